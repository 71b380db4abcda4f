# SPDX-License-Identifier: Apache-2.0

"""
Preference following by likelihood: of several continuations of a prompt, which one does the model find likeliest, and which one gains
the most from the persona? No judge is needed.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..persona.marks import PersonaError
from ..scoring.scores import TokenScores
from .predictions import split_conversation


def has_options(row: dict[str, Any]) -> bool:
    """Whether a row has options to choose from: a list `options`, and `answer`, the index of the right one."""
    return row.get("options") is not None and row.get("answer") is not None


def option_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Rows to score: each option of each row that has some, in the place of its response, a conversation's last reply.

    Args:
        rows (iterable of `dict`): Rows with `prompt` and `completion`, or `messages`. Those with options have `options` (`list[str]`, two or more) and
            `answer` (`int`, the index of the option that is right for the user).

    Returns:
        `list[dict[str, Any]]`: Row after row, option after option.

    Raises:
        `PersonaError`: Options that cannot be scored; the message names the row.
    """
    scored = []
    for index, row in enumerate(rows):
        if not has_options(row):
            continue
        options, answer = row["options"], row["answer"]
        if not isinstance(options, (list, tuple)) or len(options) < 2:
            raise PersonaError(
                f"row {index}: 'options' is {options!r}. Write a list of two or more texts, or leave it out."
            )
        for option in options:
            if not isinstance(option, str) or not option.strip():
                raise PersonaError(f"row {index}: 'options' holds {option!r}. Write texts that are not empty.")
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
            raise PersonaError(
                f"row {index}: 'answer' is {answer!r}. Write the index of the right option, 0 to {len(options) - 1}."
            )
        try:
            asked = split_conversation(row)
        except PersonaError as error:
            raise PersonaError(f"row {index}: {error}") from error
        scored += [with_response(asked, option) for option in options]
    return scored


def with_response(row: dict[str, Any], text: str) -> dict[str, Any]:
    """
    A row with another response, of the kind of its own: with the space or line break that it begins with, or as a message.

    Args:
        row (`dict[str, Any]`): With `prompt` and `completion` ([`~predictions.split_conversation`]).
        text (`str`): The response.

    Returns:
        `dict[str, Any]`: A new row, without `options` and `answer`.
    """
    own = row["completion"]
    completion: Any = [{"role": "assistant", "content": text}]
    if isinstance(own, str):
        completion = own[: len(own) - len(own.lstrip())] + text
    return {name: row[name] for name in row if name not in ("options", "answer")} | {"completion": completion}


def option_questions(rows: Sequence[dict[str, Any]]) -> list[int]:
    """For each of [`option_rows`], the index of the row that it is an option of."""
    return [index for index, row in enumerate(rows) if has_options(row) for _ in row["options"]]


def option_values(
    rows: Sequence[dict[str, Any]], scores: Sequence[TokenScores], swapped: Sequence[TokenScores] | None = None
) -> dict[str, np.ndarray]:
    """
    Which option a model chooses.

    Args:
        rows (`Sequence[dict]`): All `R` rows that were evaluated.
        scores (`Sequence[TokenScores]`): Of [`option_rows`] of them, in order.
        swapped (`Sequence[TokenScores]`, *optional*): Of the same, with another user's persona, one for all options of a row
            ([`~likelihood.score_swapped`]).

    Returns:
        `dict[str, np.ndarray]`: Arrays of shape `(R,)`, NaN where a row has no options, one of them was left out, or, for all but the
            first, there is no persona. `options/likelihood`: 1 where the right option has the highest mean log-likelihood a token, a
            share of 1 where it has it together with others, else 0. `options/without` and `options/swapped`: the same without a persona
            and with another user's, for which no option is right: that of the own persona is counted. `options/pir`: the same for
            the sum of PIR over the option's tokens; and `options/pir_margin`: that sum for the right option less its mean over all
            options, in nats.
    """
    names = ["likelihood", "without", *([] if swapped is None else ["swapped"]), "pir", "pir_margin"]
    values = {f"options/{name}": np.full(len(rows), np.nan) for name in names}
    position = 0
    for index, row in enumerate(rows):
        if not has_options(row):
            continue
        own = scores[position : position + len(row["options"])]
        position += len(own)
        if any(option.skipped is not None for option in own):
            continue
        answer = row["answer"]
        values["options/likelihood"][index] = _likeliest([option.log_probs for option in own], answer)
        gains = [option.pir.sum(dtype=np.float64) for option in own]
        if not np.isfinite(gains).all():
            continue
        values["options/without"][index] = _likeliest([option.counterfactual_log_probs for option in own], answer)
        values["options/pir"][index] = _chosen(gains, answer)
        values["options/pir_margin"][index] = gains[answer] - np.mean(gains)
        if swapped is not None:
            others = swapped[position - len(own) : position]
            if all(option.skipped is None for option in others):
                values["options/swapped"][index] = _likeliest(
                    [option.counterfactual_log_probs for option in others], answer
                )
    return values


def _likeliest(log_probs: Sequence[np.ndarray], answer: int) -> float:
    return _chosen([own.mean(dtype=np.float64) for own in log_probs], answer)


def _chosen(values: Sequence[float], answer: int) -> float:
    best = np.flatnonzero(np.asarray(values) == max(values))
    return float(answer in best) / len(best)
