# SPDX-License-Identifier: Apache-2.0

"""
PrefEval (Zhao et al. 2025, arXiv 2502.09597): questions of people who have stated a preference, with an answer that respects it and four
options, of which one does. Explicit preferences, one turn.

The answers are those of Mistral 8x7B, which was reminded of the preference, from the benchmark's repository; the data on the Hub have none.
Topics are held out: what is tested on is of other topics than what is trained on.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..history.entries import HistoryRow
from .histories import make_rows, tell_users
from .reading import Skips, random_order, read_records, sample, take, take_choice


logger = logging.getLogger(__name__)

TEST_TOPICS = (
    "entertain_music_book",
    "lifestyle_dietary",
    "professional_work_location_style",
    "shop_technology",
    "travel_restaurant",
)
_ANSWERS = "SFT/single_pref_remind"


def load(
    split: str,
    path: str | Path,
    num_rows: int | None = None,
    validation_topics: Sequence[str] = (),
    response_words: int | None = None,
    seed: int = 0,
) -> list[HistoryRow]:
    """
    Rows of PrefEval. The preference is the whole history.

    Args:
        split (`str`): `"train"`, `"validation"` or `"test"`.
        path (`str` or `Path`): A checkout of the benchmark's repository, whose [`TEST_TOPICS`] are tested on; or a folder with `train.jsonl`
            and `test.jsonl`, whose lines have `topic`, `preference`, `question`, `response`, `options` and `answer`, as `python
            examples/get_data.py prefeval` writes it.
        num_rows (`int`, *optional*): How many rows to sample. If `None`, all.
        validation_topics (`Sequence[str]`, *optional*, defaults to `()`): Topics of the training rows that `"validation"` takes and
            `"train"` leaves out. Give them for both splits.
        response_words (`int`, *optional*): Cut responses behind the last whole sentence that ends within so many words, or, where none
            does, behind that word. Those of the benchmark have 160 on average.
        seed (`int`, *optional*, defaults to `0`): Of the sample, and of the order of the options that come from a checkout.

    Returns:
        `list[HistoryRow]`: In the order of the source, with `options` and `answer`. Equal preferences are one user.

    Raises:
        `FileNotFoundError`: There is neither the one nor the other in `path`.
        `ValueError`: A record lacks a key, a topic is unknown, or `"validation"` has no topics; the message says which.
    """
    take_choice(split, "split", ("train", "validation", "test"))
    if response_words is not None and response_words < 1:
        raise ValueError(f"`response_words` is {response_words}. Write a positive number of words, or leave it out.")
    if split == "validation" and not validation_topics:
        raise ValueError("`validation_topics` is missing: topics of the training rows, such as ['shop_home'].")
    records, source = _read(Path(path), "test" if split == "test" else "train", seed)
    if split != "test":
        topics = {record["topic"] for record in records}
        if unknown := sorted({*validation_topics} - topics):
            raise ValueError(
                f"`validation_topics`: {source} has no topic {unknown[0]!r}; there are {', '.join(sorted(topics))}."
            )
        records = [record for record in records if (record["topic"] in validation_topics) == (split == "validation")]
        if not records:
            raise ValueError(f"`validation_topics` leaves no topic of {source} to train on. Write fewer.")
    if response_words is not None:
        records = [record | {"response": _cut(record["response"], response_words)} for record in records]
    skips = Skips()
    users = tell_users(records, "preferences", f"{split}/")
    rows = make_rows(records, "preferences", lambda number: f"{source}, record {number + 1}", skips, users=users)
    skips.log(logger, f"rows of {source}")
    if num_rows is not None and len(rows) < num_rows:
        logger.warning(f"There are {len(rows)} usable rows of {source} and not {num_rows}: all are taken.")
    return sample(rows, num_rows, seed)


def read_checkout(
    folder: str | Path, split: str, seed: int = 0, left_out: Counter | None = None
) -> list[dict[str, Any]]:
    """
    The questions of a checkout of the benchmark's repository.

    Args:
        folder (`str` or `Path`): The checkout.
        split (`str`): `"test"`: those of [`TEST_TOPICS`]. `"train"`: those of all other topics.
        seed (`int`, *optional*, defaults to `0`): Of the order of the options; the right one is the first in the repository.
        left_out (`Counter`, *optional*): Counts what is left out, instead of the log.

    Returns:
        `list[dict[str, Any]]`: `topic`, `preference`, `question`, `response` (up to its last whole sentence), `options` and `answer`.

    Raises:
        `FileNotFoundError`: A file is not there.
        `ValueError`: A record lacks a key; the message names file, item and key.
    """
    folder = Path(folder)
    answers = {path.parent.name: path for path in sorted((folder / _ANSWERS).glob("*/mistral8x7b_*_2turn.json"))}
    if missing := [topic for topic in TEST_TOPICS if topic not in answers]:
        topic = missing[0]
        raise FileNotFoundError(
            f"{folder}: there is no {_ANSWERS}/{topic}/mistral8x7b_{topic}_2turn.json. Is the checkout whole?"
        )
    counted = Counter() if left_out is None else left_out
    found = []
    for topic, path in answers.items():
        if (topic in TEST_TOPICS) != (split == "test"):
            continue
        options_path = folder / "benchmark_dataset" / "mcq_options" / f"{topic}.json"
        options = {
            _question(record, f"{options_path}, item {index}"): take(
                record, "classification_task_options", list, f"{options_path}, item {index}"
            )
            for index, record in enumerate(read_records(options_path))
        }
        for index, record in enumerate(read_records(path)):
            where = f"{path}, item {index}"
            question, response = _question(record, where), _whole(take(record, "response_to_q", str, where))
            if question not in options or not response:
                counted["questions without options or an answer"] += 1
                continue
            given = options[question]
            order = random_order(len(given), seed + index)
            found.append(
                {
                    **{"topic": topic, "preference": question[0], "question": question[1], "response": response},
                    **{"options": [given[place] for place in order], "answer": order.index(0)},
                }
            )
    if left_out is None:
        for reason, count in counted.items():
            logger.warning(f"{folder}: left out {count} {reason}.")
    return found


def _read(path: Path, split: str, seed: int) -> tuple[list[dict[str, Any]], str]:
    """The records of a split, and where they are from."""
    if (path / _ANSWERS).is_dir():
        return read_checkout(path, split, seed), str(path)
    file = path / f"{split}.jsonl"
    if not file.is_file():
        raise FileNotFoundError(
            f"There is neither {file} nor {path / _ANSWERS}, of a checkout of PrefEval. `python examples/get_data.py prefeval` gets "
            "the data."
        )
    records = read_records(file)
    for index, record in enumerate(records):
        for key in ("topic", "preference", "question", "response"):
            take(record, key, str, f"{file}, record {index + 1}")
    return records, str(file)


def _question(record: dict[str, Any], where: str) -> tuple[str, str]:
    return take(record, "preference", str, where), take(record, "question", str, where)


def _whole(text: str) -> str:
    """An answer that was cut off at its limit, up to its last whole sentence."""
    text = text.strip()
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", text)]
    return text[: ends[-1]] if ends and text[-1] not in ".!?)\"'" else text


def _cut(text: str, words: int) -> str:
    """The text up to the last whole sentence within so many words."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    if len(ends) <= words:
        return text
    cut = text[: ends[words - 1]]
    # "1." of a list ends no sentence
    sentences = [match.end() for match in re.finditer(r"(?<!\d)[.!?](?=\s|$)", cut)]
    return cut[: sentences[-1]] if sentences else cut
