# SPDX-License-Identifier: Apache-2.0

"""Scores on disk ([`RowFile`])."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..utils.files import read_lines
from ..utils.row_file import RowFile, remove_rows
from .scores import TokenScores


_NAME = "scores.jsonl"


class ScoreFile(RowFile):
    """
    `scores.jsonl` of a folder, one row of [`TokenScores`] a line. Until all rows are there, it is called `scores.jsonl.part`, whose
    rows stand in the order in which they were scored.

    Args:
        folder (`str` or `Path`): Folder of the file; it is made if it is not there.
        settings (`dict[str, Any]`): Everything that the scores depend on, as JSON takes it; kept in `settings.json`.

    Raises:
        `ValueError`: The folder has scores that were made with other settings; the message says which differ.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        super().__init__(folder, _NAME, settings)

    def __iter__(self) -> Iterator[TokenScores]:
        """The rows of the finished file, in order."""
        return map(TokenScores.from_dict, self.lines())

    def append(self, rows: Iterable[TokenScores]) -> None:
        """Write rows as they come, each as a whole line."""
        self.append_lines(scores.to_dict() for scores in rows)


def read_scores(folder: str | Path) -> Iterator[TokenScores]:
    """The rows of a folder's finished `scores.jsonl`, in order."""
    return map(TokenScores.from_dict, read_lines(Path(folder) / _NAME))


def remove_scores(folder: str | Path) -> None:
    """Remove what a [`ScoreFile`] has written to a folder."""
    remove_rows(folder, _NAME)
