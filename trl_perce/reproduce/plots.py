# SPDX-License-Identifier: Apache-2.0

"""
Plots of the tables, drawn with matplotlib. Big marks are means over seeds, small dots the seeds, and, where methods stand below
each other, lines the 95 % intervals over rows. Colours are those of Okabe and Ito, which colour-blind readers tell apart; each method has a mark of its own too.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from ..scoring.heatmap.palette import PALETTE
from .number import METRIC_LABELS, Number, rate_text, unit
from .panels import (
    MUTED,
    PATTERNS,
    SMALL,
    STYLES,
    TEXT,
    curve_title,
    curves,
    dot,
    file_name,
    grid,
    label,
    legend,
    mark_empty,
    plain,
    row_height,
    row_label,
    save,
    style,
    title,
)
from .results import METHOD_LABELS, Condition, Results


_OVERLAP, _PERSONAL = ("rougeL", "meteor"), ("log_likelihood/personal", "uptake")
# Light to middle of the orange that stands for more, so that dark text can be read on all of it
_SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", PALETTE["light"]["positive"]])
# Which metric is drawn hollow beside another one
_BESIDE = {"log_likelihood/personal": "log_likelihood/other", "uptake": "uptake_swapped"}
_LONGEST = "log P personal (nats)"  # name of a row of the transfer's heatmaps
_TITLES = {
    "log_likelihood/personal": "log P (nats)\nfilled: personal, hollow: other tokens",
    "uptake": "uptake (words of the persona)\nhollow: another one in the prompt",
}


def write_plots(results: Results, folder: Path, tables: Sequence[int]) -> dict[int, list[Path]]:
    """
    Write a PNG for each model and table that has a plot and something to show.

    Args:
        results ([`Results`]): Of the grid.
        folder (`Path`): Where to.
        tables (`Sequence[int]`): Numbers of the tables, of which 1, 2, 3, 4, 5, 8, 9 and 12 have plots.

    Returns:
        `dict[int, list[Path]]`: Number of the table → its files.
    """
    plots: dict[int, list[Path]] = {}
    for table, name, figure in draw_plots(results, tables):
        plots.setdefault(table, []).append(save(figure, folder / name))
    return plots


def draw_plots(results: Results, tables: Sequence[int]) -> Iterator[tuple[int, str, Figure]]:
    """
    The plots themselves.

    Args:
        results ([`Results`]): Of the grid.
        tables (`Sequence[int]`): As in [`write_plots`].

    Yields:
        `tuple[int, str, Figure]`: Number of the table, name of the file, figure.
    """
    lamp = results.tasks_of("lamp")
    own = [task for task in results.tasks if task not in lamp]
    draw = {
        1: lambda model: _methods(results, model, own, (*_OVERLAP, *_PERSONAL)),
        2: lambda model: _learning_rates(results, model, own),
        3: lambda model: _transfer(results, model),
        4: lambda model: _aloe(results, model),
        5: lambda model: _methods(results, model, lamp, ("rouge1", "rougeL", *_PERSONAL)),
        12: lambda model: _clips(results, model, own),
    }
    draw |= {8: draw[3], 9: draw[4]}
    models = {3: results.models[:1], 4: results.models[:1], 8: results.models[1:], 9: results.models[1:]}
    for table in (table for table in tables if table in draw):
        for model in models.get(table, results.models):
            figure = draw[table](model)
            if figure is not None:
                yield table, file_name(f"table{table}", results.models.index(model) + 1, model), figure


# Figures


def _cells(results: Results, model: str, tasks: Sequence[str], metrics: Sequence[str], **options):
    """Task → its conditions, and the metrics, of what there is something to draw of."""
    shown = {task: results.shown(model, task, **options) for task in tasks}

    def has(item: Condition, task: str, metric: str) -> bool:
        return not results.values(item, task, metric).empty

    kept = {
        task: [item for item in items if any(has(item, task, metric) for metric in metrics)]
        for task, items in shown.items()
    }
    kept = {task: items for task, items in kept.items() if items}
    metrics = [
        metric for metric in metrics if any(has(item, task, metric) for task, items in kept.items() for item in items)
    ]
    return kept, metrics


def _methods(results: Results, model: str, tasks: Sequence[str], metrics: Sequence[str]) -> Figure | None:
    """Methods below each other; a row a task, a column a metric."""
    cells, metrics = _cells(results, model, tasks, metrics)
    if not cells:
        return None
    heights = [row_height(task, 0.27 * len(items) + 0.3) + 0.45 for task, items in cells.items()]
    figure, axes = grid(len(cells), len(metrics), 1.6 + 2.5 * len(metrics), sum(heights) + 0.5, model, heights)
    for row, (task, items) in zip(axes, cells.items(), strict=True):
        for panel, metric in zip(row, metrics, strict=True):
            plain(panel, "x")
            names = [label(item, items) for item in items] if panel is row[0] else []
            panel.set_yticks(range(len(items)), names or [""] * len(items), parse_math=False)
            panel.set_ylim(len(items) - 0.5, -0.5)
            panel.tick_params(axis="y", length=0)
            panel.xaxis.set_major_locator(MaxNLocator(4))
            heading = _TITLES.get(metric, f"{METRIC_LABELS[metric]} × 100") if row is axes[0] else ""
            title(panel, heading)
            for place, item in enumerate(items):
                colour, mark = style(results, item.method)
                beside = _BESIDE.get(metric)
                dot(results, panel, item, task, metric, place - 0.12 * bool(beside), colour, mark, True)
                if beside:
                    dot(results, panel, item, task, beside, place + 0.2, colour, mark, False)
            mark_empty(panel, keep_names=True)
        row_label(row[0], task, 0.27 * len(items) + 0.3)
    return figure


def _learning_rates(results: Results, model: str, tasks: Sequence[str]) -> Figure | None:
    cells, metrics = _cells(results, model, tasks, (*_OVERLAP, *_PERSONAL), every_rate=True)
    cells = {
        task: items for task, items in cells.items()
        if len({item.learning_rate for item in items if item.learning_rate is not None}) > 1
    }  # fmt: skip
    if not cells:
        return None
    figure, axes = grid(
        len(cells),
        len(metrics),
        0.9 + 2.5 * len(metrics),
        sum(row_height(task, 1.5) + 0.5 for task in cells) + 0.9,
        model,
    )
    for row, (task, items) in zip(axes, cells.items(), strict=True):
        trained = [item for item in items if item.learning_rate is not None]
        rates = sorted({item.learning_rate for item in trained})
        lines: dict[str, list[Condition]] = {}
        for item in trained:
            same_rate = [other for other in trained if other.learning_rate == item.learning_rate]
            lines.setdefault(label(item, same_rate), []).append(item)
        for panel, metric in zip(row, metrics, strict=True):
            plain(panel, "y")
            panel.set_xscale("log")
            panel.set_xticks(rates, [rate_text(rate) for rate in rates])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_locator(MaxNLocator(5))
            points = {name: [(item.learning_rate, item, task, metric) for item in own] for name, own in lines.items()}
            curves(results, panel, points, metric)
            mark_empty(panel)
            if row is axes[0]:
                title(panel, curve_title(metric))
            if row is axes[-1]:
                panel.set_xlabel("learning rate", fontsize=SMALL, color=TEXT)
        row_label(row[0], task, 1.5)
    legend(figure, axes)
    return figure


def _clips(results: Results, model: str, tasks: Sequence[str]) -> Figure | None:
    """Bounds of the weights across, CE as a dashed line."""
    cells, metrics = _cells(results, model, tasks, (*_OVERLAP, *_PERSONAL), every_clip=True)
    swept = {
        task: [item for item in items if len({other.clip for other in items if other.method == item.method}) > 1]
        for task, items in cells.items()
    }
    swept = {task: items for task, items in swept.items() if items}
    if not swept:
        return None
    figure, axes = grid(
        len(swept),
        len(metrics),
        0.9 + 2.6 * len(metrics),
        sum(row_height(task, 1.5) + 0.6 for task in swept) + 0.9,
        model,
    )
    for row, (task, items) in zip(axes, swept.items(), strict=True):
        clips = sorted({item.clip for item in items})
        for panel, metric in zip(row, metrics, strict=True):
            plain(panel, "y")
            panel.set_xticks(range(len(clips)), [f"{low:g}\nto {high:g}" for low, high in clips])
            panel.set_xlim(-0.4, len(clips) - 0.6)
            panel.yaxis.set_major_locator(MaxNLocator(5))
            lines: dict[str, list[tuple]] = {}
            for item in items:
                same_clip = [other for other in items if other.clip == item.clip]
                lines.setdefault(label(item, same_clip), []).append((clips.index(item.clip), item, task, metric))
            curves(results, panel, lines, metric)
            baselines = [item for item in cells[task] if item.method == "ce" and item not in items]
            for index, item in enumerate(baselines):
                value = results.values(item, task, metric).mean() * unit(metric)[0]
                look: dict[str, Any] = {
                    "color": STYLES["ce"][0],
                    "linestyle": PATTERNS[(index + (len(baselines) == 1)) % len(PATTERNS)],
                }
                if np.isfinite(value):
                    panel.axhline(value, linewidth=1.3, label=label(item, baselines), **look)
            mark_empty(panel)
            if row is axes[0]:
                title(panel, curve_title(metric))
        row_label(row[0], task, 1.5)
    legend(figure, axes)
    return figure


def _transfer(results: Results, model: str) -> Figure | None:
    """A heatmap a method and metric: lines trained on, columns tested on."""
    trained = [item for task in results.train_tasks for item in results.shown(model, task) if item.train_task == task]
    numbers = {}
    for item in trained:
        for metric in (*_OVERLAP, *_PERSONAL):
            for task in results.tasks:
                number = results.number(item, task, metric)
                if number is not None and number.mean is not None:
                    numbers[metric, item, task] = number
    if all(item.train_task == task for _, item, task in numbers):
        return None
    metrics = [name for name in (*_OVERLAP, *_PERSONAL) if any(key[0] == name for key in numbers)]
    tasks = [name for name in results.tasks if any(key[2] == name for key in numbers)]
    methods = [name for name in results.methods if any(key[1].method == name for key in numbers)]
    places = {item: (item.method, _trained_on(item, trained)) for item in trained}
    lines = list(dict.fromkeys(line for _, line in places.values()))
    size = (
        1.6 + (0.25 + 0.62 * max(len(tasks), 2)) * len(methods),
        (row_height(_LONGEST, 0.3 * len(lines) + 0.4) + 0.35) * len(metrics) + 1.0,
    )
    figure, axes = grid(len(metrics), len(methods), *size, model)
    for row, metric in zip(axes, metrics, strict=True):
        cells = {(*places[item], task): number for (name, item, task), number in numbers.items() if name == metric}
        for panel, method in zip(row, methods, strict=True):
            _matrix(panel, cells, method, lines, tasks)
            panel.set_yticks(range(len(lines)), lines if panel is row[0] else [""] * len(lines), parse_math=False)
            names = tasks if row is axes[-1] else [""] * len(tasks)
            look: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor", "parse_math": False}
            panel.set_xticks(range(len(tasks)), names, **look)
            if row is axes[0]:
                title(panel, METHOD_LABELS.get(method, method))
        row_label(row[0], curve_title(metric), row_height(_LONGEST, 0.3 * len(lines) + 0.4))
    note = "Lines: trained on; columns: tested on. Shades go over all methods from the lowest to the highest\n"
    note += "of a column, or over the width of its mean interval over rows if that is wider."
    figure.supxlabel(note, fontsize=SMALL, color=MUTED)
    return figure


def _trained_on(item: Condition, items: Sequence[Condition]) -> str:
    same = [other for other in items if other.train_task == item.train_task]
    return f"{item.train_task}{label(item, same).removeprefix(METHOD_LABELS.get(item.method, item.method))}"


def _matrix(panel: Axes, cells: dict[tuple, Number], method: str, lines: list[str], tasks: list[str]) -> None:
    """Values and shades of a method from (method, line, task) → number of all methods."""
    shades = np.full((len(lines), len(tasks)), np.nan)
    for x, task in enumerate(tasks):
        column = [number for key, number in cells.items() if key[2] == task]
        means = [number.mean for number in column if number.mean is not None]
        noise = [
            number.row_interval[1] - number.row_interval[0] for number in column if number.row_interval is not None
        ]
        # So that differences which rows may have made are not drawn as the strongest there are
        span = max(max(means) - min(means), np.mean(noise) if noise else 0.0) if means else 0.0
        for y, line in enumerate(lines):
            number, text = cells.get((method, line, task)), "–"
            if number is not None and number.mean is not None:
                scale, digits = unit(number.metric)
                text = f"{number.mean * scale:.{digits}f}".replace("-", "−")
                middle = (max(means) + min(means)) / 2
                shades[y, x] = (number.mean - middle) / span + 0.5 if span else 0.5
            panel.text(x, y, text, ha="center", va="center", fontsize=SMALL, color=TEXT)
    panel.imshow(shades, cmap=_SHADES, vmin=0, vmax=1, aspect="auto")
    panel.tick_params(labelsize=SMALL, length=0, labelcolor=TEXT)
    for side in panel.spines.values():
        side.set_visible(False)


def _aloe(results: Results, model: str) -> Figure | None:
    """Alignment over the rounds of a conversation; a panel for each task that was trained on."""
    shown = {task: results.shown(model, task) for task in (results.train_tasks or (None,))}
    points: dict[tuple, list[tuple]] = {}
    for trained_on, items in shown.items():
        for task in results.tasks:
            for metric in results.metrics(task):
                found = re.fullmatch(r"alignment@(\d+)", metric)
                if found is None:
                    continue
                for item in items:
                    if not results.values(item, task, metric).empty:
                        points.setdefault((trained_on, task), []).append((int(found[1]), item, task, metric))
    if not points:
        return None
    figure, axes = grid(1, len(points), 0.9 + 3.3 * len(points), 3.4, model)
    for panel, ((trained_on, task), own) in zip(axes[0], points.items(), strict=True):
        plain(panel, "y")
        items = [item for item in shown[trained_on] if any(item == point[1] for point in own)]
        lines = {label(item, items): sorted((p for p in own if p[1] == item), key=lambda p: p[0]) for item in items}
        curves(results, panel, lines, "alignment")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel("round k of the conversation", fontsize=SMALL, color=TEXT)
        title(panel, task if trained_on is None else f"{task}, trained on {trained_on}")
    axes[0][0].set_ylabel("alignment (1 to 5)", fontsize=SMALL, color=TEXT)
    legend(figure, axes)
    return figure
