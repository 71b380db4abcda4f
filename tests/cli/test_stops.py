"""Ctrl-C, SIGTERM and a disk that takes no more: a line that says how to go on, and nothing lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from conftest import ROOT
from processes import adapter_of, assert_same_adapter, files_of_at_most, recipe, start
from rows import make_chat_rows, write_lines, write_splits
from trl_perce.cli.common import explain_stops, fail, keep_model_whole
from trl_perce.cli.main import main


ROWS = make_chat_rows()


@pytest.fixture
def train_argv(tmp_path, tiny_model):
    values = {
        "model_name_or_path": tiny_model,
        "dataset_name": write_splits(tmp_path / "data", train=ROWS),
        "num_train_epochs": 400,
    }
    values |= {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 3, "resume_from_checkpoint": True}
    return ["train", "--config", recipe(tmp_path / "config.yaml", **values), "--output_dir", str(tmp_path / "run")]


def hear_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # where the tests run in the background it is ignored


@pytest.mark.parametrize("number, code, name", [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_training_that_is_stopped_says_where_it_goes_on(tmp_path, train_argv, number, code, name):
    process = start(train_argv, preexec_fn=hear_ctrl_c)
    for _ in range(1200):
        if (tmp_path / "run" / "checkpoint-10" / "trainer_state.json").exists():
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    last = errors.strip().splitlines()[-1]
    assert last.startswith(
        f"trl-perce train: stopped by {name}. With `--resume_from_checkpoint true` the same command"
    )
    checkpoint = last.removesuffix(".").split()[-1]
    assert os.path.isfile(os.path.join(checkpoint, "trainer_state.json")) and "Traceback" not in errors


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_worker_ends_with_its_launcher(train_argv):
    worker = [sys.executable, "-m", "trl_perce.cli.train", *train_argv[1:]]  # as `accelerate launch` starts it
    launcher = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])", *worker],
        **{"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "start_new_session": True},
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    next(line for line in launcher.stdout if line.startswith("step     loss"))
    (process,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.communicate(timeout=30)
    gone, _ = psutil.wait_procs([process], timeout=10)
    assert len(gone) == 1


def test_a_run_that_was_killed_before_its_last_evaluation(tmp_path, train_argv):
    argv = [*train_argv, "--num_train_epochs", "2", "--save_steps", "6", "--eval_strategy", "epoch"]
    argv += ["--dataset_test_split", "train"]

    def evaluations():
        history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
        return [(log["step"], log["eval_loss"], log["eval_pir/mean"]) for log in history if "eval_loss" in log]

    assert main(argv) == 0
    whole = evaluations()
    assert [step for step, *_ in whole] == [6, 12]
    (tmp_path / "run" / "trainer_state.json").unlink()
    assert main(argv) == 0  # from the last step's checkpoint, which is written before the epoch's evaluation
    assert evaluations() == whole


def test_a_disk_that_is_full_at_a_checkpoint(tmp_path, train_argv):
    argv = [*train_argv, "--num_train_epochs", "3", "--save_steps", "6", "--lr_scheduler_type", "constant"]
    assert main([*argv, "--output_dir", str(tmp_path / "whole")]) == 0
    assert main([*argv, "--max_steps", "6"]) == 0
    largest = max(file.stat().st_size for file in (tmp_path / "run" / "checkpoint-6").iterdir())

    with files_of_at_most(largest // 2):  # inherited
        process = start(argv)
    _, errors = process.communicate(timeout=120)
    last = errors.strip().splitlines()[-1]
    assert process.returncode == 1, errors
    assert last.startswith("trl-perce train: error: The checkpoint of step 12 could not be written")
    assert last.endswith("checkpoint-6.") and "Traceback" not in errors
    assert main(argv) == 0
    assert_same_adapter(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "run"))


@pytest.mark.parametrize("command", ["train", "score", "evaluate", "aloe", "reproduce"])
def test_a_folder_that_cannot_be_written_to_is_told_first(tmp_path, tiny_model, capsys, monkeypatch, command):
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "out")
    rows = write_lines(tmp_path / "rows.jsonl", ROWS)
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", rows, "--output_dir", folder]
    if command == "train":
        argv += ["--use_cpu", "true", "--bf16", "false"]
    if command == "aloe":
        argv = ["--data_dir", "x", "--judge_base_url", "http://localhost", "--judge_model", "x", *argv[:2], *argv[4:]]
    if command == "reproduce":
        argv = ["--config", "recipes/reproduce/local.yaml", *argv[4:]]
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        main([command, *argv])
    assert stopped.value.code == 2
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there_is_told_before_a_model_loads(train_argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*train_argv, "--model_name_or_path", "no/model", "--resume_from_checkpoint", "nowhere/checkpoint-5"])
    assert stopped.value.code == 2
    assert (
        "`resume_from_checkpoint`: nowhere/checkpoint-5 is not whole: there is no such folder."
        in capsys.readouterr().err
    )


def test_the_main_process_speaks_first(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    threading.Timer(
        0.3, os.kill, (os.getpid(), signal.SIGTERM)
    ).start()  # the launcher, since the main process has failed
    with pytest.raises(SystemExit) as stopped, explain_stops("trl-perce score", str):
        raise RuntimeError("Connection closed by peer")
    assert stopped.value.code == 143 and capsys.readouterr().err == ""
    monkeypatch.setattr("trl_perce.cli.common._PATIENCE", 0.1)  # the main process has not failed
    with pytest.raises(SystemExit) as stopped, explain_stops("trl-perce score", str):
        fail("trl-perce score", "Row 5 is odd.", 1)
    assert stopped.value.code == 1 and capsys.readouterr().err == "trl-perce score: error: Row 5 is odd.\n"


def test_a_configuration_for_training_does_not_shard_what_is_scored(monkeypatch, capsys):
    # With FSDP's variables, Transformers would load weights on the main process alone
    for name, value in (("FSDP", "true"), ("DEEPSPEED", "false"), ("CPU", "true")):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", value)
    keep_model_whole()
    assert [name for name in os.environ if name.startswith("ACCELERATE_USE_")] == ["ACCELERATE_USE_CPU"]
    assert capsys.readouterr().err == "Not sharded (FSDP): each process holds the whole model.\n"


def test_scoring_that_meets_a_full_disk_keeps_what_it_has(tmp_path, tiny_model):
    rows = write_lines(tmp_path / "rows.jsonl", ROWS)
    argv = ["score", "--model_name_or_path", tiny_model, "--dataset_name", rows, "--score_batch_tokens", "64"]
    assert main([*argv, "--output_dir", str(tmp_path / "whole")]) == 0
    size = (tmp_path / "whole" / "scores.jsonl").stat().st_size

    argv += ["--output_dir", str(tmp_path / "out")]
    with files_of_at_most(size // 2):
        process = start(argv)
    _, errors = process.communicate(timeout=120)
    last = errors.strip().splitlines()[-1]
    assert process.returncode == 1, errors
    assert "trl-perce score: error: " in last and last.endswith("the same command goes on from there.")
    assert main(argv) == 0
    whole, again = [(tmp_path / folder / "scores.jsonl").read_text() for folder in ("whole", "out")]
    assert whole == again
