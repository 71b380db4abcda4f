# SPDX-License-Identifier: Apache-2.0

"""Pieces of Markdown that the reports share."""

from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """
    A table whose columns are numbers, right-aligned, but for the first.

    Args:
        head (`Sequence[str]`): Names of the columns.
        lines (`Sequence[Sequence]`): Cells, as many in each line as in `head`. An `int` gets thousands separators; what a cell
            has of pipes must be escaped, as [`code`] and [`escape`] do.

    Returns:
        `str`: Markdown, without a line break at its end.
    """
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in line] for line in lines]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *cells))


def code(text: Any) -> str:
    """
    As code, which keeps underscores, stars and pipes of names.

    Args:
        text (`Any`): What `str` makes a text of.

    Returns:
        `str`: In backticks, in one line. A backtick becomes an apostrophe.
    """
    text = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"


def escape(text: Any) -> str:
    """
    As plain text of a table's cell, in which nothing is taken for Markdown.

    Args:
        text (`Any`): What `str` makes a text of.

    Returns:
        `str`: In one line, with a backslash before characters that mean something.
    """
    text = " ".join(str(text).split())
    return "".join(f"\\{character}" if character in "\\`*_|<>[]" else character for character in text)
