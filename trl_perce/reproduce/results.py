# SPDX-License-Identifier: Apache-2.0

"""The grid's records, and what a table takes of them: means, intervals, gains, the learning rate to show."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from .number import Number, make_number, unit


VALIDATION = ":validation"
"""End of the task's name in records of validation rows, on which learning rates are chosen. No table shows them."""

PAPER_CLIP = (0.8, 5.0)
"""The bounds of a weight in the paper (Table 7). Where a method ran with several, all tables but 12 show these."""

METHOD_LABELS = {
    "untrained": "untrained",
    "ce": "CE",
    "lossce": "LossCE",
    "entce": "EntCE",
    "perce": "PerCE",
    "perce_sequence": "PerCE (sequence)",
    "perce_swap": "PerCE (another's persona)",
    "perce_frozen": "PerCE (frozen)",
}
"""Names of the methods, in the order of the tables. Others come behind them under their own name."""

# Best of a learning rate on validation rows: the first of these that there is
_CHOICES = (("rougeL", "idxmax"), ("nll", "idxmin"))
_NO_SEED = -1
_KEYS = (
    *("model", "train_task", "task", "method", "learning_rate", "clip", "seed", "metric"),
    *("value", "interval", "rows"),
)


@dataclass(frozen=True)
class Condition:
    """
    What was trained, but for the seed. Attributes are those of a record; `clip` is a tuple.
    """

    model: str
    train_task: str | None
    method: str
    learning_rate: float | None
    clip: tuple[float, float] | None


@dataclass(frozen=True)
class Choice:
    """A learning rate, chosen on validation rows by the mean of `metric` over `seeds` seeds that all `rates` have."""

    rate: float
    metric: str
    seeds: int
    rates: list[float]


class Results:
    """
    Records of a grid, to look up.

    Args:
        records (`Iterable[dict[str, Any]]`): Flat records, as [`~trl_perce.reproduce.tables.write_tables`] takes them.
        settings (`dict[str, Any]`): The grid's YAML, for the order of `models`, `tasks` and `methods`.

    Attributes:
        models, tasks, train_tasks, methods (`list[str]`): All that there are, in the order of the YAML. Tasks are of test rows.
        conditions (`list[Condition]`): All that there are, in the order of the records.
        choices (`dict[tuple[str, str], dict[tuple, Choice]]`): (model, training task) → (method, clip) → learning rate.

    Raises:
        `ValueError`: A record lacks a key or holds what cannot be; two records are of the same run and metric.
    """

    def __init__(self, records: Iterable[dict[str, Any]], settings: dict[str, Any]):
        frame = _frame(records)
        tasks = settings.get("tasks")
        self._tasks = tasks if isinstance(tasks, dict) else {}
        self.conditions: list[Condition] = list(dict.fromkeys(frame["condition"]))
        self._groups = dict(iter(frame.groupby(["condition", "task", "metric"], sort=False)))
        self._all_metrics = {task: set(part["metric"]) for task, part in frame.groupby("task", sort=False)}
        self.models = _ordered((condition.model for condition in self.conditions), settings.get("models"))
        self.tasks = _ordered((task for task in frame["task"] if not task.endswith(VALIDATION)), settings.get("tasks"))
        methods = [*METHOD_LABELS, *(settings.get("methods") or ())]
        self.methods = _ordered((condition.method for condition in self.conditions), methods)
        tasks = [task.removesuffix(VALIDATION) for task in frame["task"]]
        trained = (condition.train_task for condition in self.conditions if condition.train_task is not None)
        self.train_tasks = _ordered(trained, [*(settings.get("tasks") or ()), *tasks])
        self.choices = {(model, task): self._choose(model, task) for model in self.models for task in self.train_tasks}

    def tasks_of(self, benchmark: str) -> list[str]:
        """Tasks whose `benchmark` in the YAML is this one."""
        return [task for task in self.tasks if self._tasks.get(task, {}).get("benchmark") == benchmark]

    def metrics(self, task: str) -> set[str]:
        """Names of the metrics that a task has."""
        return self._all_metrics[task]

    def part(self, condition: Condition, task: str, metric: str) -> pd.DataFrame | None:
        """The records, one a seed. `None` if there are none."""
        return self._groups.get((condition, task, metric))

    def values(self, condition: Condition, task: str, metric: str) -> pd.Series:
        """Value by seed, without NaN."""
        part = self.part(condition, task, metric)
        return pd.Series(dtype=float) if part is None else part.set_index("seed")["value"].dropna()

    def number(self, condition: Condition, task: str, metric: str) -> Number | None:
        """
        The figure of a condition, over its seeds.

        Args:
            condition ([`Condition`]): What was trained.
            task (`str`): What it was evaluated on.
            metric (`str`): Name in the records.

        Returns:
            [`Number`], *optional*: `None` if there are no records.
        """
        part = self.part(condition, task, metric)
        if part is None:
            return None
        valid = part.dropna(subset="value")
        has_rows = len(valid) and valid["low"].notna().all()
        return make_number(
            metric,
            "value",
            valid["value"],
            row_interval=[float(valid["low"].mean()), float(valid["high"].mean())] if has_rows else None,
            rows=[int(valid["rows"].min()), int(valid["rows"].max())] if len(valid) else [],
            without_value=len(part) - len(valid),
        )

    def gain(self, condition: Condition, baseline: Condition | None, task: str, metric: str) -> Number | None:
        """
        What a condition has over another one, over the seeds that both have: seeds are pairs. A run without a seed pairs with all.

        Args:
            condition ([`Condition`]): What was trained.
            baseline ([`Condition`], *optional*): What it is compared with.
            task (`str`): What both were evaluated on.
            metric (`str`): Name in the records.

        Returns:
            [`Number`], *optional*: Of shares the ratio of means less 1, of others the difference. `None` if nothing pairs.
        """
        if baseline is None:
            return None
        ours, base = self.values(condition, task, metric), self.values(baseline, task, metric)
        if list(base.index) == [_NO_SEED]:
            base = pd.Series(base.iloc[0], index=ours.index)
        if list(ours.index) == [_NO_SEED]:
            ours = pd.Series(ours.iloc[0], index=base.index)
        pairs = pd.concat({"ours": ours, "base": base}, axis=1, join="inner")
        if pairs.empty or (unit(metric)[0] == 100 and not pairs["base"].sum()):
            return None
        if unit(metric)[0] != 100:
            return make_number(metric, "difference", pairs["ours"] - pairs["base"])
        return make_number(metric, "gain", pairs["ours"] - pairs["base"], pairs["base"])

    def over_rates(self, conditions: Sequence[Condition], task: str, metric: str) -> dict[str, list[float]] | None:
        """
        Mean and variance over learning rates, for each seed that ran with all of them.

        Args:
            conditions (`Sequence[Condition]`): That differ in their learning rate.
            task (`str`): What they were evaluated on.
            metric (`str`): Name in the records.

        Returns:
            `dict[str, list[float]]`, *optional*: `"mean"` and `"variance"` (n − 1), one value a seed. `None` with fewer than two
            conditions, or without such a seed.
        """
        values = pd.DataFrame({item: self.values(item, task, metric) for item in conditions}).dropna()
        if len(conditions) < 2 or values.empty:
            return None
        return {"mean": values.mean(axis=1).to_list(), "variance": values.var(axis=1).to_list()}

    def shown(self, model: str, train_task: str | None, every_clip: bool = False, every_rate: bool = False):
        """
        Conditions for a table of what was trained on a task, the untrained model before them.

        Args:
            model (`str`): The model.
            train_task (`str`, *optional*): The task. `None` for the untrained model alone.
            every_clip (`bool`, *optional*, defaults to `False`): Whether all clip ranges, or the paper's where a method has it.
            every_rate (`bool`, *optional*, defaults to `False`): Whether all learning rates, or the one chosen on validation
                rows where one could be.

        Returns:
            `list[Condition]`: In the order of methods, learning rates and clip ranges.
        """
        found = [found for found in self.conditions if found.model == model and found.train_task in (None, train_task)]
        clips = {(item.train_task, item.method, item.clip) for item in found}
        choices = {} if every_rate or train_task is None else self.choices.get((model, train_task), {})

        def is_shown(item: Condition) -> bool:
            has_papers = (item.train_task, item.method, PAPER_CLIP) in clips
            choice = choices.get((item.method, item.clip))
            return (every_clip or not has_papers or item.clip == PAPER_CLIP) and (
                choice is None or item.learning_rate == choice.rate
            )

        def order(item: Condition):
            return self.methods.index(item.method), item.learning_rate or 0.0, item.clip or ()

        return sorted(filter(is_shown, found), key=order)

    def _choose(self, model: str, train_task: str) -> dict[tuple, Choice]:
        """(method, clip) → its learning rate, where all that it has ran on validation rows with a seed in common."""
        groups: dict[tuple, dict[float, Condition]] = {}
        for item in self.conditions:
            if (item.model, item.train_task) == (model, train_task) and item.learning_rate is not None:
                groups.setdefault((item.method, item.clip), {})[item.learning_rate] = item
        for metric, best in _CHOICES:
            choices = {}
            for key, items in groups.items():
                series = {rate: self.values(items[rate], train_task + VALIDATION, metric) for rate in sorted(items)}
                shared = pd.DataFrame(series).dropna()
                if len(items) > 1 and len(shared):
                    rate = getattr(shared.mean(), best)()
                    choices[key] = Choice(float(rate), metric, len(shared), [*series])
            if choices:
                return choices
        return {}


def baseline_of(condition: Condition, shown: Sequence[Condition]) -> Condition | None:
    """
    The CE run that a condition is compared with.

    Args:
        condition ([`Condition`]): Of a table.
        shown (`Sequence[Condition]`): All of the table.

    Returns:
        [`Condition`], *optional*: The table's only CE run if there is one of this method and clip range, else the one with the same
        learning rate. `None` for CE itself, and where there is no such run.
    """
    baselines = [item for item in shown if item.method == "ce"]
    if condition.method == "ce" or not baselines:
        return None
    same = [item for item in shown if (item.method, item.clip) == (condition.method, condition.clip)]
    if len(baselines) == len(same) == 1:
        return baselines[0]
    return next((item for item in baselines if item.learning_rate == condition.learning_rate), None)


def _ordered(found: Iterable[str], wanted: Iterable[str] | None) -> list[str]:
    found = dict.fromkeys(found)
    names = [name for name in wanted or () if isinstance(name, str) and name in found]
    return list(dict.fromkeys([*names, *found]))


def _frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    lines = [_line(index, record) for index, record in enumerate(records)]
    names = ["condition", "task", "metric", "seed", "value", "low", "high", "rows"]
    frame = pd.DataFrame(lines, columns=names).astype({"value": float, "low": float, "high": float})
    twice = frame.duplicated(names[:4], keep="first")
    if twice.any():
        index = int(twice.to_numpy().argmax())
        line = frame.iloc[index]
        raise ValueError(
            f"Record {index}: there is another one of {line['metric']!r} on {line['task']!r} with the same seed of "
            f"{line['condition']}. Each run has a metric once; take the old record out."
        )
    return frame


def _line(index: int, record: dict[str, Any]) -> tuple:
    missing = [key for key in _KEYS if key not in record]
    if missing:
        raise ValueError(f"Record {index} has no {', '.join(map(repr, missing))}. A record has {', '.join(_KEYS)}.")
    value, interval, clip = record["value"], record["interval"], record["clip"]
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise ValueError(f"Record {index}: `value` is {value!r}. Write a number, or NaN where there is none.")
    for name, pair in (("interval", interval), ("clip", clip)):
        if pair is not None and (len(pair) != 2 or pair[0] > pair[1]):
            raise ValueError(f"Record {index}: `{name}` is {pair!r}. Write [low, high], or null.")
    low, high = (math.nan, math.nan) if interval is None else interval
    rate = record["learning_rate"]
    condition = Condition(
        model=record["model"],
        train_task=record["train_task"],
        method=record["method"],
        learning_rate=None if rate is None else float(rate),
        clip=None if clip is None else (float(clip[0]), float(clip[1])),
    )
    seed = _NO_SEED if record["seed"] is None else record["seed"]
    return condition, record["task"], record["metric"], seed, value, low, high, record["rows"]
