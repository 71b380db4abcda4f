# SPDX-License-Identifier: Apache-2.0

"""Rows of all users before they are split: what the formats hand over."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ..benchmarks.reading import Skips
from ..history.entries import HistoryEntry, HistoryRow, find_mark, folded, gives_away
from ..persona.marks import PLACEHOLDER
from .arguments import PrepareArguments


NO_PERSONA = "the persona is empty"
NO_HISTORY = "the user wrote nothing else, or nothing earlier"
NO_OTHER_HISTORY = "what else the user wrote holds the response or is not earlier"


@dataclass
class Loaded:
    """
    Rows of records.

    Attributes:
        format (`str`): What the records are.
        rows (`list[HistoryRow]`): In the order of the source. Where the persona is given, it is the only entry of the history.
        columns (`dict[str, str]`): What a column was found for → its name.
        groups (`list[set[str]]`): Users who talk with each other, and so belong in the same split.
        from_history (`bool`): Whether entries are still to be retrieved.
        notes (`list[str]`): What the user should know of how it was read.
    """

    format: str
    rows: list[HistoryRow] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    groups: list[set[str]] = field(default_factory=list)
    from_history: bool = True
    notes: list[str] = field(default_factory=list)


def first_message(args: PrepareArguments, default: str, query: str) -> str:
    """
    The message that the persona stands in.

    Args:
        args ([`PrepareArguments`]): May have a `prompt_template`.
        default (`str`): Template otherwise, with `{persona}` and `{query}`.
        query (`str`): What goes into the place of `{query}`. It holds no `{persona}` ([`why_not`] has looked).
    """
    return (args.prompt_template or default).replace("{query}", query)


def why_not(texts: Iterable[str], response: str, args: PrepareArguments) -> str | None:
    """
    Why a row cannot be made of texts.

    Args:
        texts (`Iterable[str]`): Those of the prompt, without the persona.
        response (`str`): The response.
        args ([`PrepareArguments`]): Has `max_words`.

    Returns:
        `str` or `None`: The reason, as it is counted; `None` if there is none.
    """
    if not response.strip():
        return "the response is empty"
    if args.max_words is not None and len(response.split()) > args.max_words:
        return f"the response is longer than {args.max_words} words (`max_words`)"
    if mark := find_mark([*texts, response]):
        return f"the prompt or the response holds {mark!r}"
    return None


def with_persona(row: HistoryRow, persona: str | None, skips: Skips) -> HistoryRow | None:
    """
    The row with its given persona; `None`, and counted, where there is none or it holds the response, or all entries of the history do.

    Args:
        row ([`~trl_perce.history.entries.HistoryRow`]): Its history is that of the user.
        persona (`str`, *optional*): The persona; if `None`, it is still to be retrieved from the history.
        skips ([`~trl_perce.benchmarks.reading.Skips`]): Counts.
    """
    if persona is None:
        response = folded(row.response)
        if any(entry.response is None or not gives_away(response, folded(entry.response)) for entry in row.history):
            return row
        skips.add(NO_OTHER_HISTORY if row.history else NO_HISTORY)
        return None
    if not persona.strip():
        skips.add(NO_PERSONA)
        return None
    if gives_away(folded(row.response), folded(persona)):
        skips.add("the persona holds the response, or nearly all of it")
        return None
    return replace(row, history=(HistoryEntry(persona, persona),), time=None)


DEFAULT_NOTES = f"About the user:\n{PLACEHOLDER}\n\n{{query}}"
