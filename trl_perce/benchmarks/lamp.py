# SPDX-License-Identifier: Apache-2.0

"""
LaMP (Salemi et al. 2023, arXiv 2304.11406): the tasks whose output is a text of the user.

| task | the PerCE paper's name | an item of `profile` | retrieval compares it with |
|---|---|---|---|
| `LaMP_4` | PNHG, headline of an article | `title`, `text`, `id` | the article |
| `LaMP_5` | PSTG, title of a paper | `title`, `abstract`, `id` | the abstract |
| `LaMP_7` | PTP, paraphrase of a tweet | `text`, `id` | the tweet |

The data are pairs of files from https://lamp-benchmark.github.io/download: `train_questions.json`, a list of
`{"id", "input", "profile"}`, and `train_outputs.json`, `{"task": "LaMP_4", "golds": [{"id", "output"}]}`; likewise `dev`. Setting
`user`: other users in each split. Setting `time`: the same users, and each item of a profile has a `date`, by which the entries are
put in order. The questions have no date, so it is the benchmark's own choice of the profile that keeps later items out; where a
question has a `date`, items that are not earlier are never retrieved.

The outputs of the test split are not public. Results of papers are on `dev`, which is `validation` here. For a submission:

    rows = lamp.load("test", "LaMP_4", path="LaMP_4", num_rows="all", without_outputs=True)
    …  # retrieve, predict
    lamp.write_submission(read_records("predictions.jsonl"), "LaMP_4", "LaMP_4.json", questions="LaMP_4/test_questions.json")

The input is a whole instruction ("Generate a headline for the following article: …") and is the user's message as it is. The PerCE paper
has no prompts for these tasks; the system message before it has the parts of those in its Appendix D.1, in words of ours.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from ..history.entries import HistoryRow
from ..utils.files import write_json
from .profiles import ProfileTask, RowMaker, number_to_draw, user_of
from .reading import (
    Skips,
    check_unique,
    draw_rows,
    find_file,
    read_object,
    read_records,
    take,
    take_choice,
)


logger = logging.getLogger(__name__)

SETTINGS = ("user", "time")
TASKS = {
    "LaMP_4": ProfileTask(
        lead="You write headlines for the user. Earlier headlines of theirs:",
        style="Write the new one as they would, in their style and tone.",
        labels={"title": "Headline", "text": "Article"},
        response="title",
        query="article:",
    ),
    "LaMP_5": ProfileTask(
        lead="You write titles of the user's papers. Earlier titles of theirs:",
        style="Write the new one as they would, in their style and language.",
        labels={"title": "Title", "abstract": "Abstract"},
        response="title",
        query="paper:",
    ),
    "LaMP_7": ProfileTask(
        lead="You write tweets for the user. Earlier tweets of theirs:",
        style="Write the new one as they would, in their style and tone.",
        labels={"text": ""},
        response="text",
        query=":",
    ),
}
# What stands in the place of a response that nobody knows
NO_OUTPUT = "(no output)"
_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
# The benchmark's questions have no user; files that were made from them may
_USER_COLUMNS = ("user_id", "user")


def load(
    split: str,
    task: str = "LaMP_4",
    setting: str = "user",
    path: str | Path = ".",
    num_rows: int | Literal["all"] | None = None,
    seed: int = 0,
    without_outputs: bool = False,
) -> list[HistoryRow]:
    """
    Rows of LaMP, before retrieval.

    Args:
        split (`str`): `"train"`, `"validation"` (LaMP's `dev`) or `"test"`.
        task (`str`, *optional*, defaults to `"LaMP_4"`): Or `"LaMP_5"`, `"LaMP_7"`.
        setting (`str`, *optional*, defaults to `"user"`): Or `"time"`: each item of a profile must have a `date`.
        path (`str` or `Path`, *optional*, defaults to `"."`): The questions' file, with the outputs beside it; or a folder with
            `dev_questions.json` or `dev/dev_questions.json`, also in a folder `LaMP_4` or `LaMP-4`.
        num_rows (`int` or `"all"`, *optional*): Number of rows to draw. By default 2,000 for training and 500 else.
        seed (`int`, *optional*, defaults to `0`): The same rows for the same seed and data.
        without_outputs (`bool`, *optional*, defaults to `False`): Read no outputs: each response is `(no output)`. The rows can be
            answered, and no metric of the answers means anything.

    Returns:
        `list[HistoryRow]`: In the order of the questions, with their ids. The user is the question's `user_id` if there is one, else
        its id. Questions without history or output are left out and counted in a warning, and replaced by others.

    Raises:
        `ValueError`: An argument, file or column is wrong, an id occurs twice, or the two files do not belong together; the
            message says which.
        `FileNotFoundError`: There is no such file.
    """
    take_choice(split, "split", _SPLITS)
    take_choice(task, "task", TASKS)
    take_choice(setting, "setting", SETTINGS)
    name = _SPLITS[split]
    file = f"{name}_questions.json"
    folders = (
        "",
        f"{name}/",
        *(f"{spelled}/{folder}" for spelled in (task, task.replace("_", "-")) for folder in ("", f"{name}/")),
    )
    questions_path = find_file(path, [folder + file for folder in folders])
    questions = _by_id(read_records(questions_path), questions_path)
    outputs = (
        dict.fromkeys(questions, NO_OUTPUT) if without_outputs else _read_outputs(questions_path, task, questions)
    )
    ids, maker = list(questions), RowMaker(TASKS[task], by_time=setting == "time", needs_date=setting == "time")

    def make(index: int) -> HistoryRow | None:
        row_id, where = ids[index], f"{questions_path}, question {ids[index]!r}"
        question = questions[row_id]
        return maker(question, outputs.get(row_id, ""), row_id, user_of(question, _USER_COLUMNS, row_id), where)

    try:
        what = f"questions of {questions_path}"
        number = number_to_draw(num_rows, split)
        return draw_rows(len(ids), make, number, seed, what, logger, num_rows is None)
    finally:
        maker.log(logger, str(questions_path))


def write_submission(
    predictions: Iterable[dict[str, Any]], task: str, path: str | Path, questions: str | Path | None = None
) -> None:
    """
    Write predictions in LaMP's own format, which its evaluation and its leaderboard take:
    `{"task": "LaMP_4", "golds": [{"id", "output"}]}`.

    Args:
        predictions (`Iterable[dict[str, Any]]`): Lines of `predictions.jsonl`, of which `id` and `prediction` count.
        task (`str`): `"LaMP_4"`, `"LaMP_5"` or `"LaMP_7"`.
        path (`str` or `Path`): The file to write.
        questions (`str` or `Path`, *optional*): The questions' file. The predictions must then be of exactly its ids, and are written
            in its order.

    Raises:
        `ValueError`: There are no predictions, one has no id or no text, an id occurs twice, or the ids are not the questions'.
    """
    take_choice(task, "task", TASKS)
    outputs = {}
    for index, line in enumerate(predictions):
        where = f"prediction {index}"
        row_id = str(take(line, "id", (str, int), where))
        if row_id in outputs:
            raise ValueError(f"{where}: the id {row_id!r} occurs twice.")
        outputs[row_id] = take(line, "prediction", str, where)
    if not outputs:
        raise ValueError("There are no predictions to write.")
    if questions is not None:
        ids = list(_by_id(read_records(questions), questions))
        _check_ids(set(ids), set(outputs), questions)
        outputs = {row_id: outputs[row_id] for row_id in ids}
    golds = [{"id": row_id, "output": output} for row_id, output in outputs.items()]
    write_json(path, {"task": task, "golds": golds}, indent=1)


def _by_id(records: list[dict[str, Any]], path: str | Path) -> dict[str, dict[str, Any]]:
    ids = [str(take(record, "id", (str, int), f"{path}, item {index}")) for index, record in enumerate(records)]
    check_unique(ids, str(path))
    return dict(zip(ids, records, strict=True))


def _read_outputs(questions_path: Path, task: str, questions: dict[str, Any]) -> dict[str, str]:
    """The output of each question that has one."""
    path = questions_path.with_name(questions_path.name.replace("questions", "outputs"))
    if path == questions_path:
        raise ValueError(f"{path}: the name of the questions' file must hold 'questions', as in dev_questions.json.")
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path}. The outputs of LaMP's test split are not public: evaluate on split 'validation', whose file is "
            "dev_outputs.json. To predict without outputs, for a submission, set `without_outputs=True`."
        )
    content = read_object(path)
    if take(content, "task", str, str(path)) != task:
        raise ValueError(f"{path} is of task {content['task']!r} and not of {task!r}.")
    golds = take(content, "golds", list, str(path))
    for index, gold in enumerate(golds):
        if not isinstance(gold, dict):
            raise ValueError(f"{path}, item {index} of 'golds' is a {type(gold).__name__}. It must be an object.")
    outputs = {
        row_id: take(gold, "output", str, f"{path}, id {row_id!r}") for row_id, gold in _by_id(golds, path).items()
    }
    if not outputs.keys() & questions.keys():
        raise ValueError(f"{path} and {questions_path} have no id in common. They are not of the same split.")
    unasked = Skips()
    unasked.add("no such question", len(outputs.keys() - questions.keys()))
    unasked.log(logger, f"outputs of {path}")
    return outputs


def _check_ids(asked: set[str], answered: set[str], questions: str | Path) -> None:
    for ids, what in ((asked - answered, "have no prediction"), (answered - asked, "are predicted and not asked")):
        if ids:
            shown = ", ".join(map(repr, sorted(ids)[:5])) + (", …" if len(ids) > 5 else "")
            raise ValueError(
                f"{len(ids)} ids of {questions} {what}: {shown}. A submission needs one prediction for each question."
            )
