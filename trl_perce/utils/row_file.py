# SPDX-License-Identifier: Apache-2.0

"""Rows on disk: whole lines, one after the other, so that a run that was killed goes on where it stopped."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from glob import escape
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .files import keep_settings, read_lines, whole_lines
from .share import Share


class RowFile:
    """
    A file of JSON lines, one a row of a dataset, each with the row's index as `"row"`. Until all rows are there, its name ends with
    `.part`, and its lines stand in the order in which they were made.

    On several processes (Accelerate) all of them make it, append to it and finish it. Each appends to a file of its own (`.part`, `.part-1`,
    …), the main one makes one file of them. What any number of processes has left, any other number goes on with.

    Args:
        folder (`str` or `Path`): Folder of the file; it is made if it is not there. It holds one such file.
        name (`str`): Name of the file, such as `"scores.jsonl"`.
        settings (`dict[str, Any]`): Everything that the rows depend on, as JSON takes it; kept in `settings.json`.

    Attributes:
        done (`set[int]`): Indices of the rows that are there: of all processes, once it is made and once it is finished; between, those
            that were there before, and this process's.
        is_finished (`bool`): Whether all rows are there, in order.

    Raises:
        `ValueError`: The folder has rows that were made with other settings; the message says which differ.
    """

    def __init__(self, folder: str | Path, name: str, settings: dict[str, Any]):
        state = PartialState()
        self.folder = Path(folder)
        self.path = self.folder / name
        suffix = "" if state.is_main_process else f"-{state.process_index}"
        self.part = self.folder / f"{name}.part{suffix}"
        found: list[Any] = [None, None]
        self._sizes: dict[Path, int] = {}
        if state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            is_finished = self.path.is_file()
            keep_settings(self.folder / "settings.json", settings, is_finished or bool(self._parts()))
            found = [is_finished, [line["row"] for line in self.lines()] if is_finished else [*self._read_parts()]]
            if is_finished:  # a run that was killed at its very end may have left them
                _remove_parts(self.folder, name)
            self._sizes = {part: part.stat().st_size for part in self._parts()}
        # One view of what is done, or a row would be nobody's
        self.is_finished, rows = broadcast_object_list(found)
        self.done = set(rows)
        self._own: list[int] = []

    def lines(self) -> Iterator[dict[str, Any]]:
        """The lines of the finished file, in order."""
        return read_lines(self.path)

    def share(self) -> Share:
        """This process's share of the rows that are not there."""
        state = PartialState()
        return Share(state.process_index, state.num_processes, self._count_elsewhere)

    def _count_elsewhere(self) -> int:
        """How many rows the other processes have finished since this was last called."""
        finished = 0
        for part in self._parts():
            start = self._sizes.get(part, 0)
            if part != self.part and part.stat().st_size > start:
                with open(part, "rb") as file:
                    file.seek(start)
                    added = file.read()
                self._sizes[part] = start + len(added)
                finished += added.count(b"\n")
        return finished

    def append_lines(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write lines as they come, each as a whole."""
        with open(self.part, "a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                self.done.add(line["row"])
                self._own.append(line["row"])

    def finish(self) -> None:
        """
        Put the rows of all processes in order and give the file its name. Does nothing where that is done.

        Raises:
            `OSError`: The main process does not find what another has written, which is on a machine with other disks.
        """
        if self.is_finished:
            return
        written = gather_object(self._own)  # waits for all
        self.done.update(written)
        self.is_finished = True
        if not PartialState().is_main_process:
            return
        places = self._read_parts()
        if missing := {*written} - places.keys():
            raise OSError(
                f"{self.folder} lacks {len(missing)} rows that other processes have written. On several machines, give an "
                "`output_dir` that all of them share."
            )
        unsorted = self.path.with_name(f"{self.path.name}.sorted")
        with ExitStack() as stack, open(unsorted, "wb") as file:
            parts = {part: stack.enter_context(open(part, "rb")) for part in self._parts()}
            for row in sorted(places):
                part, start = places[row]
                parts[part].seek(start)
                file.write(parts[part].readline())
        os.replace(unsorted, self.path)
        _remove_parts(self.folder, self.path.name)

    def _parts(self) -> list[Path]:
        return _find_parts(self.folder, self.path.name)

    def _read_parts(self) -> dict[int, tuple[Path, int]]:
        """Where each row's line is: the file, and its start in bytes. A last line that is not whole is cut off."""
        return {json.loads(line)["row"]: (part, start) for part in self._parts() for start, line in whole_lines(part)}


def remove_rows(folder: str | Path, name: str) -> None:
    """Remove what a [`RowFile`] has written to a folder. Of several processes, the main one does."""
    if PartialState().is_main_process:
        _remove_parts(Path(folder), name)
        for file in (name, "settings.json"):
            (Path(folder) / file).unlink(missing_ok=True)


def _remove_parts(folder: Path, name: str) -> None:
    for part in _find_parts(folder, name):
        part.unlink()


def _find_parts(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{escape(name)}.part*"))
