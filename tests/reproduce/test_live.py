"""The live view of a grid."""

import io

import pytest
from rich.console import Console

from trl_perce.reproduce.live import changed_lines, live_table


def cell(name, train="waiting", score="waiting", metrics=None, seconds=None):
    steps = {"train": train, "score": score}
    return {"name": name, "label": name, "steps": steps, "metrics": metrics or {}, "seconds": seconds or {}}


def printed(cells, width=100, **options):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(live_table(cells, **options))
    return console.file.getvalue()


CELLS = [
    cell("small/reviews/ce [bold]", "done", "done", {"rougeL": 0.12345, "uptake": 0.6}, {"train": 125.4, "score": 59}),
    cell("small/reviews/perce", "done", "running", seconds={"train": 7300}),
    cell("small/posts/ce", "failed", "waiting", seconds={"train": 3}),
    cell("small/posts/perce", "elsewhere"),
    cell("small/posts/entce", "done"),
]


def test_states_seconds_and_metrics():
    text = printed(CELLS)
    lines = {line[:24].strip(): line for line in text.splitlines()}
    first = lines["small/reviews/ce [bold]"]
    assert "✓ 3 min 04 s" in first and "0.1235" in first and "0.6" in first
    assert "▶ score" in lines["small/reviews/perce"]
    assert "✗ train failed" in lines["small/posts/ce"]
    assert "▷ train" in lines["small/posts/perce"]
    assert "· 1 of 2 done" in lines["small/posts/entce"]
    assert "5 cells: 1 waiting, 1 running, 1 elsewhere, 1 done, 1 failed" in text and "\x1b" not in text


def test_a_table_of_all_that_a_grid_shows_has_80_columns():
    names = ["rougeL", "log_likelihood/personal", "log_likelihood/other", "uptake/own"]
    label = "preferences, perce_from_0.5, lr=0.0005, clip=0.5–5, seed=0"
    cells = [cell(label, "done", "done", dict.fromkeys(names, -1.2345), {"train": 4021, "score": 59})]
    text = printed(cells, width=80)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert all(
        word in words for word in ("perce_from_0.5,", "seed=0", "ROUGE-L", "personal", "uptake", "✓ 1 h 08 min")
    )
    assert words.count("−1.23") == len(names)


@pytest.mark.parametrize(
    "running, first, last", [((0,), 1, 5), ((50,), 49, 53), ((99,), 96, 100), ((), 1, 5), ((50, 52), 50, 54)]
)
def test_a_large_grid_shows_what_is_around_the_running_cells(running, first, last):
    cells = [cell(f"cell {index + 1}", "running" if index in running else "waiting") for index in range(100)]
    text = printed(cells, max_rows=5)
    shown = [int(line.split()[1]) for line in text.splitlines() if line.strip().startswith("cell ")]
    assert shown == list(range(first, last + 1))
    assert f"100 cells: {100 - len(running)} waiting" in text and f"Shown: {first} to {last}" in " ".join(text.split())


def test_without_a_running_cell_the_first_that_waits_is_shown():
    cells = [cell(f"cell {index}", *(["done"] * 2 if index < 60 else [])) for index in range(100)]
    assert "cell 60 " in printed(cells, max_rows=5)
    done = [cell(f"cell {index}", "done", "done") for index in range(100)]
    assert "cell 99 " in printed(done, max_rows=5) and "cell 95 " in printed(done, max_rows=5)


def test_an_empty_grid_and_steps_that_a_cell_has_not():
    assert "0 cells" in printed([])
    cells = [cell("a"), {"name": "b", "label": "b", "steps": {"judge": "done"}, "metrics": {}}]
    assert "✓ done" in printed(cells)


def test_lines_for_a_log_tell_only_what_has_changed():
    assert changed_lines([], [cell("a"), cell("b")]) == []
    before = [cell("a", "done", seconds={"train": 12}), cell("b", "running")]
    after = [
        cell("a", "done", "done", {"rougeL": 0.25}, {"train": 12, "score": 90}),
        cell("b", "failed", seconds={"train": 4}),
    ]
    assert changed_lines(before, after) == ["a: score done (1 min 30 s); rougeL 0.25", "b: train failed (4 s)"]
    assert changed_lines(after, after) == []
