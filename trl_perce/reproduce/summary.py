# SPDX-License-Identifier: Apache-2.0

"""What a grid has found, for a terminal of 80 columns: two measures of each task, all others are in the files."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .compare import by_task, cell_text, heading, measures_of, rows_of
from .measures import OTHER, PERSONAL


def summary_tables(comparisons: list[dict[str, Any]], baseline: str = "ce") -> list[Table]:
    """
    A table for each model, task of training and task of evaluation.

    Args:
        comparisons (`list[dict[str, Any]]`): From [`~reproduce.compare.compare_methods`].
        baseline (`str`, *optional*, defaults to `"ce"`): What was compared with.

    Returns:
        `list[Table]`: With a line a run: means of the untrained model and of the baseline, and the others' differences to it with their
            95 % intervals, bold where they do not hold 0; log-likelihoods of personal and of other tokens, or, where a task has none, its
            first two measures.
    """
    tables = []
    for (model, trained, task), by_run in by_task(comparisons).items():
        there = measures_of(by_run)
        shown = [measure for measure in there if measure.name in (PERSONAL, OTHER)] or there[:2]
        tested = "" if task == trained else f", tested on {task}"
        table = Table(
            box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"{model}, {trained}{tested} ({rows_of(by_run)} rows)"
        )
        table.title_justify, table.title_style = "left", "bold"
        table.add_column(f"against {baseline}", overflow="fold", max_width=20)
        table.add_column("seeds", justify="right")
        for measure in shown:
            table.add_column(heading(measure), justify="right", max_width=23)
        runs = [run[:3] for run in by_run]
        for (method, rate, clip, seeds), found in by_run.items():
            # A method that the grid tries at several rates or bounds has them in its name
            others = [run for run in runs if run[0] == method]
            name = method + (f", lr={rate:g}" if len({run[1] for run in others}) > 1 else "")
            name += f", clip={clip[0]:g}–{clip[1]:g}" if len({run[2] for run in others}) > 1 else ""
            texts = (_text(cell_text(found.get(measure.name))) for measure in shown)
            table.add_row(Text(name), str(len(seeds) or "–"), *texts)
        tables.append(table)
    return tables


def _text(markdown: str) -> Text:
    return Text(markdown.strip("*"), style="bold" if markdown.startswith("**") else "")
