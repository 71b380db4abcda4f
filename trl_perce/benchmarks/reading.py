# SPDX-License-Identifier: Apache-2.0

"""What the readers of all benchmarks share: JSON files, checked columns, seeded samples, counted skips."""

import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from ..history.entries import HistoryRow


T = TypeVar("T")


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """
    The records of a file: a JSON list of objects, or JSONL with one object a line (empty lines count for nothing).

    Args:
        path (`str` or `Path`): The file, in UTF-8.

    Returns:
        `list[dict[str, Any]]`: One or more records, in the order of the file.

    Raises:
        `FileNotFoundError`: There is no such file.
        `ValueError`: The file is empty, is no JSON from some line on (as when it was downloaded half), or holds something else
            than objects. The message names the file and the line, or the item of the list.
    """
    path = _existing(path)
    return parse_records(_read_text(path), path)


def parse_records(text: str, path: Path) -> list[dict[str, Any]]:
    """
    As [`read_records`], of a text that is read already.

    Args:
        text (`str`): What stands in the file.
        path (`Path`): The file, for messages.
    """
    if not text.strip():
        raise ValueError(f"{path} is empty. Download it again.")
    if text.lstrip()[0] == "[":
        records = [(f"item {index}", record) for index, record in enumerate(_parse(text, path, 1))]
    else:  # not `splitlines`: it also parts at characters that JSON allows in a string
        lines = enumerate(text.split("\n"), start=1)
        records = [(f"line {number}", _parse(line, path, number)) for number, line in lines if line.strip()]
    for where, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, {where}: holds {_shown(record)}. Every record must be a JSON object.")
    if not records:
        raise ValueError(f"{path} holds an empty list. Download it again.")
    return [record for _, record in records]


def read_object(path: str | Path) -> dict[str, Any]:
    """
    The one JSON object that a file holds.

    Args:
        path (`str` or `Path`): The file, in UTF-8.

    Raises:
        `FileNotFoundError`: There is no such file.
        `ValueError`: The file is no JSON from some line on, or holds something else. The message names the file and the line.
    """
    path = _existing(path)
    content = _parse(_read_text(path), path, 1)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {_shown(content)} and not a JSON object.")
    return content


def find_file(path: str | Path, names: Iterable[str]) -> Path:
    """
    The file that is meant by a path.

    Args:
        path (`str` or `Path`): The file itself, or a folder that holds it.
        names (`Iterable[str]`): What the file may be called in a folder, in order of preference; also with folders before it.

    Raises:
        `FileNotFoundError`: There is no such path, or the folder holds none of the names. The message lists them.
    """
    path, names = Path(path), list(names)
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"The folder {path} holds none of {', '.join(names)}.")
        return found[0]
    return _existing(path)


def take(record: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """
    A value of a record, checked.

    Args:
        record (`dict[str, Any]`): The record.
        key (`str`): Its column.
        kind (`type` or `tuple[type, ...]`): What the value must be.
        where (`str`): File and row, for the message.

    Raises:
        `ValueError`: The column is missing or of another type. The message says which columns there are.
    """
    if key not in record:
        raise ValueError(
            f"{where}: there is no {key!r}; there are {', '.join(map(repr, record)) or 'no columns at all'}."
        )
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise ValueError(
            f"{where}: {key!r} is {_shown(value)}. It must be a {' or '.join(k.__name__ for k in kinds)}."
        )
    return value


def take_choice(value: Any, name: str, choices: Iterable[T]) -> T:
    """
    Raises:
        `ValueError`: The value is none of the choices. The message names the argument and the choices.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}. Choose one of {', '.join(map(repr, choices))}.")
    return value


def to_days(value: int | float | str, where: str) -> float:
    """
    A date as a number of days, to order by. A year or a month counts as its first day.

    Args:
        value (`int`, `float` or `str`): A year (`2012`), `2012-05`, `2012-05-31`, a date with a time in ISO 8601 (UTC if it says
            nothing else), or seconds since 1970 (a number of five or more digits).
        where (`str`): File and row, for the message.

    Returns:
        `float`: Days since the start of year 1.

    Raises:
        `ValueError`: It is none of these.
    """
    if isinstance(value, int | float) and abs(value) >= 10_000:
        return datetime(1970, 1, 1).toordinal() + value / 86_400
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    parts = re.fullmatch(r"(\d{4})(?:-(\d{1,2}))?(?:-(\d{1,2}))?", text)
    try:
        if parts:
            year, month, day = (int(part or 1) for part in parts.groups())
            moment = datetime(year, month, day)
        else:
            moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{where}: {value!r} is no date. Write 2012, 2012-05, 2012-05-31 or seconds since 1970."
        ) from None
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC)
    return moment.toordinal() + (moment.hour * 3600 + moment.minute * 60 + moment.second) / 86_400


def check_unique(ids: Iterable[str], where: str) -> None:
    """
    Raises:
        `ValueError`: An id occurs twice. The message begins with `where` and names up to five of them.
    """
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        shown = ", ".join(map(repr, repeated[:5])) + (", …" if len(repeated) > 5 else "")
        raise ValueError(f"{where}: {len(repeated)} ids occur more than once: {shown}. Each id must be unique.")


def random_order(num_items: int, seed: int) -> list[int]:
    """
    All indices in an order that depends on the seed and the number of items alone. The first `n` are a sample of `n`, so a
    larger sample holds the smaller one.

    Args:
        num_items (`int`): Number of items.
        seed (`int`): The seed.
    """
    draw = random.Random(seed)  # of its methods, only `random` keeps its sequence over versions of Python
    keys = [draw.random() for _ in range(num_items)]
    return sorted(range(num_items), key=keys.__getitem__)


def sample(items: Sequence[T], num: int | None, seed: int) -> list[T]:
    """
    A random sample in the order of the source.

    Args:
        items (`Sequence`): What to take from.
        num (`int`, *optional*): How many to take. All, if `None` or if there are fewer.
        seed (`int`): The same seed and number of items give the same sample everywhere.

    Raises:
        `ValueError`: `num` is no positive number.
    """
    _check_num(num)
    return [items[index] for index in sorted(random_order(len(items), seed)[:num])]


class Skips:
    """
    Counts what is left out, by reason.

    Attributes:
        counts (`Counter`): Number of times by reason.
    """

    def __init__(self):
        self.counts: Counter[str] = Counter()

    def add(self, reason: str, number: int = 1) -> None:
        """Count what is left out. `reason` stands in the log as "3 rows were left out: no history (2), no output (1)"."""
        if number:
            self.counts[reason] += number

    def log(self, logger: logging.Logger, what: str) -> None:
        """One warning with all reasons and their numbers, or nothing. `what` says of what, as in "rows of reviews.jsonl"."""
        if self.counts:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in self.counts.most_common())
            logger.warning(f"{self.counts.total()} {what} were left out: {reasons}.")


def draw_rows(
    num_source: int,
    make: Callable[[int], HistoryRow | None],
    num_rows: int | None,
    seed: int,
    what: str,
    logger: logging.Logger,
    by_default: bool = False,
) -> list[HistoryRow]:
    """
    Draw usable rows of a source until there are enough. A row is only made once it is drawn: a source on disk is not read whole.

    Args:
        num_source (`int`): Number of rows in the source.
        make (`Callable[[int], HistoryRow | None]`): Makes the row with this index; `None` where it is not usable.
        num_rows (`int`, *optional*): How many. All usable ones, if `None` or if there are fewer (this is logged).
        seed (`int`): The same rows for the same seed and source.
        what (`str`): Names the rows in the log and in messages.
        logger (`logging.Logger`): Gets the number of rows, the seed and a hash of the ids that were drawn.
        by_default (`bool`, *optional*, defaults to `False`): Whether nobody asked for `num_rows`: rows that are not drawn are then
            told in a warning.

    Returns:
        `list[HistoryRow]`: The rows, in the order of the source.

    Raises:
        `ValueError`: No row is usable, or `num_rows` is no positive number.
    """
    _check_num(num_rows)
    drawn: dict[int, HistoryRow] = {}
    for index in random_order(num_source, seed):
        row = make(index)
        if row is not None:
            drawn[index] = row
        if len(drawn) == num_rows:
            break
    if not drawn:
        raise ValueError(f"None of the {num_source} {what} can be used; the log says why.")
    rows = [drawn[index] for index in sorted(drawn)]
    if num_rows is not None and len(rows) < num_rows and not by_default:
        logger.warning(f"There are {len(rows)} usable {what} and not {num_rows}: all are taken.")
    drawn_of = f"{len(rows)} of {num_source} {what}"
    if by_default and num_rows is not None and len(rows) == num_rows < num_source:
        logger.warning(f"{drawn_of} are drawn, the paper's number. `num_rows='all'` takes all.")
    logger.info(f"{drawn_of}, seed {seed}, ids {ids_hash(row.id for row in rows)}")
    return rows


def ids_hash(ids: Iterable[str]) -> str:
    """12 hexadecimal digits that tell one list of ids from another."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:12]


def _check_num(num: int | None) -> None:
    if num is not None and (not isinstance(num, int) or num < 1):
        raise ValueError(f"The number of rows to draw is {num!r}. Write a positive number.")


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}). Give a JSON or JSONL file.") from None


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"{path}, line {line}: this is not JSON ({error.msg}, character {error.colno} of the line). If the file was "
            "downloaded, its end may be missing: download it again."
        ) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '…'}"
