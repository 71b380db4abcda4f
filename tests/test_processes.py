"""
Several processes on CPU (gloo), started as a user starts them: with the files of recipes/accelerate_configs. One process on
the same global batches is what each must equal.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import ROOT
from processes import adapter_of, assert_same_adapter, recipe, run, start
from reference import make_rows
from rows import write_lines, write_splits
from score_and_evaluate import evaluate_loaded
from trl_perce.cli.main import main


# `make test` puts DeepSpeed here, aside from the environment, where Accelerate would import it in every test
DEEPSPEED = ROOT / ".cache" / "deepspeed"
# What only the strategy at hand leaves in a checkpoint, so that a test cannot pass with another one
LEFT_BEHIND = {
    "ddp": "optimizer.pt",
    "fsdp2": "pytorch_model_fsdp.bin",
    "deepspeed_zero2": "global_step4/mp_rank_00_model_states.pt",
    "deepspeed_zero3": "global_step4/zero_pp_rank_1_mp_rank_00_model_states.pt",
}


def train_on_one(config, folder, *arguments):
    """With the whole batch, in this process."""
    argv = ["--config", config, "--output_dir", str(folder), "--per_device_train_batch_size", "4", *arguments]
    assert main(["train", *argv]) == 0


def two_processes(strategy: str) -> tuple[list[str], dict[str, str]]:
    """Arguments of `accelerate launch` behind the configuration file, and the environment."""
    if strategy.startswith("deepspeed") and not (DEEPSPEED.is_dir() and shutil.which("g++")):
        pytest.skip(
            f"DeepSpeed is not in {DEEPSPEED} (`make test` puts it there), or there is no g++ to build its CPU part"
        )
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    if strategy == "ddp":
        env = {"ACCELERATE_USE_CPU": "true"}
    else:
        folders = [ROOT / "tests" / "shards_on_cpu", DEEPSPEED, *os.environ.get("PYTHONPATH", "").split(":")]
        env = {"PYTHONPATH": ":".join(str(folder) for folder in folders if str(folder))}
        env |= {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions")}
        env |= {"PATH": f"{DEEPSPEED / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return [
        str(ROOT / "recipes" / "accelerate_configs" / f"{strategy}.yaml"),
        *("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", port),
    ], env


def train_on_two(config, folder, *arguments, strategy="ddp"):
    """With half the batch on each process."""
    launch, env = two_processes(strategy)
    argv = ["--config", config, "--output_dir", str(folder), "--per_device_train_batch_size", "2", *arguments]
    return run("trl-perce", "train", *argv, "--accelerate_config", *launch, timeout=240, **env)


@pytest.fixture(scope="module")
def make_config(tmp_path_factory, tiny_model):
    # Few rows with personas, and a budget under most rows' length: the processes have unequally many forwards to run, in
    # some windows one of them has none
    folder = tmp_path_factory.mktemp("rows")
    rows = [row.tokenized() for row in make_rows(seed=21, count=16, with_persona=0.4)]
    write_splits(folder, train=rows, test=rows[:4])

    def make(**kwargs):
        values = {"model_name_or_path": tiny_model, "dataset_name": str(folder), "max_length": None}
        values |= {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "save_strategy": "epoch"}
        # Plain SGD: its steps are the gradients, which Adam would scale rounding errors up to
        values |= {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        values |= {"lora_alpha": 8, "counterfactual_batch_tokens": 12}
        return recipe(tmp_path_factory.mktemp("config") / "config.yaml", **values, **kwargs)

    return make


@pytest.fixture(scope="module")
def on_one(tmp_path_factory, make_config):
    """The run on one process, and its recipe."""
    config, folder = make_config(eval_strategy="epoch"), tmp_path_factory.mktemp("one")
    train_on_one(config, folder)
    assert max(value.abs().max() for name, value in adapter_of(folder).items() if "lora_B" in name) > 1e-2
    return config, folder


def history(folder, step):
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("strategy", LEFT_BEHIND)
def test_two_processes_give_the_loss_the_metrics_and_the_adapter_of_one(tmp_path, on_one, strategy):
    config, one = on_one
    two = tmp_path / "two"
    train_on_two(config, two, strategy=strategy)
    left = [
        str(path.relative_to(two / "checkpoint-4")) for path in (two / "checkpoint-4").rglob("*") if path.is_file()
    ]
    assert LEFT_BEHIND[strategy] in left, left
    assert_same_adapter(adapter_of(one), adapter_of(two), atol=5e-6)
    logs, others = history(one, 4), history(two, 4)
    assert len(logs) == len(others) and sum("loss" in log for log in logs) == 4
    compared = 0
    for log, other in zip(logs, others, strict=True):
        names = [name for name in log if name.removeprefix("eval_") in {"loss", "nll"} or "/" in name]
        for name in names:
            assert other[name] == pytest.approx(log[name], rel=1e-4, abs=1e-6), name
        compared += len(names)
    assert compared > 30


def test_streams_shard_over_processes(tmp_path, make_config):
    config = make_config(dataset_streaming=True, max_steps=4)
    train_on_one(config, tmp_path / "one")
    train_on_two(config, tmp_path / "two")
    assert_same_adapter(adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two"), atol=5e-6)


def test_two_processes_resume_on_one_and_back(tmp_path, make_config, capfd):
    # With log-probabilities that are kept for two epochs: the second epoch runs no counterfactual pass, on any process
    config = make_config(counterfactual_refresh_epochs=2, resume_from_checkpoint=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_on_one(config, whole)
    steps = ("--save_strategy", "steps", "--save_steps", "1", "--max_steps")
    train_on_two(config, parts, *steps, "1")
    assert len([*(parts / "checkpoint-1").glob("counterfactual_log_probs_*")]) == 2
    capfd.readouterr()
    train_on_one(config, parts, *steps, "2")
    assert "checkpoint-1" in capfd.readouterr().out
    (file,) = (parts / "checkpoint-2").glob("counterfactual_log_probs_*")
    personas = sum(bool(row.persona) for row in make_rows(seed=21, count=16, with_persona=0.4))
    assert load_file(file)["lengths"].numel() == personas
    result = train_on_two(config, parts, *steps, "4")
    assert "checkpoint-2" in result.stdout
    assert_same_adapter(adapter_of(whole), adapter_of(parts), atol=5e-6)
    for log, other in zip(history(whole, 4), history(parts, 4), strict=True):
        for name in ("loss", "pir/mean", "counterfactual/token_ratio"):
            assert other.get(name) == pytest.approx(log.get(name), rel=1e-4), name
        assert (log["counterfactual/token_ratio"] > 0) == (log["epoch"] <= 1)


@pytest.fixture(scope="module")
def callback_on_one(tmp_path_factory, make_config):
    """What the callback logged on one process, and how it was started."""
    config, folder = make_config(eval_strategy="epoch"), tmp_path_factory.mktemp("callback")
    arguments = [str(ROOT / "tests" / "train_with_callback.py"), "--config", config, "--per_device_train_batch_size"]
    run("python", *arguments, "4", "--output_dir", str(folder))
    return json.loads((folder / "percontrast.json").read_text()), arguments


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_zero3"])
def test_the_callback_scores_a_model_in_parts(tmp_path, callback_on_one, strategy):
    one, arguments = callback_on_one
    launch, env = two_processes(strategy)
    launch = ["launch", "--config_file", *launch]
    run("accelerate", *launch, *arguments, "2", "--output_dir", str(tmp_path / "two"), timeout=240, **env)
    two = json.loads((tmp_path / "two" / "percontrast.json").read_text())
    assert [log["step"] for log in one] == [log["step"] for log in two] == [0, 2, 4]
    assert one[0]["percontrast/pir_mean"] != pytest.approx(one[-1]["percontrast/pir_mean"], abs=1e-4)
    for log, other in zip(one, two, strict=True):
        assert other["percontrast/pir_mean"] == pytest.approx(log["percontrast/pir_mean"], abs=1e-4)
    assert (tmp_path / "two" / "checkpoint-4" / "percontrast.html").is_file()


# ── scoring and evaluation ───────────────────────────────────────────────────────────────────────────────────────────


def make_ragged_row(index):
    return {
        "id": f"r{index}",
        "user": f"u{index // 2}",
        "persona": f"I sew dress number {index}. " * (index % 7),  # every seventh row has none
        "prompt": [{"role": "user", "content": "About me: {persona}\nWhat should I buy?"}],
        "completion": [
            {"role": "assistant", "content": f"A new set of {index} needles. " * (40 if index == 3 else 1)}
        ],
    }


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_score_and_evaluate_as_one_and_go_on_with_what_killed_ones_have_left(
    tmp_path, tiny_model, one_thread
):
    rows = write_lines(tmp_path / "rows.jsonl", map(make_ragged_row, range(151)))
    one, two = tmp_path / "one", tmp_path / "two"
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(tmp_path / "adapter")

    def config(command, folder, **launch):
        values = {"model_name_or_path": tiny_model, "dataset_name": rows, "use_cpu": True, "bf16": False}
        if command == "score":
            values |= {"max_length": 200, "score_batch_tokens": 1}
        else:
            values |= {"adapter": str(tmp_path / "adapter"), "metrics": ["rouge"], "swap_persona": True}
            values |= {"max_length": 600, "max_new_tokens": 8, "max_rows": 13}
            values |= {"generation_batch_tokens": 300, "score_batch_tokens": 300}
        path = tmp_path / f"{command}.yaml"
        path.write_text(yaml.safe_dump({**values, **launch, "output_dir": str(folder / "run")}))
        return str(path)

    assert main(["score", "--config", config("score", one)]) == 0
    assert main(["evaluate", "--config", config("evaluate", one)]) == 0
    result = evaluate_loaded(AutoModelForCausalLM.from_pretrained(tiny_model), tiny_model, rows, one / "loaded")

    # The second of two processes is killed
    launcher = start(["score", "--config", config("score", two, num_processes=2)])
    parts = [two / "run-scores" / f"scores.jsonl.part{end}" for end in ("", "-1")]
    while not all(part.is_file() and part.stat().st_size for part in parts):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.01)
    workers = psutil.Process(launcher.pid).children()
    (second,) = (worker for worker in workers if worker.environ().get("RANK") == "1")
    second.send_signal(signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL and "Traceback" not in errors
    assert "trl-perce score: error: process 1 was ended by SIGKILL" in errors
    assert not any(worker.is_running() for worker in workers) and not (two / "run-scores" / "scores.jsonl").exists()
    finished = [part.read_bytes().count(b"\n") for part in parts]
    assert min(finished) > 0 and sum(finished) < 151
    with open(parts[1], "ab") as part:
        part.write(b'{"row": 150, "per')

    # What three killed processes might have left of the predictions
    left = two / "run-evaluation"
    left.mkdir(parents=True)
    shutil.copy(one / "run-evaluation" / "settings.json", left)
    lines = (one / "run-evaluation" / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    for end, kept in (("", lines[4:6]), ("-1", [lines[12]]), ("-2", [lines[0], lines[1][:-9]])):
        (left / f"predictions.jsonl.part{end}").write_bytes(b"".join(kept))

    launch, env = two_processes("ddp")
    script = [str(ROOT / "tests" / "score_and_evaluate.py"), tiny_model, rows, str(two / "loaded")]
    script += [config("score", two), config("evaluate", two)]
    said = run("accelerate", "launch", "--config_file", *launch, *script, **env).stdout
    for line in (
        *(f"{sum(finished)} rows are scored already.", f"Scored {151 - sum(finished)} rows in"),
        *("4 predictions are there already.", "Generated 9 predictions in", "Scored 13 rows (reference)"),
    ):
        assert said.count(line) == 1, line
    for rank, expected in enumerate((result, {})):
        file = two / "loaded" / f"result-{rank}.json"
        assert json.loads(file.read_text()) == json.loads(json.dumps(expected))
        file.unlink()
    expected = contents(one)
    assert contents(two) == expected and "run-evaluation/reference/scores.jsonl" in expected
