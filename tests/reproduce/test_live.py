"""The live view of a grid."""

import io

import pytest
from rich.console import Console

from trl_perce.reproduce.live import changed_lines, live_table


def cell(name, train="waiting", score="waiting", metrics=None, seconds=None):
    steps = {"train": train, "score": score}
    return {"name": name, "steps": steps, "metrics": metrics or {}, "seconds": seconds or {}}


def printed(cells, width=100, **options):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(live_table(cells, **options))
    return console.file.getvalue()


CELLS = [
    cell("small/reviews/ce [bold]", "done", "done", {"rougeL": 0.12345, "uptake": 0.6}, {"train": 125.4, "score": 59}),
    cell("small/reviews/perce", "done", "running", seconds={"train": 7300}),
    cell("small/posts/ce", "failed", "waiting", seconds={"train": 3}),
    cell("small/posts/perce", "elsewhere"),
]


def test_states_seconds_and_metrics():
    text = printed(CELLS)
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    first = lines["small/reviews/ce [bold]"]
    assert "✓ 2 min 05 s" in first and "✓ 59 s" in first and "0.1235" in first and "0.6" in first
    assert "✓ 2 h 01 min" in lines["small/reviews/perce"] and "▶ running" in lines["small/reviews/perce"]
    assert "✗ failed 3 s" in lines["small/posts/ce"] and "· waiting" in lines["small/posts/ce"]
    assert "▷ elsewhere" in lines["small/posts/perce"]
    assert "4 cells: 1 running, 1 elsewhere, 1 done, 1 failed" in text and "\x1b" not in text


@pytest.mark.parametrize(
    "running, first, last", [((0,), 1, 5), ((50,), 49, 53), ((99,), 96, 100), ((), 1, 5), ((50, 52), 50, 54)]
)
def test_a_large_grid_shows_what_is_around_the_running_cells(running, first, last):
    cells = [cell(f"cell {index + 1}", "running" if index in running else "waiting") for index in range(100)]
    text = printed(cells, max_rows=5)
    shown = [int(line.split("│")[1].split()[1]) for line in text.splitlines() if line.startswith("│")]
    assert shown == list(range(first, last + 1))
    assert f"100 cells: {100 - len(running)} waiting" in text and f"Shown: {first} to {last}" in text


def test_without_a_running_cell_the_first_that_waits_is_shown():
    cells = [cell(f"cell {index}", *(["done"] * 2 if index < 60 else [])) for index in range(100)]
    assert "cell 60 " in printed(cells, max_rows=5)
    done = [cell(f"cell {index}", "done", "done") for index in range(100)]
    assert "cell 99 " in printed(done, max_rows=5) and "cell 95 " in printed(done, max_rows=5)


def test_an_empty_grid_and_steps_that_a_cell_has_not():
    assert "0 cells" in printed([])
    cells = [cell("a"), {"name": "b", "steps": {"judge": "done"}, "metrics": {}}]
    assert "–" in printed(cells)


def test_lines_for_a_log_tell_only_what_has_changed():
    assert changed_lines([], [cell("a"), cell("b")]) == []
    before = [cell("a", "done", seconds={"train": 12}), cell("b", "running")]
    after = [
        cell("a", "done", "done", {"rougeL": 0.25}, {"train": 12, "score": 90}),
        cell("b", "failed", seconds={"train": 4}),
    ]
    assert changed_lines(before, after) == ["a: score done (1 min 30 s); rougeL 0.25", "b: train failed (4 s)"]
    assert changed_lines(after, after) == []
