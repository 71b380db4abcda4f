# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Heatmaps: responses coloured by PIR, as a page to look through (HTML), as a picture for a paper (PNG), in the terminal.

All three take their colours from [`PALETTE`]: purple where the persona makes a token less likely, orange where it makes it
more likely, a pair that colour-blind readers tell apart. A personal token is underlined too.
"""

import base64
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .files import write_text, written_whole
from .scores import TokenScores, WordScore


# Colours of the most negative, of no and of the most positive PIR, and of the text on all of them
PALETTE = {
    "light": {"negative": "#9c8fd6", "neutral": "#ffffff", "positive": "#f2892b", "text": "#1b1b1f"},
    "dark": {"negative": "#6b54c0", "neutral": "#1c1d22", "positive": "#b05204", "text": "#f4f4f6"},
}
# PIR of the full colour, in nats: the upper clipping bound of the paper
SCALE = 5.0
# Under 1, so that a token that is just personal (1 nat) has a third of the full colour and not a fifth
EXPONENT = 0.7
# In the terminal a token nearer to 0 has no background: pale on dark, it would be louder than the personal ones
_FAINT = 1.0
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


def colour(pir: float, theme: str = "light") -> str:
    """
    The background of a token: from neutral at 0 to the full colour at [`SCALE`] nats.

    Args:
        pir (`float`): In nats. NaN is neutral.
        theme (`str`, *optional*, defaults to `"light"`): `"light"` or `"dark"`.

    Returns:
        `str`: Colour as `"#rrggbb"`. The theme's text on it has a contrast of 4.5 at least (WCAG AA).
    """
    palette = PALETTE[theme]
    strength = 0.0 if math.isnan(pir) else min(abs(pir) / SCALE, 1.0) ** EXPONENT
    full = palette["negative" if pir < 0 else "positive"]
    channels = zip(bytes.fromhex(palette["neutral"][1:]), bytes.fromhex(full[1:]), strict=True)
    return "#" + "".join(f"{round(start + (end - start) * strength):02x}" for start, end in channels)


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


def write_html(
    scores: Iterable[TokenScores], path: str | Path, settings: dict[str, Any], max_rows: int = 1000
) -> None:
    """
    Write one page that holds all it needs: it opens from a disk, loads nothing and runs no script but its own.

    Args:
        scores (`Iterable[TokenScores]`): Scores of the rows, also of those that are skipped or have no persona.
        path (`str` or `Path`): File to write.
        settings (`dict[str, Any]`): How they were made: `"model"`, `"adapter"` (`None` if there is none), `"dataset"`,
            `"counterfactual"`, `"weight_clip_min"` and `"weight_clip_max"`.
        max_rows (`int`, *optional*, defaults to `1000`): Rows that the page holds. It says how many more there are. A row
            takes some 26 bytes a token and the bytes of its texts.

    Raises:
        `ValueError`: `max_rows` is not positive.
    """
    _check_positive("max_rows", max_rows)
    scores = iter(scores)
    kept = list(islice(scores, max_rows))
    data = {
        "settings": _settings_lines(settings),
        "threshold": kept[0].threshold if kept else 1.0,
        "palette": PALETTE,
        "scale": SCALE,
        "exponent": EXPONENT,
        "rows": [_row_data(row) for row in kept],
        "total": len(kept) + sum(1 for _ in scores),
    }
    template = files(__package__).joinpath("heatmap.html").read_text(encoding="utf-8")
    for tag in ("style", "script"):
        content = template.split(f"<{tag}>", 1)[1].rsplit(f"</{tag}>", 1)[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        template = template.replace(f"{{{{{tag}_hash}}}}", digest)
    # The data last: what it holds is looked through for nothing
    before, after = template.split("{{data}}")
    write_text(path, before + _json_for_script(data) + after)


def write_png(scores: Iterable[TokenScores], path: str | Path, settings: dict[str, Any], num_rows: int = 4) -> None:
    """
    Write a picture of the first rows that have a PIR, 7 inches wide at 200 dots an inch, for papers and READMEs.

    A long text is cut, and the picture says so. A character that no installed font has is a box. The tokens of a
    right-to-left response are set from the left.

    Args:
        scores (`Iterable[TokenScores]`): Scores of the rows.
        path (`str` or `Path`): File to write.
        settings (`dict[str, Any]`): As for [`write_html`].
        num_rows (`int`, *optional*, defaults to `4`): Rows to draw.

    Raises:
        `ValueError`: `num_rows` is not positive.
    """
    _check_positive("num_rows", num_rows)
    from .heatmap_png import draw

    figure = draw(_first_scored(scores, num_rows), settings)
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=200)


def print_heatmap(scores: Iterable[TokenScores], console, num_rows: int = 4) -> None:
    """
    Print the first rows that have a PIR. Where the console has no colours (a pipe, a file, `NO_COLOR`) a personal token
    is written `[needles +3.1]`.

    Args:
        scores (`Iterable[TokenScores]`): Scores of the rows.
        console ([`~rich.console.Console`]): Where to print.
        num_rows (`int`, *optional*, defaults to `4`): Rows to print.

    Raises:
        `ValueError`: `num_rows` is not positive.
    """
    from rich.table import Table
    from rich.text import Text

    _check_positive("num_rows", num_rows)
    has_colours = console.is_terminal and console.color_system is not None and not console.no_color
    rows = _first_scored(scores, num_rows)
    lines: list = [] if rows else [Text(NOTHING_TO_DRAW)]
    for row in rows:
        texts = {
            "Persona": Text(shorten(row.persona, MAX_PERSONA)),
            "Query": Text(shorten(row.query, MAX_QUERY)),
            "Response": _coloured(row) if has_colours else Text(_bracketed(row)),
        }
        lines.append(Text(summary(row), style="bold" if has_colours else ""))
        if has_colours:
            grid = Table.grid(padding=(0, 2))
            for label, text in texts.items():
                grid.add_row(Text(label, style="dim"), text)
            lines.append(grid)
        else:
            lines += [Text(f"{label:10}") + text for label, text in texts.items()]
        lines.append(Text())
    if rows and has_colours:
        steps = [Text(f" {pir:+.0f} ", style=_style(pir)) for pir in (-5, -3, -1, 1, 3, 5)]
        lines.append(Text.assemble("PIR in nats ", *steps, f"  underlined: personal (PIR > {rows[0].threshold:g})"))
    elif rows:
        lines.append(Text(f"[…]: a personal token (PIR > {rows[0].threshold:g}) and its PIR in nats"))
    for line in lines:
        console.print(line, soft_wrap=not has_colours, highlight=False)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"`{name}` is {value}. It must be 1 or more.")


def _settings_lines(settings: dict[str, Any]) -> dict[str, str]:
    adapter = {} if settings["adapter"] is None else {"adapter": str(settings["adapter"])}
    return {
        "model": str(settings["model"]),
        **adapter,
        "dataset": str(settings["dataset"]),
        "counterfactual": str(settings["counterfactual"]),
        "weight": f"PIR clipped to [{settings['weight_clip_min']:g}, {settings['weight_clip_max']:g}]",
    }


def _row_data(scores: TokenScores) -> dict[str, Any]:
    """A row as the page reads it: JavaScript's indices, and numbers as the bytes of float32, which are exact and short."""
    # JavaScript counts UTF-16 units: two for a character beyond U+FFFF
    position = list(accumulate((1 + (character > "\uffff") for character in scores.response), initial=0))
    units = units_of(scores)
    tokens: dict[str, Any] = {"special": [index for index, unit in enumerate(units) if unit.is_special]}
    if len(units) < len(scores.tokens):
        tokens |= {"spans": _flat(units, position), "pir": _floats([unit.pir for unit in units])}
    special = [unit for unit in units if unit.is_special]
    words: list[WordScore | Unit] = sorted([*scores.words, *special], key=lambda word: word.start)
    return {
        "row": scores.row,
        "persona": scores.persona,
        "query": scores.query,
        "response": scores.response,
        "skipped": scores.skipped,
        "spans": _flat([Unit(*offset, math.nan, False) for offset in scores.offsets], position),
        "pir": _floats(scores.pir),
        "log_probs": _floats(scores.log_probs),
        "weights": _floats(scores.weights),
        "tokens": tokens,
        "words": {
            "spans": _flat(words, position),
            "pir": _floats([word.pir for word in words]),
            "special": [index for index, word in enumerate(words) if isinstance(word, Unit)],
        },
    }


def _flat(pieces: list, position: list[int]) -> list[int]:
    """`[gap, length, gap, length, …]`: short numbers. A gap is negative where pieces share a character."""
    flat, end = [], 0
    for piece in pieces:
        flat += [position[piece.start] - end, position[piece.end] - position[piece.start]]
        end = position[piece.end]
    return flat


def _floats(values) -> str:
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()


def _json_for_script(data: dict[str, Any]) -> str:
    """JSON that no text in it can end as a script element, and that every encoding has room for."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Half a surrogate pair cannot be written as UTF-8; the line ends U+2028 and U+2029 are for old parsers
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _first_scored(scores: Iterable[TokenScores], num_rows: int) -> list[TokenScores]:
    return list(islice((row for row in scores if np.isfinite(row.pir).any()), num_rows))


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


def _style(pir: float) -> str:
    return f"{PALETTE['light']['text']} on {colour(pir)}"


def _coloured(scores: TokenScores):
    from rich.text import Text

    response = Text()
    for text, unit in pieces_of(scores):
        if unit is None:
            response.append(text)
            continue
        style = "dim" if unit.is_special else _style(unit.pir) if abs(unit.pir) >= _FAINT else ""
        response.append(text, style=f"{style} underline" if unit.pir > scores.threshold else style)
    return response


def _bracketed(scores: TokenScores) -> str:
    return "".join(
        f"[{text} {unit.pir:+.1f}]" if unit is not None and unit.pir > scores.threshold else text
        for text, unit in pieces_of(scores)
    )
