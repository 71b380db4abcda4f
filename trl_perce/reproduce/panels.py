# SPDX-License-Identifier: Apache-2.0

"""What the plots are put together from: panels, marks, curves, in one style."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..scoring.heatmap.palette import PALETTE
from ..utils.files import written_whole
from .number import METRIC_LABELS, rate_text, unit
from .results import METHOD_LABELS, Condition, Results


_DPI = 160
TEXT, MUTED, GRID = PALETTE["light"]["text"], "#5b5e6b", "#dedee4"
TITLE, SIZE, SMALL = 10.0, 9.0, 8.0
STYLES = {
    "untrained": ("#7a7a7a", "X"),
    "ce": ("#0072b2", "o"),
    "lossce": ("#009e73", "s"),
    "entce": ("#cc79a7", "^"),
    "perce": ("#d55e00", "D"),
    "perce_sequence": ("#e69f00", "v"),
}
# Of lines of the same method
PATTERNS = ("-", "--", ":", "-.", (0, (8, 3)), (0, (5, 1, 1, 1, 1, 1)))
_MORE_STYLES = (
    *(("#56b4e9", "P"), ("#000000", "*"), ("#8c6d1f", "<"), ("#4b0082", ">")),
    *(("#7a1f3d", "p"), ("#1b7f79", "h"), ("#5f6f00", "d"), ("#a05195", "X")),
    *(("#c2185b", "8"), ("#2a6f97", "P"), ("#b5651d", "*"), ("#386641", "p")),
)


def style_of(method: str, methods: Sequence[str]) -> tuple[str, str]:
    """Colour and mark of a method among those that are drawn."""
    others = [name for name in methods if name not in STYLES]
    return STYLES.get(method) or _MORE_STYLES[others.index(method) % len(_MORE_STYLES)]


def style(results: Results, method: str) -> tuple[str, str]:
    return style_of(method, results.methods)


def label(condition: Condition, shown: Sequence[Condition]) -> str:
    """The method, with what tells the condition from others of it."""
    same = [item for item in shown if item.method == condition.method]
    parts = [METHOD_LABELS.get(condition.method, condition.method)]
    if len({item.learning_rate for item in same}) > 1 and condition.learning_rate is not None:
        parts.append(rate_text(condition.learning_rate))
    if len({item.clip for item in same}) > 1 and condition.clip is not None:
        parts.append(f"[{condition.clip[0]:g}, {condition.clip[1]:g}]")
    return " ".join(parts)


def grid(
    rows: int, columns: int, width: float, height: float, title: str, heights: Sequence[float] | None = None
) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06, wspace=0.04, hspace=0.04)
    figure.suptitle(title, fontsize=TITLE + 1, color=TEXT, fontweight="bold", parse_math=False)
    return figure, figure.subplots(rows, columns, squeeze=False, height_ratios=heights).tolist()


def file_name(start: str, number: int, model: str) -> str:
    """Of the plot of a model."""
    slug = re.sub(r"[^\w.-]+", "-", model)
    return f"{start}-{number}-{slug}.png"


def save(figure: Figure, path: Path) -> Path:
    """Write a plot, whole or not at all."""
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=_DPI)
    return path


def plain(axes: Axes, lines: Literal["x", "y", "both"]) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(labelsize=SMALL, color=MUTED, labelcolor=TEXT, length=3)
    axes.grid(axis=lines, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def mark_empty(axes: Axes, keep_names: bool = False) -> None:
    """A panel of what was not measured: neither scale nor grid. `keep_names` keeps the labels on y, which are of its row."""
    if axes.lines:
        return
    axes.grid(False)
    axes.set_xticks([])
    if not keep_names:
        axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.text(0.5, 0.5, "–", transform=axes.transAxes, ha="center", va="center", fontsize=SIZE, color=MUTED)


def title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=SIZE, color=TEXT, loc="left", parse_math=False)


def legend(figure: Figure, axes: list[list[Axes]]) -> None:
    entries: dict[str, Any] = {}
    for panel in (panel for row in axes for panel in row):
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    columns = max(1, int(figure.get_figwidth() / 1.4))
    drawn = figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False
    )
    for text in drawn.get_texts():
        text.set_parse_math(False)


def dot(results, panel, item, task, metric, place, colour, mark, filled) -> None:
    number = results.number(item, task, metric)
    if number is None or number.mean is None:
        return
    scale = unit(metric)[0]
    if number.row_interval is not None:
        ends = [bound * scale for bound in number.row_interval]
        panel.plot(ends, [place, place], color=colour, linewidth=1.6, alpha=0.75, solid_capstyle="butt")
    seeds = results.values(item, task, metric) * scale
    if len(seeds) > 1:
        panel.plot(seeds, [place + 0.16] * len(seeds), ".", color=colour, markersize=3.5, alpha=0.8, linestyle="")
    face = colour if filled else "white"
    panel.plot(number.mean * scale, place, mark, markersize=6, markerfacecolor=face, markeredgecolor=colour)


def curves(results: Results, panel: Axes, lines: dict[str, list[tuple]], metric: str) -> None:
    """Lines of label → (place, condition, task, metric of the point)."""
    scale = unit(metric)[0]
    drawn: list[str] = []
    for number, (name, points) in enumerate(lines.items()):
        method = points[0][1].method
        colour, mark = style(results, method)
        pattern = PATTERNS[drawn.count(method) % len(PATTERNS)]
        drawn.append(method)
        means = []
        for place, item, task, own_metric in points:
            seeds = results.values(item, task, own_metric) * scale
            if len(seeds):
                means.append((place, seeds.mean()))
            if len(seeds) > 1:
                panel.plot([place] * len(seeds), seeds, ".", color=colour, markersize=3.5, alpha=0.7, linestyle="")
        if means:
            panel.plot(
                *zip(*means, strict=True),
                color=colour,
                marker=mark,
                linestyle=pattern,
                label=name,
                zorder=3 + number,
                linewidth=1.6,
                markersize=5.5,
                markeredgecolor="white",
                markeredgewidth=0.5,
            )


def curve_title(metric: str) -> str:
    """A metric with its unit."""
    name = METRIC_LABELS.get(metric, metric)
    return f"{name} × 100" if unit(metric)[0] == 100 else name.replace("log P personal", "log P personal (nats)")


def row_height(text: str, height: float) -> float:
    """Inches of a row of panels: `height`, or what its name takes at 7 points."""
    return max(height, 0.072 * len(text))


def row_label(panel: Axes, text: str, height: float) -> None:
    """Name of a row of panels at its left, small enough for its height in inches."""
    size = min(SIZE, 72 * row_height(text, height) / (0.72 * len(text)))
    panel.set_ylabel(text, fontsize=size, color=TEXT, fontweight="bold", parse_math=False)
