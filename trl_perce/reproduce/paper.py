# SPDX-License-Identifier: Apache-2.0

"""
Figures of the PerCE paper (arXiv 2603.06595) to stand beside ours, each with where it was read.

The tables of the paper could not be read where this was written. What is here are the figures that public text states; most
cells have none. Who has the paper writes further ones into a JSON file, see [`load_quotes`].
"""

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
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

_NOTES = "the design notes of this project, after https://arxiv.org/html/2603.06595v1"
_ABSTRACT = "https://arxiv.org/abs/2603.06595"
_SUMMARY = "https://papers.lunadong.com/paper/8560"
_BOARD = "https://www.wizwand.com/paper/69afa57c2d603e6de3e4399f"
_GAIN = "“average gains of over 10% and up to 68.04% on the LongLaMP dataset”"
_NO_TABLE = "The source does not say in which table it stands."


def _lengths(task: str, with_persona: float, without: float) -> list[Quote]:
    return [
        Quote(6, "prompt_tokens_with_persona", with_persona, _NOTES, task=task, note="Tokenizer of Qwen3."),
        Quote(6, "prompt_tokens_without_persona", without, _NOTES, task=task, note="Tokenizer of Qwen3."),
    ]


def _setting(metric: str, value: float, note: str = "", model: str | None = None) -> Quote:
    return Quote(7, metric, value, _NOTES, model=model, note=note)


def _loose(metric: str, value: float, source: str, note: str, task: str | None = None) -> Quote:
    return Quote(None, metric, value, source, task=task, note=note)


def _summary(metric: str, task: str, column: str, value: float, note: str) -> Quote:
    text = f"Column “{column}”, there as a share of 1. {note}"
    return _loose(metric, value, _SUMMARY, text, task)


def _board(metric: str, task: str, value: float) -> Quote:
    note = "Under “Related benchmarks”, with “Rank 12”. Neither model nor method is given."
    return _loose(metric, value, _BOARD, note, task)


_ROBUST = (
    "“Robustness analysis shows PerCE maintains high performance even when learning rate is increased, unlike Standard CE "
    "which collapses.” Neither model nor learning rate is given."
)
_TRANSFER = "“Cross-task transfer”, “Score (likely ROUGE-L/METEOR)”. Neither model nor training task is given."

QUOTES: tuple[Quote, ...] = (
    Quote(
        *(1, "meteor_gain", 68.04, _SUMMARY, "Qwen3-4B", "product_review", "product_review", "perce"),
        note="“+68.04% improvement in METEOR score on the Personalized Review Writing task (LongLaMP) with Qwen3-4B compared "
        "to standard”: in percent of the baseline's score, which is taken to be CE's, as what could be read ends there.",
    ),
    *_lengths("abstract_generation", 975.1, 64.5),
    *_lengths("product_review", 2062.6, 168.9),
    *_lengths("topic_writing", 1055.3, 54.8),
    _setting("weight_clip_min", 0.8),
    _setting("weight_clip_max", 5.0),
    _setting("adam_beta1", 0.9),
    _setting("adam_beta2", 0.999),
    _setting("num_train_epochs", 3),
    _setting("warmup_ratio", 0.04),
    _setting("max_length", 5000),
    _setting("batch_size", 32, model="Qwen3-14B"),
    _setting("batch_size", 64, model="Llama-3.1-8B-Instruct"),
    _setting("batch_size", 96, model="Qwen3-4B"),
    _setting("learning_rate_min", 2e-6, "Smallest of those that were tried."),
    _setting("learning_rate_max", 5e-5, "Largest of those that were tried."),
    _setting("temperature", 0.4, _NO_TABLE),
    _setting("max_new_tokens", 512, _NO_TABLE),
    _setting("retrieved_entries", 4, f"By Contriever. {_NO_TABLE}"),
    _setting("train_rows", 2000, f"Of each task. {_NO_TABLE}"),
    _setting("test_rows", 500, f"Of each task. {_NO_TABLE}"),
    _loose("gain", 10, _ABSTRACT, f"{_GAIN}: over 10 %, of what over what is not said."),
    _loose("gain_max", 68.04, _ABSTRACT, f"{_GAIN}: of which model and task is not said."),
    _loose("word_matching_recall", 26.5, _NOTES, "Identification experiment, Appendix A."),
    _loose("word_matching_f1", 41, _NOTES, "Identification experiment, Appendix A."),
    _summary("rougeL", "abstract_generation", "Baseline", 22.61, _ROBUST),
    _summary("rougeL", "abstract_generation", "This Paper", 37.28, _ROBUST),
    _summary("rougeL_or_meteor", "product_review", "Baseline", 18.98, _TRANSFER),
    _summary("rougeL_or_meteor", "product_review", "This Paper", 22.11, _TRANSFER),
    _summary("rougeL_or_meteor", "topic_writing", "Baseline", 16.65, _TRANSFER),
    _summary("rougeL_or_meteor", "topic_writing", "This Paper", 19.55, _TRANSFER),
    _board("rougeL", "abstract_generation", 37.85),
    _board("rougeL", "product_review", 27.84),
    _board("rougeL", "topic_writing", 23.07),
    _board("alignment_6", "aloe", 3.08),
)


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
