# SPDX-License-Identifier: Apache-2.0

"""What a grid's steps have found, as flat records of which the tables are made."""

from typing import Any

from .grid import Step
from .settings import Cell
from .steps import Steps


# Names in an evaluation's `metrics.json` → names in the tables
_NAMES = {
    "uptake/own": "uptake",
    "uptake/other": "uptake_chance",
    "swapped/uptake/own": "uptake_swapped",
    "swapped/uptake/other": "uptake_of_swapped",
}
# What a training run logs and a table may show: means over the run
_LOGGED = (
    "nll",
    "pir/mean",
    "pir/personal_fraction",
    "weight/mean",
    "weight/at_min",
    "weight/at_max",
    "train_runtime",
)


def make_records(steps: Steps) -> list[dict[str, Any]]:
    """
    Records of the steps that are done.

    Args:
        steps ([`Steps`]): The grid's.

    Returns:
        `list[dict[str, Any]]`: One figure of one run each, as [`~reproduce.tables.write_tables`] takes them.
    """
    records = []
    for (model, task), own in steps.untrained.items():
        if steps.settings.tasks[task].of is not None:  # no task of the paper: `compare.py` has them
            continue
        condition = {"model": model, "train_task": None, "task": task, "method": "untrained"}
        condition |= {"learning_rate": None, "clip": None, "seed": None}
        records += _evaluated(condition, own)
    for cell, step in steps.train.items():
        records += _trained(_condition(cell), step)
    for (cell, task), own in steps.evaluate.items():
        if steps.settings.tasks[task].of is not None:
            continue
        condition = _condition(cell) | {"task": task}
        records += _evaluated(condition, own)
    return records


def _condition(cell: Cell) -> dict[str, Any]:
    return {
        **{"model": cell.model, "train_task": cell.task, "task": cell.task, "method": cell.method},
        **{"learning_rate": cell.learning_rate, "clip": list(cell.clip), "seed": cell.seed},
    }


def _trained(condition: dict[str, Any], step: Step) -> list[dict[str, Any]]:
    if step.result is None:
        return []
    records = [
        {**condition, "metric": f"train/{name}", "value": step.result[name], "interval": None, "rows": 0}
        for name in _LOGGED
        if name in step.result
    ]
    # Without weights the loss is `nll` itself
    nll = step.result.get("eval_nll", step.result.get("eval_loss"))
    if nll is not None:
        validation = {
            "task": f"{condition['task']}:validation",
            "metric": "nll",
            "value": nll,
            "interval": None,
            "rows": 0,
        }
        records.append(condition | validation)
    return records


def _evaluated(condition: dict[str, Any], steps: list[Step]) -> list[dict[str, Any]]:
    # The judge's result holds that of the evaluation before it, too
    result = next((step.result for step in reversed(steps) if step.result is not None), None)
    if result is None:
        return []
    if "rounds" in result:
        from ..benchmarks.aloe_metrics import aloe_records

        run = {name: value for name, value in condition.items() if name != "task"}
        return [record | {"task": condition["task"]} for record in aloe_records(result, **run)]
    records = []
    for name, found in result["metrics"].items():
        value = float("nan") if found["mean"] is None else found["mean"]
        figure = {"value": value, "interval": found["interval"], "rows": found["rows"]}
        records.append({**condition, "metric": _NAMES.get(name, name), **figure})
    lengths = result.get("prompt_lengths")
    if lengths:
        records += [
            {
                **condition,
                "metric": f"tokens/{name}",
                "value": lengths[name],
                "interval": None,
                "rows": lengths["rows"],
            }
            for name in ("with_persona", "without_persona")
        ]
    return records
