# SPDX-License-Identifier: Apache-2.0

"""
Histories in local files: a user's own (`rows`), and four formats of public data (`reviews`, `posts`, `chats`, `preferences`),
which `examples/get_data.py` downloads, but for `posts`.

A folder holds `train.jsonl` and `test.jsonl`, and `validation.jsonl` where there is one. A line is

- `rows`: `{"user", "history", "query", "response"}`, and `"id"`, `"time"` if there are any. An entry of `history` is a text,
  or `{"text"}` with `"time"`, `"search"` if there are any. `query` is a text or a list of messages.
- `reviews`: a reviewer, `{"reviews": [{"overall", "summary", "description", "reviewText"}, …]}`. One review is left out and
  becomes the response, the others are the history (as LongLaMP's product reviews).
- `posts`: an author, `{"posts": [{"forum", "post"}, …]}`: likewise; the query gives the post's first ten words.
- `chats`: a conversation, `{"user_2_persona": [sentence, …], "conversation": [{"user": 1 or 2, "text"}, …]}`. Replies of the
  second user become responses, that user's sentences are the history.
- `preferences`: a question of someone with a preference, `{"preference", "question", "response"}`. The preference is the history. With `options` and
  `answer`, the index of the right one, `trl-perce evaluate` also says which one the model chooses.

Users are told apart by `user`, `reviewer` or `author`, or by the persona or preference itself; else each record is a user.

The wording of the prompts is ours.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from ..history.entries import HistoryEntry, HistoryRow, find_mark
from .reading import Skips, read_records, sample, take_choice


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
    validation_size: float | None = None,
    skips: Skips | None = None,
) -> list[HistoryRow]:
    """
    Load rows with their users' histories.

    Args:
        split (`str`): `"train"`, `"validation"` or `"test"`: the file of that name. `"train"` is all of `train.jsonl`, unless
            `validation_size` is given.
        path (`str` or `Path`): Folder of the files.
        format (`str`, *optional*, defaults to `"rows"`): `"rows"`, `"reviews"`, `"posts"`, `"chats"` or `"preferences"`.
        num_rows (`int`, *optional*): How many rows to sample. If `None`, all.
        rows_per_user (`int`, *optional*, defaults to `2`): How many rows are made of a user (reviews, posts) or of a
            conversation (chats), at most. If `None`, all.
        turns (`int`, *optional*, defaults to `3`): How many messages before the reply a chat's prompt holds, at most.
        max_words (`int`, *optional*): Leave out rows with a longer response.
        seed (`int`, *optional*, defaults to `0`): Of the sampling.
        validation_size (`float`, *optional*): Where there is no `validation.jsonl`: the share of the users of `train.jsonl`, the
            last ones, that `"validation"` takes and `"train"` leaves out, such as `0.1`. Give it for both splits. The log
            counts the users.
        skips ([`~trl_perce.benchmarks.reading.Skips`], *optional*): Counts what is left out, instead of the log.

    Returns:
        `list[HistoryRow]`: In the order of the file. Rows that were left out are counted in the log.

    Raises:
        `FileNotFoundError`: There is no file of this split.
        `ValueError`: The format is unknown, a line lacks a key, or `validation_size` is no share or stands beside a
            `validation.jsonl`; the message names file, line and key.
    """
    if format not in _FORMATS:
        raise ValueError(f"`format` is {format!r}. Write one of {', '.join(map(repr, _FORMATS))}.")
    _check_split(split, Path(path), format, validation_size)
    if split == "test":
        validation_size = None
    file = Path(path) / f"{split if validation_size is None else 'train'}.jsonl"
    records = read_records(file)
    users = tell_users(records, format, f"{file.stem}/")
    taken = {*users} if validation_size is None else _side(split, users, validation_size, file)
    if validation_size is None and split != "train":
        _warn_of_shared_users(records, file, format)
    counted = Skips() if skips is None else skips
    rows = make_rows(
        records,
        format,
        lambda number: f"{file}, record {number + 1}",
        counted,
        rows_per_user=rows_per_user,
        turns=turns,
        max_words=max_words,
        seed=seed,
        users=[user if user in taken else None for user in users],
    )
    if skips is None:
        counted.log(logger, f"rows of {file}")
    if not rows:
        raise ValueError(f"{file}: no row is left of {len(records)} records; the log says why.")
    if num_rows is not None and len(rows) < num_rows:
        logger.warning(f"There are {len(rows)} usable rows of {file} and not {num_rows}: all are taken.")
    return sample(rows, num_rows, seed)


def make_rows(
    records: list[dict[str, Any]],
    format: str,
    where: Callable[[int], str],
    skips: Skips,
    rows_per_user: int | None = 2,
    turns: int = 3,
    max_words: int | None = None,
    seed: int = 0,
    users: Sequence[str | None] | None = None,
) -> list[HistoryRow]:
    """
    Rows of records that are read already; the other arguments are those of [`load`].

    Args:
        records (`list[dict[str, Any]]`): The records.
        format (`str`): What they are.
        where (`Callable[[int], str]`): Names a record by its number, for messages.
        skips ([`~trl_perce.benchmarks.reading.Skips`]): Counts what is left out.
        users (`Sequence[str | None]`, *optional*): The user of each record; `None` of one that is not wanted. By default as
            the format tells them.

    Returns:
        `list[HistoryRow]`: In the order of the records.

    Raises:
        `ValueError`: A record lacks a key; the message names it.
    """
    rows: list[HistoryRow] = []
    rng = Random(seed)
    for number, (record, user) in enumerate(zip(records, users or tell_users(records, format), strict=True)):
        if user is None:
            continue
        try:
            made = [row for row in _FORMATS[format](record, number, user, turns) if _is_usable(row, max_words, skips)]
        except (KeyError, TypeError, AttributeError) as error:
            what = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{where(number)}: {what}. A record of `{format}` is {_SHAPES[format]}.") from error
        if format != "rows" and rows_per_user is not None and len(made) > rows_per_user:
            skips.add(f"more than {rows_per_user} of a record (`rows_per_user`)", len(made) - rows_per_user)
            made = [made[index] for index in sorted(rng.sample(range(len(made)), rows_per_user))]
        rows += map(_to_row, made)
    return rows


def _check_split(split: str, folder: Path, format: str, validation_size: float | None) -> None:
    take_choice(split, "split", ("train", "validation", "test"))
    has_validation = (folder / "validation.jsonl").is_file()
    if validation_size is not None and not (isinstance(validation_size, float) and 0 < validation_size < 1):
        raise ValueError(f"`validation_size` is {validation_size!r}. Write a share of the users, such as 0.1.")
    if validation_size is not None and has_validation:
        raise ValueError(
            f"`validation_size` is given, and there is {folder / 'validation.jsonl'}. Leave out the one or the other."
        )
    needed = folder / f"{'train' if split == 'validation' and validation_size else split}.jsonl"
    if needed.is_file():
        return
    if split == "validation" and (folder / "train.jsonl").is_file():
        raise FileNotFoundError(
            f"There is no file {needed}. Write one, or set `validation_size: 0.1`, for 'train' too, which holds out a tenth of "
            "the training users."
        )
    public = format in ("reviews", "chats", "preferences")
    hint = " `python examples/get_data.py` gets public data of this kind." if public else ""
    raise FileNotFoundError(f"There is no file {needed}. The folder must hold `train.jsonl` and `test.jsonl`.{hint}")


def tell_users(records: list[dict[str, Any]], format: str, prefix: str = "") -> list[str]:
    """
    The user of each record.

    Args:
        records (`list[dict[str, Any]]`): The records.
        format (`str`): What they are.
        prefix (`str`, *optional*, defaults to `""`): Of users without a name, who are numbers: tells those of two files apart.
    """
    is_name = _USERS[format][1]
    firsts: dict[str, str] = {}
    users = []
    for number, record in enumerate(records):
        name = _name(record, format)
        # A persona is too long for a name: the number of the first record with it
        numbered = f"{prefix}{number}"
        users.append(numbered if name is None else name if is_name else firsts.setdefault(name, numbered))
    return users


def _name(record: dict[str, Any], format: str) -> str | None:
    """What tells the user of a record from others, if anything does. Sentences are those of the same person in any order."""
    value = record.get(_USERS[format][0])
    return None if value is None else str(sorted(map(str, value)) if isinstance(value, list) else value)


def _side(split: str, users: list[str], validation_size: float, file: Path) -> set[str]:
    """The users of a split that is made of the training file."""
    names = [*dict.fromkeys(users)]
    held_out = max(1, round(validation_size * len(names)))
    if held_out >= len(names):
        raise ValueError(
            f"{file}: `validation_size` is {validation_size}, which leaves none of {len(names)} users to train on."
        )
    logger.warning(
        f"{file}: {held_out} of {len(names)} users, the last ones, are held out as 'validation' (`validation_size` is "
        f"{validation_size:g}); 'train' has the other {len(names) - held_out}."
    )
    return {*(names[-held_out:] if split == "validation" else names[:-held_out])}


def _warn_of_shared_users(records: list[dict[str, Any]], file: Path, format: str) -> None:
    """Count the users of a file who have records in the training file, too."""
    train = file.with_name("train.jsonl")
    if not train.is_file():
        return
    own, trained = ({_name(record, format) for record in side} - {None} for side in (records, read_records(train)))
    if shared := own & trained:
        key, is_name = _USERS[format]
        shown = f", such as {key} {min(map(str, shared))!r}" if is_name else ""
        logger.warning(f"{len(shared)} of {len(own)} users of {file} are users of {train}, too{shown}.")


def _is_usable(row: dict[str, Any], max_words: int | None, skips: Skips) -> bool:
    if not isinstance(row["response"], str):
        raise TypeError(f"the response of row {row['id']} is {row['response']!r} and no text")
    words = len(row["response"].split())
    if not row["texts"]:
        reason = "nobody speaks before the reply"
    elif not words:
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
        options=None if row.get("options") is None else tuple(row["options"]),
        answer=row.get("answer"),
    )


def _prompt(intro: str, texts: list[str]) -> tuple[dict[str, str], ...]:
    """Messages of user and assistant in turns, the last one the user's; the history goes before the first."""
    messages = [
        {"role": "user" if (len(texts) - index) % 2 else "assistant", "content": text}
        for index, text in enumerate(texts)
    ]
    messages[0]["content"] = f"{intro}\n\n{{persona}}\n\n{messages[0]['content']}"
    return tuple(messages)


def _own_rows(record: dict[str, Any], number: int, user: str, turns: int) -> Iterator[dict[str, Any]]:
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


def _review_rows(record: dict[str, Any], number: int, user: str, turns: int) -> Iterator[dict[str, Any]]:
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
            "user": user,
            "intro": "Past reviews of a reviewer:",
            "texts": [query],
            "response": review["reviewText"],
            "history": reviews[:index] + reviews[index + 1 :],
            "search": f"{review['description']} {review['summary']}",
        }


def _post_rows(record: dict[str, Any], number: int, user: str, turns: int) -> Iterator[dict[str, Any]]:
    posts = [
        HistoryEntry(f"In {post['forum']}: {post['post']}", post["post"], response=post["post"])
        for post in record["posts"]
    ]
    for index, post in enumerate(record["posts"]):
        words = post["post"].split()
        opening = " ".join(words[:OPENING_WORDS])
        yield {
            "id": f"{number}/{index}",
            "user": user,
            "intro": "Past posts of an author:",
            "texts": [f'Go on with the post that this author begins in the forum {post["forum"]} with "{opening}".'],
            "response": " ".join(words[OPENING_WORDS:]),
            # The query gives the beginning away: the same post, put twice, is not history
            "history": [other for other in posts[:index] + posts[index + 1 :] if other.response != post["post"]],
            "search": f"{post['forum']} {opening}",
        }


def _chat_rows(record: dict[str, Any], number: int, user: str, turns: int) -> Iterator[dict[str, Any]]:
    said = record["conversation"]
    history = [HistoryEntry(sentence, sentence) for sentence in record["user_2_persona"]]
    for index, turn in enumerate(said):
        if turn["user"] != 2:
            continue
        before = _alternating(said[:index])[-turns:]
        before = before[len(before) % 2 == 0 :]  # from a message of the first user on
        yield {
            "id": f"{number}/{index}",
            "user": user,
            "intro": "You are this person:",
            "texts": before,
            "response": turn["text"],
            "history": history,
            "search": before[-1] if before else "",
        }


def _alternating(said: list[dict[str, Any]]) -> list[str]:
    """The end of a conversation in which users 1 and 2 take turns and the last word is user 1's; empty if it is not."""
    texts: list[str] = []
    for turn in reversed(said):
        if turn["user"] != 1 + len(texts) % 2:
            break
        texts.append(turn["text"])
    return texts[::-1]


def _preference_rows(record: dict[str, Any], number: int, user: str, turns: int) -> Iterator[dict[str, Any]]:
    options = record.get("options")
    if options is not None and not (isinstance(options, list) and all(isinstance(option, str) for option in options)):
        raise TypeError(f"`options` is {options!r} and no list of texts")
    yield {
        "id": str(number),
        "user": user,
        "intro": "About me:",
        "texts": [record["question"]],
        "response": record["response"],
        "history": [HistoryEntry(record["preference"], record["preference"])],
        "search": record["question"],
        **{name: record[name] for name in ("options", "answer") if record.get(name) is not None},
    }


_FORMATS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "rows": _own_rows,
    "reviews": _review_rows,
    "posts": _post_rows,
    "chats": _chat_rows,
    "preferences": _preference_rows,
}
# Of each format: the key that tells users apart, and whether its value is a name
_USERS = {
    "rows": ("user", True),
    "reviews": ("reviewer", True),
    "posts": ("author", True),
    "chats": ("user_2_persona", False),
    "preferences": ("preference", False),
}
_SHAPES = {
    "rows": '{"user", "history": [text or {"text"}, …], "query", "response"}',
    "reviews": '{"reviews": [{"overall", "summary", "description", "reviewText"}, …]}',
    "posts": '{"posts": [{"forum", "post"}, …]}',
    "chats": '{"user_2_persona": [sentence, …], "conversation": [{"user", "text"}, …]}',
    "preferences": '{"preference", "question", "response"}',
}
