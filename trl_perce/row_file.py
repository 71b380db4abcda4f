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

"""Rows on disk: whole lines, one after the other, so that a run that was killed goes on where it stopped."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .files import keep_settings, read_lines, whole_lines


class RowFile:
    """
    A file of JSON lines, one a row of a dataset, each with the row's index as `"row"`. Until all rows are there, its name ends with
    `.part`, and its lines stand in the order in which they were made.

    Args:
        folder (`str` or `Path`): Folder of the file; it is made if it is not there. It holds one such file.
        name (`str`): Name of the file, such as `"scores.jsonl"`.
        settings (`dict[str, Any]`): Everything that the rows depend on, as JSON takes it; kept in `settings.json`.

    Attributes:
        done (`set[int]`): Indices of the rows that are there.

    Raises:
        `ValueError`: The folder has rows that were made with other settings; the message says which differ.
    """

    def __init__(self, folder: str | Path, name: str, settings: dict[str, Any]):
        self.folder = Path(folder)
        self.path = self.folder / name
        self.part = self.folder / f"{name}.part"
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_settings(self.folder / "settings.json", settings, self.path.is_file() or self.part.is_file())
        self.done = {line["row"] for line in self.lines()} if self.path.is_file() else set(self._read_part())

    @property
    def is_finished(self) -> bool:
        """Whether all rows are there, in order."""
        return self.path.is_file()

    def lines(self) -> Iterator[dict[str, Any]]:
        """The lines of the finished file, in order."""
        return read_lines(self.path)

    def append_lines(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write lines as they come, each as a whole."""
        with open(self.part, "a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                self.done.add(line["row"])

    def finish(self) -> None:
        """Put the rows in order and give the file its name. Does nothing where that is done."""
        if self.is_finished:
            return
        starts = self._read_part()
        unsorted = self.path.with_name(f"{self.path.name}.sorted")
        with open(self.part, "rb") as part, open(unsorted, "wb") as file:
            for row in sorted(starts):
                part.seek(starts[row])
                file.write(part.readline())
        os.replace(unsorted, self.path)
        self.part.unlink()

    def _read_part(self) -> dict[int, int]:
        """Where each row's line starts, in bytes. A last line that is not whole is cut off."""
        return {json.loads(line)["row"]: start for start, line in whole_lines(self.part)}


def remove_rows(folder: str | Path, name: str) -> None:
    """Remove what a [`RowFile`] has written to a folder."""
    for file in (name, f"{name}.part", "settings.json"):
        (Path(folder) / file).unlink(missing_ok=True)
