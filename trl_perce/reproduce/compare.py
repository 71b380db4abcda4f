# SPDX-License-Identifier: Apache-2.0

"""Methods against CE, row by row and seed by seed: the differences that the tables' separate intervals cannot tell."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.files import write_text
from ..utils.markdown import table
from .grid import Step
from .measures import MEASURES, Measure, Values, mean_of, read_values
from .settings import IRRELEVANT, Cell, Settings
from .steps import Steps


# Values of the rows of an evaluation, and their users
Evaluation = tuple[Values, list[str]]
# (method, learning rate, bounds, seeds) → metric → comparison
Runs = dict[tuple, dict[str, dict[str, Any]]]
_EXPLANATION = """\
Of the untrained model and of {baseline} means; of other methods the mean difference to {baseline} over the same test rows, and its 95 %
interval. With two or more seeds the interval is for new seeds and new users (crossed random effects: `utils.statistics.mean_over_seeds`);
with one seed it is for new users alone, and says nothing of other seeds. **Bold**: the interval does not hold 0. One in twenty would be
bold by chance."""
_CAPTION = """\
Differences of log-likelihood to {baseline} over the same test rows, with 95 % intervals; {baseline} is at 0, 0. Up and right is better. Hollow
marks are methods without weights, trained at another rate or for longer: what is above them is more than a larger step does."""


def compare_methods(steps: Steps, baseline: str = "ce") -> list[dict[str, Any]]:
    """
    Differences between each method and a baseline that was trained alike: same model, task, learning rate and seeds. A method with a
    learning rate or bounds of its own is compared with the baseline at the grid's, a baseline with such with all methods.

    Args:
        steps ([`Steps`]): The grid's.
        baseline (`str`, *optional*, defaults to `"ce"`): Name of the method that the others are compared with.

    Returns:
        `list[dict[str, Any]]`: `"model"`, `"train_task"`, `"task"`, `"method"`, `"learning_rate"`, `"clip"`, `"metric"`, `"seeds"`,
            `"rows"`, `"mean"` and `"baseline"` (means over rows and seeds), `"difference"` and `"interval"`. Of the untrained model and of
            the baseline itself the last three are `None`.
    """
    # (run without its seed, evaluated task) → seed → its rows
    evaluations: dict[tuple[Cell, str], dict[int, Evaluation]] = {}
    kinds = {name: task.kind for name, task in steps.settings.tasks.items()}
    for (cell, task), parts in steps.evaluate.items():
        if (read := _read(parts, kinds[task])) is not None:
            evaluations.setdefault((replace(cell, seed=0), task), {})[cell.seed] = read
    comparisons: list[dict[str, Any]] = []
    condition: dict[str, Any]
    for model, trained, task in dict.fromkeys((cell.model, cell.task, task) for cell, task in evaluations):
        if (read := _read(steps.untrained[model, task], kinds[task])) is not None:
            condition = {"model": model, "train_task": trained, "task": task, "method": "untrained"}
            condition |= {"learning_rate": None, "clip": None, "seeds": []}
            comparisons += [condition | found for found in _compare([read], None, kinds[task])]
    for (cell, task), own in evaluations.items():
        condition = {"model": cell.model, "train_task": cell.task, "task": task, "method": cell.method}
        condition |= {"learning_rate": cell.learning_rate, "clip": [*cell.clip]}
        if cell.method == baseline:
            seeds, base = sorted(own), None
        else:
            theirs = _baseline_of(cell, task, evaluations, steps.settings, baseline)
            seeds = sorted(own.keys() & theirs.keys())
            base = [theirs[seed] for seed in seeds]
        if seeds:
            found = _compare([own[seed] for seed in seeds], base, kinds[task])
            comparisons += [condition | {"seeds": seeds} | compared for compared in found]
    return comparisons


def _read(evaluations: Sequence[Step], kind: str) -> Evaluation | None:
    """The values of an evaluation's rows and their users, if it is done and has such."""
    last = evaluations[-1]
    has_rows = last.state == "done" and (last.folder / "metrics.jsonl").is_file()
    return read_values(last.folder, with_scores=kind == IRRELEVANT) if has_rows else None


def _baseline_of(cell: Cell, task: str, evaluations: Mapping, settings: Settings, baseline: str) -> dict:
    """The evaluations of the baseline that a run is compared with, by seed."""
    if baseline not in settings.methods:
        return {}
    has_own_rate = "learning_rate" in settings.methods[cell.method]
    for rate in settings.learning_rates if has_own_rate else (cell.learning_rate,):
        for clip in (cell.clip, *settings.clip_ranges):
            theirs = settings.cell(cell.model, cell.task, baseline, rate, clip, cell.seed)
            if (theirs, task) in evaluations:
                return evaluations[theirs, task]
    return {}


def _compare(own: Sequence[Evaluation], theirs: Sequence[Evaluation] | None, kind: str) -> list[dict[str, Any]]:
    """The differences of all measures between evaluations, one of each a seed; or their means, if there are none to compare with."""
    users = own[0][1]
    found = []
    for measure in MEASURES:
        if measure.kind != kind:
            continue
        sides = [[measure.of(values) for values, _ in side] for side in (own, theirs or ())]
        if any(values is None for side in sides for values in side):
            continue
        where = np.isfinite(np.array(sides[0] + sides[1], float)).all(0)
        if not where.any():
            continue
        values = np.array(sides[0], float)[:, where]
        compared = {"metric": measure.name, "rows": int(where.sum()), "mean": float(values.mean())}
        compared |= {"baseline": None, "difference": None, "interval": None}
        if theirs is not None:
            base = np.array(sides[1], float)[:, where]
            groups = [user for user, is_there in zip(users, where, strict=True) if is_there]
            difference, interval = mean_of(values - base, groups)
            compared |= {"baseline": float(base.mean()), "difference": difference, "interval": interval}
        found.append(compared)
    return found


def write_comparisons(
    comparisons: list[dict[str, Any]], folder: str | Path, plots: Sequence[Path] = (), baseline: str = "ce"
) -> list[Path]:
    """
    Write `comparisons.md` and `comparisons.json`; with another baseline than CE `comparisons-BASELINE.md` and `….json`.

    Args:
        comparisons (`list[dict[str, Any]]`): From [`compare_methods`].
        folder (`str` or `Path`): Where to.
        plots (`Sequence[Path]`, *optional*): Of [`~reproduce.frontier.write_frontiers`], in the same folder, to be shown.
        baseline (`str`, *optional*, defaults to `"ce"`): What was compared with.

    Returns:
        `list[Path]`: The files.
    """
    folder = Path(folder)
    parts = [f"# Against {baseline}", _EXPLANATION.format(baseline=baseline)]
    for (model, trained, task), by_run in by_task(comparisons).items():
        shown = measures_of(by_run)
        clips = [clip if method != baseline else () for method, _, clip, _ in by_run]
        lines: list[list[Any]] = [
            ["learning rate", *("–" if rate is None else f"{rate:g}" for _, rate, _, _ in by_run)],
            ["clip", *(" … ".join(f"{bound:g}" for bound in clip) or "–" for clip in clips)],
            ["seeds", *(len(seeds) or "–" for *_, seeds in by_run)],
        ]
        lines += [
            [heading(measure), *(cell_text(found.get(measure.name)) for found in by_run.values())] for measure in shown
        ]
        parts.append(f"## {model}, trained on {trained}, tested on {task} ({rows_of(by_run)} rows)")
        parts.append(table(["", *(method for method, *_ in by_run)], lines))
    if plots:
        parts.append(_CAPTION.format(baseline=baseline))
    parts += [f"![Personal against other tokens]({plot.name})" for plot in plots]
    stem = "comparisons" if baseline == "ce" else f"comparisons-{baseline}"
    paths = [folder / f"{stem}.md", folder / f"{stem}.json"]
    for path, text in zip(paths, ("\n\n".join(parts), json.dumps(comparisons, indent=1)), strict=True):
        write_text(path, text + "\n")
    return paths


def by_task(comparisons: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], Runs]:
    """Comparisons by model, task of training and task of evaluation; in each by run, and by metric."""
    found: dict[tuple[str, str, str], Runs] = {}
    for own in comparisons:
        run = own["method"], own["learning_rate"], tuple(own["clip"] or ()), tuple(own["seeds"])
        runs = found.setdefault((own["model"], own["train_task"], own["task"]), {})
        runs.setdefault(run, {})[own["metric"]] = own
    return found


def measures_of(runs: Runs) -> list[Measure]:
    """Which measures there are of any run, in their order."""
    return [measure for measure in MEASURES if any(measure.name in found for found in runs.values())]


def rows_of(runs: Runs) -> int:
    """The most rows that a measure of any run is over."""
    return max(own["rows"] for found in runs.values() for own in found.values())


def heading(measure: Measure) -> str:
    """A measure with its unit, where it has one."""
    return f"{measure.heading} ({measure.unit})" if measure.unit in ("nats", "words", "share") else measure.heading


def cell_text(compared: dict[str, Any] | None) -> str:
    """A difference and its interval, in Markdown: bold where it does not hold 0; or a mean, where there is nothing to compare with."""
    if compared is None:
        return "–"
    if compared["difference"] is None:
        return f"{compared['mean']:.3f}".replace("-", "−")
    text = f"{compared['difference']:+.3f}"
    if compared["interval"] is not None:
        low, high = compared["interval"]
        text += f" [{low:+.3f}, {high:+.3f}]"
        if low > 0 or high < 0:
            text = f"**{text}**"
    return text.replace("-", "−")
