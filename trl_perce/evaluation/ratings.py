# SPDX-License-Identifier: Apache-2.0

"""Ratings from 1 to 5 in the replies of LLM judges: read strictly or not at all."""

import re
from typing import TypeVar

import numpy as np

from .thoughts import split_thought


T = TypeVar("T", float, np.ndarray)

LOWEST, HIGHEST = 1, 5  # of a rating
_NUMBER = r"(?P<number>[-+]?\d+(?:\.\d+)?)(?:\s*/\s*5|\s+out\s+of\s+5)?"
_WORDS = ("score", "rating")


def parse_rating(reply: str, name: str | None = None) -> int | None:
    """
    The rating in a judge's reply. A line counts if it is nothing but a number (`4`, `4/5`, `4 out of 5`), alone or behind
    "score", "rating" or the criterion's name and a colon or equals sign (`Score: 4`, `Coherence (1-5): 4`, `Final score =
    4`, `{"score": 4}`). Markdown, bullets, quotes, a closing full stop and a thought before it ([`split_thought`]) do not matter.

    Nothing is guessed: all lines that count must give the same whole number from 1 to 5. Without such a line, with two
    different ones, or with a number out of range, there is no rating.

    Args:
        reply (`str`): What the judge wrote.
        name (`str`, *optional*): Name of the criterion, which may stand before the number.

    Returns:
        `int` or `None`: The rating, or `None` where it cannot be read.
    """
    words = "|".join(re.escape(word) for word in (*_WORDS, *([name] if name else [])))
    label = rf"(?:(?:\w+\s+)?(?:{words})(?:\s+(?:score|rating))?(?:\s*\(\s*1\s*[-–]\s*5\s*\))?\s*[:=]\s*)?"
    line = re.compile(rf"(?:[-•]\s+)?{label}{_NUMBER}\s*\.?", re.IGNORECASE)
    text = re.sub(r"[*_`\"'{}\[\]<>#]", "", split_thought(reply).answer)
    found = {float(match["number"]) for match in map(line.fullmatch, map(str.strip, text.splitlines())) if match}
    if len(found) != 1:
        return None
    rating = found.pop()
    return int(rating) if rating in range(LOWEST, HIGHEST + 1) else None


def to_percent(ratings: T) -> T:
    """
    Ratings on a scale from 0 to 100: `100 (r − 1) / 4`, so that 1 is 0 and 5 is 100. The prompts of Appendix D.1
    rate from 1 to 5 and Table 10 has per cent, some below 20: so 1 is 0 there, too, but the paper does not say it.

    Args:
        ratings (`np.ndarray` or `float`): From 1 to 5, or means of such; NaN stays.

    Returns:
        `np.ndarray` or `float`: From 0 to 100.
    """
    return 100 * (ratings - LOWEST) / (HIGHEST - LOWEST)


def mean_of_known(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The mean over what is not NaN, and NaN, without a warning, where there is nothing."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis) / known.sum(axis)
