# SPDX-License-Identifier: Apache-2.0

"""
Histories in local files: a user's own (`rows`), and three formats of public data (`reviews`, `posts`, `chats`).

A folder holds `train.jsonl` and `test.jsonl`, and `validation.jsonl` where there is one. A line is

- `rows`: `{"user", "history", "query", "response"}`, and `"id"`, `"time"` if there are any. An entry of `history` is a text,
  or `{"text"}` with `"time"`, `"search"` if there are any. `query` is a text or a list of messages.
- `reviews`: a reviewer, `{"reviews": [{"overall", "summary", "description", "reviewText"}, …]}`. One review is left out and
  becomes the response, the others are the history (as LongLaMP's product reviews).
- `posts`: an author, `{"posts": [{"forum", "post"}, …]}`: likewise; the query gives the post's first ten words.
- `chats`: a conversation, `{"user_2_persona": [sentence, …], "conversation": [{"user": 1 or 2, "text"}, …]}`. Replies of the
  second user become responses, that user's sentences are the history.

The wording of the prompts is ours.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from ..history.entries import HistoryEntry, HistoryRow, find_mark
from .reading import Skips, read_records, sample


logger = logging.getLogger(__name__)

OPENING_WORDS = 10


def load(
    split: str,
    path: str | Path,
    format: str = "rows",
    num_rows: int | None = None,
    rows_per_user: int | None = 2,
    turns: int = 3,
    max_words: int | None = None,
    seed: int = 0,
) -> list[HistoryRow]:
    """
    Load rows with their users' histories.

    Args:
        split (`str`): `"train"`, `"validation"` or `"test"`. Without a file of that name, `"validation"` takes the users of
            the last tenth of the training file, and `"train"` leaves them out.
        path (`str` or `Path`): Folder of the files.
        format (`str`, *optional*, defaults to `"rows"`): `"rows"`, `"reviews"`, `"posts"` or `"chats"`.
        num_rows (`int`, *optional*): How many rows to sample. If `None`, all.
        rows_per_user (`int`, *optional*, defaults to `2`): How many rows are made of a user (reviews, posts) or of a
            conversation (chats), at most. If `None`, all.
        turns (`int`, *optional*, defaults to `3`): How many messages before the reply a chat's prompt holds, at most.
        max_words (`int`, *optional*): Leave out rows with a longer response.
        seed (`int`, *optional*, defaults to `0`): Of the sampling.

    Returns:
        `list[HistoryRow]`: In the order of the file. Rows that were left out are counted in the log.

    Raises:
        `FileNotFoundError`: There is no file of this split.
        `ValueError`: The format is unknown, or a line lacks a key; the message names file, line and key.
    """
    if format not in _FORMATS:
        raise ValueError(f"`format` is {format!r}. Write one of {', '.join(map(repr, _FORMATS))}.")
    file, records = _read_split(split, Path(path))
    skips, rows, rng = Skips(), [], Random(seed)
    for number, record in enumerate(records):
        try:
            made = [row for row in _FORMATS[format](record, number, turns) if _is_usable(row, max_words, skips)]
        except (KeyError, TypeError, AttributeError) as error:
            what = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{file}, record {number + 1}: {what}. A record of `{format}` is {_SHAPES[format]}."
            ) from error
        if format != "rows" and rows_per_user is not None and len(made) > rows_per_user:
            made = [made[index] for index in sorted(rng.sample(range(len(made)), rows_per_user))]
        rows += made
    skips.log(logger, f"rows of {file}")
    if not rows:
        raise ValueError(f"{file}: no row is left of {len(records)} records.")
    loaded = [_to_row(row) for row in rows]
    return loaded if num_rows is None else sample(loaded, num_rows, seed)


def _read_split(split: str, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    if split not in ("train", "validation", "test"):
        raise ValueError(f"`split` is {split!r}. Write 'train', 'validation' or 'test'.")
    file = folder / f"{split}.jsonl"
    if file.is_file():
        own_validation = (folder / "validation.jsonl").is_file()
        records = read_records(file)
        return file, records if split != "train" or own_validation else records[: _first_held_out(records)]
    train = folder / "train.jsonl"
    if split != "validation" or not train.is_file():
        raise FileNotFoundError(f"There is no file {file}. The folder must hold `train.jsonl` and `test.jsonl`.")
    records = read_records(train)
    return train, records[_first_held_out(records) :]


def _first_held_out(records: list[dict[str, Any]]) -> int:
    """Index of the first record of the last tenth; a user is not divided."""
    first = len(records) - len(records) // 10
    while (
        0 < first < len(records)
        and "user" in records[first]
        and records[first]["user"] == records[first - 1].get("user")
    ):
        first += 1
    return first


def _is_usable(row: dict[str, Any], max_words: int | None, skips: Skips) -> bool:
    if not isinstance(row["response"], str):
        raise TypeError(f"the response of row {row['id']} is {row['response']!r} and no text")
    words = len(row["response"].split())
    if not words:
        reason = "the response is empty"
    elif max_words is not None and words > max_words:
        reason = f"the response is longer than {max_words} words"
    elif not row["history"]:
        reason = "the user has no other history"
    elif mark := find_mark([*row["texts"], row["response"]]):
        reason = f"the query or the response holds {mark!r}"
    else:
        return True
    skips.add(reason)
    return False


def _to_row(row: dict[str, Any]) -> HistoryRow:
    return HistoryRow(
        id=row["id"],
        user=row["user"],
        prompt=_prompt(row["intro"], row["texts"]),
        response=row["response"],
        history=tuple(row["history"]),
        search=row["search"],
        time=row.get("time"),
    )


def _prompt(intro: str, texts: list[str]) -> tuple[dict[str, str], ...]:
    """Messages of user and assistant in turns, the last one the user's; the history goes before the first."""
    messages = [
        {"role": "user" if (len(texts) - index) % 2 else "assistant", "content": text}
        for index, text in enumerate(texts)
    ]
    messages[0]["content"] = f"{intro}\n\n{{persona}}\n\n{messages[0]['content']}"
    return tuple(messages)


def _own_rows(record: dict[str, Any], number: int, turns: int) -> Iterator[dict[str, Any]]:
    query = record["query"]
    texts = [query] if isinstance(query, str) else [message["content"] for message in query]
    if not isinstance(query, str) and [m["role"] for m in query] != [
        "user" if (len(query) - index) % 2 else "assistant" for index in range(len(query))
    ]:
        raise TypeError("the messages of `query` must be of user and assistant in turns, the last one of the user")
    yield {
        "id": str(record.get("id", number)),
        "user": str(record["user"]),
        "intro": "What this user wrote before:",
        "texts": texts,
        "response": record["response"],
        "history": [_own_entry(entry) for entry in record["history"]],
        "search": texts[-1],
        "time": record.get("time"),
    }


def _own_entry(entry: str | dict[str, Any]) -> HistoryEntry:
    if isinstance(entry, str):
        entry = {"text": entry}
    text = entry["text"]
    return HistoryEntry(text, entry.get("search", text), response=text, time=entry.get("time"))


def _review_rows(record: dict[str, Any], number: int, turns: int) -> Iterator[dict[str, Any]]:
    reviews = [
        HistoryEntry(
            text=f'{review["overall"]:g} of 5 stars for "{review["description"]}": {review["summary"]}\n{review["reviewText"]}',
            search=f"{review['description']} {review['summary']} {review['reviewText']}",
            response=review["reviewText"],
        )
        for review in record["reviews"]
    ]
    for index, review in enumerate(record["reviews"]):
        query = (
            f'Write the review that this reviewer writes of a product with the description "{review["description"]}". They '
            f'give it {review["overall"]:g} of 5 stars. The summary of the review is "{review["summary"]}".'
        )
        yield {
            "id": f"{number}/{index}",
            "user": str(record.get("reviewer", number)),
            "intro": "Past reviews of a reviewer:",
            "texts": [query],
            "response": review["reviewText"],
            "history": reviews[:index] + reviews[index + 1 :],
            "search": f"{review['description']} {review['summary']}",
        }


def _post_rows(record: dict[str, Any], number: int, turns: int) -> Iterator[dict[str, Any]]:
    posts = [
        HistoryEntry(f"In {post['forum']}: {post['post']}", post["post"], response=post["post"])
        for post in record["posts"]
    ]
    for index, post in enumerate(record["posts"]):
        words = post["post"].split()
        opening = " ".join(words[:OPENING_WORDS])
        yield {
            "id": f"{number}/{index}",
            "user": str(record.get("author", number)),
            "intro": "Past posts of an author:",
            "texts": [f'Go on with the post that this author begins in the forum {post["forum"]} with "{opening}".'],
            "response": " ".join(words[OPENING_WORDS:]),
            # The query gives the beginning away: the same post, put twice, is not history
            "history": [other for other in posts[:index] + posts[index + 1 :] if other.response != post["post"]],
            "search": f"{post['forum']} {opening}",
        }


def _chat_rows(record: dict[str, Any], number: int, turns: int) -> Iterator[dict[str, Any]]:
    said = record["conversation"]
    history = [HistoryEntry(sentence, sentence) for sentence in record["user_2_persona"]]
    for index, turn in enumerate(said):
        before = _alternating(said[:index])[-turns:] if turn["user"] == 2 else []
        if before and len(before) % 2 == 0:
            before = before[1:]
        if before:
            yield {
                "id": f"{number}/{index}",
                "user": str(number),
                "intro": "You are this person:",
                "texts": before,
                "response": turn["text"],
                "history": history,
                "search": before[-1],
            }


def _alternating(said: list[dict[str, Any]]) -> list[str]:
    """The end of a conversation in which users 1 and 2 take turns and the last word is user 1's; empty if it is not."""
    texts: list[str] = []
    for turn in reversed(said):
        if turn["user"] != 1 + len(texts) % 2:
            break
        texts.append(turn["text"])
    return texts[::-1]


_FORMATS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "rows": _own_rows,
    "reviews": _review_rows,
    "posts": _post_rows,
    "chats": _chat_rows,
}
_SHAPES = {
    "rows": '{"user", "history": [text or {"text"}, …], "query", "response"}',
    "reviews": '{"reviews": [{"overall", "summary", "description", "reviewText"}, …]}',
    "posts": '{"posts": [{"forum", "post"}, …]}',
    "chats": '{"user_2_persona": [sentence, …], "conversation": [{"user", "text"}, …]}',
}
