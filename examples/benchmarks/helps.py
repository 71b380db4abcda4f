# SPDX-License-Identifier: Apache-2.0

"""
Does PerCE help, at a size that a CPU cannot reach? CE and PerCE on chats and on PrefEval, several seeds, all held-out rows.

    python examples/benchmarks/helps.py --model .cache/SmolLM2-135M-Instruct --data ../shared/data --processes 6

- `chats` (Synthetic-Persona-Chat): log-likelihood of the held-out replies' tokens, those that are personal to the untrained model
  (PIR > 1) and the others.
- `prefeval` (PrefEval): how often, of four options, the one that respects the stated preference is the likeliest (mean
  log-likelihood a token), and how often it is the one that gains the most from the preference (sum of PIR).

A LoRA adapter (r 16, all linear layers) is trained for one epoch. Each task and seed is a process of its own and writes
<task>-<seed>.json; what is there is not run again. Writes helps.json and helps.md after each. Intervals are 95 %, for new seeds and
new users (`trl_perce.utils.statistics.mean_over_seeds`).
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from trl_perce.utils.files import write_json, write_text


SETTINGS = {
    "chats": {"learning_rate": 1e-3, "per_device_train_batch_size": 16},
    "prefeval": {"learning_rate": 5e-4, "per_device_train_batch_size": 8},
}
METHODS = {"CE": "uniform", "PerCE": "perce"}
NAMES = {
    "personal": "log P of personal tokens, nats",
    "other": "log P of other tokens, nats",
    "likeliest": "aligned option is the likeliest, %",
    "gains_most": "aligned option gains most from the preference, %",
}


def load_rows(task: str, split: str, data: Path, limit: int | None) -> list[dict]:
    """Rows with `persona`, `prompt` and `completion`, and `user` (chats) or `options` and `answer` (prefeval)."""
    from trl_perce.benchmarks import histories
    from trl_perce.history.entries import to_examples
    from trl_perce.history.retrieval import Retriever

    if task == "chats":
        rows = histories.load(split, data / "persona_chat", "chats", num_rows=limit)
        return to_examples(rows, Retriever("recency", 5)(rows))  # all sentences that describe the user
    with open(data / "prefeval" / f"{split}.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file][:limit]
    return [_preference_row(record, record["response"]) | record for record in records]


def _preference_row(record: dict, response: str) -> dict:
    return {
        "persona": record["preference"],
        "prompt": [{"role": "user", "content": "About me: {persona}\n\n" + record["question"]}],
        "completion": [{"role": "assistant", "content": response}],
    }


def values_of(task: str, scorer, rows: list[dict], reference: list | None) -> tuple[dict[str, list[float]], list]:
    """The figures of each held-out row, and the scores that they are made of."""
    from trl_perce.evaluation.likelihood import likelihood_values, token_likelihoods

    if task == "chats":
        scores = scorer.score([{key: row[key] for key in ("persona", "prompt", "completion")} for row in rows])
        found = likelihood_values(token_likelihoods(scores, reference or scores))
        names = [
            name for name in ("personal", "other") if f"log_likelihood/{name}" in found
        ]  # there may be no such token
        return {name: found[f"log_likelihood/{name}"].tolist() for name in names}, scores
    scores = scorer.score([_preference_row(row, option) for row in rows for option in row["options"]])
    likelihood = np.array([one.log_probs.mean() for one in scores]).reshape(len(rows), -1)
    gain = np.array([one.pir.sum() for one in scores]).reshape(len(rows), -1)
    answers = np.array([row["answer"] for row in rows])
    return {
        "likeliest": (100.0 * (likelihood.argmax(1) == answers)).tolist(),
        "gains_most": (100.0 * (gain.argmax(1) == answers)).tolist(),
    }, scores


def run_one(task: str, seed: int, args: argparse.Namespace) -> None:
    """The untrained model, then each method from the same adapter; written after each."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, set_seed

    from measure import be_quiet, environment
    from trl_perce import PerCEConfig, PerCETrainer, PerContrast

    be_quiet()
    on_gpu = torch.cuda.is_available()
    train, test = (load_rows(task, split, args.data, args.rows) for split in ("train", "test"))
    columns = ("persona", "prompt", "completion")
    result = {
        "task": task, "seed": seed, "rows": {"train": len(train), "test": len(test)}, "environment": environment(),
        "users": [row.get("user") or str(index) for index, row in enumerate(test)], "methods": {}, "seconds": {},
    }  # fmt: skip
    device = "cuda" if on_gpu else "cpu"
    given = {"use_cpu": not on_gpu, "disable_tqdm": True}
    scoring = {**given, "bf16": False, "score_batch_tokens": 16384 if on_gpu else 2048}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
    values, reference = values_of(task, PerContrast(model, **scoring), test, None)
    result["methods"]["untrained"] = values
    for method, weighting in METHODS.items():
        started = time.perf_counter()
        set_seed(seed)
        trainer = PerCETrainer(
            args.model,
            PerCEConfig(
                output_dir=str(args.output_dir / f"{task}-{seed}-{method}"),
                token_weighting=weighting,
                num_train_epochs=1,
                lr_scheduler_type="cosine",
                warmup_steps=0.04,
                max_length=1024,
                seed=seed,
                bf16=True,
                gradient_checkpointing=False,
                model_init_kwargs={"dtype": "bfloat16"},
                save_strategy="no",
                report_to="none",
                **given,
                **SETTINGS[task],
            ),
            train_dataset=Dataset.from_list([{key: row[key] for key in columns} for row in train]),
            peft_config=LoraConfig(
                r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        trainer.train()
        result["seconds"][method] = time.perf_counter() - started
        scorer = PerContrast(trainer.model, trainer.processing_class, **scoring)
        result["methods"][method], _ = values_of(task, scorer, test, reference)
        write_json(args.output_dir / f"{task}-{seed}.json", result)


def aggregate(runs: list[dict]) -> tuple[dict, str]:
    """Means over seeds and rows, the differences PerCE − CE with their intervals, and the same as Markdown."""
    from trl_perce.utils.statistics import mean_over_seeds

    lines = [
        "| data | rows to train, to test | seeds | figure | untrained | CE | PerCE | PerCE − CE |",
        "|---|---|---:|---|---:|---:|---:|---|",
    ]
    summary: dict = {}
    for task in SETTINGS:
        own = [run for run in runs if run["task"] == task and {*METHODS} <= run["methods"].keys()]
        for name in own[0]["methods"]["untrained"] if own else ():
            values = {
                method: np.array([run["methods"][method][name] for run in own]) for method in ("untrained", *METHODS)
            }
            found = mean_over_seeds([*(values["PerCE"] - values["CE"])], own[0]["users"])
            summary.setdefault(task, {})[name] = {
                **{method: array.mean(1).tolist() for method, array in values.items()},
                "difference": found["mean"],
                "interval": found["interval"],
            }
            digits = 1 if name in ("likeliest", "gains_most") else 3
            shown = [f"{array.mean():.{digits}f}" for array in values.values()]
            interval = found["interval"]
            ends = f" [{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]" if interval else ""
            rows = own[0]["rows"]
            lines.append(
                f"| {task} | {rows['train']:,}, {rows['test']:,} | {len(own)} | {NAMES[name]} | {' | '.join(shown)} "
                f"| {found['mean']:+.{digits}f}{ends} |"
            )
    return summary, "\n".join([*lines, ""])


def is_done(path: Path) -> bool:
    return path.exists() and {*METHODS} <= json.loads(path.read_text())["methods"].keys()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=".cache/SmolLM2-135M-Instruct", help="Folder or name of an instruct model.")
    add("--data", type=Path, default=Path("../shared/data"), help="Folder with persona_chat and prefeval.")
    add("--tasks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--rows", type=int, help="At most so many rows to train and to test. Default: all.")
    add("--processes", type=int, default=1, help="How many to run at a time. Default: 1.")
    add("--output_dir", type=Path, default=Path("outputs/helps"), help="Default: outputs/helps.")
    add("--one", nargs=2, metavar=("TASK", "SEED"), help="Run one task with one seed in this process.")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.one:
        return run_one(args.one[0], int(args.one[1]), args)

    def start(task: str, seed: int) -> subprocess.CompletedProcess:
        argv = [sys.executable, *sys.argv, "--one", task, str(seed)]
        return subprocess.run(argv, capture_output=True, text=True)

    def report() -> None:
        runs = [json.loads(path.read_text()) for path in sorted(args.output_dir.glob("*-*.json"))]
        summary, table = aggregate(runs)
        write_json(args.output_dir / "helps.json", {"summary": summary, "runs": runs})
        write_text(args.output_dir / "helps.md", table)

    jobs = [(task, seed) for seed in args.seeds for task in args.tasks]
    jobs = [(task, seed) for task, seed in jobs if not is_done(args.output_dir / f"{task}-{seed}.json")]
    failed = []
    with ThreadPoolExecutor(args.processes) as pool:
        for future in as_completed([pool.submit(start, *job) for job in jobs]):
            if future.result().returncode:
                failed.append(future.result().stderr)
            else:
                report()
    print(
        (args.output_dir / "helps.md").read_text() if (args.output_dir / "helps.md").exists() else "Nothing was run."
    )
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
