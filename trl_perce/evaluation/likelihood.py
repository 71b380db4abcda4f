# SPDX-License-Identifier: Apache-2.0

"""
How likely the users' own responses are to a model, on the tokens that are personal and on the others.

Which tokens are personal, another model decides (the untrained one), so that it is the same for all that are compared. Overlap with one
reference hardly shows whether a model uses the persona; the log-likelihood of personal tokens does.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from ..config import copy_config
from ..persona.masks import persona_stretches, swap_persona
from ..scoring.percontrast import PerContrast
from ..scoring.preparation import PreparedRows
from ..scoring.scores import TokenScores
from ..utils.share import EVERYTHING, Share
from .predictions import other_rows


@dataclass
class TokenLikelihoods:
    """
    Sums over the tokens of each of `R` rows, and their numbers; means over tokens are made of them by [`ratio_values`].

    Attributes:
        sums (`dict[str, np.ndarray]`): Arrays of shape `(R,)`, in nats: `log_likelihood/personal` and `log_likelihood/other` (sums of
            `log P_θ(y_i | p, x, y_<i)`), `pir/personal` and `pir/other` (sums of the evaluated model's PIRs), without a persona
            `log_likelihood/personal_without` and `log_likelihood/other_without`, and with another user's persona
            `log_likelihood/personal_swapped` and `log_likelihood/other_swapped`; `personal_fraction` counts personal
            tokens and `own_personal_fraction` those that the evaluated model itself finds personal.
        counts (`dict[str, np.ndarray]`): Arrays of shape `(R,)`: by the same names, the tokens that each sum is over.
    """

    sums: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]


def token_likelihoods(
    scores: Sequence[TokenScores], reference: Sequence[TokenScores], swapped: Sequence[TokenScores] | None = None
) -> TokenLikelihoods:
    """
    Log-likelihood of personal and of other tokens under the model that gave `scores`. Personal are tokens whose PIR is over
    the threshold in `reference`; other tokens are all the rest that is trained, the end of the response included. Tokens without a
    PIR (there is no persona) are other tokens, and are left out of `pir/other` and `log_likelihood/other_without`.

    Args:
        scores (`Sequence[TokenScores]`): Of the evaluated model, `R` rows.
        reference (`Sequence[TokenScores]`): Of the model that decides which tokens are personal, of the same rows.
        swapped (`Sequence[TokenScores]`, *optional*): Of the evaluated model, with another user's persona as the counterfactual: from
            [`score_swapped`], or from [`PerContrast`] with `counterfactual="swap"`.

    Returns:
        [`TokenLikelihoods`]: A row that was left out in `scores` or `reference` has 0 everywhere.

    Raises:
        `ValueError`: The scores are not of the same rows and tokens; the message names the row.
    """
    _check_same(scores, reference, "reference")
    if swapped is not None:
        _check_same(scores, swapped, "swapped")
    collected: dict[str, list[tuple[float, int]]] = {}

    def add(name: str, values: np.ndarray, where: np.ndarray) -> None:
        chosen = values[where & np.isfinite(values)].astype(np.float64)
        collected.setdefault(name, []).append((float(chosen.sum()), len(chosen)))

    for index, (own, deciding) in enumerate(zip(scores, reference, strict=True)):
        left_out = own.skipped is not None or deciding.skipped is not None
        personal = np.zeros(len(own.tokens), bool) if left_out else deciding.is_personal
        other = np.zeros(len(own.tokens), bool) if left_out else ~personal
        add("log_likelihood/personal", own.log_probs, personal)
        add("log_likelihood/other", own.log_probs, other)
        add("pir/personal", own.pir, personal)
        add("pir/other", own.pir, other)
        add("log_likelihood/personal_without", own.counterfactual_log_probs, personal)
        add("log_likelihood/other_without", own.counterfactual_log_probs, other)
        add("personal_fraction", personal.astype(float), personal | other)
        add("own_personal_fraction", own.is_personal.astype(float), personal | other)
        if swapped is not None:
            with_other = swapped[index].counterfactual_log_probs
            if swapped[index].skipped is not None:
                with_other = np.full(len(own.tokens), np.nan)
            add("log_likelihood/personal_swapped", with_other, personal)
            add("log_likelihood/other_swapped", with_other, other)
    sums = {name: np.array([total for total, _ in values]) for name, values in collected.items()}
    counts = {name: np.array([count for _, count in values]) for name, values in collected.items()}
    return TokenLikelihoods(sums, counts)


def ratio_values(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """
    Values of rows whose plain mean is the mean over all tokens, and whose spread is that of this mean: the ratio's linear
    approximation, `r + (s_i − r n_i) / mean(n)` with `r = Σ s / Σ n`. Means over tokens go through the same bootstrap and paired
    test with them as means over rows.

    Args:
        sums (`np.ndarray` of shape `(R,)`): Sum of each row.
        counts (`np.ndarray` of shape `(R,)`): Tokens of each row.

    Returns:
        `np.ndarray` of shape `(R,)`: Values; all NaN where there is no token.
    """
    if not counts.sum():
        return np.full(len(sums), np.nan)
    ratio = sums.sum() / counts.sum()
    return ratio + (sums - ratio * counts) / counts.mean()


def likelihood_values(likelihoods: TokenLikelihoods) -> dict[str, np.ndarray]:
    """
    [`ratio_values`] of every name, which summarise to nats a token (or to a fraction of tokens).

    Args:
        likelihoods ([`TokenLikelihoods`]): From [`token_likelihoods`].

    Returns:
        `dict[str, np.ndarray]`: Arrays of shape `(R,)`. Names without a single token are left out.
    """
    values = {name: ratio_values(sums, likelihoods.counts[name]) for name, sums in likelihoods.sums.items()}
    return {name: own for name, own in values.items() if not np.isnan(own).any()}


def score_swapped(
    scorer: PerContrast,
    prepared: PreparedRows,
    users: Sequence[str | None],
    done: Collection[int] = (),
    share: Share = EVERYTHING,
    questions: Sequence[int] | None = None,
) -> Iterator[TokenScores]:
    """
    Score rows with another user's persona in place of their own ([`~predictions.other_rows`]). Unlike [`PerContrast`] with
    `counterfactual="swap"` it never takes another persona of the same user, and pays one pass, not two.

    Args:
        scorer ([`PerContrast`]): The model.
        prepared ([`PreparedRows`]): From [`~PerContrast.prepare`], not streaming.
        users (`Sequence[str | None]`): The user of each row, `None` where it is not known.
        done (`Collection[int]`, *optional*): Indices of rows to pass over.
        share ([`~share.Share`], *optional*): What this process scores, where several share the work. By default all.
        questions (`Sequence[int]`, *optional*): The question of each row, where several rows are options of one: they get the same
            other persona. By default each row is a question.

    Yields:
        [`TokenScores`]: Of each row; `counterfactual_log_probs` is with the other persona, `log_probs` (and so `pir`) is NaN.

    Raises:
        `PersonaError`: There is no other user's persona.
    """
    rows = prepared.dataset
    numbers, personas = [*rows["_row"]], [*rows["_persona"]]
    of_row = numbers if questions is None else [questions[number] for number in numbers]
    first_of: dict[int, int] = {}
    for place, question in enumerate(of_row):
        first_of.setdefault(question, place)
    firsts = [*first_of.values()]
    donors = other_rows([users[numbers[place]] for place in firsts], [personas[place] for place in firsts])
    donor_of = dict(zip(first_of, (firsts[donor] for donor in donors), strict=True))
    others = [donor_of[question] for question in of_row]
    swapped = []
    for row, other in zip(rows, others, strict=True):
        ids, labels, mask, persona = row["input_ids"], row["labels"], row["persona_mask"], row["_persona"]
        if any(mask):
            donor = rows[other]
            stretches = persona_stretches(donor["input_ids"], donor["persona_mask"])
            ids, labels = swap_persona(ids, labels, mask, stretches)
            persona = donor["_persona"]
        # Without a mask the other persona is plain context: one pass
        swapped.append(
            {**row, "input_ids": ids, "labels": labels, "persona_mask": [0] * len(ids), "_persona": persona}
        )
    one_pass = PreparedRows(Dataset.from_list(swapped), prepared.read, prepared.skipped)
    args = copy_config(scorer.args, counterfactual="drop")
    for scores in PerContrast(scorer.model, scorer.tokenizer, args).iterate(one_pass, done, share):
        scores.counterfactual_log_probs = scores.log_probs
        scores.log_probs = np.full_like(scores.log_probs, np.nan)
        yield scores


def _check_same(scores: Sequence[TokenScores], others: Sequence[TokenScores], name: str) -> None:
    if len(scores) != len(others):
        raise ValueError(f"There are {len(scores)} rows of scores and {len(others)} in `{name}`. Score the same rows.")
    for own, other in zip(scores, others, strict=True):
        both = own.skipped is None and other.skipped is None
        if own.row != other.row or (both and own.tokens != other.tokens):
            raise ValueError(
                f"row {own.row}: its response has other tokens in `{name}`. Score the same rows with the same "
                "tokenizer, chat template and `max_length`."
            )
