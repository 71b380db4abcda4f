# SPDX-License-Identifier: Apache-2.0

"""What a heatmap colours: the pieces of a response, and the texts around it."""

import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..scores import TokenScores


# Characters of a text that a picture and the terminal have room for
MAX_PERSONA, MAX_QUERY, MAX_RESPONSE = 300, 600, 2000
NOTHING_TO_DRAW = "No row has a PIR: none was scored with a persona."


class Unit(NamedTuple):
    """
    A piece of a response that is coloured as one: a token, or the tokens that share a character.

    Attributes:
        start (`int`): Index of its first character in the response.
        end (`int`): Index after its last character.
        pir (`float`): Sum of the PIRs of its tokens, in nats; NaN if one of them has none.
        is_special (`bool`): Whether it is no text.
    """

    start: int
    end: int
    pir: float
    is_special: bool


def units_of(scores: TokenScores) -> list[Unit]:
    """
    The pieces of a response to colour, in order.

    Args:
        scores ([`TokenScores`]): Of one row.

    Returns:
        `list[Unit]`: One a token, but tokens that share a character (an emoji) are one, and a token without any text goes
        to its neighbour.
    """
    units: list[Unit] = []
    for (start, end), pir, is_special in zip(scores.offsets, scores.pir.tolist(), scores.is_special, strict=True):
        last = units[-1] if units else None
        if last is not None and (start < last.end or start == end or last.start == last.end):
            units[-1] = Unit(last.start, max(last.end, end), last.pir + pir, last.is_special and bool(is_special))
        else:
            units.append(Unit(start, end, pir, bool(is_special)))
    return units


def check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"`{name}` is {value}. It must be 1 or more.")


def most_personal(scores: Iterable[TokenScores], num_rows: int) -> list[TokenScores]:
    """
    The rows that a picture has room for: of each persona the row with the highest mean PIR, highest first.

    Args:
        scores (`Iterable[TokenScores]`): Scores of the rows. Those without any PIR are passed over.
        num_rows (`int`): How many rows, and so personas, to take at most.

    Returns:
        `list[TokenScores]`: Rows of different personas.
    """
    best: dict[str, tuple[float, TokenScores]] = {}
    for row in scores:
        if not np.isfinite(row.pir).any():
            continue
        mean = float(np.nanmean(row.pir, dtype=np.float64))
        if row.persona not in best or mean > best[row.persona][0]:
            best[row.persona] = mean, row
        if len(best) > num_rows:
            del best[min(best, key=lambda persona: best[persona][0])]
    return [row for _, row in sorted(best.values(), key=lambda pair: -pair[0])]


def printable(text: str) -> str:
    """
    The text with a visible sign for each control character, so that an escape sequence stays text, and a space for each
    white space but the line end. As long as the text.
    """
    return "".join(character if character == "\n" else _printable(character) for character in text)


def _printable(character: str) -> str:
    if character.isspace():
        return " "
    if unicodedata.category(character) not in ("Cc", "Cs"):
        return character
    return chr(0x2400 + ord(character)) if ord(character) < 0x20 else "\ufffd"


def shorten(text: str, limit: int) -> str:
    """The text on one line, its first `limit` characters and how many there are if it is longer."""
    line = " ".join(printable(text).split())
    return line if len(line) <= limit else f"{line[:limit].rstrip()}… (cut: {limit} of {len(line):,} characters)"


def summary(scores: TokenScores) -> str:
    """`Row 3: 21 % personal (4 of 19 tokens), mean PIR +0.42 nats`, over the tokens that have a PIR."""
    pir = scores.pir[np.isfinite(scores.pir)]
    personal = int((pir > scores.threshold).sum())
    return (
        f"Row {scores.row}: {personal / len(pir):.0%} personal ({personal} of {len(pir)} tokens), "
        f"mean PIR {pir.mean(dtype=np.float64):+.2f} nats"
    ).replace("%", " %")


def pieces_of(scores: TokenScores) -> Iterator[tuple[str, Unit | None]]:
    """
    The response cut into texts, each with its unit, or `None` for the white space around a unit, which is not coloured.
    What lies beyond the characters that a picture has room for is left out, with a last text that says so. White space at the
    end, which chat templates leave there, is left out too.
    """
    end, size = 0, len(scores.response.rstrip())
    for unit in units_of(scores):
        if unit.start >= size:
            return
        if unit.start >= MAX_RESPONSE:
            yield f"… (cut: {end:,} of {len(scores.response):,} characters)", None
            return
        text = printable(scores.response[unit.start : unit.end])
        core = text.strip()
        before = len(text) - len(text.lstrip())
        yield printable(scores.response[end : unit.start]) + text[:before], None
        if core:
            yield core, unit
            yield text[before + len(core) :], None
        end = unit.end
    yield printable(scores.response[end:size]), None
