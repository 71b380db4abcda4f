# SPDX-License-Identifier: Apache-2.0

"""
General questions (PerCE paper, Table 11): does training a model to be personal hurt what else it can do?

HotpotQA (Yang et al. 2018, the questions with distractors) and DROP (Dua et al. 2019), scored with exact match and F1 as their
official evaluators do (`hotpot_evaluate_v1.py` of hotpotqa/hotpot, `drop_eval.py` of allenai/allennlp-reading-comprehension).

    load("drop") ──► rows {"prompt", "completion", "answers", …} ── a model ──► replies ── score() ──► {"em", "f1"}

The questions are asked without examples, in words of ours: the paper does not give its prompts. The package `lm-eval` has
DROP too, which [`lm_eval_scores`] runs as it stands there; of HotpotQA it has only LongBench's 200 rows (`longbench_hotpotqa`).
"""

import json
import logging
import random
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.thoughts import split_thought


logger = logging.getLogger(__name__)

NAMES = ("hotpotqa", "drop")
# `ucinlp/drop` will not do: it puts the spans of all annotators into one list, so that one answer of three spans looks like three
# answers. This one, which lm-eval takes too, has each answer as it is in the official file.
_HUB = {"hotpotqa": ("hotpotqa/hotpot_qa", "distractor"), "drop": ("EleutherAI/drop", None)}
_SPLITS = ("train", "validation")

# Wording ours
PROMPT = "{context}\n\nQuestion: {question}\n\n{instruction} Reply with the answer alone, on one line."
INSTRUCTIONS = {
    "hotpotqa": "Answer with yes, no, or a few words from the text above.",
    "drop": "Answer with a number, a date, or a few words from the text above. If the answer has several parts, put semicolons "
    "between them.",
}

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_PREFIX = re.compile(r"^[\s*_]*(?:final )?answer[\s*_]*:[\s*_]*", re.IGNORECASE)


def load(
    name: str, split: str = "validation", path: str | Path | None = None, num_rows: int | None = 500, seed: int = 0
) -> list[dict[str, Any]]:
    """
    Questions with their texts, ready to be asked.

    Args:
        name (`str`): `"hotpotqa"` or `"drop"`.
        split (`str`, *optional*, defaults to `"validation"`): `"train"` or `"validation"` of the dataset on the Hub
            (`hotpotqa/hotpot_qa`, configuration `distractor`; `EleutherAI/drop`). The answers of the test splits are not public.
        path (`str` or `Path`, *optional*): Official file to take instead, `hotpot_dev_distractor_v1.json` or
            `drop_dataset_dev.json`; `split` then does not matter.
        num_rows (`int`, *optional*, defaults to `500`): Questions to draw, in the order of the source. `None` for all.
        seed (`int`, *optional*, defaults to `0`): Of the draw.

    Returns:
        `list[dict[str, Any]]`: Rows with `id`, `benchmark` (the name), `prompt` and `completion` (messages), and `answers`: the
            answers that count as right, each a list of spans (one span but for some answers of DROP). Questions without any
            answer (DROP has a few) are left out and counted in the log.

    Raises:
        `ValueError`: There is no such benchmark or split, or the file is not as it should be; the message says where.
    """
    if name not in NAMES:
        raise ValueError(f"There is no benchmark {name!r} of general questions. Write 'hotpotqa' or 'drop'.")
    if num_rows is not None and num_rows < 1:
        raise ValueError(f"`num_rows` is {num_rows}. Write a positive number, or None for all.")
    if path is not None:
        questions = _hotpotqa_file(path) if name == "hotpotqa" else _drop_file(path)
    else:
        questions = _hub_questions(name, split)
    rows = [_row(name, *question) for question in questions]
    answered = [row for row in rows if row["answers"]]
    if len(answered) < len(rows):
        logger.warning(
            f"{name}: {len(rows) - len(answered)} of {len(rows)} questions have no answer and are left out."
        )
    if not answered:
        raise ValueError(f"{name}: no question has an answer in {path or _HUB[name][0]}.")
    if num_rows is None or num_rows >= len(answered):
        logger.info(f"{name}: all {len(answered)} questions.")
        return answered
    return [answered[index] for index in sorted(random.Random(seed).sample(range(len(answered)), num_rows))]


# Id, text, question, answers
_Question = tuple[str, str, str, list[list[str]]]


def _row(name: str, id: str, context: str, question: str, answers: list[list[str]]) -> dict[str, Any]:
    prompt = PROMPT.format(context=context, question=question.strip(), instruction=INSTRUCTIONS[name])
    return {
        "id": id,
        "benchmark": name,
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": "; ".join(answers[0]) if answers else ""}],
        "answers": answers,
    }


def _hub_questions(name: str, split: str) -> Iterator[_Question]:
    from datasets import load_dataset

    if split not in _SPLITS:
        raise ValueError(f"{name} has no split {split!r} with answers. Write 'train' or 'validation'.")
    dataset = load_dataset(*_HUB[name], split=split)
    for index, record in enumerate(dataset):
        yield _hub_question(name, record, f"{_HUB[name][0]}, row {index}")


def _hub_question(name: str, record: dict[str, Any], where: str) -> _Question:
    if name == "hotpotqa":
        paragraphs = _items(record, "context", ("title", "sentences"), where)
        return _hotpotqa_question({**record, "_id": record.get("id"), "context": list(map(list, paragraphs))}, where)
    fields = ("number", "spans", "date")
    validated = [
        dict(zip(fields, values, strict=True)) for values in _items(record, "validated_answers", fields, where)
    ]
    passage = _field(record, "passage", str, where)
    return _drop_question({**record, "validated_answers": validated}, passage, where)


def _items(record: dict[str, Any], name: str, fields: Sequence[str], where: str) -> Iterator[tuple]:
    """Of a column that has a list for each field, as the Hub's rows do: the fields of one item after another."""
    columns = _field(record, name, dict, where)
    return zip(*(_field(columns, field, list, f"{where}, {name!r}") for field in fields), strict=True)


def _hotpotqa_file(path: str | Path) -> Iterator[_Question]:
    records = _read(path, list, "a list of questions (hotpot_dev_distractor_v1.json)")
    for index, record in enumerate(records):
        yield _hotpotqa_question(record, f"{path}, question {index}")


def _hotpotqa_question(record: dict[str, Any], where: str) -> _Question:
    paragraphs = []
    for paragraph in _field(record, "context", list, where):
        if len(paragraph) != 2 or not isinstance(paragraph[0], str) or not isinstance(paragraph[1], list):
            raise ValueError(f"{where}: a paragraph of 'context' is not [title, [sentence, …]].")
        title, sentences = paragraph
        paragraphs.append(f"{title}\n{' '.join(sentence.strip() for sentence in sentences)}")
    answer = _field(record, "answer", str, where)
    answers = [[answer]] if answer.strip() else []
    id, question = _field(record, "_id", str, where), _field(record, "question", str, where)
    return id, "\n\n".join(paragraphs), question, answers


def _drop_file(path: str | Path) -> Iterator[_Question]:
    sections = _read(path, dict, "an object of passages (drop_dataset_dev.json)")
    for name, section in sections.items():
        passage = _field(section, "passage", str, f"{path}, passage {name!r}")
        for index, record in enumerate(_field(section, "qa_pairs", list, f"{path}, passage {name!r}")):
            yield _drop_question(record, passage, f"{path}, passage {name!r}, question {index}")


def _drop_question(record: dict[str, Any], passage: str, where: str) -> _Question:
    candidates = [_field(record, "answer", dict, where), *(record.get("validated_answers") or [])]
    answers = []
    for candidate in candidates:
        spans = _drop_spans(candidate, where)
        if spans[0].strip() and spans not in answers:
            answers.append(spans)
    return _field(record, "query_id", str, where), passage, _field(record, "question", str, where), answers


def _drop_spans(answer: dict[str, Any], where: str) -> list[str]:
    """Of one annotator, in the official evaluator's order: the number, or else the spans, or else the date."""
    if not isinstance(answer, dict) or not {"number", "spans", "date"} & set(answer):
        raise ValueError(f"{where}: the answer {answer!r} has none of 'number', 'spans' and 'date'.")
    if answer.get("number"):
        return [str(answer["number"])]
    if answer.get("spans"):
        return list(answer["spans"])
    date = answer.get("date") or {}
    return [" ".join(date[part] for part in ("day", "month", "year") if date.get(part))]


def _read(path: str | Path, kind: type, expected: str) -> Any:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read as JSON; was it downloaded completely, and unpacked? {error}"
        ) from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not {expected}.")
    return content


def _field(record: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        held = f"has {', '.join(map(repr, record))}" if isinstance(record, dict) else f"is {record!r}"
        raise ValueError(
            f"{where}: there is no {name!r}; it {held}. Test files come without answers: take the dev file."
        )
    if not isinstance(record[name], kind):
        raise ValueError(f"{where}: {name!r} is {record[name]!r}, not a {kind.__name__}.")
    return record[name]


def extract_answer(reply: str) -> str:
    """
    The answer in a chat model's reply: its first line, without "Answer:" (or "Final answer:") before it, bold or not. A thought
    before it ([`split_thought`]) does not count; where it never ends, there is no answer.

    Args:
        reply (`str`): The reply.

    Returns:
        `str`: The answer, `""` if there is none.
    """
    lines = _PREFIX.sub("", split_thought(reply).answer).strip().splitlines()
    return lines[0].strip() if lines else ""


def score(predictions: Sequence[str], rows: Iterable[dict[str, Any]]) -> dict[str, np.ndarray]:
    """
    Exact match and F1 of replies, by the official rules of each row's benchmark, the best over the answers that count as right.

    Args:
        predictions (`Sequence[str]` of length `R`): Replies; [`extract_answer`] is applied to each. For DROP, semicolons part
            several spans, as the prompt asks for.
        rows (`Iterable[dict[str, Any]]` of length `R`): The rows that were asked, from [`load`].

    Returns:
        `dict[str, np.ndarray]`: `"em"` (0 or 1) and `"f1"` (0 to 1; DROP's is rounded to two places, as officially), each of shape
            `(R,)`.

    Raises:
        `ValueError`: There are not as many predictions as rows.
        `ImportError`: A row is of DROP and SciPy is not installed.
    """
    rows = list(rows)
    if len(predictions) != len(rows):
        raise ValueError(
            f"There are {len(predictions)} predictions for {len(rows)} rows. Give one for each row, in order."
        )
    scores = np.zeros((len(rows), 2))
    for index, (prediction, row) in enumerate(zip(predictions, rows, strict=True)):
        answer = extract_answer(prediction)
        if row["benchmark"] == "drop":
            spans = [span for span in answer.split(";") if span.strip()] or [""]
            found = [_drop_scores(spans, right) for right in row["answers"]]
        else:
            found = [_hotpotqa_scores(answer, right[0]) for right in row["answers"]]
        scores[index] = np.max(found, axis=0)
    return {"em": scores[:, 0], "f1": scores[:, 1]}


def _hotpotqa_scores(predicted: str, right: str) -> tuple[float, float]:
    predicted, right = _hotpotqa_normalized(predicted), _hotpotqa_normalized(right)
    if predicted == right:
        return 1.0, 1.0 if right else 0.0
    if {predicted, right} & {"yes", "no", "noanswer"}:
        return 0.0, 0.0
    predicted_words, right_words = predicted.split(), right.split()
    common = (Counter(predicted_words) & Counter(right_words)).total()
    return 0.0, 2 * common / max(len(predicted_words) + len(right_words), 1)


def _hotpotqa_normalized(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _drop_scores(predicted: list[str], right: list[str]) -> tuple[float, float]:
    predicted, right = [[_drop_normalized(span) for span in spans] for spans in (predicted, right)]
    exact = set(predicted) == set(right) and len(predicted) == len(right)
    return float(exact), _drop_f1([set(span.split()) for span in predicted], [set(span.split()) for span in right])


def _drop_f1(predicted: list[set[str]], right: list[set[str]]) -> float:
    """Mean F1 over pairs of spans, each span in at most one pair, paired so that it is largest; spans without a partner give 0."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("Scoring DROP needs the package scipy: pip install 'trl_perce[general_qa]'") from error
    f1 = np.array([[_bag_f1(bag, right_bag) for bag in predicted] for right_bag in right])
    pairs = linear_sum_assignment(f1, maximize=True)
    best = np.zeros(max(len(predicted), len(right)))
    best[: len(pairs[0])] = f1[pairs]
    return float(round(best.mean(), 2))


def _bag_f1(predicted: set[str], right: set[str]) -> float:
    numbers = set(filter(_is_number, right))
    if numbers and not numbers & predicted:  # a span with the wrong number is wrong
        return 0.0
    precision = len(predicted & right) / len(predicted) if predicted else 1.0
    recall = len(predicted & right) / len(right) if right else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _drop_normalized(text: str) -> str:
    words = []
    for word in re.split("[ -]", text.lower()):
        if not _is_number(word):  # the point of a number is no punctuation
            word = "".join(character for character in word if character not in _PUNCTUATION)
        word = str(float(word)) if _is_number(word) else word
        words += _ARTICLES.sub(" ", word).split()
    return " ".join(words)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def lm_eval_scores(
    model: str, adapter: str | None = None, tasks: Sequence[Any] = ("drop",), limit: int | None = None, **kwargs
) -> dict[str, dict[str, float]]:
    """
    Run tasks of the package `lm-eval` (EleutherAI's language model evaluation harness), with its prompts and its scores.

    Needs `pip install 'trl_perce[general_qa]'`, and the Hub for the tasks' data. DROP is the task `"drop"`. Sets the global
    random seeds, as lm-eval does.

    Args:
        model (`str`): Name or folder of a model, or of a PEFT adapter, whose base model is then taken.
        adapter (`str`, *optional*): Name or folder of an adapter to put on the model.
        tasks (`Sequence`, *optional*, defaults to `("drop",)`): Names of lm-eval's tasks, or their configurations.
        limit (`int`, *optional*): The first so many rows of each task only. If `None`, all.
        kwargs (*optional*): Further arguments of `lm_eval.simple_evaluate`, such as `num_fewshot`, `batch_size`,
            `apply_chat_template` (off if not set) and `device`.

    Returns:
        `dict[str, dict[str, float]]`: Of each task its figures, such as `{"drop": {"em": …, "em_stderr": …, "f1": …}}`, shares of 1.

    Raises:
        `ImportError`: The package `lm-eval` is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise ImportError("`lm_eval_scores` needs the package lm-eval: pip install 'trl_perce[general_qa]'") from error
    from ..scoring.loading import find_adapter

    base, adapter = find_adapter(model, adapter)
    model_args = {"pretrained": base} | ({} if adapter is None else {"peft": adapter})
    found = lm_eval.simple_evaluate("hf", model_args=model_args, tasks=list(tasks), limit=limit, **kwargs)["results"]
    return {
        task: {key.partition(",")[0]: value for key, value in figures.items() if "," in key}
        for task, figures in found.items()
    }
