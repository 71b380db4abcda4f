# SPDX-License-Identifier: Apache-2.0

"""Files that are written whole or not at all, and files that grow by whole lines."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


def is_disk_error(error: BaseException) -> bool:
    """
    Tell a file that cannot be written (full disk, quota, limit, read-only, no permission) from what else an `OSError` may be.

    Args:
        error (`BaseException`): Any error.

    Returns:
        `bool`: Whether it is one.
    """
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """
    A path beside `path` to write to. When the block ends it takes the place of `path`; when the block fails it is removed,
    and what stood at `path` is still there.

    Args:
        path (`str` or `Path`): Where the file shall be. Its folder is made if there is none.

    Yields:
        `Path`: Where to write it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """
    Write a text whole or not at all ([`written_whole`]), in UTF-8 and with `\\n` at the ends of lines.

    Args:
        path (`str` or `Path`): Where to.
        text (`str`): The text. A lone surrogate, which UTF-8 has no bytes for, becomes an escape as in JSON.
    """
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: str | Path, value: Any, indent: int = 2) -> None:
    """
    Write JSON whole or not at all.

    Args:
        path (`str` or `Path`): Where to.
        value (`Any`): What `json` can write.
        indent (`int`, *optional*, defaults to `2`): Spaces of an indentation.
    """
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_json_lines(path: str | Path, rows: Iterable[Any]) -> None:
    """
    Write JSON lines whole or not at all.

    Args:
        path (`str` or `Path`): Where to.
        rows (`Iterable`): A line each, as it comes.
    """
    with (
        written_whole(path) as part,
        open(part, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def fingerprint(value: Any) -> str:
    """
    What tells a value from others.

    Args:
        value (`Any`): As JSON takes it; what it does not take counts by its text.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def find_shipped(path: str) -> str:
    """
    A file that comes with the package, for a path as it stands in the repository: `recipes/…` or `trl_perce/benchmarks/data/…`.

    Args:
        path (`str`): What the user wrote.

    Returns:
        `str`: The path itself, if it exists or nothing of that name is shipped; else where the package has it.
    """
    package = Path(__file__).parent.parent
    first, _, rest = path.partition("/")
    # The wheel has the recipes inside of the package, a checkout beside it
    roots = {"recipes": [package / "recipes", package.parent / "recipes"], "trl_perce": [package]}.get(first, [])
    found = [root / rest for root in roots if rest and (root / rest).exists()]
    return str(found[0]) if found and not Path(path).exists() else path


def read_yaml(path: str | Path) -> Any:
    """
    What a YAML file holds, plain data alone.

    Args:
        path (`str` or `Path`): The file.

    Raises:
        `FileNotFoundError`: There is no such file.
        `ValueError`: It is no YAML, or asks for an object of Python. The message names the file and the place.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def whole_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """
    The lines of a file that grows. A last line that is not whole (a run was killed while it wrote) is cut off the file.

    Args:
        path (`str` or `Path`): The file; there need not be one.

    Yields:
        `tuple[int, bytes]`: Where the line starts, in bytes, and the line with its line break.
    """
    if not Path(path).is_file():
        return
    position = 0
    with open(path, "r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(position)
                return
            yield position, line
            position += len(line)


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """
    The rows of a file of JSON lines that is whole. Line breaks alone part them: `str.splitlines` would part at characters that
    stand in texts, too.

    Args:
        path (`str` or `Path`): The file.

    Yields:
        `dict[str, Any]`: One row a line.
    """
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def keep_settings(path: str | Path, settings: dict[str, Any], started: bool) -> None:
    """
    Write the settings of a run, or, where the run has started before, see that they are still the same.

    Args:
        path (`str` or `Path`): File of the settings, in the folder of the run.
        settings (`dict[str, Any]`): Everything that the results depend on, as JSON takes it.
        started (`bool`): Whether the folder holds results.

    Raises:
        `ValueError`: The results were made with other settings; the message says which differ.
    """
    path, settings = Path(path), json.loads(json.dumps(settings))
    if started and path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        differing = differences(earlier, settings)
        if differing:
            raise ValueError(
                f"{path.parent} holds results that were made with other settings: {'; '.join(differing)}. Choose another "
                "`output_dir`, or set `overwrite` to start over."
            )
    write_json(path, settings)


def differences(kept: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """
    In what two settings differ, for a message.

    Args:
        kept (`dict[str, Any]`): Earlier settings.
        wanted (`dict[str, Any]`): Those of now.
        prefix (`str`, *optional*, defaults to `""`): Of the keys' names.

    Returns:
        `list[str]`: One text for each key, nested ones with dots.
    """
    found = []
    for key in {**kept, **wanted}:
        was, now = kept.get(key), wanted.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            found += differences(was, now, f"{prefix}{key}.")
        elif was != now:
            found.append(f"`{prefix}{key}` was {was!r} and is {now!r}")
    return found
