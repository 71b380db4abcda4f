# SPDX-License-Identifier: Apache-2.0

"""
LLM as a judge (Appendix D.1, Table 10): how personal, and how well written, are the predictions of `trl-perce evaluate`?

Two prompts, in the style of G-Eval (Liu et al. 2023), with the paper's slots in its order and its five steps of a scale, in words of
ours. Personalization: query, the user's own response, prediction; the persona is not shown. Quality: query, prediction. The paper's second judge
gives its four ratings in one reply; here each has a question of its own, as in G-Eval, so that a reply that cannot be read costs one
rating. G-Eval's weighting by token probabilities is not offered: many endpoints (among them `transformers serve`) return none, and what
they return depends on the tokenizer; the mean over several sampled replies estimates the same figure with any endpoint.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.files import write_json_lines
from .endpoint import Endpoint
from .ratings import mean_of_known, parse_rating, to_percent


logger = logging.getLogger(__name__)

_FORM = """\
Rate {name} with a whole number from 1 (worst) to 5 (best). Write the form below and nothing else.

{name}: <a whole number from 1 to 5>"""

PERSONALIZATION_PROMPT = (
    """\
You compare a response with the one that the user wrote, or would have wanted. Judge as a neutral reader would.

Criterion: {name}. {definition}

{scale}

Query:
{query}

The user's own response:
{reference}

Response to rate:
{prediction}

"""
    + _FORM
)

QUALITY_PROMPT = (
    """\
You rate how well a response to a query is written. Judge as a neutral reader would.

Criterion: {name}. {definition}

{scale}

Query:
{query}

Response to rate:
{prediction}

"""
    + _FORM
)

_LIKENESS = (
    "it has nothing to do with the user's own response.",
    "it touches on it, but goes another way.",
    "it goes the same way in part, and gets things wrong.",
    "it is the same in the main, and leaves out a little.",
    "it says the same, in full and without a fault.",
)
_QUALITY = (
    "it cannot be used.",
    "its faults are grave.",
    "its faults are plain, but parts of it will do.",
    "it is good, with small faults.",
    "it is very good, without a fault to be seen.",
)


@dataclass(frozen=True)
class Criterion:
    """
    One thing that the judge rates.

    Attributes:
        prompt (`str`): Text of the question, with places `{name}`, `{definition}`, `{scale}`, `{query}`, `{prediction}` and,
            if the judge shall see it, `{reference}`.
        definition (`str`): What is rated.
        scale (`tuple[str, ...]`): What the ratings 1 to 5 mean.
    """

    prompt: str
    definition: str
    scale: tuple[str, ...]

    def messages(self, name: str, prediction: dict[str, Any]) -> list[dict[str, str]]:
        """The question to the judge about a line of `predictions.jsonl`."""
        scale = "\n".join(f"{rating}: {meaning}" for rating, meaning in enumerate(self.scale, 1))
        texts = {key: prediction[key] for key in ("query", "reference", "prediction")}
        content = self.prompt.format(name=name, definition=self.definition, scale=scale, **texts)
        return [{"role": "user", "content": content}]


CRITERIA = {
    "personalization": Criterion(
        PERSONALIZATION_PROMPT,
        "How close does the response come to the user's own, in what it says and in how it says it?",
        _LIKENESS,
    ),
    "coherence": Criterion(
        QUALITY_PROMPT,
        "Do the sentences follow from each other and build one whole, in an order that makes sense?",
        _QUALITY,
    ),
    "consistency": Criterion(
        QUALITY_PROMPT,
        "Does the response agree with the query and with itself? Statements that contradict either are faults.",
        _QUALITY,
    ),
    "fluency": Criterion(
        QUALITY_PROMPT,
        "Is the language of the response good: grammar, spelling, punctuation, choice of words, no repetition, no broken end?",
        _QUALITY,
    ),
    "relevance": Criterion(
        QUALITY_PROMPT,
        "Does the response do what the query asks for, with what matters for it and nothing beside the point?",
        _QUALITY,
    ),
}


@dataclass
class Judgements:
    """
    What a judge says of `R` predictions.

    Attributes:
        scores (`dict[str, np.ndarray]`): Of each criterion an array of shape `(R,)` and dtype `float64`: the rating from 1 to
            5 (the mean over the samples that could be read), NaN where none could.
        unparsable (`dict[str, int]`): Of each criterion, replies without a rating, of `R * samples`.
        replies (`dict[str, list[list[str]]]`): Of each criterion and prediction, what the judge wrote, one text a sample.
    """

    scores: dict[str, np.ndarray]
    unparsable: dict[str, int]
    replies: dict[str, list[list[str]]]

    def summary(self) -> dict[str, dict[str, float | int | None]]:
        """
        Of each criterion: `"mean"` from 1 to 5 over the predictions with a rating, the same as `"percent"`
        ([`~ratings.to_percent`]), both `None` where there is none; `"rated"`, the number of such predictions; `"rows"`; and
        `"unparsable"` replies.
        """
        return {name: self._summary_of(name) for name in self.scores}

    def _summary_of(self, name: str) -> dict[str, float | int | None]:
        scores = self.scores[name]
        rated = int(np.isfinite(scores).sum())
        mean = float(mean_of_known(scores)) if rated else None
        return {
            "mean": mean,
            "percent": None if mean is None else to_percent(mean),
            "rated": rated,
            "rows": len(scores),
            "unparsable": self.unparsable[name],
        }

    def write(self, path: str | Path, predictions: list[dict[str, Any]]) -> None:
        """
        Write `judge.jsonl`: of each prediction a line `{"row", "id", "scores": {criterion: float or null}, "replies":
        {criterion: [str, …]}}`.

        Args:
            path (`str` or `Path`): Where to.
            predictions (`list[dict[str, Any]]`): Those that were judged.
        """
        write_json_lines(path, map(self._line, range(len(predictions)), predictions))

    def _line(self, index: int, prediction: dict[str, Any]) -> dict[str, Any]:
        scores = {name: float(values[index]) for name, values in self.scores.items()}
        return {
            "row": prediction["row"],
            "id": prediction.get("id"),
            "scores": {name: None if np.isnan(score) else score for name, score in scores.items()},
            "replies": {name: replies[index] for name, replies in self.replies.items()},
        }


def judge_predictions(
    predictions: list[dict[str, Any]],
    endpoint: Endpoint,
    criteria: Sequence[str] = tuple(CRITERIA),
    samples: int = 1,
) -> Judgements:
    """
    Have a model rate predictions, one question a prediction, criterion and sample.

    Args:
        predictions (`list[dict[str, Any]]`): Lines of `predictions.jsonl`: `query`, `reference` and `prediction` are judged.
        endpoint ([`~trl_perce.evaluation.endpoint.Endpoint`]): The judge. Its file of answers makes a run that was killed go on.
        criteria (`Sequence[str]`, *optional*): Of [`CRITERIA`]; all by default.
        samples (`int`, *optional*, defaults to `1`): Replies to each question, of which the mean counts. More than one needs
            an endpoint whose `temperature` is above 0; they go with the seeds 0, 1, ….

    Returns:
        [`Judgements`]: Ratings, counts and replies.

    Raises:
        `ValueError`: A criterion is not known, a prediction lacks a field, or `samples` does not go with the endpoint.
    """
    _check(predictions, endpoint, criteria, samples)
    asked = [(name, prediction, seed) for name in criteria for prediction in predictions for seed in range(samples)]
    replies = endpoint.ask(
        [CRITERIA[name].messages(name, prediction) for name, prediction, _ in asked],
        desc="Judge",
        seeds=[seed for _, _, seed in asked] if samples > 1 else None,
    )
    shape = (len(criteria), len(predictions), samples)
    grouped = np.array(replies, dtype=object).reshape(shape).tolist()
    return read_judgements(dict(zip(criteria, grouped, strict=True)))


def read_judgements(replies: dict[str, list[list[str]]]) -> Judgements:
    """
    The replies of a judge, read and counted.

    Args:
        replies (`dict[str, list[list[str]]]`): Of each criterion and prediction, what the judge wrote, one text a sample.

    Returns:
        [`Judgements`]: Ratings, counts and replies.
    """
    scores, unparsable = {}, {}
    for name, of_rows in replies.items():
        ratings = [[parse_rating(reply, name) for reply in of_row] for of_row in of_rows]
        known = [[rating for rating in of_row if rating is not None] for of_row in ratings]
        scores[name] = np.array([np.mean(of_row) if of_row else np.nan for of_row in known], dtype=float)
        unparsable[name] = sum(of_row.count(None) for of_row in ratings)
        if unparsable[name]:
            logger.warning(
                f"Judge, {name}: {unparsable[name]} of {sum(map(len, of_rows))} replies hold no rating. They are counted and "
                "left out of the mean."
            )
    return Judgements(scores, unparsable, replies)


def _check(predictions: list[dict[str, Any]], endpoint: Endpoint, criteria: Sequence[str], samples: int) -> None:
    unknown = [name for name in criteria if name not in CRITERIA]
    if unknown or not criteria:
        raise ValueError(f"`criteria` is {list(criteria)}. Write some of {', '.join(map(repr, CRITERIA))}.")
    if samples < 1 or (samples > 1 and endpoint.temperature == 0):
        raise ValueError(
            f"`samples` is {samples} and the endpoint's `temperature` {endpoint.temperature}. Write 1, or more with a "
            "temperature above 0: without sampling, all replies are the same."
        )
    for index, prediction in enumerate(predictions):
        missing = [key for key in ("row", "query", "reference", "prediction") if key not in prediction]
        if missing:
            raise ValueError(
                f"Prediction {index} has no {', '.join(map(repr, missing))}; it has {', '.join(map(repr, prediction))}. "
                "Give lines of 'predictions.jsonl' as `trl-perce evaluate` writes them."
            )
