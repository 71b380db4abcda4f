# SPDX-License-Identifier: Apache-2.0

"""Methods against CE, row by row and seed by seed: the differences that the tables' separate intervals cannot tell."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.files import read_lines, write_text
from ..utils.markdown import table
from ..utils.statistics import bootstrap_interval, mean_over_seeds
from .settings import Cell
from .steps import Steps


# Names in an evaluation's `metrics.jsonl` → headings
METRICS = {
    "rougeL": "ROUGE-L",
    "meteor": "METEOR",
    "log_likelihood/personal": "log P personal",
    "log_likelihood/other": "log P other",
    "log_likelihood/personal_swapped": "log P personal, another persona",
    "pir/personal": "PIR personal",
    "pir/other": "PIR other",
    "log_likelihood/personal_without": "log P personal, no persona",
    "options/likelihood": "right option likeliest",
    "options/pir": "right option gains most",
    "options/pir_margin": "gain of the right option over the mean option",
    "options/without": "its option likeliest, no persona",
    "options/swapped": "its option likeliest, another persona",
    "uptake/own": "uptake",
    "swapped/uptake/other": "uptake of another persona in the prompt",
    "judge/personalization": "judge, personalization",
}
_EXPLANATION = """\
Mean difference to {baseline} over the same test rows, and its 95 % interval. With two or more seeds the interval is for new seeds and
new users (crossed random effects: `utils.statistics.mean_over_seeds`); with one seed it is for new users alone, and says nothing of
other seeds. **Bold**: the interval does not hold 0. One in twenty would be bold by chance."""


def compare_methods(steps: Steps, baseline: str = "ce") -> list[dict[str, Any]]:
    """
    Differences between each method and a baseline that was trained alike: same model, task, learning rate and seeds.

    Args:
        steps ([`Steps`]): The grid's.
        baseline (`str`, *optional*, defaults to `"ce"`): Name of the method that the others are compared with.

    Returns:
        `list[dict[str, Any]]`: `"model"`, `"train_task"`, `"task"`, `"method"`, `"learning_rate"`, `"clip"`, `"metric"`, `"seeds"`,
            `"rows"`, `"mean"` and `"baseline"` (means over rows and seeds), `"difference"` and `"interval"`.
    """
    # (run without its seed, evaluated task) → seed → folder
    folders: dict[tuple[Cell, str], dict[int, Path]] = {}
    for (cell, task), evaluations in steps.evaluate.items():
        last = evaluations[-1]
        if last.state == "done" and (last.folder / "metrics.jsonl").is_file():
            folders.setdefault((replace(cell, seed=0), task), {})[cell.seed] = last.folder
    found = []
    for (cell, task), own in folders.items():
        clips = steps.settings.clip_ranges
        theirs = next(
            (
                folders[key]
                for clip in (cell.clip, *clips)
                if (key := (replace(cell, method=baseline, clip=clip), task)) in folders
            ),
            {},
        )
        seeds = sorted(own.keys() & theirs.keys())
        if cell.method != baseline and seeds:
            condition: dict[str, Any] = {"model": cell.model, "train_task": cell.task, "task": task}
            condition |= {"method": cell.method, "learning_rate": cell.learning_rate, "clip": list(cell.clip)}
            condition |= {"seeds": seeds}
            found += [
                condition | compared
                for compared in _compare([own[seed] for seed in seeds], [theirs[seed] for seed in seeds])
            ]
    return found


def _compare(own_folders: Sequence[Path], their_folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The differences of all metrics between evaluations, one of each a seed."""
    own, theirs = (
        [[*read_lines(folder / "metrics.jsonl")] for folder in folders] for folders in (own_folders, their_folders)
    )
    users = [line["user"] or f"row {line['row']}" for line in own[0]]
    found = []
    for metric in METRICS:
        if not all(metric in lines[0] for lines in (*own, *theirs)):
            continue
        values, base = (
            np.array([[line[metric] for line in lines] for lines in side], float) for side in (own, theirs)
        )
        where = (np.isfinite(values) & np.isfinite(base)).all(0)
        if not where.any():
            continue
        differences = (values - base)[:, where]
        groups = [user for user, is_there in zip(users, where, strict=True) if is_there]
        interval = (
            mean_over_seeds(differences, groups)["interval"]
            if len(differences) > 1
            else bootstrap_interval(differences[0], groups)
        )
        found.append(
            {
                **{"metric": metric, "rows": int(where.sum()), "mean": float(values[:, where].mean())},
                **{"baseline": float(base[:, where].mean()), "difference": float(differences.mean())},
                "interval": None if interval is None else list(interval),
            }
        )
    return found


def write_comparisons(comparisons: list[dict[str, Any]], folder: str | Path, baseline: str = "ce") -> list[Path]:
    """
    Write `comparisons.md` and `comparisons.json`.

    Args:
        comparisons (`list[dict[str, Any]]`): From [`compare_methods`].
        folder (`str` or `Path`): Where to.
        baseline (`str`, *optional*, defaults to `"ce"`): What was compared with.

    Returns:
        `list[Path]`: The files.
    """
    folder = Path(folder)
    parts = [f"# Against {baseline}", _EXPLANATION.format(baseline=baseline)]
    for model, trained, task in dict.fromkeys((own["model"], own["train_task"], own["task"]) for own in comparisons):
        own = [c for c in comparisons if (c["model"], c["train_task"], c["task"]) == (model, trained, task)]
        metrics = [metric for metric in METRICS if any(c["metric"] == metric for c in own)]
        runs = list(dict.fromkeys((c["method"], c["learning_rate"], tuple(c["clip"]), tuple(c["seeds"])) for c in own))
        by_run = {(c["method"], c["learning_rate"], tuple(c["clip"]), tuple(c["seeds"]), c["metric"]): c for c in own}
        lines = [
            [method, f"{rate:g}", f"{clip[0]:g} … {clip[1]:g}", len(seeds)]
            + [_cell(by_run.get((method, rate, clip, seeds, metric))) for metric in metrics]
            for method, rate, clip, seeds in runs
        ]
        rows = max(c["rows"] for c in own)
        parts.append(f"## {model}, trained on {trained}, tested on {task} ({rows} rows)")
        parts.append(
            table(["method", "learning rate", "clip", "seeds", *(METRICS[metric] for metric in metrics)], lines)
        )
    paths = [folder / "comparisons.md", folder / "comparisons.json"]
    for path, text in zip(paths, ("\n\n".join(parts), json.dumps(comparisons, indent=1)), strict=True):
        write_text(path, text + "\n")
    return paths


def _cell(compared: dict[str, Any] | None) -> str:
    if compared is None:
        return "–"
    text = f"{compared['difference']:+.3f}"
    if compared["interval"] is None:
        return text
    low, high = compared["interval"]
    text = f"{text} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if low > 0 or high < 0 else text
