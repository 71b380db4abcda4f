# SPDX-License-Identifier: Apache-2.0

"""What a comparison has found: figures of each arm, their differences with intervals, answers and cost, as `report.json` holds them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.likelihood import ratio_values
from ..reproduce.results import METHOD_LABELS
from ..reproduce.settings import Cell
from ..reproduce.steps import Steps
from ..scoring.score_file import read_scores
from ..utils.files import read_lines
from ..utils.statistics import bootstrap_interval, mean_over_seeds
from .settings import BASELINE, IRRELEVANT, OWN, SEEN
from .verdict import SAME, decide


UNTRAINED = "untrained"
GROUPS = {
    "use": "Does it use the persona?",
    "lost": "What was lost?",
    "irrelevant": "Questions to which the persona does not matter",
    "options": "Which of the options does it choose?",
    "answers": "The answers",
}
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Measure:
    """
    A figure of each arm.

    Parameters:
        name (`str`): Its key in the report.
        task (`str`): The rows that it is of.
        group (`str`): Of [`GROUPS`].
        title (`str`): For people.
        unit (`str`): `"nats"` (a token), `"share"`, `"words"`, `"tokens"` or `"score"`.
        note (`str`): What it is, in a sentence.
        better (`str`, *optional*): `"higher"` or `"lower"`; `None` where neither is.
        values (`Callable`, *optional*): Makes the rows' values of those of an evaluation. By default those of the name.
        same (`float`, *optional*, defaults to `0.0`): A change whose interval is within it, in the unit, to either side, counts as none.
    """

    name: str
    task: str
    group: str
    title: str
    unit: str
    note: str
    better: str | None
    values: Callable[[Values], np.ndarray | None] | None = None
    same: float = 0.0

    def of(self, found: Values) -> np.ndarray | None:
        return found.get(self.name) if self.values is None else self.values(found)


def _difference(of: str, less: str) -> Callable[[Values], np.ndarray | None]:
    return lambda found: found[of] - found[less] if of in found and less in found else None


def _share(of: str) -> Callable[[Values], np.ndarray | None]:
    return lambda found: np.where(np.isnan(found[of]), np.nan, found[of] > 0) if of in found else None


def _excess(of: str, less: str) -> Callable[[Values], np.ndarray | None]:
    def values(found: Values) -> np.ndarray | None:
        own, other = (_share(name)(found) for name in (of, less))
        return None if own is None or other is None else own - other

    return values


def _renamed(name: str) -> Callable[[Values], np.ndarray | None]:
    return lambda found: found.get(name)


PERSONAL, OTHER, GAIN = "log_likelihood/personal", "log_likelihood/other", "gain/personal"
MEASURES = (
    Measure(
        PERSONAL,
        *(OWN, "use", "Personal tokens", "nats"),
        "Log-likelihood of the tokens of your users' own replies that depend on the persona, a token.",
        "higher",
    ),
    Measure(
        GAIN,
        *(OWN, "use", "… over another's persona", "nats"),
        "How much likelier a personal token is with the user's own persona than with another user's.",
        "higher",
        _difference(PERSONAL, f"{PERSONAL}_swapped"),
    ),
    Measure(
        "uptake/own",
        *(OWN, "use", "Words of the persona", "words"),
        "Content words of the user's persona in an answer that the prompt has not.",
        "higher",
    ),
    Measure(
        "uptake/other",
        *(OWN, "use", "… of another's, by chance", "words"),
        "Content words of another user's persona in the same answers.",
        None,
    ),
    Measure(
        OTHER,
        *(OWN, "lost", "Other tokens", "nats"),
        "Log-likelihood of all other tokens of your users' own replies, a token.",
        "higher",
        same=SAME,
    ),
    Measure(
        f"{PERSONAL}_swapped",
        *(OWN, "lost", "Personal, another's persona", "nats"),
        "The personal tokens, where the prompt has another user's persona: what is likelier here needs no persona.",
        None,
    ),
    Measure(
        f"{PERSONAL}_without",
        *(OWN, "lost", "Personal, no persona", "nats"),
        "The personal tokens, where the prompt has no persona at all.",
        None,
    ),
    Measure(
        "leak",
        *(SEEN, "lost", "… of users trained on", "nats"),
        "The same of users in the training data: higher than before means that the adapter tells of them from memory.",
        "lower",
        _renamed(f"{PERSONAL}_without"),
    ),
    Measure(
        "irrelevant/share",
        *(IRRELEVANT, "irrelevant", "Answers with persona words", "share"),
        "Share of the answers with a word of the persona, less the share with a word of another user's, which is chance.",
        "lower",
        _excess("uptake/own", "uptake/other"),
    ),
    Measure(
        "irrelevant/pir",
        *(IRRELEVANT, "irrelevant", "The persona shifts a token by", "nats"),
        "Mean of |PIR| over the tokens of the right answer, which is the same for everybody.",
        "lower",
        _renamed("pir/absolute"),
        same=SAME,
    ),
    Measure(
        "irrelevant/log_likelihood",
        *(IRRELEVANT, "irrelevant", "The right answer", "nats"),
        "Log-likelihood of the right answer, a token.",
        "higher",
        _renamed("log_likelihood/all"),
    ),
    Measure(
        "options/likelihood",
        *(OWN, "options", "The right one is likeliest", "share"),
        "Share of rows whose right option has the highest mean log-likelihood a token.",
        "higher",
    ),
    Measure(
        "options/pir",
        *(OWN, "options", "The right one gains most", "share"),
        "Share of rows whose right option gains the most from the persona (sum of PIR).",
        "higher",
    ),
    Measure(
        "options/swapped",
        *(OWN, "options", "… likeliest, another's persona", "share"),
        "Share of rows whose option is the likeliest where the prompt has another user's persona: chance.",
        None,
    ),
    Measure(
        "rougeL",
        *(OWN, "answers", "ROUGE-L", "score"),
        "Overlap of an answer with the user's own reply; says little where there are many good replies.",
        "higher",
    ),
    Measure("num_tokens", *(OWN, "answers", "Length", "tokens"), "Generated tokens of an answer.", None),
    Measure("finished", *(OWN, "answers", "Ended by itself", "share"), "Share that ended before the limit.", None),
)


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
    read = {arm: [{task: _read(folder) for task, folder in seed.items()} for seed in own] for arm, own in arms.items()}
    values = {arm: [{task: own for task, (own, _) in seed.items()} for seed in seeds] for arm, seeds in read.items()}
    users = {task: own for task, (_, own) in read[UNTRAINED][0].items()}
    measures = [found for measure in MEASURES if (found := _measured(measure, values, users)) is not None]
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


def _read(folder: Path) -> tuple[Values, list[str]]:
    """
    The values of an evaluation's rows, NaN where a row has none, with those that only its scores tell; and the user of each row: by name,
    else by the persona's text, else the row alone.
    """
    lines = [*read_lines(folder / "metrics.jsonl")]
    names = [name for name in lines[0] if name not in ("row", "id", "user")]
    values = {name: np.array([line[name] for line in lines], dtype=float) for name in names}
    scores = [*read_scores(folder / "scores")]
    sums, counts, gains, paired = ([] for _ in range(4))
    for row in scores:
        has_pir = np.isfinite(row.pir)
        sums.append(row.log_probs.sum(dtype=np.float64))
        counts.append(len(row.log_probs))
        gains.append(np.abs(row.pir[has_pir]).sum(dtype=np.float64))
        paired.append(has_pir.sum())
    values["log_likelihood/all"] = ratio_values(np.array(sums), np.array(counts))
    values["pir/absolute"] = ratio_values(np.array(gains), np.array(paired))
    values["has_persona"] = np.array(paired) > 0
    values.setdefault("num_tokens", np.full(len(lines), np.nan))
    users = [line["user"] or row.persona or f"row {row.row}" for line, row in zip(lines, scores, strict=True)]
    return values, users


def _measured(
    measure: Measure, values: Mapping[str, list[dict[str, Values]]], users: Mapping[str, list[str]]
) -> dict[str, Any] | None:
    """A measure of all arms, and its change from arm to arm; `None` where an arm has it not."""
    by_arm: dict[str, np.ndarray] = {}
    for arm, seeds in values.items():
        found = [own for seed in seeds if (own := measure.of(seed.get(measure.task, {}))) is not None]
        if len(found) < len(seeds):
            return None
        by_arm[arm] = np.stack(found)
    where = np.isfinite(np.concatenate([*by_arm.values()])).all(0)
    if not where.any():
        return None
    groups = [user for user, is_there in zip(users[measure.task], where, strict=True) if is_there]
    by_arm = {arm: own[:, where] for arm, own in by_arm.items()}
    changes = {}
    for arm, own in by_arm.items():
        against = UNTRAINED if arm == BASELINE else BASELINE
        if arm != UNTRAINED:
            mean, interval = _mean(own - by_arm[against], groups)
            changes[arm] = {"against": against, "difference": mean, "interval": interval}
    return {
        **{name: getattr(measure, name) for name in ("name", "group", "title", "unit", "note", "better", "same")},
        **{"rows": int(where.sum()), "users": len({*groups})},
        "arms": {arm: dict(zip(("mean", "interval"), _mean(own, groups), strict=True)) for arm, own in by_arm.items()},
        "changes": changes,
    }


def _mean(values: np.ndarray, groups: Sequence[str]) -> tuple[float, list[float] | None]:
    """Mean over seeds and rows, and its 95 % interval: over new users, and with two or more seeds over new seeds, too."""
    found = (
        mean_over_seeds([*values], groups)["interval"] if len(values) > 1 else bootstrap_interval(values[0], groups)
    )
    return float(values.mean()), None if found is None else list(found)


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
