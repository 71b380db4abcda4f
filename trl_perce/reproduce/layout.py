# SPDX-License-Identifier: Apache-2.0

"""What stands in which of the paper's tables: the grid's results as lines of cells."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..utils.markdown import code, escape
from .number import METRIC_LABELS, Number, Quoted, make_number, rate_text, unit
from .results import METHOD_LABELS, VALIDATION, Condition, Results, baseline_of


_OVERLAP, _USE = ("rougeL", "meteor"), ("log_likelihood/personal", "log_likelihood/other", "uptake")
_SWAPPED = (
    *("log_likelihood/personal", "log_likelihood/personal_swapped", "uptake", "uptake_swapped"),
    *("uptake_of_swapped", "uptake_chance", "personal_fraction"),
)
_LENGTHS = {"tokens/with_persona": "prompt_tokens_with_persona", "tokens/without_persona": "prompt_tokens_without_persona"}  # fmt: skip
_LAST_ROUNDS = range(6, 11)


@dataclass
class Part:
    """Part of a table: lines of column → cell, all with the same columns. A cell is a figure, a text, an `int` or `None`."""

    title: str
    lines: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """Those that have something in a line."""
        return [name for name in self.lines[0] if any(line[name] is not None for line in self.lines)]


def make_tables(
    results: Results, settings: dict[str, Any], quoted: Callable[..., float | None] | None = None
) -> dict[int, list[Part]]:
    """
    All tables.

    Args:
        results ([`Results`]): Of the grid.
        settings (`dict[str, Any]`): Its YAML.
        quoted (`Callable`, *optional*): As in [`write_tables`].

    Returns:
        `dict[int, list[Part]]`: Number of the table → its parts; none where nothing was run.
    """
    return _Maker(results, settings, quoted).tables()


class _Maker:
    def __init__(self, results: Results, settings: dict[str, Any], quoted):
        self.results, self.settings = results, settings
        self.quoted = quoted or (lambda **cell: None)

    def tables(self) -> dict[int, list[Part]]:
        main, others = self.results.models[:1], self.results.models[1:]
        of_benchmark = self.results.tasks_of
        lamp = of_benchmark("lamp")
        own = [
            task
            for task in self.results.tasks
            if task not in {*lamp, *of_benchmark("general_qa"), *of_benchmark("aloe")}
        ]
        made = {
            1: self.methods(1, own, (*_OVERLAP, *_USE), _OVERLAP) + self.swapped(own) + self.training(own),
            2: self.learning_rates(own),
            3: self.transfer(3, main),
            4: self.aloe(4, main),
            5: self.methods(5, lamp, ("rouge1", "rougeL", *_USE), ("rouge1", "rougeL")),
            6: self.lengths(),
            7: self.hyperparameters(),
            8: self.transfer(8, others),
            9: self.aloe(9, others),
            10: self.judge(),
            11: self.general_qa(),
            12: self.clip_ranges(own),
        }  # fmt: skip
        return {number: [part for part in parts if part.lines] for number, parts in made.items()}

    # Lines and cells

    def paper(self, number: int, metric: str, condition: Condition | None = None, task: str | None = None, **cell):
        if condition is not None:
            cell |= {"model": condition.model, "train_task": condition.train_task, "method": condition.method}
        value = self.quoted(table=number, metric=metric, task=task, **cell)
        digits = None if number == 7 else 1 if number == 6 or metric.endswith("_gain") else unit(metric)[1]
        return None if value is None else Quoted(value, digits)

    def line(self, number, condition, task, metrics, shown, compared=(), quoted=(), **cell) -> dict[str, Any] | None:
        """One line of a condition. `None` if it has none of the metrics."""
        line: dict[str, Any] = _names(condition)
        baseline = baseline_of(condition, shown)
        for metric in metrics:
            label = METRIC_LABELS.get(metric, escape(metric))
            line[label] = self.results.number(condition, task, metric)
            if metric in quoted:
                line[f"{label}, paper"] = self.paper(number, metric, condition, task, **cell)
            if metric in compared:
                line[f"{label} over CE"] = self.results.gain(condition, baseline, task, metric)
            if metric in compared and metric in quoted:
                line[f"{label} over CE, paper"] = self.paper(number, f"{metric}_gain", condition, task, **cell)
        found = [cell for cell in line.values() if isinstance(cell, Number) and cell.kind == "value"]
        return {**line, **_runs(found)} if found else None

    def lines(self, number, shown, task, metrics, **options) -> list[dict[str, Any]]:
        lines = (self.line(number, condition, task, metrics, shown, **options) for condition in shown)
        return [line for line in lines if line is not None]

    def cells(self, tasks: list[str]):
        """Model and task, for tables of what was trained on the task that it is tested on."""
        return [(model, task) for model in self.results.models for task in tasks]

    def everything(self, model: str) -> list[Condition]:
        """All conditions of a model to show, of all training tasks; the untrained model once."""
        results = self.results
        return list(
            dict.fromkeys(item for task in (None, *results.train_tasks) for item in results.shown(model, task))
        )

    def rate_notes(self, model: str, task: str) -> list[str]:
        """How the learning rates of a table came about."""
        shown, choices = self.results.shown(model, task), self.results.choices.get((model, task), {})
        chosen: dict[str, list[str]] = {}
        for item in shown:
            choice = choices.get((item.method, item.clip))
            if choice is not None:
                how = "highest mean ROUGE-L" if choice.metric == "rougeL" else "lowest mean loss"
                how = f"Of {', '.join(map(rate_text, choice.rates))} the one with the {how} over {choice.seeds} seeds"
                chosen.setdefault(how, []).append(f"{_method(item.method)} {rate_text(choice.rate)}")
        notes = [f"{how} on validation rows: {', '.join(names)}." for how, names in chosen.items()]
        several = [item.method for item in shown if (item.method, item.clip) not in choices]
        several = [method for method in self.results.methods if several.count(method) > 1]
        if several:
            notes.append(
                f"{', '.join(map(_method, several))}: each learning rate in its own line, since not all of them have records of "
                f"{code(task + VALIDATION)}; none is chosen on test rows."
            )
        return notes

    # Tables

    def methods(self, number: int, tasks: list[str], metrics, quoted) -> list[Part]:
        parts = []
        for model, task in self.cells(tasks):
            lines = self.lines(number, self.results.shown(model, task), task, metrics, compared=metrics, quoted=quoted)
            parts.append(Part(f"{code(model)} on {code(task)}", lines, self.rate_notes(model, task)))
        return parts

    def swapped(self, tasks: list[str]) -> list[Part]:
        notes = [
            "*right persona*: that of the row's own user; *swapped*: with another user's persona in the prompt; *by chance*: words of a "
            "persona that was not in the prompt. A model that uses the right persona, and does not merely say what fits anyone, has more "
            "of it than by chance, and less of it once it is swapped out."
        ]
        parts = []
        for model, task in self.cells(tasks):
            if self.results.metrics(task) & {"log_likelihood/personal_swapped", "uptake_swapped", "uptake_of_swapped"}:
                lines = self.lines(1, self.results.shown(model, task), task, _SWAPPED)
                parts.append(Part(f"{code(model)} on {code(task)}: whose persona is it?", lines, notes))
        return parts

    def training(self, tasks: list[str]) -> list[Part]:
        parts = []
        for model, task in self.cells(tasks):
            metrics = sorted(metric for metric in self.results.metrics(task) if metric.startswith("train/"))
            lines = self.lines(1, self.results.shown(model, task), task, metrics)
            parts.append(Part(f"{code(model)} on {code(task)}: what training logged", lines))
        return parts

    def learning_rates(self, tasks: list[str]) -> list[Part]:
        parts = []
        for model, task in self.cells(tasks):
            shown = [item for item in self.results.shown(model, task, every_rate=True) if item.train_task is not None]
            for metric in (*_OVERLAP, "log_likelihood/personal", "uptake"):
                parts.append(self.rates_of_metric(model, task, metric, shown))
        return [part for part in parts if part is not None]

    def rates_of_metric(self, model, task, metric, shown) -> Part | None:
        rows: dict[tuple, dict[float, Condition]] = {}
        for item in shown:
            if self.results.number(item, task, metric) is not None:
                rows.setdefault((item.method, item.clip), {})[item.learning_rate] = item
        rates = sorted({rate for row in rows.values() for rate in row})
        if len(rates) < 2:
            return None
        shared = [rate for rate in rates if all(rate in row for row in rows.values())]
        lines = []
        for row in rows.values():
            any_item = next(iter(row.values()))
            line = {name: cell for name, cell in _names(any_item).items() if name != "learning rate"}
            for rate in rates:
                line[rate_text(rate)] = self.results.number(row[rate], task, metric) if rate in row else None
                line[f"{rate_text(rate)}, paper"] = self.paper(2, metric, any_item, task, learning_rate=rate)
            runs = _runs([cell for cell in line.values() if isinstance(cell, Number)])
            over = self.results.over_rates([row[rate] for rate in shared], task, metric)
            for name in ("mean", "variance"):
                line[name] = over and make_number(metric, "value" if name == "mean" else name, over[name])
                line[f"{name}, paper"] = self.paper(2, f"{metric}_{name}", any_item, task)
            lines.append({**line, **runs})
        names = ", ".join(map(rate_text, shared))
        note = (
            f"Mean and variance (n − 1) over the {len(shared)} learning rates that all methods have ({names}), for each seed that "
            "ran with all of them, then the mean over these seeds."
            if len(shared) > 1
            else "No mean or variance: the methods share fewer than two learning rates."
        )
        return Part(f"{METRIC_LABELS[metric]}: {code(model)} on {code(task)}", lines, [note])

    def transfer(self, number: int, models: list[str]) -> list[Part]:
        parts = []
        for model in models:
            shown = self.everything(model)
            tasks = [task for task in self.results.tasks if task not in self.results.tasks_of("general_qa")]
            for metric in (*_OVERLAP, "log_likelihood/personal", "uptake"):
                parts.append(self.matrix(number, model, metric, shown, tasks))
        return parts

    def matrix(self, number, model, metric, shown, tasks) -> Part:
        lines, crossed = [], False
        tasks = [task for task in tasks if any(self.results.number(item, task, metric) for item in shown)]
        for method in self.results.methods:
            for item in (item for item in shown if item.method == method):
                line = {"method": _method(method), "trained on": _task(item.train_task), **_names(item)}
                for task in tasks:
                    line[code(task)] = self.results.number(item, task, metric)
                    line[f"{code(task)}, paper"] = self.paper(number, metric, item, task)
                    crossed |= line[code(task)] is not None and item.train_task not in (None, task)
                found = [cell for cell in line.values() if isinstance(cell, Number)]
                lines += [{**line, **_runs(found)}] if found else []
        note = "Lines are what was trained on, columns what was tested."
        return Part(f"{METRIC_LABELS[metric]}: {code(model)}", lines if crossed else [], [note])

    def across(self, number: int, models, tasks, metrics, quoted=None) -> list[Part]:
        """Lines of everything that was trained, for tasks that are only tested."""
        parts = []
        for model in models:
            for task in tasks:
                shown, lines = self.everything(model), []
                for item in shown:
                    line = self.line(number, item, task, metrics, shown, quoted=metrics if quoted is None else quoted)
                    if line is not None:
                        lines.append({"method": None, "trained on": _task(item.train_task)} | line)
                parts.append(Part(f"{code(model)} on {code(task)}", lines))
        return parts

    def aloe(self, number: int, models: list[str]) -> list[Part]:
        metrics = [*(f"alignment@{k}" for k in _LAST_ROUNDS), "alignment@6-10", "n_ir"]
        tasks = [task for task in self.results.tasks if self.results.metrics(task) & set(metrics)]
        return self.across(number, models, tasks, metrics)

    def judge(self) -> list[Part]:
        parts = []
        for model, task in self.cells(self.results.tasks):
            metrics = sorted(metric for metric in self.results.metrics(task) if metric.startswith("judge/"))
            metrics.sort(key=lambda metric: metric != "judge/personalization")
            if metrics:
                lines = self.lines(10, self.results.shown(model, task), task, metrics, quoted=metrics)
                parts.append(Part(f"{code(model)} on {code(task)}", lines, self.rate_notes(model, task)))
        return parts

    def general_qa(self) -> list[Part]:
        tasks = [task for task in self.results.tasks if self.results.metrics(task) & {"em", "f1"}]
        return self.across(11, self.results.models, tasks, ("em", "f1"))

    def lengths(self) -> list[Part]:
        parts = []
        for model in self.results.models:
            lines = []
            for task in self.results.tasks:
                line: dict[str, Any] = {"task": code(task)}
                for metric, name in _LENGTHS.items():
                    line[METRIC_LABELS[metric]] = self.any_number(model, task, metric)
                    line[f"{METRIC_LABELS[metric]}, paper"] = self.paper(6, name, task=task)
                found = [cell for cell in line.values() if isinstance(cell, Number)]
                if found:
                    lines.append({**line, "rows": _runs(found)["rows"]})
            parts.append(Part(f"Tokens of {code(model)}, mean over rows", lines))
        return parts

    def any_number(self, model: str, task: str, metric: str) -> Number | None:
        """Of what training does not change."""
        items = (item for item in self.results.conditions if item.model == model)
        return next(filter(None, (self.results.number(item, task, metric) for item in items)), None)

    def hyperparameters(self) -> list[Part]:
        lines = []
        for name, value in _flat(self.settings):
            paper = self.paper(7, name.split(".")[-1])
            lines.append({"setting": code(name), "ours": code(json.dumps(value, ensure_ascii=False)), "paper": paper})
        return [Part("Of the grid, as in its YAML", lines)]

    def clip_ranges(self, tasks: list[str]) -> list[Part]:
        parts, metrics = [], (*_OVERLAP, *_USE, "train/weight/mean")
        for model, task in self.cells(tasks):
            shown = self.results.shown(model, task, every_clip=True)
            swept = {
                item.method
                for item in shown
                if len({other.clip for other in shown if other.method == item.method}) > 1
            }
            lines: list[dict[str, Any]] = []
            for item in (item for item in shown if item.method in swept or item.method == "ce"):
                options = {"compared": _OVERLAP, "quoted": _OVERLAP, "clip": item.clip}
                lines += filter(None, [self.line(12, item, task, metrics, shown, **options)])
            parts.append(Part(f"{code(model)} on {code(task)}", lines if swept else [], self.rate_notes(model, task)))
        return parts


def _method(name: str) -> str:
    return METHOD_LABELS.get(name) or code(name)


def _task(name: str | None) -> str:
    return "nothing" if name is None else code(name)


def _names(condition: Condition) -> dict[str, Any]:
    rate, clip = condition.learning_rate, condition.clip
    return {
        "method": _method(condition.method),
        "learning rate": None if rate is None else rate_text(rate),
        "clip": None if clip is None or condition.method == "ce" else f"{clip[0]:g} to {clip[1]:g}",
    }


def _runs(found: list[Number]) -> dict[str, Any]:
    """Fewest and most seeds and rows of a line's figures."""
    rows = [count for number in found for count in number.rows if count]  # what training logs has none
    return {"seeds": _span([number.seeds for number in found]), "rows": _span(rows)}


def _span(counts: list[int]) -> int | str | None:
    if not counts:
        return None
    low, high = min(counts), max(counts)
    return low if low == high else f"{low:,} to {high:,}"


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
