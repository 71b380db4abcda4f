# SPDX-License-Identifier: Apache-2.0

"""
Figures of the PerCE paper (arXiv 2603.06595v1) to stand beside ours: all of its tables, from `paper.csv`. A JSON file adds others, see
[`load_quotes`].
"""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Quote:
    """
    One figure of the paper. The fields that name its cell are those of our records of results.

    Attributes:
        table (`int`, *optional*): Number of the paper's table, 1 to 12. `None` where the source does not say which model, method
            or row the figure is of: such a quote is for the reader and never stands beside a result.
        metric (`str`): Such as `"rougeL"`, `"meteor"`, `"prompt_tokens_with_persona"`; for Table 7 the name of a setting.
        value (`float`): In the source's unit. Scores are in percent.
        source (`str`): Where it was read.
        model (`str`, *optional*): Last part of the model's name on the Hub, such as `"Qwen3-4B"`. `None` if it is of no model.
        train_task (`str`, *optional*): Task that was trained on. `None` if it is of no training.
        task (`str`, *optional*): Task that was tested on. `None` if it is of no task.
        method (`str`, *optional*): `"untrained"`, `"ce"`, `"lossce"`, `"entce"`, `"perce"`. `None` if it is of no method.
        learning_rate (`float`, *optional*): Of the training, where the cell is of one learning rate (Table 2).
        clip (`tuple[float, float]`, *optional*): `(m, M)`, where the cell is of one clip range (Table 12).
        note (`str`, *optional*, defaults to `""`): What the source says and what it leaves open.

    Raises:
        `ValueError`: A field is not what it should be.
    """

    table: int | None
    metric: str
    value: float
    source: str
    model: str | None = None
    train_task: str | None = None
    task: str | None = None
    method: str | None = None
    learning_rate: float | None = None
    clip: tuple[float, float] | None = None
    note: str = ""

    def __post_init__(self):
        if self.table is not None and not (_is_number(self.table) and self.table in range(1, 13)):
            raise ValueError(f"`table` is {self.table!r}. Write 1 to 12, or null if the cell is not known.")
        if not _is_number(self.value):
            raise ValueError(f"`value` is {self.value!r}. Write a finite number.")
        if not (self.learning_rate is None or _is_number(self.learning_rate)):
            raise ValueError(f"`learning_rate` is {self.learning_rate!r}. Write a number or null.")
        if not (
            self.clip is None or (isinstance(self.clip, tuple) and list(map(_is_number, self.clip)) == [True] * 2)
        ):
            raise ValueError(f"`clip` is {self.clip!r}. Write two numbers [m, M], or null.")
        for name in ("metric", "source"):
            if not (isinstance(getattr(self, name), str) and getattr(self, name).strip()):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}. Write a text.")
        if not isinstance(self.note, str):
            raise ValueError(f"`note` is {self.note!r}. Write a text, or leave it out.")
        for name in ("model", "train_task", "task", "method"):
            if not isinstance(getattr(self, name), str | NoneType):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}. Write a text or null.")

    @property
    def cell(self) -> tuple:
        """What tells the cell from others: everything but value, source and note."""
        return tuple(getattr(self, name) for name in _CELL)


_CELL = ("table", "model", "train_task", "task", "method", "learning_rate", "clip", "metric")

_PAPER = "https://arxiv.org/abs/2603.06595v1"
# Names in `paper.csv` → ours, where they differ. Scores of Tables 10 and 11 keep theirs: their scale is not ours.
_METRICS = {
    **{f"alignment_{k}": f"alignment@{k}" for k in range(6, 11)},
    **{"alignment_average": "alignment@6-10", "rougeL_variance_1e4": "rougeL_variance"},
    "sampling_temperature": "temperature",
}
_TASKS = {"LaMP_4 (PNHG)": "headlines", "LaMP_5 (PSTG)": "titles", "LaMP_7 (PTP)": "tweets"}
# Settings of Table 7 that are several numbers
_PAIRS = {
    "adam_betas": ("adam_beta1", "adam_beta2"),
    "learning_rate_searched": ("learning_rate_min", "learning_rate_max"),
}
ODDITIES = {
    1: "No figure of the paper has an interval or a number of seeds, and the learning rate is chosen on the figures that are reported.",
    2: "The paper's best CE figure on abstracts is 37.28 here and 37.27 in its Table 1. The best learning rate differs by method and task.",
    10: "The paper's prompts rate from 1 to 5 and its table is in per cent, without a word on how one becomes the other or who judges.",
    11: "The paper gives one score a benchmark and does not say which; ours are exact match and F1, so that they do not stand side by side.",
}
"""Number of a table → what is odd in the paper, or keeps its figures from standing beside ours."""


def _read_paper() -> tuple[Quote, ...]:
    """The lines of `paper.csv` that hold numbers, and the gains over CE that follow from them."""
    quotes = []
    with open(Path(__file__).with_name("paper.csv"), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            quotes += _paper_quotes(row)
    ce = {quote.cell: quote.value for quote in quotes if quote.method == "ce"}
    for quote in [*quotes]:
        if quote.table in (1, 5) and quote.method not in (None, "ce"):
            base = ce.get(replace(quote, method="ce").cell)
            if base:
                note = "From the two cells, in percent of CE's."
                value = round(100 * (quote.value / base - 1), 2)
                quotes.append(replace(quote, metric=f"{quote.metric}_gain", value=value, note=note))
    return tuple(quotes)


def _paper_quotes(row: dict[str, str]) -> list[Quote]:
    metric, values = _METRICS.get(row["metric"], row["metric"]), row["value"].split()
    if metric in _PAIRS:
        named = dict(zip(_PAIRS[metric], (values[0], values[-1]), strict=True))
    elif len(values) == 1 and metric != "optimizer":
        named = {metric: values[0]}
    else:  # Table 7's name of an optimizer, and the batch sizes that it also gives by model
        return []
    scale = 100 if row["unit"] == "share of 1" else 1
    in_appendix = row["table"] == "A"
    clip = (float(row["clip_min"]), float(row["clip_max"])) if row["clip_min"] else None
    return [
        Quote(
            table=None if in_appendix else int(row["table"]),
            metric=name,
            value=round(scale * float(value), 6),
            source=f"{_PAPER}, {'Appendix A' if in_appendix else 'Table ' + row['table']}",
            model=row["model"] or None,
            train_task=_TASKS.get(row["train_task"], row["train_task"]) or None,
            task=_TASKS.get(row["task"], row["task"]) or None,
            method=row["method"] or None,
            learning_rate=float(row["learning_rate"]) if row["learning_rate"] else None,
            clip=clip,
            note=f"Unit: {row['unit']}." if row["unit"] else "",
        )
        for name, value in named.items()
    ]


QUOTES = _read_paper()


def quoted(
    table: int,
    metric: str,
    model: str | None = None,
    train_task: str | None = None,
    task: str | None = None,
    method: str | None = None,
    learning_rate: float | None = None,
    clip: tuple[float, float] | None = None,
    quotes: Sequence[Quote] = QUOTES,
) -> float | None:
    """
    The paper's figure of one cell. All fields must be equal, `None` being a value like others.

    Args:
        table (`int`): Number of the paper's table.
        metric (`str`): Name of the figure.
        model (`str`, *optional*): Name or folder of the model; its last part counts.
        train_task, task, method, learning_rate, clip (*optional*): As in [`Quote`].
        quotes (`Sequence[Quote]`, *optional*, defaults to [`QUOTES`]): Quotes; of two of one cell the later counts, so
            `QUOTES + load_quotes(path)` lets a user's file go first.

    Returns:
        `float` or `None`: The figure; `None` where nothing is quoted.
    """
    model = None if model is None else Path(model).name
    bounds = None if clip is None else tuple(clip)
    cell = (table, model, train_task, task, method, learning_rate, bounds, metric)
    values = [quote.value for quote in quotes if quote.table is not None and quote.cell == cell]
    return values[-1] if values else None


def load_quotes(path: str | Path) -> tuple[Quote, ...]:
    """
    Further quotes, from a JSON file: a list of objects with the fields of [`Quote`], of which `table`, `metric`, `value` and
    `source` must be there.

        [{"table": 1, "model": "Qwen3-4B", "train_task": "topic_writing", "task": "topic_writing", "method": "ce",
          "metric": "rougeL", "value": …, "source": "arXiv 2603.06595v1, Table 1"}]

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `tuple[Quote, ...]`: In the order of the file.

    Raises:
        `ValueError`: The file is not such a list, a quote has a field that is missing, unknown or wrong, or two quotes are of
            one cell. The message says which.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON in UTF-8: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f'{path} holds a JSON {type(rows).__name__}. Write a list of quotes: [{{"table": 1, …}}, …].')
    quotes: list[Quote] = []
    seen: dict[tuple, int] = {}
    for number, row in enumerate(rows):
        try:
            quotes.append(_read_quote(row))
        except ValueError as error:
            raise ValueError(f"{path}, quote {number}: {error}") from error
        cell = quotes[-1].cell
        if cell[0] is not None and seen.setdefault(cell, number) != number:
            raise ValueError(f"{path}, quote {number}: quote {seen[cell]} is of the same cell. Remove one of them.")
    return tuple(quotes)


def _read_quote(row: Any) -> Quote:
    if not isinstance(row, dict):
        raise ValueError(f"it is {row!r}. Write an object.")
    names = [field.name for field in fields(Quote)]
    unknown = [name for name in row if name not in names]
    if unknown:
        raise ValueError(f"there is no field {unknown[0]!r}. The fields are {', '.join(names)}.")
    missing = [field.name for field in fields(Quote) if field.default is MISSING and field.name not in row]
    if missing:
        raise ValueError(f"the field {missing[0]!r} is missing.")
    if isinstance(row.get("clip"), list):
        row = {**row, "clip": tuple(row["clip"])}
    return Quote(**row)
