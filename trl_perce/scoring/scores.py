# SPDX-License-Identifier: Apache-2.0

"""What PerContrast says of one row. Light: no torch, so that reports are made without it."""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np


# Letters and digits; apostrophes and hyphens inside of a word belong to it
WORD = re.compile(r"\w+(?:['’‐‑-]\w+)*")


@dataclass
class WordScore:
    """
    A word of a response.

    Attributes:
        text (`str`): The word, without white space and punctuation.
        start (`int`): Index of its first character in the response.
        end (`int`): Index after its last character.
        pir (`float`): Sum of the PIRs of its tokens, in nats: the PIR of the word. NaN if one of them has none.
        is_personal (`bool`): Whether `pir` is over the threshold of a personal token.
    """

    text: str
    start: int
    end: int
    pir: float
    is_personal: bool


@dataclass
class TokenScores:
    """
    The scores of one row's response, of `N` tokens: the tokens that the trainer trains, in order.

    A token that the counterfactual pass does not predict (the row has no persona, or the token belongs to it) has NaN as
    `counterfactual_log_probs` and `pir`, weight 1, and is not personal.

    Attributes:
        row (`int`): Index of the row in the dataset.
        persona (`str`): The row's persona, empty if it has none; several are put together with a blank line between.
        query (`str`): The text that the response answers, with "…" for the persona.
        response (`str`): The text of the tokens, those that the chat template adds (`<|im_end|>`) included.
        tokens (`list[str]`): Text of each token, `response[start:end]`. The tokens of one character that is made of several
            (an emoji) all have that character.
        offsets (`list[tuple[int, int]]`): Half-open character span of each token in `response`.
        is_special (`np.ndarray` of shape `(N,)` and dtype `bool`): Tokens that are not text, such as `<|im_end|>`.
        log_probs (`np.ndarray` of shape `(N,)` and dtype `float32`): `log P_θ(y_i | p, x, y_<i)`, in nats.
        counterfactual_log_probs (`np.ndarray` of shape `(N,)` and dtype `float32`): `log P_θ(y_i | x, y_<i)`, in nats.
        pir (`np.ndarray` of shape `(N,)` and dtype `float32`): Personal Influence Ratios, in nats (PerCE paper).
        weights (`np.ndarray` of shape `(N,)` and dtype `float32`): `w_i` of the PerCE loss, before `weight_normalization`.
        is_personal (`np.ndarray` of shape `(N,)` and dtype `bool`): Tokens with a PIR over `threshold`.
        threshold (`float`): In nats; 1 in the paper.
        num_tokens (`int`): Tokens of the factual pass: persona, query, response and chat template.
        num_counterfactual_tokens (`int`): Tokens of the counterfactual pass; 0 without a persona.
        num_persona_tokens (`int`): Tokens of the persona, once it is trimmed to `max_length`.
        skipped (`str` or `None`): Why the trainer would leave the row out, in which case `N` is 0. `None` if it is scored.
    """

    row: int
    persona: str
    query: str
    response: str
    tokens: list[str]
    offsets: list[tuple[int, int]]
    is_special: np.ndarray
    log_probs: np.ndarray
    counterfactual_log_probs: np.ndarray
    pir: np.ndarray
    weights: np.ndarray
    is_personal: np.ndarray
    threshold: float
    num_tokens: int
    num_counterfactual_tokens: int
    num_persona_tokens: int
    skipped: str | None = None

    @classmethod
    def left_out(cls, row: int, reason: str, threshold: float = 1.0) -> "TokenScores":
        """The scores of a row without any, for the `reason` that stands in `skipped`."""
        values: dict[str, Any] = dict.fromkeys(("persona", "query", "response"), "")
        values |= {"tokens": [], "offsets": []}
        values |= dict.fromkeys(("is_special", "is_personal"), np.empty(0, bool))
        values |= dict.fromkeys(("log_probs", "counterfactual_log_probs", "pir", "weights"), np.empty(0, np.float32))
        values |= dict.fromkeys(("num_tokens", "num_counterfactual_tokens", "num_persona_tokens"), 0)
        return cls(row=row, threshold=threshold, skipped=reason, **values)

    @property
    def words(self) -> list[WordScore]:
        """
        The words of the response with their PIR, the sum over their tokens: log-probabilities of tokens add up to that of
        the word. A word is a run of letters and digits, with the hyphens and apostrophes inside of it; a token counts for
        the first word that it has a character of. Special tokens are in no word. A script that does not part its words
        with spaces gives one word a clause.
        """
        # Special tokens are blanked, which leaves all offsets as they are
        text = list(self.response)
        for (start, end), is_special in zip(self.offsets, self.is_special, strict=True):
            if is_special:
                text[start:end] = " " * (end - start)
        words, token = [], 0
        for match in WORD.finditer("".join(text)):
            start, end = match.span()
            while token < len(self.offsets) and (self.offsets[token][1] <= start or self.is_special[token]):
                token += 1
            first = token
            while token < len(self.offsets) and self.offsets[token][0] < end:
                token += 1
            pir = float(np.sum(self.pir[first:token], dtype=np.float64)) if token > first else math.nan
            words.append(WordScore(match.group(), start, end, pir, pir > self.threshold))
        return words

    def to_dict(self) -> dict[str, Any]:
        """
        The scores as a line of `scores.jsonl`: lists instead of arrays, `None` instead of NaN, five decimals, and the words
        as `{"text", "start", "end", "pir", "is_personal"}`.
        """
        line = {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}
        line["words"] = [{**vars(word), "pir": _plain(word.pir)} for word in self.words]
        return line

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> "TokenScores":
        """The scores of a line of `scores.jsonl`. The inverse of [`~TokenScores.to_dict`], up to its rounding."""
        values = {name: line[name] for name in cls.__dataclass_fields__}
        for name in ("log_probs", "counterfactual_log_probs", "pir", "weights"):
            values[name] = np.array(values[name], dtype=np.float32)  # `None` becomes NaN
        for name in ("is_special", "is_personal"):
            values[name] = np.array(values[name], dtype=bool)
        values["offsets"] = [tuple(offset) for offset in values["offsets"]]
        return cls(**values)


def _plain(value):
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    return value
