# SPDX-License-Identifier: Apache-2.0

"""Which column of the records is what, and the persona that columns hold."""

import difflib
from collections.abc import Iterable
from typing import Any

from ..benchmarks.reading import to_days
from ..persona.marks import is_missing
from ..persona.rows import HISTORIES, PROMPTS, RESPONSES
from .arguments import PrepareArguments, placeholders
from .secrets import Secrets
from .tables import Record


# What a column is for → its usual names, the likelier ones first
NAMES = {
    "user": ("user_id", "userid", "user", "author", "author_id", "sender", "from", "speaker", "reviewer", "username"),
    "text": ("text", "content", "body", "message", "post", "review", "reviewText", "review_body", "comment"),
    "title": ("title", "subject", "summary", "headline"),
    "time": ("time", "timestamp", "date", "datetime", "created_at", "sent_at", "unixReviewTime", "create_time"),
    "role": ("role",),
    "conversation": ("conversation_id", "conversation", "session_id", "session", "thread_id", "chat_id", "dialog_id"),
    "prompt": ("prompt", *(name for name in PROMPTS if name != "user")),
    "response": RESPONSES,
}


class Columns:
    """
    The columns of records: those that are named, else those of the usual names.

    Args:
        records (`list[Record]`): All records.
        args ([`PrepareArguments`]): Names columns.
        secrets ([`Secrets`]): Every text goes through it.

    Attributes:
        names (`list[str]`): Columns that some record has.
        used (`dict[str, str]`): What a column was found for → its name.

    Raises:
        `ValueError`: A column that is named is not there; the message says which are.
    """

    def __init__(self, records: list[Record], args: PrepareArguments, secrets: Secrets):
        self.args, self.secrets = args, secrets
        self.names = [*dict.fromkeys(column for record in records for column in record.values)]
        self.used: dict[str, str] = {}
        for kind in (*NAMES, "persona"):
            if given := getattr(args, f"{kind}_column"):
                self._check(given, f"{kind}_column")
        if args.persona_column:
            self.used["persona"] = args.persona_column
        for column in placeholders(args.persona_template or "", "persona_template"):
            self._check(column, "persona_template")

    def _check(self, column: str, argument: str) -> None:
        if column not in self.names:
            nearest = difflib.get_close_matches(column, self.names, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"`{argument}` names the column {column!r}, which is not there.{hint} {self.there()}")

    def there(self) -> str:
        """The sentence that names the columns."""
        return f"Columns that are there: {', '.join(map(repr, self.names[:20]))}."

    def find(self, kind: str) -> str | None:
        """
        The column of a kind, if there is one.

        Args:
            kind (`str`): A key of `NAMES`.
        """
        lower = {name.lower(): name for name in reversed(self.names)}
        persona = self.args.persona_column
        usual = (lower.get(name.lower()) for name in NAMES[kind])
        found = getattr(self.args, f"{kind}_column") or next((n for n in usual if n and n != persona), None)
        if found is not None:
            self.used[kind] = found
        return found

    def need(self, kind: str, why: str) -> str:
        """
        As [`find`].

        Raises:
            `ValueError`: There is none.
        """
        found = self.find(kind)
        if found is None:
            raise ValueError(f"No column is {why}. Name it with `--{kind}_column`. {self.there()}")
        return found

    def text(self, record: Record, column: str | None) -> str:
        """The text of a cell, secrets counted or masked; empty where it is missing or not asked for."""
        value = record.values.get(column) if column is not None else None
        return "" if value is None or value != value else self.secrets.clean(str(value).strip())

    def user(self, record: Record, column: str) -> str | None:
        """The name of the record's user, if it has one."""
        value = record.values.get(column)
        return None if is_missing(value) else self.secrets.name(str(value))

    def time(self, record: Record, column: str | None) -> float | None:
        """Days since the start of year 1, if the record has a time."""
        value = record.values.get(column) if column is not None else None
        if is_missing(value):
            return None
        if isinstance(value, str) and value.replace(".", "", 1).isdigit():
            value = float(value)  # a number of a CSV file
        where = f"{record.where}, column {column!r}"
        return to_days(value if isinstance(value, int | float) else str(value), where)

    def persona(self, records: Iterable[Record]) -> str | None:
        """
        The persona that columns hold: of the first of some records that has one.

        Args:
            records (`Iterable[Record]`): Those of a conversation, or one.

        Returns:
            `str` or `None`: Empty where it is missing; `None` where the persona is the history.
        """
        column, template = self.args.persona_column, self.args.persona_template
        if column is None and template is None:
            return None
        made = (self._persona(record, column, template) for record in records)
        return self.secrets.clean(next((text for text in made if text), ""))

    def _persona(self, record: Record, column: str | None, template: str | None) -> str:
        if column is not None:
            return _joined(record.values.get(column))
        assert template is not None
        names = placeholders(template, "persona_template")
        values = {name: _joined(record.values.get(name)) for name in names}
        return template.format_map(values) if all(values.values()) else ""


def _joined(value: Any) -> str:
    """A text, or a list of texts as lines."""
    values = value if isinstance(value, list) else [value]
    return "\n".join(str(item).strip() for item in values if not is_missing(item))


def choose_format(columns: Columns) -> str:
    """
    The format that the columns' names tell.

    Args:
        columns ([`Columns`]): Of the records.

    Raises:
        `ValueError`: They tell none.
    """
    for name in ("messages", "conversations"):
        if name in columns.names:
            return name
    for column, name in HISTORIES.items():
        if column in columns.names:
            return name
    if columns.find("text") and (columns.find("role") or columns.find("conversation")):
        return "flat"
    if columns.find("text"):
        return "texts"
    if columns.find("prompt") and columns.find("response"):
        return "pairs"
    raise ValueError(
        "The columns' names do not tell what the records are. Give `--format`, or name the column of the texts "
        f"(`--text_column`), or of prompts and responses. {columns.there()}"
    )
