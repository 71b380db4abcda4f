import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from conftest import ROOT
from trl_perce.cli import aloe, evaluate, train
from trl_perce.cli.common import check_known
from trl_perce.cli.reproduce import make_steps
from trl_perce.reproduce.compare import _baseline_of, _read
from trl_perce.reproduce.grid import GridError, Step, run_steps
from trl_perce.reproduce.settings import Cell, load_settings
from trl_perce.utils.files import differences


GRID = {
    "output_dir": "out",
    "models": {"tiny": {"model_name_or_path": "tiny"}, "small": {"model_name_or_path": "small"}},
    "tasks": {
        "chats": {
            "benchmark": "histories",
            "path": "data",
            "format": "chats",
            "train_rows": 10,
            "retrieval": {"k": 2},
        },
        "posts": {"benchmark": "histories", "path": "data", "format": "posts", "test_rows": 0},
        "drop": {"benchmark": "general_qa"},
    },
    "methods": ["ce", "perce"],
    "seeds": [0, 1],
    "learning_rates": [1.0e-3],
}
CHATS = {"chats": GRID["tasks"]["chats"]}

# A step writes its own process id, waits, and is done
WORKER = """
import os, sys, time
from pathlib import Path
from trl_perce.reproduce.grid import Step, run_steps
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
def make(index):
    def run():
        with open(folder / "log", "a") as log:
            log.write(f"{index} {os.getpid()}\\n")
        time.sleep(seconds)
        return {"index": index}
    return Step(folder / str(index), "step", {"index": index}, run)
steps = []
for index in range(6):
    step = make(index)
    if index == 5:
        step.needs = tuple(steps)
    steps.append(step)
failed = run_steps(steps, lambda step: print(step.folder.name, step.state, flush=True), wait=0.05)
sys.exit(len(failed))
"""


def write(folder: Path, **changes) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID | changes, sort_keys=False))
    return path


def make_step(folder: Path, kind: str = "step", settings=None, result=None, needs=()) -> Step:
    calls = []

    def run():
        calls.append(kind)
        if isinstance(result, Exception):
            raise result
        return result or {"calls": len(calls)}

    return Step(folder, kind, settings or {}, run, needs)


def test_cells_have_whole_comparisons_first(tmp_path):
    settings = load_settings(write(tmp_path, clip_ranges=[[0.8, 5.0], [0.5, 3.0]]))
    cells = settings.cells()
    # CE has no weights: once for all clip ranges. 2 seeds × 2 models × 2 tasks × (1 + 2)
    assert len(cells) == 24 == len(set(cells))
    assert [cell.seed for cell in cells] == [0] * 12 + [1] * 12
    assert cells[:3] == [
        Cell("tiny", "chats", "ce", 1e-3, (0.8, 5.0), 0),
        Cell("tiny", "chats", "perce", 1e-3, (0.8, 5.0), 0),
        Cell("tiny", "chats", "perce", 1e-3, (0.5, 3.0), 0),
    ]
    assert cells[1].name == "tiny/chats/perce-lr0.001-clip0.8-5-seed0"
    assert len({cell.name for cell in cells}) == 24
    assert settings.tasks["chats"].options == {"path": "data", "format": "chats"}


def test_a_file_extends_another(tmp_path):
    write(tmp_path)
    path = tmp_path / "more.yaml"
    path.write_text("extends: grid.yaml\nlearning_rates: [1.0e-4, 3.0e-4]\n")
    settings = load_settings(path, output_dir="elsewhere")
    assert settings.learning_rates == [1e-4, 3e-4] and settings.output_dir == "elsewhere"
    assert settings.seeds == GRID["seeds"] and list(settings.tasks) == list(GRID["tasks"])
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        path.write_text("extends: nowhere.yaml")
        load_settings(path)


def test_paths_are_seen_from_the_data_dir(tmp_path):
    settings = load_settings(write(tmp_path), data_dir="/elsewhere")
    assert [task.options.get("path") for task in settings.tasks.values()] == ["/elsewhere/data"] * 2 + [None]
    path = tmp_path / "grid.yaml"
    path.write_text(path.read_text().replace("path: data", "path: /absolute"))
    assert load_settings(path, data_dir="/elsewhere").tasks["chats"].options["path"] == "/absolute"


def test_what_a_run_is_evaluated_on(tmp_path):
    settings = load_settings(write(tmp_path))
    of_chats, of_posts = (Cell("tiny", task, "ce", 1e-3, (0.8, 5.0), 0) for task in ("chats", "posts"))
    assert settings.evaluated_tasks(of_chats) == ["chats", "drop"]
    assert settings.evaluated_tasks(of_posts) == ["drop"]  # it has no test rows
    settings = load_settings(write(tmp_path, transfer=True))
    assert settings.evaluated_tasks(of_posts) == ["chats", "drop"]
    tasks = yaml.safe_load((tmp_path / "grid.yaml").read_text())["tasks"] | {
        "asked": {"benchmark": "irrelevant", "of": "chats"}
    }
    settings = load_settings(write(tmp_path, transfer=True, tasks=tasks))
    assert (
        settings.evaluated_tasks(of_chats) == ["chats", "drop", "asked"] and settings.tasks["asked"].test_rows == 100
    )
    assert settings.evaluated_tasks(of_posts) == ["chats", "drop"]


def test_what_a_run_is_compared_with(tmp_path):
    methods = {"ce": {"token_weighting": "uniform"}, "perce": {}, "faster": {"learning_rate": 2e-3}}
    settings = load_settings(
        write(tmp_path, methods=methods, learning_rates=[1.0e-3, 3.0e-3], clip_ranges=[[0.5, 2.0]])
    )
    own = [cell for cell in settings.cells() if (cell.model, cell.task) == ("tiny", "chats")]
    cells = {(cell.method, cell.learning_rate): replace(cell, seed=0) for cell in own}
    assert [*cells] == [("ce", 1e-3), ("perce", 1e-3), ("faster", 2e-3), ("ce", 3e-3), ("perce", 3e-3)]
    evaluations = {(cell, "chats"): {0: cell} for cell in cells.values()}
    baselines = {key: _baseline_of(cell, "chats", evaluations, settings, "ce").get(0) for key, cell in cells.items()}
    assert baselines["perce", 3e-3] == cells["ce", 3e-3] and baselines["perce", 1e-3] == cells["ce", 1e-3]
    assert baselines["faster", 2e-3] == cells["ce", 1e-3]
    assert _baseline_of(cells["perce", 1e-3], "posts", evaluations, settings, "ce") == {}
    # a baseline with a learning rate or bounds of its own is that of all methods
    settings = load_settings(write(tmp_path, methods=methods | {"bounded": {"weight_clip_min": 1.0}}))
    own = [replace(cell, seed=0) for cell in settings.cells() if (cell.model, cell.task) == ("tiny", "chats")]
    evaluations = {(cell, "chats"): {0: cell} for cell in own}
    for baseline in ("faster", "bounded", "perce"):
        (expected,) = {cell for cell in own if cell.method == baseline}
        assert all(_baseline_of(cell, "chats", evaluations, settings, baseline) == {0: expected} for cell in own)
    assert _baseline_of(own[0], "chats", evaluations, settings, "absent") == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": [1e-3]}, "unknown key `learning_rate` in the file. Did you mean `learning_rates`?"),
        ({"methods": ["ce", "pirce"]}, "'pirce' is not known. Write some of ce, lossce"),
        ({"learning_rates": ["1e-3"]}, "'1e-3' is not a positive number. YAML reads 1.0e-3"),
        ({"clip_ranges": [[5.0, 0.8]]}, r"\[5.0, 0.8\] is not a pair of bounds"),
        ({"seeds": []}, "`seeds` must be a list that is not empty"),
        ({"models": {"tiny": {}}}, "`models`, tiny: `model_name_or_path` is missing"),
        ({"tasks": {"chats": {"path": "data"}}}, "`tasks`, chats: `benchmark` must be one of histories"),
        ({"tasks": CHATS | {"more": {"benchmark": "seen"}}}, "`tasks`, more: `benchmark: seen` needs `of`"),
        ({"tasks": CHATS | {"more": {"benchmark": "seen", "of": "chat"}}}, "`of: chat` is no task here with rows"),
        ({"tasks": {"chats": CHATS["chats"] | {"of": "chats"}}}, "is made of no other task: leave `of` out"),
        ({"tasks": CHATS | {"more": {"benchmark": "seen", "of": "chats", "path": "x"}}}, "`path` is not for rows"),
        (
            {"tasks": CHATS | {"more": {"benchmark": "irrelevant", "of": "chats", "test_rows": 101}}},
            "there are 100 irrelevant questions; `test_rows` is 101",
        ),
    ],
)
def test_errors_of_the_file(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"grid.yaml: .*{message}"):
        load_settings(write(tmp_path, **changes))


def test_a_missing_key_is_named(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in GRID.items() if key != "seeds"}))
    with pytest.raises(ValueError, match="the key `seeds` is missing"):
        load_settings(path)
    path.write_text("- a list")
    with pytest.raises(ValueError, match="expected keys and values, got list"):
        load_settings(path)


def test_a_step_is_done_once(tmp_path):
    step = make_step(tmp_path / "a")
    assert run_steps([step], lambda step: None) == []
    assert step.state == "done" and step.result == {"calls": 1} and step.seconds >= 0
    again = make_step(tmp_path / "a", result={"calls": "not made"})
    run_steps([again], lambda step: None)
    assert again.result == {"calls": 1}


def test_a_step_of_other_settings_is_not_reused(tmp_path):
    run_steps([make_step(tmp_path, settings={"lr": 1, "of": {"rows": 2, "k": 3}})], lambda step: None)
    step = make_step(tmp_path, settings={"lr": 1, "of": {"rows": 4, "k": 3}})
    assert run_steps([step], lambda step: None) == [step]
    error = (tmp_path / "step.error").read_text()
    assert "was made with other settings: `of.rows` was 2 and is 4. Choose another `output_dir`" in error


def test_differences():
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}) == []
    assert differences({"a": 1}, {"d": None}) == ["`a` was 1 and is None"]
    assert differences({"b": {"c": 2}}, {"b": 3}) == ["`b` was {'c': 2} and is 3"]


def test_a_failure_holds_up_only_what_needs_it(tmp_path):
    bad = make_step(tmp_path / "bad", result=RuntimeError("out of memory"))
    good = make_step(tmp_path / "good")
    after_bad = make_step(tmp_path / "after bad", needs=(bad,))
    after_good = make_step(tmp_path / "after good", needs=(good,))
    states = []
    failed = run_steps([bad, after_bad, good, after_good], lambda step: states.append((step.folder.name, step.state)))
    assert failed == [bad, after_bad]
    assert (bad.error, after_bad.error) == ("RuntimeError: out of memory", None)
    assert after_good.state == "done" and after_bad.result is None
    assert ("bad", "running") in states and ("after bad", "running") not in states
    assert "out of memory" in (tmp_path / "bad" / "step.error").read_text()
    assert not (tmp_path / "bad" / "step.json").exists()
    # Once it can be done, the error is gone
    again = make_step(tmp_path / "bad")
    assert run_steps([again], lambda step: None) == []
    assert not (tmp_path / "bad" / "step.error").exists()


@pytest.mark.parametrize("error", [GridError("no data"), OSError(errno.ENOSPC, "No space left on device")])
def test_what_would_hit_others_alike_stops_the_grid(tmp_path, error):
    bad, other = make_step(tmp_path / "bad", result=error), make_step(tmp_path / "other")
    with pytest.raises(type(error), match=str(error.args[-1])):
        run_steps([bad, other], lambda step: None)
    assert bad.state == "failed" and other.state == "waiting" and not [*tmp_path.rglob("step.*")]


def test_processes_share_the_steps(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path), "0.2"]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [worker.communicate(timeout=100)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    ran = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(index for index, _ in ran) == list("012345")  # each by one of them
    assert ran[-1][0] == "5"  # it needs all others
    assert all("5 done" in output for output in outputs)


def test_what_another_process_has_done_meanwhile_is_not_waited_for(tmp_path):
    order = []
    elsewhere, first, second, last = steps = [
        make_step(tmp_path / name) for name in ("elsewhere", "first", "second", "last")
    ]
    for step in steps:
        step.run = lambda name=step.folder.name: order.append(name) or {}
    second.needs = (elsewhere,)
    elsewhere.folder.mkdir()
    lock = FileLock(elsewhere.folder / f".{elsewhere.kind}.lock")
    lock.acquire()

    def other_process_ends() -> dict:
        elsewhere.path.write_text(
            json.dumps({"settings": elsewhere.settings, "result": {"by": "another"}, "seconds": 1})
        )
        lock.release()
        return order.append("first") or {}

    first.run = other_process_ends
    assert run_steps(steps, lambda step: None) == []
    assert order == ["first", "second", "last"] and elsewhere.result == {"by": "another"}


def test_a_killed_grid_goes_on(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path), "0.5"]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "2 running\n" in iter(worker.stdout.readline, "")
    time.sleep(0.1)
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    assert not (tmp_path / "2" / "step.json").exists()
    subprocess.run([*command[:-1], "0"], check=True, timeout=100, stdout=subprocess.DEVNULL)
    ran = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert ran == list("012") + list("2345")  # the step that was killed is done anew, the ones before are not
    assert json.loads((tmp_path / "5" / "step.json").read_text())["result"] == {"index": 5}


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "recipes" / "reproduce").glob("*.yaml")))
def test_recipes(name):
    """All recipes of the grid are valid down to the arguments of the commands, and have runs that others take over."""
    settings = load_settings(ROOT / "recipes" / "reproduce" / name)
    steps = make_steps(settings)
    assert steps.train and steps.untrained
    parser = train.make_parser()
    for step in steps.train.values():
        check_known(parser, {*step.settings["recipe"]}, launch=False)
    for step in steps.all():
        if step.kind == "evaluate":
            command = aloe if step.folder.name == "aloe" else evaluate
            check_known(command.make_parser(), {*step.settings["config"]}, launch=False)
    if settings.output_dir.endswith("paper"):
        main = make_steps(load_settings(ROOT / "recipes/reproduce/paper.yaml"))
        assert {*steps.train} & {*main.train} or name == "lamp.yaml"


def test_evaluations_without_likelihoods_are_compared_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"row": 0, "id": null, "user": "ann", "rougeL": 0.5}\n{"row": 1, "id": null, "user": null, "rougeL": null}\n'
    )
    step = Step(tmp_path, "evaluate", {}, dict, state="done")
    values, users = _read([step], "own")
    assert users == ["ann", "row 1"] and values["rougeL"][0] == 0.5 and math.isnan(values["rougeL"][1])
    step.state = "waiting"
    assert _read([step], "own") is None
