# SPDX-License-Identifier: Apache-2.0

"""What a comparison has found: figures of each arm, their differences with intervals, answers and cost, as `report.json` holds them."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..reproduce.measures import MEASURES, Measure, Values, mean_of, read_values
from ..reproduce.results import METHOD_LABELS
from ..reproduce.settings import IRRELEVANT, OWN, Cell
from ..reproduce.steps import Steps
from .settings import BASELINE
from .verdict import decide


UNTRAINED = "untrained"
GROUPS = {
    "use": "Does it use the persona?",
    "lost": "What was lost?",
    "irrelevant": "Questions to which the persona does not matter",
    "options": "Which of the options does it choose?",
    "answers": "The answers",
}


def make_findings(
    steps: Steps, settings: Sequence[tuple[str, str]], notes: Sequence[str], answers: list[dict[str, Any]], rule: str
) -> dict[str, Any]:
    """
    Everything that the report shows.

    Args:
        steps ([`~trl_perce.reproduce.steps.Steps`]): Of the grid, all done.
        settings (`Sequence[tuple[str, str]]`): Name and value of what identifies the comparison.
        notes (`Sequence[str]`): About the data.
        answers (`list[dict]`): From [`~answers.read_answers`].
        rule (`str`): How they were chosen.

    Returns:
        `dict[str, Any]`: What `report.json` holds: `"settings"`, `"data"`, `"arms"`, `"labels"`, `"baseline"`, `"verdict"`
            ([`~verdict.decide`]), `"groups"`, `"measures"`, `"answers"`, `"threshold"`, `"answers_rule"` and `"cost"`.
    """
    (model,) = steps.settings.models
    arms: dict[str, list[Mapping[str, Path]]] = {
        UNTRAINED: [{task: parts[0].folder for (_, task), parts in steps.untrained.items()}]
    }
    for cell in steps.train:
        arms.setdefault(cell.method, []).append(
            {task: parts[0].folder for task, parts in steps.evaluations_of(cell).items()}
        )
    read = {
        arm: [{task: read_values(folder) for task, folder in seed.items()} for seed in own]
        for arm, own in arms.items()
    }
    values = {arm: [{task: own for task, (own, _) in seed.items()} for seed in seeds] for arm, seeds in read.items()}
    users = {task: own for task, (_, own) in read[UNTRAINED][0].items()}
    shown = [measure for measure in MEASURES if measure.group]
    measures = [found for measure in shown if (found := _measured(measure, values, users)) is not None]
    labels = {arm: METHOD_LABELS.get(arm, arm) for arm in arms}
    with_persona = {
        user for user, own in zip(users[OWN], values[UNTRAINED][0][OWN]["has_persona"], strict=True) if own
    }
    data = {
        "train_rows": steps.settings.tasks[OWN].train_rows,
        "test_rows": len(users[OWN]),
        "test_users": len(with_persona),
        "predicted_rows": int(np.isfinite(values[UNTRAINED][0][OWN]["num_tokens"]).sum()),
        "irrelevant_rows": len(users.get(IRRELEVANT, ())),
        "notes": [*notes],
    }
    cost = _cost(steps)
    return {
        "settings": [[name, value] for name, value in (*settings, ("versions", _versions()))],
        "data": data,
        "arms": [*arms],
        "labels": labels,
        "baseline": BASELINE,
        "verdict": decide(measures, labels, BASELINE, len(with_persona), len(steps.settings.seeds), cost),
        "groups": [
            {"key": key, "title": title}
            for key, title in GROUPS.items()
            if any(one["group"] == key for one in measures)
        ],
        "measures": measures,
        "answers": answers,
        "threshold": 1.0,
        "answers_rule": rule,
        "cost": cost,
    }


def _measured(
    measure: Measure, values: Mapping[str, list[dict[str, Values]]], users: Mapping[str, list[str]]
) -> dict[str, Any] | None:
    """A measure of all arms, and its change from arm to arm; `None` where an arm has it not."""
    by_arm: dict[str, np.ndarray] = {}
    for arm, seeds in values.items():
        found = [own for seed in seeds if (own := measure.of(seed.get(measure.kind, {}))) is not None]
        if len(found) < len(seeds):
            return None
        by_arm[arm] = np.stack(found)
    where = np.isfinite(np.concatenate([*by_arm.values()])).all(0)
    if not where.any():
        return None
    groups = [user for user, is_there in zip(users[measure.kind], where, strict=True) if is_there]
    by_arm = {arm: own[:, where] for arm, own in by_arm.items()}
    changes = {}
    for arm, own in by_arm.items():
        against = UNTRAINED if arm == BASELINE else BASELINE
        if arm != UNTRAINED:
            mean, interval = mean_of(own - by_arm[against], groups)
            changes[arm] = {"against": against, "difference": mean, "interval": interval}
    return {
        **{name: getattr(measure, name) for name in ("name", "group", "title", "unit", "note", "better", "same")},
        **{"rows": int(where.sum()), "users": len({*groups})},
        "arms": {
            arm: dict(zip(("mean", "interval"), mean_of(own, groups), strict=True)) for arm, own in by_arm.items()
        },
        "changes": changes,
    }


def _cost(steps: Steps) -> dict[str, Any]:
    """Seconds and memory of the trainings, one value a seed."""
    cost: dict[str, Any] = {}
    for cell, step in steps.train.items():
        result = step.result or {}
        own = cost.setdefault(cell.method, {"train_seconds": [], "peak_memory": None})
        own["train_seconds"].append(result.get("train_runtime", step.seconds))
        memory = result.get("peak_memory")
        if memory and (own["peak_memory"] is None or memory["bytes"] > own["peak_memory"]["bytes"]):
            own["peak_memory"] = memory
    return cost


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("trl_perce", "trl", "transformers", "torch"))


def first_seed(steps: Steps) -> dict[str, Cell]:
    """Of each method, its run with the first seed."""
    first: dict[str, Cell] = {}
    for cell in steps.train:
        first.setdefault(cell.method, cell)
    return first
