# SPDX-License-Identifier: Apache-2.0

"""What the personal tokens gain and what the others pay for it: a plot of a grid's methods against plain CE, and CE trained otherwise."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .measures import OTHER, PERSONAL
from .number import rate_text
from .panels import MUTED, SMALL, TEXT, file_name, grid, legend, plain, save, style_of, title
from .results import METHOD_LABELS


def write_frontiers(
    comparisons: Sequence[dict[str, Any]], folder: Path, plain_methods: Sequence[str], baseline: str = "ce"
) -> list[Path]:
    """
    Write the plots of [`draw_frontiers`].

    Args:
        comparisons (`Sequence[dict[str, Any]]`): As there.
        folder (`Path`): Where to.
        plain_methods (`Sequence[str]`): As there.
        baseline (`str`, *optional*, defaults to `"ce"`): As there.

    Returns:
        `list[Path]`: The files.
    """
    return [save(figure, folder / name) for name, figure in draw_frontiers(comparisons, plain_methods, baseline)]


def draw_frontiers(
    comparisons: Sequence[dict[str, Any]], plain_methods: Sequence[str], baseline: str = "ce"
) -> Iterator[tuple[str, Figure]]:
    """
    Draw log-likelihood of personal against that of other tokens, a panel a task, for each model that has two or more methods to compare
    with the baseline on a task that they are trained on.

    Args:
        comparisons (`Sequence[dict[str, Any]]`): From [`~reproduce.compare.compare_methods`].
        plain_methods (`Sequence[str]`): Methods without weights, whose marks are hollow.
        baseline (`str`, *optional*, defaults to `"ce"`): What was compared with.

    Yields:
        `tuple[str, Figure]`: Name of the file, figure.
    """
    models: dict[str, dict[str, dict[tuple, dict[str, dict]]]] = {}
    for c in comparisons:
        if c["interval"] is not None and c["train_task"] == c["task"] and c["metric"] in (PERSONAL, OTHER):
            run = c["method"], c["learning_rate"], tuple(c["clip"])
            models.setdefault(c["model"], {}).setdefault(c["task"], {}).setdefault(run, {})[c["metric"]] = c
    base = METHOD_LABELS.get(baseline, baseline)
    for number, (model, tasks) in enumerate(models.items(), start=1):
        tasks = {
            task: whole
            for task, runs in tasks.items()
            if len(whole := {run: found for run, found in runs.items() if len(found) == 2}) > 1
        }
        if not tasks:
            continue
        figure, axes = grid(1, len(tasks), 0.8 + 4.2 * len(tasks), 5.2, model)
        names = [baseline, *dict.fromkeys(method for runs in tasks.values() for method, *_ in runs)]
        for panel, (task, runs) in zip(axes[0], tasks.items(), strict=True):
            plain(panel, "both")
            title(panel, task)
            _draw(panel, runs, names, plain_methods, baseline)
            panel.set_xlabel(f"other tokens: log P less {base}'s (nats a token)", fontsize=SMALL, color=TEXT)
        axes[0][0].set_ylabel(f"personal tokens: log P less {base}'s", fontsize=SMALL, color=TEXT)
        legend(figure, axes)
        yield file_name("frontier", number, model), figure


def _draw(
    panel: Axes,
    runs: dict[tuple, dict[str, dict]],
    names: Sequence[str],
    plain_methods: Sequence[str],
    baseline: str,
) -> None:
    """A task's methods, with the baseline at 0, 0."""
    for line in (panel.axhline, panel.axvline):
        line(0.0, color=MUTED, linewidth=0.6, zorder=1)

    def draw(x: float, y: float, method: str, name: str) -> str:
        colour, mark = style_of(method, names)
        is_plain = method in plain_methods
        look: dict[str, Any] = {"markersize": 7, "linestyle": "", "zorder": 5, "color": colour, "label": name}
        look |= {"markeredgecolor": colour if is_plain else "white", "markeredgewidth": 1.6 if is_plain else 1.0}
        panel.plot(x, y, mark, markerfacecolor="white" if is_plain else colour, **look)
        return colour

    draw(0.0, 0.0, baseline, METHOD_LABELS.get(baseline, baseline))
    for (method, rate, (low, high)), found in runs.items():
        name = METHOD_LABELS.get(method, method)
        if sum(other == method for other, *_ in runs) > 1:
            name += f" {rate_text(rate)} [{low:g}, {high:g}]"
        x, y = found[OTHER]["difference"], found[PERSONAL]["difference"]
        colour = draw(x, y, method, name)
        panel.plot(found[OTHER]["interval"], [y, y], color=colour, linewidth=1.2, alpha=0.6)
        panel.plot([x, x], found[PERSONAL]["interval"], color=colour, linewidth=1.2, alpha=0.6)
