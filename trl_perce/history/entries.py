# SPDX-License-Identifier: Apache-2.0

"""
What all benchmarks with user histories have in common: a row before retrieval, and the row that is trained or answered.

    benchmarks/*.load() ──► HistoryRow ── retrieval.py ──► entries ── to_example() ──► {"persona", "prompt", "completion"}
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..persona.marks import PLACEHOLDER


# What training takes for marks of the persona, by default
_MARKS = (PLACEHOLDER, "<persona>", "</persona>")
# In words: what makes a quotation, what is hardly the same by chance, and what is no mere title or set phrase
_QUOTATION, _RUN, _LONG = 5, 8, 24
# Share of a near-duplicate. Who ends each review with the same long sentence does not write near-duplicates
_NEAR = 0.8


@dataclass(frozen=True)
class HistoryEntry:
    """
    One thing that a user wrote or did before.

    Attributes:
        text (`str`): The entry as it stands in the prompt.
        search (`str`): What retrieval compares with the query.
        response (`str`, *optional*): The part of the entry that is of the same kind as a row's response (the text of a review,
            an abstract). An entry whose response gives the row's own away ([`gives_away`]) is never retrieved.
        time (`float`, *optional*): When it was written, in any unit that orders. `None` where it is not known.
    """

    text: str
    search: str
    response: str | None = None
    time: float | None = None


@dataclass(frozen=True)
class HistoryRow:
    """
    A query to a model on behalf of a user, with the user's whole history, of which retrieval takes a few entries.

    Attributes:
        id (`str`): Identifies the row within its benchmark.
        user (`str`): Identifies the user.
        prompt (`tuple[dict[str, str], ...]`): Messages `{"role", "content"}`; one of them holds `{persona}`, once.
        response (`str`): The user's own response.
        history (`tuple[HistoryEntry, ...]`): In the order of the source, oldest first where it has one.
        search (`str`): What retrieval compares with the entries.
        time (`float`, *optional*): When the response was written. Entries that are not earlier are never retrieved.
        options (`tuple[str, ...]`, *optional*): Responses to choose from, and
        answer (`int`, *optional*): the index of the one that is right for the user.

    Raises:
        `ValueError`: `{persona}` does not stand in the prompt exactly once, or the response is empty.
    """

    id: str
    user: str
    prompt: tuple[dict[str, str], ...]
    response: str
    history: tuple[HistoryEntry, ...]
    search: str
    time: float | None = None
    options: tuple[str, ...] | None = None
    answer: int | None = None

    def __post_init__(self):
        count = sum(message["content"].count(PLACEHOLDER) for message in self.prompt)
        if count != 1:
            raise ValueError(
                f"Row {self.id!r}: the prompt holds {PLACEHOLDER!r} {count} times. It must occur once, where the history "
                "goes; if the user's own text holds it, leave the row out."
            )
        if not self.response.strip():
            raise ValueError(f"Row {self.id!r}: the response is empty.")


def find_mark(texts: Iterable[str]) -> str | None:
    """
    A mark of the persona that texts of users hold: training would take it for its own.

    Args:
        texts (`Iterable[str]`): Those of a row beside the persona, in which marks stay what they are.

    Returns:
        `str` or `None`: `{persona}`, `<persona>` or `</persona>`.
    """
    texts = list(texts)
    return next((mark for mark in _MARKS if any(mark in text for text in texts)), None)


def folded(text: str) -> str:
    """A text without its case and white space, to tell whether two are the same."""
    return " ".join(text.casefold().split())


def gives_away(response: str, text: str) -> bool:
    """
    Whether a text is a response, quotes it, or is its near-duplicate, such as the same post with another opening.

    Args:
        response (`str`): From [`folded`].
        text (`str`): Likewise.

    Returns:
        `bool`: Whether they are equal; or the text holds the response, if that has five words or more, or four fifths of its words, in
            runs of eight, if it has 24 or more.
    """
    words = response.split()
    if response == text or (len(words) >= _QUOTATION and response in text):
        return True
    if len(words) < _LONG:
        return False
    runs = [words[at : at + _RUN] for at in range(0, len(words), _RUN)]
    return sum(len(run) for run in runs if " ".join(run) in text) >= _NEAR * len(words)


def to_example(row: HistoryRow, entries: Sequence[HistoryEntry]) -> dict[str, Any]:
    """
    The row that [`PerCETrainer`], [`PerContrast`] and `trl-perce evaluate` take.

    Args:
        row ([`HistoryRow`]): The row.
        entries (`Sequence[HistoryEntry]`): What was retrieved of its history, in the order of the prompt.

    Returns:
        `dict[str, Any]`: `id`, `user`, `persona` (the entries, a blank line between them), `prompt`, `completion`, and `options` and
            `answer` where the row has them.
    """
    chosen = {} if row.options is None else {"options": [*row.options], "answer": row.answer}
    return {
        "id": row.id,
        "user": row.user,
        "persona": "\n\n".join(entry.text for entry in entries),
        "prompt": [dict(message) for message in row.prompt],
        "completion": [{"role": "assistant", "content": row.response}],
        **chosen,
    }


def to_examples(rows: Iterable[HistoryRow], retrieved: Iterable[Sequence[int]]) -> list[dict[str, Any]]:
    """
    [`to_example`] of many rows.

    Args:
        rows (`Iterable[HistoryRow]`): The rows.
        retrieved (`Iterable[Sequence[int]]`): For each row, indices into its history, from [`~retrieval.Retriever`].

    Returns:
        `list[dict[str, Any]]`: One row each.
    """
    return [
        to_example(row, [row.history[index] for index in indices])
        for row, indices in zip(rows, retrieved, strict=True)
    ]
