# SPDX-License-Identifier: Apache-2.0

"""The heatmap as a picture for a paper (PNG), drawn with matplotlib. Lengths are points (1/72 inch)."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ...utils.files import written_whole
from ..scores import TokenScores
from .palette import PALETTE, SCALE, colour
from .pieces import MAX_PERSONA, MAX_QUERY, NOTHING_TO_DRAW, check_positive, most_personal, pieces_of, shorten, summary


_WIDTH, _MARGIN, _LABELS = 504.0, 14.0, 52.0
_SIZE, _SMALL = 9.0, 7.5
_LINE, _RESPONSE_LINE = 13.0, 16.0
_TEXT, _MUTED = PALETTE["light"]["text"], "#5b5e6b"
_BOX = "□"
_DPI = 200


def draw(rows: list[TokenScores], settings: dict[str, Any]) -> Figure:
    """
    Args:
        rows (`list[TokenScores]`): Rows that have a PIR; all are drawn.
        settings (`dict[str, Any]`): As for [`~trl_perce.scoring.heatmap.page.write_html`].

    Returns:
        [`~matplotlib.figure.Figure`]: 7 inches wide and as high as its lines.
    """
    texts = [text for row in rows for text in (row.persona, row.query, row.response)]
    page = _Page({*"".join(texts), *_title(settings)})
    page.paragraph([(_title(settings), None)], 0, size=_SMALL, text_colour=_MUTED)
    for row in rows:
        page.y += 9
        page.paragraph([(summary(row), None)], 0, weight="bold")
        page.paragraph([(shorten(row.persona, MAX_PERSONA), None)], _LABELS, "Persona")
        page.paragraph([(shorten(row.query, MAX_QUERY), None)], _LABELS, "Query")
        page.y += 2
        page.paragraph(list(pieces_of(row)), _LABELS, "Response", line=_RESPONSE_LINE, threshold=row.threshold)
    if not rows:
        page.paragraph([(NOTHING_TO_DRAW, None)], 0)
    if page.has_boxes:
        page.y += 6
        note = f"{_BOX}: a character that no font of this computer has"
        page.paragraph([(note, None)], 0, size=_SMALL, text_colour=_MUTED)
    return page.figure(rows[0].threshold if rows else None)


def _title(settings: dict[str, Any]) -> str:
    model = settings["model"] if settings["adapter"] is None else f"{settings['model']} + {settings['adapter']}"
    return f"Model: {model}   Dataset: {settings['dataset']}   Counterfactual: {settings['counterfactual']}"


class _Page:
    """Lays text out from the top, line after line, and then makes a figure of the height that it took."""

    def __init__(self, characters: set[str]):
        self.family, self.known = _fonts(characters)
        self.has_boxes = False
        self.plain_end: tuple[float, float] | None = None  # where a text without a unit ends, x and y
        self.y = _MARGIN - _LINE + _SMALL  # the first line's letters begin at the margin
        self.artists: list = []
        self.texts: list[dict[str, Any]] = []
        self.renderer = FigureCanvasAgg(Figure(dpi=_DPI)).get_renderer()

    def paragraph(
        self, pieces, indent, label="", size=_SIZE, weight="normal", line=_LINE, text_colour=_TEXT, threshold=None
    ):
        """Pieces `(text, unit)` one after the other, broken at white space, or inside of what is wider than a line."""
        # What is bold is ours, and the other families may have no bold
        font = FontProperties(family=self.family if weight == "normal" else "DejaVu Sans", size=size, weight=weight)
        left = x = _MARGIN + indent
        right = _WIDTH - _MARGIN
        self.y += line
        self._write(label, _MARGIN, FontProperties(family="DejaVu Sans", size=_SMALL), _MUTED)
        for word in _words(pieces):
            if word == "\n":
                x, self.y = left, self.y + line
                continue
            runs = [(self._with_boxes(text), unit) for text, unit in word]
            width = sum(self._width(text, font) for text, _ in runs)
            if x > left and x + width > right and not runs[0][0].isspace():
                x, self.y = left, self.y + line
            for text, unit in runs:
                for part in self._parts(text, font, right - x, right - left):
                    width = self._width(part, font)
                    if x > left and x + width > right:
                        if part.isspace():
                            continue
                        x, self.y = left, self.y + line
                    self._run(part, unit, x, width, font, text_colour, threshold)
                    x += width

    def _parts(self, text, font, room, line_width):
        """The text in parts that fit: whole, unless it is wider than a line."""
        if self._width(text, font) <= line_width:
            return [text]
        parts = [""]
        for character in text:
            if parts[-1] and self._width(parts[-1] + character, font) > (room if len(parts) == 1 else line_width):
                parts.append("")
            parts[-1] += character
        return parts

    def _run(self, text, unit, x, width, font, text_colour, threshold):
        if unit is not None and unit.is_special:
            text_colour = _MUTED
        elif unit is not None:
            box = Rectangle(
                (x, self.y - 9.4), width, 12.4, facecolor=colour(unit.pir), edgecolor="white", linewidth=0.5
            )
            self.artists.append(box)
        if unit is not None and unit.pir > threshold:
            line = Line2D([x + 0.4, x + width - 0.4], [self.y + 1.7] * 2, color=_TEXT, linewidth=1.1)
            line.set_solid_capstyle("butt")
            self.artists.append(line)
        if unit is None and self.plain_end == (x, self.y):
            self.texts[-1]["s"] += text  # one text, in which right-to-left words are in their order
        else:
            self._write(text, x, font, text_colour)
        self.plain_end = (x + width, self.y) if unit is None else None

    def _write(self, text, x, font, text_colour):
        self.texts.append({"x": x, "y": self.y, "s": text, "fontproperties": font, "color": text_colour})

    def _width(self, text, font) -> float:
        return self.renderer.get_text_width_height_descent(text, font, ismath=False)[0] * 72 / _DPI

    def _with_boxes(self, text) -> str:
        shown = "".join(character if character in self.known or character.isspace() else _BOX for character in text)
        self.has_boxes |= shown != text
        return shown

    def figure(self, threshold: float | None) -> Figure:
        height = self.y + (52 if threshold is not None else 14)
        figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=_DPI, facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(height, 0))
        axes.set_axis_off()
        for artist in self.artists:
            axes.add_artist(artist)
        for text in self.texts:
            axes.text(**text, va="baseline", parse_math=False)
        if threshold is not None:
            bar = figure.add_axes(((_MARGIN + _LABELS) / _WIDTH, 24 / height, 190 / _WIDTH, 9 / height))
            steps = ListedColormap([colour(SCALE * (step / 128 - 1)) for step in range(257)])
            figure.colorbar(ScalarMappable(Normalize(-SCALE, SCALE), steps), bar, orientation="horizontal")
            bar.set_xticks([-5, -3, -1, 0, 1, 3, 5], ["≤ −5", "−3", "−1", "0", "+1", "+3", "≥ +5"])
            bar.tick_params(labelsize=_SMALL, length=2, width=0.5, color=_MUTED, labelcolor=_TEXT)
            bar.set_frame_on(False)
            note = f"PIR in nats. Underlined: personal (PIR > {threshold:g})"
            axes.text(_MARGIN + _LABELS + 206, height - 26, note, size=_SMALL, color=_TEXT, va="baseline")
        return figure


def _words(pieces):
    """`(text, unit)` pieces → words, each a list of its parts, then spaces and `"\\n"` between them."""
    word = []
    for piece, unit in pieces:
        for text in re.findall(r"\n|[^\S\n]+|\S+", piece):
            if not text.isspace():
                word.append((text, unit))
                continue
            if word:
                yield word
                word = []
            yield "\n" if text == "\n" else [(" " * len(text), unit)]
    if word:
        yield word


def _fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """Font families that together have the characters, as far as installed ones do, and those characters."""
    family, known = ["DejaVu Sans"], _characters_of(font_manager.findfont("DejaVu Sans"))
    missing = {character for character in characters if not character.isspace()} - known
    for entry in font_manager.fontManager.ttflist:
        if not missing:
            break
        # The fonts of last resort have a sign for every character, which says as little as a box
        if entry.style == "normal" and entry.weight == 400 and not entry.name.startswith("Last Resort"):
            found = missing & _characters_of(entry.fname)
            if found:
                family.append(entry.name)
                known |= found
                missing -= found
    return family, known


def _characters_of(path: str) -> set[str]:
    font = font_manager.get_font(path)
    # Bitmap fonts (colour emoji) cannot be drawn at any size
    return {chr(code) for code in font.get_charmap()} if font.scalable else set()


def write_png(scores: Iterable[TokenScores], path: str | Path, settings: dict[str, Any], num_rows: int = 4) -> None:
    """
    Write a picture of the most personal row of each of a few personas, 7 inches wide at 200 dots an inch, for papers and READMEs.

    A long text is cut, and the picture says so. A character that no installed font has is a box. The tokens of a
    right-to-left response are set from the left.

    Args:
        scores (`Iterable[TokenScores]`): Scores of the rows.
        path (`str` or `Path`): File to write.
        settings (`dict[str, Any]`): As for [`~trl_perce.scoring.heatmap.page.write_html`].
        num_rows (`int`, *optional*, defaults to `4`): Rows to draw.

    Raises:
        `ValueError`: `num_rows` is not positive.
    """
    check_positive("num_rows", num_rows)
    figure = draw(most_personal(scores, num_rows), settings)
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=200)
