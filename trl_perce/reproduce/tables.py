# SPDX-License-Identifier: Apache-2.0

"""The paper's tables (arXiv 2603.06595) of a grid's records: Markdown to read, JSON to reckon with, plots."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..utils.files import write_text
from ..utils.markdown import table
from .layout import Part, make_tables
from .number import Number, Quoted
from .paper import ODDITIES
from .plots import write_plots
from .results import Results


TITLES = {
    1: "Methods and tasks: overlap with the user's own text, and use of the persona",
    2: "Robustness to the learning rate",
    3: "Trained on one task, tested on the others",
    4: "ALOE: alignment over a conversation",
    5: "LaMP: headlines, titles, tweets",
    6: "Length of prompts with and without the persona",
    7: "Hyperparameters",
    8: "Trained on one task, tested on the others: further models",
    9: "ALOE: further models",
    10: "A model as the judge",
    11: "General question answering: what personalization costs",
    12: "Clip ranges of the weights",
}
"""Number of the paper's table → what it is about, in our words."""

NEEDS = {
    1: "`tasks` with `test_rows` (`benchmark: longlamp` or `histories`)",
    2: "two or more `learning_rates`",
    3: "two or more `tasks`, and `transfer: true`",
    4: "a task with `benchmark: aloe`",
    5: "a task with `benchmark: lamp`",
    6: "`tasks`, whose prompts are counted",
    7: "`training`, in the settings",
    8: "two or more `models`, two or more `tasks`, and `transfer: true`",
    9: "two or more `models`, and a task with `benchmark: aloe`",
    10: "`judge`",
    11: "a task with `benchmark: general_qa`",
    12: "two or more `clip_ranges`",
}
"""Number of a table → what the grid's YAML must have for it to be run."""


def write_tables(
    records: Iterable[dict[str, Any]],
    settings: dict[str, Any],
    folder: str | Path,
    quoted: Callable[..., float | None] | None = None,
    tables: Sequence[int] | None = None,
) -> list[Path]:
    """
    Write `tables.md`, `tables.json` and a PNG for each table that has a plot, each whole or not at all.

    Args:
        records (`Iterable[dict[str, Any]]`): One figure of one run each: `"model"`, `"train_task"` (`None`: untrained), `"task"`
            (`"…:validation"` if of validation rows), `"method"`, `"learning_rate"`, `"clip"` (`[m, M]`), `"seed"` (each or
            `None`), `"metric"`, `"value"` (NaN: there is none), `"interval"` (`[low, high]`, 95 % over rows, or `None`) and
            `"rows"`.
        settings (`dict[str, Any]`): The grid's YAML: its `models`, `tasks` and `methods` give the order, the first model is the
            main one, a task's `benchmark` says to which table it belongs, and all of it is Table 7.
        folder (`str` or `Path`): Where to; made if there is none.
        quoted (`Callable`, *optional*): [`~trl_perce.reproduce.paper.quoted`], or what takes its arguments. The paper's
            figures stand beside ours, marked as quoted. By default none do.
        tables (`Sequence[int]`, *optional*): Numbers of the tables to make. By default all.

    Returns:
        `list[Path]`: The files.

    Raises:
        `ValueError`: A record lacks a key or holds what cannot be, two are of the same run and metric, or there is no table of
            a number.
    """
    numbers = list(TITLES) if tables is None else sorted(set(tables))
    unknown = [number for number in numbers if number not in TITLES]
    if unknown:
        raise ValueError(f"`tables`: there is no table {unknown[0]!r}. Write numbers from 1 to {max(TITLES)}.")
    results, folder = Results(records, settings), Path(folder)
    made = make_tables(results, settings, quoted)
    made = {number: made[number] for number in numbers}
    plots = write_plots(results, folder, [number for number, parts in made.items() if parts])
    for name, text in (
        ("tables.json", json.dumps(_as_json(made, plots, settings), ensure_ascii=True, allow_nan=False, indent=2) + "\n"),
        ("tables.md", _as_markdown(made, plots)),
    ):  # fmt: skip
        write_text(folder / name, text)
    return [folder / "tables.md", folder / "tables.json", *(path for paths in plots.values() for path in paths)]


def _explanations(parts: list[Part]) -> list[str]:
    """What the signs in a table's cells mean, as far as it has them."""
    found = [cell for part in parts for line in part.lines for cell in line.values()]
    numbers = [cell for cell in found if isinstance(cell, Number)]
    texts = []
    if any(number.row_interval is not None for number in numbers):
        texts.append(
            "`[low, high]`: 95 % interval over the rows of a run (other rows, same training), bounds averaged over seeds."
        )
    if any(number.seed_interval is not None for number in numbers):
        texts.append(
            "`±`: half of the 95 % t-interval of the mean over seeds (other trainings, same rows; with two seeds it is 9 standard "
            "deviations wide). Neither interval holds the other: the whole uncertainty is larger than each."
        )
    elif any("seeds" in part.columns for part in parts):
        texts.append("One seed: how far another training would move a figure is not known.")
    if any(number.kind == "gain" for number in numbers):
        texts.append("Gains are of the means over the seeds that both have, with the interval over these pairs.")
    if any(number.without_value for number in numbers):
        texts.append("Runs without a value (NaN) are left out of means and counted in brackets.")
    if any(isinstance(cell, Quoted) for cell in found):
        texts.append("*paper: … (quoted)*: the paper's figure, not measured here.")
    return [" ".join(texts)] if texts else []


def _as_markdown(made: dict[int, list[Part]], plots: dict[int, list[Path]]) -> str:
    sections = [
        "# Tables",
        "Scores and shares are times 100. log P: mean log-likelihood of the tokens of the user's own text, in nats; personal tokens are "
        "those with PIR > 1 under the untrained model. Uptake: content words of the persona in a reply. All methods are scored on the "
        "same rows, so that overlapping intervals over rows do not mean that there is no difference: that is for a paired test. "
        "–: not run, or not quoted.",
    ]
    for number, parts in made.items():
        sections.append(f"## Table {number}. {TITLES[number]}")
        if not parts:
            sections.append(f"Not run. The grid's YAML needs {NEEDS[number]}.")
        notes: list[str] = []
        for part in parts:
            lines = [[_cell(line[name]) for name in part.columns] for line in part.lines]
            sections += [
                f"**{part.title}**",
                table(part.columns, lines),
                *(note for note in part.notes if note not in notes),
            ]
            notes += part.notes
        sections += _explanations(parts)
        if parts and number in ODDITIES:
            sections.append(ODDITIES[number])
        sections += [f"![{TITLES[number]}]({path.name})" for path in plots.get(number, [])]
    return "\n\n".join(sections) + "\n"


def _cell(cell: Any) -> Any:
    if cell is None:
        return "–"
    return cell.text if isinstance(cell, Number | Quoted) else cell


def _as_json(made: dict[int, list[Part]], plots: dict[int, list[Path]], settings: dict[str, Any]) -> dict[str, Any]:
    def plain(cell: Any) -> Any:
        return dataclasses.asdict(cell) if isinstance(cell, Number | Quoted) else cell

    return {
        "settings": settings,
        "tables": {
            str(number): {
                "title": TITLES[number],
                "run": bool(parts),
                "needs": NEEDS[number],
                "parts": [
                    {
                        "title": part.title,
                        "lines": [{name: plain(line[name]) for name in part.columns} for line in part.lines],
                        "notes": part.notes,
                    }
                    for part in parts
                ],
                "plots": [path.name for path in plots.get(number, [])],
            }
            for number, parts in made.items()
        },
    }
