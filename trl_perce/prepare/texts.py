# SPDX-License-Identifier: Apache-2.0

"""Texts of authors (mails, posts, reviews) → rows: one is left out and becomes the response, the others are the history."""

from collections import defaultdict
from dataclasses import dataclass

from ..benchmarks.reading import Skips
from ..history.entries import HistoryEntry, HistoryRow, folded
from ..persona.marks import PLACEHOLDER
from .arguments import PrepareArguments
from .columns import Columns
from .loaded import Loaded, first_message, why_not, with_persona
from .tables import Record


_LEADS = {True: f"What this author wrote before:\n\n{PLACEHOLDER}", False: f"About the author:\n{PLACEHOLDER}"}
_TITLED = 'Write the text that this author writes under the title "{query}".'
_OPENED = 'Go on with the text that this author begins with "{query}".'


@dataclass(frozen=True)
class _Text:
    record: Record
    number: int
    title: str
    text: str
    folded: str
    time: float | None


def load_texts(records: list[Record], columns: Columns, args: PrepareArguments, skips: Skips) -> Loaded:
    """
    Rows of texts.

    Args:
        records (`list[Record]`): A text each.
        columns ([`Columns`]): Of the records.
        args ([`PrepareArguments`]): Says which rows.
        skips ([`~trl_perce.benchmarks.reading.Skips`]): Counts what is left out.

    Returns:
        [`Loaded`]: The rows. Where there are times, a row's history is what is earlier; else all other texts of the author.

    Raises:
        `ValueError`: There is no column of users or texts, or a time cannot be read; the message names the file, row and column.
    """
    user_column = columns.need("user", "the author's, by which splits are made")
    text_column = columns.need("text", "the texts'")
    title_column, time_column = columns.find("title"), columns.find("time")
    loaded = Loaded(
        "texts",
        columns=columns.used,
        from_history=args.persona_column is None and args.persona_template is None,
    )
    if time_column is None and loaded.from_history:
        loaded.notes.append("No column of times: the history of a text is all other texts of its author.")
    texts: dict[str, list[_Text]] = defaultdict(list)
    for number, record in enumerate(records):
        user, text = columns.user(record, user_column), columns.text(record, text_column)
        time = columns.time(record, time_column)
        if user is None:
            skips.add("the user is empty")
        elif not text:
            skips.add("the text is empty")
        elif time_column is not None and time is None:
            skips.add("a text without a time")
        else:
            texts[user].append(_Text(record, number, columns.text(record, title_column), text, folded(text), time))
    for user, own in texts.items():
        own.sort(key=lambda one: one.time or 0.0)
        seen: set[str] = set()
        for one in own:
            if one.folded in seen:
                skips.add("the same text of an author once more")
                continue
            seen.add(one.folded)
            row = _row(user, one, own, loaded.from_history, args, skips)
            if row is not None:
                made = with_persona(row, columns.persona([one.record]), skips)
                loaded.rows += [made] if made is not None else []
    return loaded


def _row(
    user: str, one: _Text, own: list[_Text], from_history: bool, args: PrepareArguments, skips: Skips
) -> HistoryRow | None:
    query, response, wording = one.title, one.text, _TITLED
    if not query:  # the prompt gives the beginning, and the rest is the response
        words = one.text.split(maxsplit=args.opening_words)
        query, response, wording = (
            " ".join(words[: args.opening_words]),
            "".join(words[args.opening_words :]),
            _OPENED,
        )
        if not response:
            skips.add(f"a text without a title has {args.opening_words} words or fewer (`opening_words`)")
            return None
    reason = why_not([query], response, args)
    if reason is not None:
        skips.add(reason)
        return None
    history: list[HistoryEntry] = []
    known = {one.folded}
    for other in reversed(own if from_history else []):  # the latest first
        is_later = one.time is not None and other.time is not None and other.time >= one.time
        if is_later or other.folded in known:
            continue
        known.add(other.folded)
        text = f"{other.title}\n{other.text}" if other.title else other.text
        history.append(HistoryEntry(text, text, response=other.text, time=other.time))
        if len(history) == args.max_history:
            break
    return HistoryRow(
        id=str(one.number),
        user=user,
        prompt=(
            {
                "role": "user",
                "content": first_message(args, f"{_LEADS[from_history]}\n\n{wording}", query),
            },
        ),
        response=response,
        history=tuple(reversed(history)),
        search=query,
        time=one.time if history else None,
    )
