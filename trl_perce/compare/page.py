# SPDX-License-Identifier: Apache-2.0

"""What a comparison has found as one page that holds all it needs, to be sent to somebody who decides (HTML)."""

import base64
import hashlib
import math
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from ..scoring.heatmap.palette import EXPONENT, PALETTE, SCALE, colour
from ..scoring.heatmap.pieces import printable
from ..utils.files import write_text
from . import formats


# Steps of a colour between none and the full one: the page may have no styles but its own, so each is a class
_STEPS = 20
# Characters of a text that is folded
_LONG = 320


def write_html(findings: Mapping[str, Any], path: str | Path) -> None:
    """
    Write one page without a script: it opens from a disk, loads nothing, and prints.

    Args:
        findings (`Mapping[str, Any]`): From [`~findings.make_findings`].
        path (`str` or `Path`): File to write.
    """
    # Texts of models and users are escaped, wherever they stand
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "sha256": _sha256,
        "printable": printable,
        "step": _step,
        "signed": _signed,
        "prose": _prose,
    }
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    text = template.render(
        findings=findings,
        formats=formats,
        pairs=formats.pairs(findings),
        groups=formats.groups(findings),
        plot=forest(findings),
        colours=_colours(),
        palette=PALETTE,
        scale=[SCALE * step / 5 for step in range(-5, 6)],
        long=_LONG,
        factor=f"{math.exp(findings['threshold']):.1f}",
    )
    write_text(path, text)


def forest(findings: Mapping[str, Any]) -> dict[str, Any] | None:
    """
    Where the marks of the plot are: the changes of all measures in nats, each with its interval.

    Args:
        findings (`Mapping[str, Any]`): From [`~findings.make_findings`].

    Returns:
        `dict[str, Any]`: `"groups"`, title and rows; a row has its `"measure"` and `"lines"`, one an arm: `"arm"`, `"x"`, and `"low"` and
            `"high"` (`None` without an interval), in percent of the plot's width. `"ticks"`: `"x"` and `"text"` of each. `"zero"`: x of 0.
            `None` where there is nothing to draw.
    """
    from matplotlib.ticker import MaxNLocator

    judged = [arm for arm, _ in formats.pairs(findings)]
    shown = [
        (title, [measure for measure in measures if measure["unit"] == "nats" and {*judged} & {*measure["changes"]}])
        for title, measures in formats.groups(findings)
    ]
    shown = [(title, measures) for title, measures in shown if measures]
    if not shown:
        return None
    changes = [
        measure["changes"][arm] for _, own in shown for measure in own for arm in judged if arm in measure["changes"]
    ]
    ends = [end for change in changes for end in (change["difference"], *(change["interval"] or ()))]
    ticks = [*map(float, MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(min(0.0, *ends), max(0.0, *ends)))]
    low, width = ticks[0], ticks[-1] - ticks[0]

    def x(value: float) -> float:
        return round(100 * (value - low) / width, 2)

    def line(measure: Mapping[str, Any], arm: str) -> dict[str, Any]:
        change = measure["changes"][arm]
        interval = change["interval"] or (None, None)
        own = {name: None if end is None else x(end) for name, end in zip(("low", "high"), interval, strict=True)}
        return {"arm": arm, "x": x(change["difference"]), **own}

    return {
        "groups": [
            {
                "title": title,
                "rows": [
                    {"measure": measure, "lines": [line(measure, arm) for arm in judged if arm in measure["changes"]]}
                    for measure in own
                ],
            }
            for title, own in shown
        ],
        "ticks": [{"x": x(tick), "text": f"{tick:+.10g}".replace("-", "−") if tick else "0"} for tick in ticks],
        "zero": x(0.0),
    }


def _colours() -> list[tuple[str, str, str]]:
    """Class, and colours in the light and in the dark."""
    strengths = [(step, SCALE * (step / _STEPS) ** (1 / EXPONENT)) for step in range(1, _STEPS + 1)]
    return [
        (f"{letter}{step}", colour(sign * pir, "light"), colour(sign * pir, "dark"))
        for letter, sign in (("n", -1), ("p", 1))
        for step, pir in strengths
    ]


def _step(pir: float) -> str:
    """The class of a PIR's colour, or nothing where it is pale."""
    step = round(min(abs(pir) / SCALE, 1.0) ** EXPONENT * _STEPS)
    return f"{'n' if pir < 0 else 'p'}{step}" if step else ""


def _signed(pir: float) -> str:
    return f"{pir:+.1f}".replace("-", "−")


def _prose(text: str) -> Markup:
    """A sentence with its code as code, what stands in parentheses set apart, and intervals that no line breaks."""
    html = re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    html = re.sub(r"\[[^][]*\]", lambda match: match[0].replace(" ", "\u00a0"), html)
    return Markup(re.sub(r"\([^()]*\)", r'<span class="aside">\g<0></span>', html))


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
