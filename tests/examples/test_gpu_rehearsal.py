"""`make gpu`, rehearsed: every section of examples/benchmarks/gpu.py on CPU with tiny models."""

import json
import subprocess
import sys
import time

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import ROOT, make_tiny_model
from trl_perce.training.checks import make_trainable_in_fp16


sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
import gpu  # noqa: E402
from gpu import SECTIONS, main, run  # noqa: E402


def test_rehearsal(tmp_path):
    result = subprocess.run(
        [sys.executable, "examples/benchmarks/gpu.py", "--rehearse", "--output_dir", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert list(sections) == list(SECTIONS) and {found["state"] for found in sections.values()} == {"done"}
    results = {name: found["results"] for name, found in sections.items()}
    outcomes = [test["outcome"] for test in results["right"]]
    assert outcomes.count("passed") >= 13 and set(outcomes) == {"passed", "skipped"}
    (cell,) = results["cost"]["cells"]
    assert all(measured["seconds"] > 0 for measured in cell["results"].values())
    where = results["where"]["variants"]
    assert list(where) == list(cell["results"]) == ["sft", "lossce", "drop"]
    assert where["drop"]["clock"]["E-step"] > 2 * where["lossce"]["clock"]["E-step"]  # which has a pass in it
    assert results["fits"]["entries"][0]["peak_bytes"] > 2**20
    assert results["generation"]["tokens_per_second"].keys() == {"padded", "continuous"}
    helps = results["helps"]
    assert helps["steps"] == [30, 30]
    tasks = {"chats", "chats_seen", "chats_irrelevant"}
    tasks |= {task.replace("chats", "preferences") for task in tasks}
    assert {(own["task"], own["method"]) for own in helps["comparisons"]} == {
        (task, method) for task in tasks for method in ("untrained", "ce", "perce_frozen")
    }
    report = (tmp_path / "gpu.md").read_text()
    assert all(f"## {section.title}\n" in report for section in SECTIONS.values())
    assert report.count("\n|---") == len(SECTIONS) - 1 and report.count("\n| ---") == len(tasks)  # a table each
    # What was not measured anew is kept
    assert main(["--merge", str(tmp_path), str(tmp_path), "--output_dir", str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged" / "gpu.json").read_text())["sections"] == sections


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_section_is_stopped_at_its_limit_with_all_that_it_started(tmp_path):
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True); p.wait()"
    started = time.monotonic()
    assert run(["-c", code], 3, tmp_path / "log") == "stopped" and time.monotonic() - started < 30
    child = int((tmp_path / "log").read_text())
    while _is_running(child):  # it takes a moment to end
        assert time.monotonic() - started < 30
        time.sleep(0.05)
    assert run(["-c", "raise SystemExit(1)"], 30, tmp_path / "log") == "failed"


def test_no_time_is_left(tmp_path, monkeypatch):
    assert main(["--minutes", "0", "--output_dir", str(tmp_path)]) == 0
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert len(sections) == len(SECTIONS)
    assert all(found["state"].startswith("not run: ") for found in sections.values())


def test_outcomes_are_read_from_either_layout():
    log = (
        "[gw3] [ 50%] PASSED tests/test_gpu.py::test_one[a-b] \n"
        "tests/test_gpu.py::test_two[{'c': True}] FAILED          [ 60%]\n"
        "tests/test_gpu.py::test_three SKIPPED (a CPU has none)   [100%]\n"
    )
    tests, table = gpu.tests_of(log)
    assert [(test["test"], test["outcome"]) for test in tests] == [
        ("test_one[a-b]", "passed"),
        ("test_two[{'c': True}]", "failed"),
        ("test_three", "skipped"),
    ]
    assert table.startswith("1 passed, 1 failed, 1 skipped.")


def test_what_fp16_trains_is_in_float32():
    model = get_peft_model(make_tiny_model("llama", torch.bfloat16), LoraConfig(target_modules="all-linear"))
    for weight in model.parameters():  # as TRL leaves a quantized model
        weight.data = weight.data.to(torch.bfloat16)
    make_trainable_in_fp16(model)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}
    with pytest.raises(ValueError, match="'model.embed_tokens.weight' is in bfloat16. Set `dtype='float32'`"):
        make_trainable_in_fp16(make_tiny_model("llama", torch.bfloat16))
