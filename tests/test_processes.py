"""
Several processes on CPU (gloo), started as a user starts them: with the files of recipes/accelerate_configs. One process on
the same global batches is what each must equal.
"""

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import ROOT
from processes import adapter_of, assert_same_adapter, recipe, run
from reference import make_rows
from rows import write_splits


# `make test` puts DeepSpeed here, aside from the environment, where Accelerate would import it in every test
DEEPSPEED = ROOT / ".cache" / "deepspeed"
# What only the strategy at hand leaves in a checkpoint, so that a test cannot pass with another one
LEFT_BEHIND = {
    "ddp": "optimizer.pt",
    "fsdp2": "pytorch_model_fsdp.bin",
    "deepspeed_zero2": "global_step4/mp_rank_00_model_states.pt",
    "deepspeed_zero3": "global_step4/zero_pp_rank_1_mp_rank_00_model_states.pt",
}


def train(config, folder, *arguments, **env):
    return run("trl-perce", "train", "--config", config, "--output_dir", str(folder), *arguments, timeout=240, **env)


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
    batch = ["--per_device_train_batch_size", "2"]
    return train(config, folder, *batch, *arguments, "--accelerate_config", *launch, **env)


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
    train(config, folder, "--per_device_train_batch_size", "4")
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
    train(config, tmp_path / "one", "--per_device_train_batch_size", "4")
    train_on_two(config, tmp_path / "two")
    assert_same_adapter(adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two"), atol=5e-6)


def test_two_processes_resume_on_one_and_back(tmp_path, make_config):
    # With log-probabilities that are kept for two epochs: the second epoch runs no counterfactual pass, on any process
    config = make_config(counterfactual_refresh_epochs=2, resume_from_checkpoint=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole, "--per_device_train_batch_size", "4")
    steps = ("--save_strategy", "steps", "--save_steps", "1", "--max_steps")
    train_on_two(config, parts, *steps, "1")
    assert len([*(parts / "checkpoint-1").glob("counterfactual_log_probs_*")]) == 2
    result = train(config, parts, "--per_device_train_batch_size", "4", *steps, "2")
    assert "checkpoint-1" in result.stdout
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
