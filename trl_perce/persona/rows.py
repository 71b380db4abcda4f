# SPDX-License-Identifier: Apache-2.0

"""Which row is it, when a table cannot be made of rows? Arrow says what is wrong, but not where."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def find_bad_row(rows: Iterable[Any]) -> str | None:
    """
    The first row that Arrow cannot take, with those before it.

    Args:
        rows (`Iterable`): Rows as `dict`s.

    Returns:
        `str` or `None`: "Row 3: …", with what is wrong; `None` if nothing is.
    """
    kinds: dict[str, tuple[str, int]] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            return f"Row {index}: it is a {type(row).__name__} and must be an object with columns."
        for column, value in row.items():
            text = _broken_text(value)
            if text is not None:
                return (
                    f"Row {index}: column {column!r} holds half of a surrogate pair, which is no character: {_shown(text)}. "
                    "Remove it, or read the text with the right encoding."
                )
            if value is None:
                continue
            kind, first = kinds.setdefault(column, (_kind(value), index))
            if kind != _kind(value):
                return (
                    f"Row {index}: column {column!r} is a {_kind(value)}, while it is a {kind} in row {first}. Write the same "
                    "kind in all rows."
                )
    return None


def find_bad_encoding(path: str | Path) -> str | None:
    """
    Where a text file is not UTF-8. Arrow does not look at that when it reads JSON: the row would fail when it is used.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `str` or `None`: "It is not UTF-8: …", with the first bad byte and how to convert the file; `None` if it is UTF-8.
    """
    position = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            bad = line.find(b"\0")  # ASCII in UTF-16 is valid UTF-8
            encoding = "WINDOWS-1252" if bad < 0 else "UTF-16"
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                bad = error.start
            if bad >= 0:
                return (
                    f"It is not UTF-8: byte {line[bad]:#04x} at position {position + bad}, in line {number}. Save it as UTF-8, or "
                    f"convert it (from {encoding}, as it seems): `iconv -f {encoding} -t UTF-8 {Path(path).name} > "
                    f"utf8{Path(path).suffix}`."
                )
            position += len(line)
    return None


def find_bad_line(path: str | Path) -> str | None:
    """
    As [`find_bad_row`], of a file of JSON lines, or of one JSON list of rows.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `str` or `None`: What is wrong, with the number of the line, from 1 on.
    """
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        if file.read(1) == "[":  # one list of rows
            try:
                return find_bad_row(json.loads("[" + file.read()))
            except json.JSONDecodeError as error:
                return f"Line {error.lineno} is no JSON ({error.msg}, character {error.colno})."
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                return f"Line {number} is no JSON ({error.msg}, character {error.colno}): {_shown(line.strip())}."
    found = find_bad_row(rows)
    if found is None:
        return None
    index, _, what = found.removeprefix("Row ").partition(":")
    return f"Line {int(index) + 1}:{what}"


# Columns of other formats, the likelier ones first
PROMPTS = ("instruction", "question", "query", "input", "user", "problem", "prompt")
RESPONSES = ("output", "answer", "response", "target", "solution", "chosen", "assistant", "completion")
# A column of a history → the format of `trl-perce prepare` that reads such files
HISTORIES = {
    **{"history": "rows", "reviews": "reviews", "posts": "posts", "user_2_persona": "chats", "profile": "lamp"},
    "preference": "preferences",
}


def suggest_columns(columns: Iterable[str]) -> str:
    """
    What to do with a row of another format.

    Args:
        columns (`Iterable[str]`): The names of its columns.

    Returns:
        `str`: " Rename …", with a space in front; empty if nothing is known of them.
    """
    columns = [*columns]
    if "messages" in columns or {"prompt", "completion"} <= {*columns}:
        return ""
    kind = next((kind for column, kind in HISTORIES.items() if column in columns), None)
    if kind is not None:
        return (
            f" This looks like a file of users' histories: `trl-perce prepare FILES --format {kind} --output_dir data/mine` makes "
            "rows of it."
        )
    prompt = next((name for name in PROMPTS if name in columns), None)
    response = next((name for name in RESPONSES if name in columns), None)
    if prompt is None or response is None:
        return ""
    renamed = [
        f"{name!r} to {ours!r}" for name, ours in ((prompt, "prompt"), (response, "completion")) if name != ours
    ]
    also = ", with 'input' behind it" if prompt == "instruction" and "input" in columns else ""
    return f" Rename {' and '.join(renamed)}{also}."


def _broken_text(value: Any) -> str | None:
    """The first text in a value that UTF-8 cannot hold."""
    if isinstance(value, str):
        return value if any("\ud800" <= character <= "\udfff" for character in value) else None
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((text for text in map(_broken_text, parts) if text is not None), None)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "truth value"
    names = {str: "text", int: "number", float: "number", list: "list", tuple: "list", dict: "object"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")
