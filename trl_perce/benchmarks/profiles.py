# SPDX-License-Identifier: Apache-2.0

"""
What LongLaMP and LaMP share: an `input` that is a whole instruction, and the `profile` of the user whose `output` is wanted.

The prompt has the parts of Appendix D.1 of the PerCE paper in its order: a system message says what to write, gives the history and asks for the
user's style; the user's message is the official input as it is. The words (`lead` and `style` of a [`ProfileTask`]) and the layout of
an entry are ours.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from ..history.entries import HistoryEntry, HistoryRow, find_mark, folded
from ..persona.marks import PLACEHOLDER
from .reading import Skips, take, to_days


# Examples a task in the PerCE paper's experiments (its section on the set-up)
NUM_ROWS = {"train": 2000, "validation": 500, "test": 500}
# Columns of a date, in a row or in an item of its profile; the first that is there counts
_DATE_COLUMNS = ("date", "year", "unixReviewTime")


@dataclass(frozen=True)
class ProfileTask:
    """
    What tells one task from another.

    Attributes:
        lead (`str`): What to write, and what the history is. Stands before it in the system message.
        style (`str`): Asks for the user's style. Stands behind the history.
        labels (`dict[str, str]`): Columns of a profile's item in the order of the benchmark's own code, and what each is called in
            the entry's text. An empty label: the value stands alone.
        response (`str`): The column that is of the same kind as the output.
        query (`str`): Retrieval compares the entries with what follows this in the input, as the benchmark's code does; with the
            whole input where it is empty or not there.
        aliases (`dict[str, str]`): Other names of columns.
    """

    lead: str
    style: str
    labels: dict[str, str]
    response: str
    query: str = ""
    aliases: dict[str, str] = field(default_factory=dict)


class RowMaker:
    """
    Makes rows of one task and counts what cannot be used.

    Args:
        task ([`ProfileTask`]): The task.
        by_time (`bool`): Whether rows get a time, if the source has one, so that later entries are never retrieved.
        needs_date (`bool`, *optional*, defaults to `False`): Whether each item of a profile must have a date.

    Attributes:
        rows ([`~reading.Skips`]): Rows that were left out.
        entries ([`~reading.Skips`]): Entries that were left out of the rows.
    """

    def __init__(self, task: ProfileTask, by_time: bool, needs_date: bool = False):
        self.task, self.by_time, self.needs_date = task, by_time, needs_date
        self.rows, self.entries = Skips(), Skips()

    def __call__(self, record: dict[str, Any], output: str, id: str, user: str, where: str) -> HistoryRow | None:
        """
        The row, or `None` if it has no history, no output, or text that training takes for a mark of the persona.

        Args:
            record (`dict[str, Any]`): Holds `input` and `profile`.
            output (`str`): The response.
            id (`str`): Of the row.
            user (`str`): Of the user.
            where (`str`): File and row, for messages.

        Raises:
            `ValueError`: A column is missing or of the wrong type.
        """
        text = take(record, "input", str, where)
        time = _time(record, where) if self.by_time else None
        history = self._history(take(record, "profile", list, where), time, where)
        reason = _reason(text, output, history, time)
        if reason:
            self.rows.add(reason)
            return None
        system = f"{self.task.lead}\n\n{PLACEHOLDER}\n\n{self.task.style}"
        return HistoryRow(
            id=id,
            user=user,
            prompt=({"role": "system", "content": system}, {"role": "user", "content": text}),
            response=output,
            history=history,
            search=text.partition(self.task.query)[2].strip() or text if self.task.query else text,
            time=time,
        )

    def log(self, logger: logging.Logger, what: str) -> None:
        """Warn of what was left out. `what` names the data, as in "LaMP_4 train"."""
        self.rows.log(logger, f"rows of {what}")
        self.entries.log(logger, f"entries in the profiles of {what}")

    def _history(self, profile: Sequence[Any], time: float | None, where: str) -> tuple[HistoryEntry, ...]:
        """The entries, oldest first if all have a date, else without dates in the order of the profile."""
        entries = [self._entry(item, f"{where}, item {index} of 'profile'") for index, item in enumerate(profile)]
        history = [entry for entry in entries if entry is not None]
        if time is not None:
            self.entries.add("no date, while the row has one", sum(entry.time is None for entry in history))
            history = [entry for entry in history if entry.time is not None]
        if any(entry.time is None for entry in history):
            return tuple(replace(entry, time=None) for entry in history)
        return tuple(sorted(history, key=attrgetter("time")))

    def _entry(self, item: Any, where: str) -> HistoryEntry | None:
        if not isinstance(item, dict):
            raise ValueError(f"{where}: is a {type(item).__name__}. It must be an object with {self._columns()}.")
        if self.needs_date and _time(item, where) is None:
            raise ValueError(f"{where}: there is no 'date'. Load this file with setting 'user'.")
        values = {column: self._value(item, column, where) for column in self.task.labels}
        if not values[self.task.response]:
            self.entries.add(f"no {self.task.response!r}")
            return None
        return HistoryEntry(
            text="\n".join(
                _labelled(label, values[column]) for column, label in self.task.labels.items() if values[column]
            ),
            search=" ".join(value for value in values.values() if value),
            response=values[self.task.response],
            time=_time(item, where),
        )

    def _value(self, item: dict[str, Any], column: str, where: str) -> str:
        name = self.task.aliases.get(column, column) if column not in item else column
        if name not in item:
            there = ", ".join(map(repr, item)) or "nothing"
            raise ValueError(f"{where}: there is no {column!r}; there is {there}. It must have {self._columns()}.")
        if item[name] is None:
            return ""
        value = take(item, name, (str, int, float), where)
        return f"{value:g}" if isinstance(value, float) else str(value).strip()

    def _columns(self) -> str:
        return ", ".join(map(repr, self.task.labels))


def number_to_draw(num_rows: int | str | None, split: str) -> int | None:
    """Of rows of a split: the paper's number for `None`, all (`None`) for `"all"`."""
    numbers: dict[Any, Any] = {None: NUM_ROWS[split], "all": None}
    return numbers.get(num_rows, num_rows)


def user_of(record: dict[str, Any], columns: Iterable[str], default: str) -> str:
    """The user of a record by the first of the columns that it has, else `default`."""
    return next((str(record[column]) for column in columns if record.get(column) not in (None, "")), default)


def _labelled(label: str, value: str) -> str:
    return f"{label}: {value}" if label else value


def _time(record: dict[str, Any], where: str) -> float | None:
    column = next((column for column in _DATE_COLUMNS if record.get(column)), None)  # year 0 is an unknown year
    return None if column is None else to_days(take(record, column, (str, int, float), where), where)


def _reason(text: str, output: str, history: Sequence[HistoryEntry], time: float | None) -> str | None:
    """Why a row cannot be used, if it cannot."""
    if not text.strip():
        return "no input"
    if not output.strip():
        return "no output"
    if not history:
        return "no history"
    earlier = [entry for entry in history if time is None or (entry.time is not None and entry.time < time)]
    if all(entry.response is not None and folded(entry.response) == folded(output) for entry in earlier):
        return "no earlier history" if time is not None else "no history but the output itself"
    mark = find_mark((text, output))
    return f"input or output hold {mark}" if mark else None
