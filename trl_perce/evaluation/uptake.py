# SPDX-License-Identifier: Apache-2.0

"""
Uptake: does a reply use the persona? Overlap with one reference hardly tells, since there are many good replies.

Counted are the persona's content words in the reply. Two further figures tell use of the *right* persona from chance and from
copying whatever is in the prompt, both with [`other_personas`]:

- chance: the same replies, counted against another user's persona;
- copying: replies generated with another user's persona in the prompt, counted against that persona. A model that copies has
  as many of its words as of the right one's.
"""

import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .words import content_words


def content_stems(text: str) -> set[str]:
    """
    The distinct content words of a text ([`~trl_perce.evaluation.words.content_words`]: neither English function words nor numerals), in
    lower case, as Porter stems: "Knitting" and "knits" are both "knit". Needs no data of NLTK's. For English.

    Args:
        text (`str`): The text.
    """
    return {_stem(text[start:end].lower()) for start, end in content_words(text)}


def persona_uptake(prediction: str, persona: str, query: str) -> int:
    """
    Number of distinct content words of the persona that occur in the reply and not in the query, as stems: words that the
    reply can only have from the persona, or by chance.

    Args:
        prediction (`str`): The reply.
        persona (`str`): The persona.
        query (`str`): The conversation before it without the persona, as [`~predictions.Prompt`] has it.
    """
    return len((content_stems(persona) & content_stems(prediction)) - content_stems(query))


def persona_uptakes(predictions: Sequence[str], personas: Sequence[str], queries: Sequence[str]) -> np.ndarray:
    """
    [`persona_uptake`] of `R` rows. A row without a persona has 0.

    Args:
        predictions (`Sequence[str]`): The replies.
        personas (`Sequence[str]`): Their personas, or those of [`other_personas`].
        queries (`Sequence[str]`): Their queries.

    Returns:
        `np.ndarray` of shape `(R,)`: Numbers of words, as `float`.

    Raises:
        `ValueError`: The lists differ in length.
    """
    _check_lengths(predictions=predictions, personas=personas, queries=queries)
    rows = zip(predictions, personas, queries, strict=True)
    return np.array([persona_uptake(*row) for row in rows], dtype=float)


def other_personas(personas: Sequence[str], users: Sequence[str | None] | None = None, seed: int = 0) -> list[str]:
    """
    For each row the persona of another user: of the next row, in an order drawn at random, whose user and persona are others
    and whose persona is not empty. So nearly each persona is given away as often as it occurs.

    Args:
        personas (`Sequence[str]`): Personas of `R` rows.
        users (`Sequence[str]` of length `R`, *optional*): Whose they are. By default equal personas are one user.
        seed (`int`, *optional*, defaults to `0`): Of the order.

    Returns:
        `list[str]` of length `R`: Personas.

    Raises:
        `ValueError`: The lists differ in length, or a row has no other user: the message names it.
    """
    users = list(personas) if users is None else users
    _check_lengths(personas=personas, users=users)
    order = random.Random(seed).sample(range(len(personas)), len(personas))
    others = [""] * len(personas)
    for position, row in enumerate(order):
        for step in range(1, len(order)):
            other = order[(position + step) % len(order)]
            if personas[other].strip() and personas[other] != personas[row] and users[other] != users[row]:
                others[row] = personas[other]
                break
        else:
            raise ValueError(
                f"Row {row}: there is no other user ({users[row]!r} here) with a persona. Two users are needed."
            )
    return others


@lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    return _stemmer().stem(word)


@lru_cache(maxsize=1)
def _stemmer():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def _check_lengths(**lists: Sequence) -> None:
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"One of each a row is needed, got {', '.join(f'{n} {name}' for name, n in lengths.items())}."
        )
