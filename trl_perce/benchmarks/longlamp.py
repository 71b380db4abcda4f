# SPDX-License-Identifier: Apache-2.0

"""
LongLaMP (Kumar et al. 2024, arXiv 2407.11016): abstracts (PAG), product reviews (PRW) and topics (PTW), long texts in the voice
of a user.

A row on the Hub (`LongLaMP/LongLaMP`) has `input`, `output`, `profile` and its user:

| task | user | an item of `profile` | retrieval compares it with |
|---|---|---|---|
| `abstract_generation` | `name` | `title`, `abstract`, `id`, `year` | the key items in the input |
| `product_review` | `reviewerId` | `overall`, `summary`, `description`, `reviewText` | the input |
| `topic_writing` | `author` | `summary`, `content`, `id`, `author` | the input |

Setting `user`: the users of train, validation and test differ. Setting `temporal`: the same users stand in all three. The Hub
has no date for the output, so there it is the benchmark's own choice of the profile that keeps later texts out; where a row of
a local file has a `date`, `year` or `unixReviewTime` like the items of its profile, entries that are not earlier are never
retrieved. Entries that all have a date are put in its order, others stay in the order of the profile.

The input is a whole instruction ("Generate the content for a reddit post …") and is the user's message as it is. Before it, a system message
has the parts of Appendix D.1 of the PerCE paper in its order: the task, the history, the user's style. The words are ours.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..history.entries import HistoryRow
from .profiles import ProfileTask, RowMaker, number_to_draw, user_of
from .reading import check_unique, draw_rows, find_file, read_records, take, take_choice


logger = logging.getLogger(__name__)

HUB = "LongLaMP/LongLaMP"
SETTINGS = ("user", "temporal")
TASKS = {
    "abstract_generation": ProfileTask(
        lead="You write abstracts of the user's papers. Abstracts of earlier papers of theirs:",
        style="Write the new one as they would, in their style and language.",
        labels={"title": "Title", "abstract": "Abstract"},
        response="abstract",
        query="items:",
    ),
    "product_review": ProfileTask(
        lead="You write product reviews for the user. Earlier reviews of theirs:",
        style="Write the new one as they would, in their style and tone.",
        labels={"overall": "Rating", "summary": "Summary", "description": "Product", "reviewText": "Review"},
        response="reviewText",
    ),
    "topic_writing": ProfileTask(
        lead="You write about a topic for the user. Earlier texts of theirs:",
        style="Write the new one as they would, in their style and tone.",
        labels={"summary": "Summary", "content": "Post"},
        response="content",
        aliases={"summary": "input", "content": "output"},
    ),
}
_USER_COLUMNS = ("name", "reviewerId", "author", "user")
_SPLITS = {"train": ("train",), "validation": ("val", "validation", "dev"), "test": ("test",)}


def load(
    split: str,
    task: str = "abstract_generation",
    setting: str = "user",
    path: str | Path | None = None,
    num_rows: int | Literal["all"] | None = None,
    seed: int = 0,
) -> list[HistoryRow]:
    """
    Rows of LongLaMP, before retrieval.

    Args:
        split (`str`): `"train"`, `"validation"` or `"test"`.
        task (`str`, *optional*, defaults to `"abstract_generation"`): Or `"product_review"`, `"topic_writing"`.
        setting (`str`, *optional*, defaults to `"user"`): Or `"temporal"`.
        path (`str` or `Path`, *optional*): A JSON or JSONL file with `input`, `output` and `profile`, or a folder with
            `<task>_<setting>/train.json` or `train.json` (`.jsonl`; likewise `val` and `test`). By default the Hub, through
            `datasets.load_dataset`.
        num_rows (`int` or `"all"`, *optional*): Number of rows to draw. By default those of the PerCE paper, 2,000 for training and
            500 else.
        seed (`int`, *optional*, defaults to `0`): The same rows for the same seed and data.

    Returns:
        `list[HistoryRow]`: In the order of the source. The id is the row's `id` if it has one, else
        `<task>_<setting>/<split>/<index>`. Rows without history or output are left out and counted in a warning, and replaced by
        others.

    Raises:
        `ValueError`: An argument, file or column is wrong, or an id occurs twice; the message says which.
        `FileNotFoundError`: There is no such file.
        `OSError`: The Hub does not answer, or has no such data.
    """
    take_choice(split, "split", _SPLITS)
    take_choice(task, "task", TASKS)
    take_choice(setting, "setting", SETTINGS)
    config = f"{task}_{setting}"
    source, records = _load_file(path, config, split) if path is not None else _load_hub(config, split)
    maker = RowMaker(TASKS[task], by_time=setting == "temporal")

    def make(index: int) -> HistoryRow | None:
        record, where = records[index], f"{source}, row {index}"
        row_id = f"{config}/{split}/{index}" if record.get("id") is None else str(record["id"])
        return maker(record, take(record, "output", str, where), row_id, user_of(record, _USER_COLUMNS, row_id), where)

    try:
        number = number_to_draw(num_rows, split)
        return draw_rows(len(records), make, number, seed, f"rows of {source}", logger, num_rows is None)
    finally:
        maker.log(logger, source)


def _load_file(path: str | Path, config: str, split: str) -> tuple[str, Sequence[dict[str, Any]]]:
    names = [f"{name}.{ending}" for name in _SPLITS[split] for ending in ("json", "jsonl")]
    found = find_file(path, [f"{config}/{name}" for name in names] + names)
    records = read_records(found)
    check_unique((str(record["id"]) for record in records if record.get("id") is not None), str(found))
    return str(found), records


def _load_hub(config: str, split: str) -> tuple[str, Sequence[dict[str, Any]]]:
    import datasets

    name = _SPLITS[split][0]
    try:
        records = datasets.load_dataset(HUB, config, split=name)
    except (
        OSError,
        ValueError,
    ) as error:  # `ValueError`: the cache of a machine without network lacks the configuration
        raise OSError(
            f"{HUB}, {config}, {name} could not be loaded from the Hub: {error} Where there is no network, give a local JSON file "
            "with `input`, `output` and `profile` as `path`."
        ) from error
    return f"{HUB}, {config}, {name}", records
