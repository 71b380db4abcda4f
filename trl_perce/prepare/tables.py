# SPDX-License-Identifier: Apache-2.0

"""Files, folders and globs of JSON lines, JSON, CSV, Parquet and mails → records."""

import csv
import gzip
import io
import json
import mailbox
import re
from collections.abc import Iterator
from email import message_from_bytes, policy
from email.message import EmailMessage
from email.utils import parseaddr
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from ..benchmarks.reading import parse_records


# Byte order marks, the longer ones first
_MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
# What mail programs write before the text that they quote
_ATTRIBUTION = re.compile(r"^(On|Am|Le|El|Il|Op|Den) .{0,200}:$|^-{2,} ?(Original|Forwarded) .*$", re.MULTILINE)


class Record(NamedTuple):
    """
    A record of a file.

    Attributes:
        where (`str`): File and number of the record, from 1 on, for messages.
        values (`dict[str, Any]`): Value of each column.
    """

    where: str
    values: dict[str, Any]


def find_files(sources: list[str]) -> list[Path]:
    """
    The data files that are meant.

    Args:
        sources (`list[str]`): Files, folders (with those below them) and globs.

    Returns:
        `list[Path]`: In order, each once.

    Raises:
        `FileNotFoundError`: There is no such file, or no data file in a folder.
        `ValueError`: A file is of an unknown kind.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if _kind(file) and not _is_hidden(file, path)]
            if not found:
                raise FileNotFoundError(f"The folder {source!r} holds no data file. Known are {', '.join(_READERS)}.")
        elif path.is_file():
            if _kind(path) is None:
                raise ValueError(f"{source!r} is not of a known kind of file: {', '.join(_READERS)}, also with .gz.")
            found = [path]
        else:
            found = [Path(name) for name in sorted(glob(str(path), recursive=True)) if _kind(Path(name))]
            if not found:
                raise FileNotFoundError(f"There is no file, folder or glob {source!r} (seen from {Path.cwd()}).")
        files += found
    return [*dict.fromkeys(files)]


def read_files(files: list[Path], encoding: str | None = None) -> tuple[list[Record], dict[str, str]]:
    """
    Read data files.

    Args:
        files (`list[Path]`): From [`find_files`].
        encoding (`str`, *optional*): Of text files. By default the one of the byte order mark, else UTF-8, else UTF-16 where there are
            zero bytes, else Windows-1252.

    Returns:
        `tuple[list[Record], dict[str, str]]`: The records, and the encoding of each file whose text is not UTF-8.

    Raises:
        `ValueError`: A file cannot be read; the message names the file and, where it can, the line.
    """
    records, encodings = [], {}
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".gz":
            try:
                content = gzip.decompress(content)
            except (OSError, EOFError) as error:
                raise ValueError(f"{path} cannot be unpacked: {error}. Was it downloaded whole?") from None
        kind, text = _kind(path), ""
        if kind not in _BINARY:
            text, used = _decode(content, path, encoding)
            if used not in ("utf-8", "utf-8-sig"):
                encodings[str(path)] = used
        rows = _READERS[kind](path, content, text)  # type: ignore[index]
        records += [Record(f"{path}, record {number}", row) for number, row in enumerate(rows, start=1)]
    if not records:
        raise ValueError(f"There is no record in {', '.join(map(str, files[:3]))}.")
    return records, encodings


def _kind(path: Path) -> str | None:
    packed = path.suffix == ".gz"
    suffix = (Path(path.stem).suffix if packed else path.suffix).lower()
    is_known = suffix in _READERS and not (packed and suffix == ".mbox")  # which is read from the file
    return suffix if is_known and path.is_file() else None


def _is_hidden(file: Path, folder: Path) -> bool:
    return file.name == "prepare.json" or any(part.startswith(".") for part in file.relative_to(folder).parts)


def _decode(content: bytes, path: Path, encoding: str | None) -> tuple[str, str]:
    marked = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
    zeros = "utf-16-le" if b"\0" in content[1:64:2] else "utf-16-be" if b"\0" in content[:64:2] else None
    for name in [encoding] if encoding else [marked or zeros or "utf-8", "cp1252"]:
        try:
            return content.decode(name), name
        except LookupError:
            raise ValueError(
                f"`encoding` is {name!r}, which Python does not know. Write one such as 'cp1252'."
            ) from None
        except UnicodeDecodeError as error:
            problem = f"byte {content[error.start]:#04x} at position {error.start}"
    raise ValueError(f"{path} is not text in {encoding or 'UTF-8 or Windows-1252'}: {problem}. Name its `encoding`.")


def _read_json(path: Path, content: bytes, text: str) -> list[dict[str, Any]]:
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None  # JSON lines, or a mistake, which is told below
    if isinstance(whole, dict):  # a record, or what an export wraps its records in
        lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        is_record = any(name in whole for name in ("messages", "user", "user_id"))
        return lists[0] if len(lists) == 1 and not is_record else [whole]
    return parse_records(text, path)


def _read_csv(path: Path, content: bytes, text: str) -> list[dict[str, Any]]:
    import pandas

    head = text.split("\n", 1)[0]
    delimiter = max(",;\t|", key=head.count)  # the first of those that stand there as often
    try:
        table = pandas.read_csv(
            io.StringIO(text), sep=delimiter, dtype=str, keep_default_na=False, quoting=csv.QUOTE_MINIMAL
        )
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError) as error:
        raise ValueError(f"{path} cannot be read, with {delimiter!r} between columns: {str(error).strip()}") from None
    return [{column: _cell(value) for column, value in row.items() if value != ""} for row in table.to_dict("records")]


def _cell(value: str) -> Any:
    """A list in a cell of a CSV file is written as JSON."""
    if value[:1] == "[" and value[-1:] == "]":
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value


def _read_parquet(path: Path, content: bytes, text: str) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _read_mail(path: Path, content: bytes, text: str) -> list[dict[str, Any]]:
    return [_mail(message_from_bytes(content, policy=policy.default))]


def _read_mailbox(path: Path, content: bytes, text: str) -> Iterator[dict[str, Any]]:
    for mail in mailbox.mbox(path, create=False):
        yield _mail(message_from_bytes(mail.as_bytes(), policy=policy.default))


def _mail(mail: EmailMessage) -> dict[str, Any]:
    """Sender, subject, time and what the sender wrote: what is quoted, and a signature, are left out."""
    body = mail.get_body(("plain",))
    try:
        text = body.get_content() if body is not None else ""
    except LookupError:  # a charset that there is not
        text = body.get_payload(decode=True).decode("latin-1")  # type: ignore[union-attr]
    text = re.split(r"^-- $", text.replace("\r\n", "\n"), maxsplit=1, flags=re.MULTILINE)[0]
    text = _ATTRIBUTION.sub("", "\n".join(line for line in text.split("\n") if not line.startswith(">")))
    date = mail["date"].datetime if mail["date"] is not None else None
    return {
        "user": parseaddr(str(mail["from"] or ""))[1].lower() or None,
        "subject": str(mail["subject"] or "").strip() or None,
        "text": re.sub(r"\n{3,}", "\n\n", text).strip(),
        "time": date.isoformat() if date is not None else None,
    }


def _read_text(path: Path, content: bytes, text: str) -> list[dict[str, Any]]:
    return [{"user": path.parent.name, "text": text.strip()}]


_READERS = {
    **{".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet},
    **{".eml": _read_mail, ".mbox": _read_mailbox, ".txt": _read_text},
}
_BINARY = (".parquet", ".eml", ".mbox")
