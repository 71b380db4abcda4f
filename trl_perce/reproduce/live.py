# SPDX-License-Identifier: Apache-2.0

"""A grid while it runs: a table for a terminal, lines for a log."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..utils.screen import duration
from .number import METRIC_LABELS


_STATES = {
    "waiting": ("·", "dim"),
    "running": ("▶", "bold cyan"),
    "elsewhere": ("▷", "cyan"),
    "done": ("✓", "green"),
    "failed": ("✗", "bold red"),
}
_LABEL_WIDTH, _STATE_WIDTH = 22, 16
_ACTIVE = ("running", "elsewhere")


def live_table(cells: list[dict[str, Any]], max_rows: int = 20) -> Table:
    """
    Where a grid stands, a line a cell, for [`~rich.live.Live`] or to print.

    Args:
        cells (`list[dict[str, Any]]`): In the order in which they run: `"name"` and `"label"` (`str`; the short one is for the
            table), `"steps"` (`dict[str, str]`, step → `"waiting"`, `"running"`, `"elsewhere"` (another process has it), `"done"`
            or `"failed"`), `"metrics"` (`dict[str, float]`, as they come) and, if known, `"seconds"` (`dict[str, float]`, by step).
        max_rows (`int`, *optional*, defaults to `20`): Cells that are shown. If there are more, those around the running ones, or
            around the first that waits; the caption counts the others.

    Returns:
        [`~rich.table.Table`]: Its caption sums up all cells.
    """
    first, last = _window([_state(cell) for cell in cells], max_rows)
    metrics = list(dict.fromkeys(metric for cell in cells[first:last] for metric in cell["metrics"]))
    caption = _summary(cells, first, last)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left", caption_style="")
    table.add_column("run", overflow="fold", min_width=_LABEL_WIDTH)
    table.add_column("state", no_wrap=True, min_width=_STATE_WIDTH, max_width=_STATE_WIDTH)
    for metric in metrics:
        name = METRIC_LABELS.get(metric, metric.split("/")[0])
        table.add_column(Text(name), justify="right", max_width=max(8, *map(len, name.split())))
    for cell in cells[first:last]:
        values = (Text(_metric(cell["metrics"].get(metric))) for metric in metrics)
        table.add_row(Text(cell["label"]), _progress(cell), *values)
    return table


def changed_lines(before: list[dict[str, Any]], cells: list[dict[str, Any]]) -> list[str]:
    """
    What has happened between two states of a grid, for where no table can be redrawn: a log, a pipe.

    Args:
        before (`list[dict[str, Any]]`): Earlier cells, as in [`live_table`]; empty at the start.
        cells (`list[dict[str, Any]]`): Those of now.

    Returns:
        `list[str]`: A line for each step that has changed its state. A step that waited from the start has none; a cell whose
        last step is done tells its metrics.
    """
    earlier = {cell["name"]: cell["steps"] for cell in before}
    lines = []
    for cell in cells:
        was = earlier.get(cell["name"], {})
        changed = {step: state for step, state in cell["steps"].items() if state != was.get(step, "waiting")}
        for step, state in changed.items():
            seconds = cell.get("seconds", {}).get(step)
            lines.append(f"{cell['name']}: {step} {state}" + ("" if seconds is None else f" ({duration(seconds)})"))
        if changed and _state(cell) == "done" and cell["metrics"]:
            lines[-1] += "; " + ", ".join(f"{name} {_metric(value)}" for name, value in cell["metrics"].items())
    return lines


def _state(cell: dict[str, Any]) -> str:
    """One state of all steps of a cell. Begun and waiting for the next step is waiting."""
    states = set(cell["steps"].values())
    for state in ("failed", *_ACTIVE, "waiting"):
        if state in states:
            return state
    return "done"


def _window(states: list[str], size: int) -> tuple[int, int]:
    """First and behind the last of `size` cells, so that the active ones are in their middle."""
    places = [index for index, state in enumerate(states) if state in _ACTIVE]
    places = places or [index for index, state in enumerate(states) if state == "waiting"][:1] or [len(states) - 1]
    first = (places[0] + places[-1] + 1 - size) // 2
    first = max(0, min(first, places[0], len(states) - size))
    return first, min(len(states), first + size)


def _summary(cells: list[dict[str, Any]], first: int, last: int) -> Text:
    counts = dict.fromkeys(_STATES, 0)
    for cell in cells:
        counts[_state(cell)] += 1
    parts = [f"{count:,} {state}" for state, count in counts.items() if count]
    text = f"{len(cells):,} cells: {', '.join(parts) or 'none'}"
    if last - first < len(cells):
        text += f". Shown: {first + 1:,} to {last:,}"
    return Text(text)


def _progress(cell: dict[str, Any]) -> Text:
    state, steps = _state(cell), cell["steps"]
    sign, style = _STATES[state]
    if state == "done":
        seconds = sum(cell.get("seconds", {}).values())
        text = duration(seconds) if seconds else "done"
    elif state == "waiting":
        done = [*steps.values()].count("done")
        text = f"{done} of {len(steps)} done" if done else "waiting"
    else:
        text = ", ".join(step for step, own in steps.items() if own == state) + (
            " failed" if state == "failed" else ""
        )
    return Text(f"{sign} {text}", style=style)


def _metric(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}".replace("-", "−")
