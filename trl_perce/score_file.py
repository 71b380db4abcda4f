# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Scores on disk: whole rows, one after the other, so that a run that was killed goes on where it stopped."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import keep_settings, whole_lines
from .scores import TokenScores


class ScoreFile:
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
        self.folder = Path(folder)
        self.path = self.folder / "scores.jsonl"
        self.part = self.folder / "scores.jsonl.part"
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_settings(self.folder / "settings.json", settings, self.path.is_file() or self.part.is_file())
        self.done = {scores.row for scores in self} if self.path.is_file() else set(self._read_part())

    def __iter__(self) -> Iterator[TokenScores]:
        """The rows of the finished file, in order."""
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                yield TokenScores.from_dict(json.loads(line))

    def append(self, rows: Iterator[TokenScores]) -> None:
        """Write rows as they come, each as a whole line."""
        with open(self.part, "a", encoding="utf-8") as file:
            for scores in rows:
                file.write(json.dumps(scores.to_dict(), ensure_ascii=False) + "\n")
                file.flush()
                self.done.add(scores.row)

    def finish(self) -> None:
        """Put the rows in order and give the file its name. Does nothing where that is done."""
        if self.path.is_file():
            return
        starts = self._read_part()
        unsorted = self.folder / "scores.jsonl.sorted"
        with open(self.part, "rb") as part, open(unsorted, "wb") as file:
            for row in sorted(starts):
                part.seek(starts[row])
                file.write(part.readline())
        os.replace(unsorted, self.path)
        self.part.unlink()

    def _read_part(self) -> dict[int, int]:
        """Where each row's line starts, in bytes. A last line that is not whole is cut off."""
        return {json.loads(line)["row"]: start for start, line in whole_lines(self.part)}


def remove_scores(folder: str | Path) -> None:
    """Remove what a [`ScoreFile`] has written to a folder."""
    for name in ("scores.jsonl", "scores.jsonl.part", "settings.json"):
        (Path(folder) / name).unlink(missing_ok=True)
