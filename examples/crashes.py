# SPDX-License-Identifier: Apache-2.0

"""
Kill the commands again and again with SIGKILL, start them anew, and see whether the end is that of an undisturbed run.

    python examples/crashes.py --kills 20            # some 40 minutes on 2 cores

A tiny model with random weights (two layers of SmolLM2's shape, with its tokenizer) answers the persona questions that come with
the package. Of each command, a first run is left alone. Then the same command is started and killed at a random moment of the first
half of the time in which the first run wrote, with all its processes, and started again, until it comes to its end, and all
over until there were enough kills. Compared are, to the bit: of `train` the adapter and the logged losses, of `score` the scores of each
row, of `evaluate` each prediction and the metrics, of `reproduce` all figures of all tables but the seconds of trainings.
"""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from smollm2 import ensure_smollm2
from trl_perce.utils.files import read_lines, write_json_lines


ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "trl_perce" / "benchmarks" / "data" / "persona_qa"
DDP = ROOT / "recipes" / "accelerate_configs" / "ddp.yaml"
# Of all trainings
TRAINING = {
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "max_length": 512,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "use_cpu": True,
}


@dataclass
class Scenario:
    """
    Attributes:
        argv: Of the command, given its output folder.
        result: What must be the same, read from the folder.
    """

    argv: Callable[[Path], list[str]]
    result: Callable[[Path], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--scenarios", nargs="+", help="by default all")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "crashes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    scenarios = make_scenarios(args.folder)
    names = args.scenarios or list(scenarios)
    if unknown := {*names} - {*scenarios}:
        parser.error(f"there is no scenario {sorted(unknown)[0]!r}; there are {', '.join(scenarios)}")
    rng = random.Random(args.seed)
    print(
        "| command | kills | runs to the end | the same as undisturbed | leftover files |\n|---|---:|---:|---:|---:|"
    )
    for name in names:
        print(
            f"| {name} | "
            + " | ".join(map(str, try_scenario(scenarios[name], args.folder / name, args.kills, rng)))
            + " |",
            flush=True,
        )


def try_scenario(scenario: Scenario, folder: Path, kills: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Kills, runs to the end, those of them that ended as the undisturbed run did, `.part` files that lie around."""
    whole = folder / "whole"
    begin, end = run(scenario, whole)
    expected = scenario.result(whole)
    killed = ended = same = 0
    while killed < kills:
        disturbed = folder / f"disturbed-{ended}"
        # What is begun anew has less to do: later moments would mostly come after its end
        while run(scenario, disturbed, rng.uniform(begin, (begin + end) / 2) if killed < kills else None) is None:
            killed += 1
        ended += 1
        same += scenario.result(disturbed) == expected
    return killed, ended, same, len([*folder.rglob("*.part*")])


def run(scenario: Scenario, folder: Path, moment: float | None = None) -> tuple[float, float] | None:
    """
    Run it; kill it so many seconds after its start. Returns the seconds at which it had its folder, and all, or `None` if it was
    killed.
    """
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "trl_perce", *scenario.argv(folder)],
            **{"cwd": ROOT, "stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True},
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        )
    started, begun = time.monotonic(), None
    while process.poll() is None:
        seconds = time.monotonic() - started
        if begun is None and folder.exists():
            begun = seconds
        if moment is not None and seconds > moment:
            # Workers of `accelerate launch` have sessions of their own
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.send_signal(signal.SIGKILL)
            process.wait()
            return None
        time.sleep(0.01)
    if process.returncode != 0:
        raise SystemExit(f"{log}: the command failed with {process.returncode}")
    seconds = time.monotonic() - started
    return (seconds if begun is None else begun), seconds


def make_scenarios(folder: Path) -> dict[str, Scenario]:
    model = make_model(folder / "model")
    rows = folder / "rows"
    rows.mkdir()
    for split, count in (("train", 96), ("test", 32)):
        lines = (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (rows / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shared = ["--model_name_or_path", model, "--dataset_name", str(rows)]
    small, short = ["--score_batch_tokens", "256"], ["--max_new_tokens", "64"]  # many batches, little to generate

    def train(*options: str) -> Callable[[Path], list[str]]:
        settings = TRAINING | {
            "gradient_accumulation_steps": 2,
            "learning_rate": 1.0e-3,
            "lora_dropout": 0.0,
            "lora_r": 4,
            "lora_target_modules": "all-linear",
            "num_train_epochs": 3,
            "report_to": "none",
            "resume_from_checkpoint": True,
            "save_steps": 3,
            "save_total_limit": 2,
            "use_peft": True,
        }
        path = folder / "train.yaml"
        path.write_text(yaml.safe_dump(settings))
        return lambda out: ["train", "--config", str(path), *shared, "--output_dir", str(out), *options]

    def trained(out: Path) -> Any:
        state = json.loads((out / "trainer_state.json").read_text())
        losses = [log["loss"] for log in state["log_history"] if "loss" in log]
        return losses, {name: value.tolist() for name, value in load_file(out / "adapter_model.safetensors").items()}

    def lines(path: Path) -> list[dict[str, Any]]:
        return sorted(read_lines(path), key=lambda line: line["row"])

    def score(*options: str) -> Callable[[Path], list[str]]:
        return lambda out: ["score", *shared, "--output_dir", str(out), "--use_cpu", "true", *small, *options]

    def scored(out: Path) -> Any:
        return lines(out / "scores.jsonl")

    def evaluate(*options: str) -> Callable[[Path], list[str]]:
        return lambda out: ["evaluate", *shared, "--output_dir", str(out), "--metrics", "rouge", *short, *options]

    def evaluated(out: Path) -> Any:
        return lines(out / "predictions.jsonl"), json.loads((out / "metrics.json").read_text())["metrics"]

    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
    histories = {"benchmark": "histories", "path": str(make_histories(folder / "histories")), "validation_size": 0.1}
    sizes = {"train_rows": 16, "test_rows": 6, "validation_rows": 4, "retrieval": {"method": "recency", "k": 1}}
    grid = {
        "output_dir": "unused",
        "models": {"tiny": {"model_name_or_path": model, **lora}},
        "tasks": {"questions": histories | sizes},
        "methods": ["ce", "perce"],
        "seeds": [0, 1],
        "learning_rates": [1.0e-3],
        "training": TRAINING | {"num_train_epochs": 1, "save_steps": 2},
        "evaluation": {"max_new_tokens": 16, "metrics": ["rouge"]},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return {
        "train": Scenario(train(), trained),
        "train, 2 processes": Scenario(train("--num_processes", "2", "--accelerate_config", str(DDP)), trained),
        "score": Scenario(score(), scored),
        "score, 2 processes": Scenario(score("--num_processes", "2"), scored),
        "evaluate": Scenario(evaluate(), evaluated),
        "evaluate, 2 processes": Scenario(evaluate("--num_processes", "2"), evaluated),
        "reproduce": Scenario(
            lambda out: ["reproduce", "--config", str(folder / "grid.yaml"), "--output_dir", str(out)],
            lambda out: [
                record
                for record in json.loads((out / "records.json").read_text())
                if not record["metric"].endswith("runtime")
            ],
        ),
    }


def make_model(folder: Path) -> str:
    source = ensure_smollm2()
    config = AutoConfig.from_pretrained(source, num_hidden_layers=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def make_histories(folder: Path) -> Path:
    folder.mkdir()
    for split, users in (("train", 30), ("test", 8)):
        rows = [
            {
                "user": f"{split} {user}",
                "history": [f"I sell {thing} number {user}." for thing in ("linen", "bread", "bikes")],
                "query": "What do you sell today?",
                "response": f"Today it is lamps and bread, number {user}.",
            }
            for user in range(users)
        ]
        write_json_lines(folder / f"{split}.jsonl", rows)
    return folder


if __name__ == "__main__":
    main()
