# SPDX-License-Identifier: Apache-2.0

"""
Does PerCE help, on the card at hand? A grid of `trl-perce reproduce` that several processes share: the same rows, methods and seeds as on
a CPU.

    python examples/benchmarks/helps.py --model .cache/SmolLM2-135M-Instruct --data ../shared/data --processes 8

Writes helps.json and helps.md (each method against plain CE) whenever steps have ended; at the end the frontier's picture, and each method
against --baselines. Runs come seed after seed, so that a grid that is stopped has whole comparisons. What is in the folder already is not
run again. METEOR is left out where NLTK's data are not there.
"""

import argparse
import dataclasses
import functools
import re
import subprocess
import sys
import time
from pathlib import Path

from trl_perce.cli.common import disable_progress_bars
from trl_perce.cli.reproduce import make_steps
from trl_perce.evaluation.metrics import METEOR_DATA
from trl_perce.evaluation.nltk_data import missing_nltk_data
from trl_perce.reproduce.compare import compare_methods, write_comparisons
from trl_perce.reproduce.frontier import write_frontiers
from trl_perce.reproduce.grid import run_steps
from trl_perce.reproduce.settings import load_settings
from trl_perce.reproduce.steps import Steps
from trl_perce.utils.files import write_json, write_text


_SECONDS = 15.0  # between looks at what has ended


@functools.cache  # else it would ask for NLTK's data at each look
def metrics() -> list[str]:
    return ["rouge"] if missing_nltk_data(METEOR_DATA) else ["rouge", "meteor"]


def read_steps(args: argparse.Namespace) -> Steps:
    """The grid on this machine; what is done has its results."""
    import torch

    settings = load_settings(args.recipe, data_dir=str(args.data), output_dir=str(args.output_dir / "grid"))
    name, model = next(iter(settings.models.items()))
    tasks = settings.tasks
    if args.rows:
        tasks = {
            key: dataclasses.replace(
                task,
                train_rows=min(args.rows, task.train_rows),
                validation_rows=min(args.rows, task.validation_rows),
                test_rows=min(args.rows, task.test_rows),
                evaluation=task.evaluation | {"max_new_tokens": 4},
            )
            for key, task in tasks.items()
        }
    settings = dataclasses.replace(
        settings,
        models={name: model | {"model_name_or_path": str(args.model)}},
        tasks=tasks,
        methods={key: own for key, own in settings.methods.items() if not args.methods or key in args.methods},
        seeds=args.seeds or settings.seeds,
        training=settings.training | {"use_cpu": not torch.cuda.is_available()},
        evaluation=settings.evaluation | {"metrics": metrics()},
    )
    steps = make_steps(settings)
    for step in steps.all():
        step.read()
    return steps


def work(args: argparse.Namespace) -> int:
    """Run what no other process runs."""
    disable_progress_bars()
    steps = read_steps(args)
    failed = run_steps(
        steps.all(), lambda step: print(f"{step.folder}: {step.kind} {step.state}", flush=True), wait=1.0
    )
    for step in failed:
        if step.error is not None:
            print(f"Failed: {step.folder}: {step.kind}: {step.error}", flush=True)
    return int(bool(failed))


def report(args: argparse.Namespace, done: int) -> int:
    """Write the comparisons anew if more than `done` steps are done; returns how many are."""
    steps = read_steps(args)
    states = [step.state for step in steps.all()]
    now = states.count("done")
    if now > done:
        comparisons = compare_methods(steps)
        write_json(args.output_dir / "helps.json", {"steps": [now, len(states)], "comparisons": comparisons})
        text = write_comparisons(comparisons, args.output_dir)[0].read_text(encoding="utf-8")
        text = re.sub("^# .*\n", f"{now} of {len(states)} steps of {args.recipe} are done.\n", text)
        write_text(args.output_dir / "helps.md", text.replace("\n## ", "\n### "))
    return now


def finish(args: argparse.Namespace) -> None:
    """What is asked of the grid once, at its end."""
    steps = read_steps(args)
    write_frontiers(compare_methods(steps), args.output_dir, steps.settings.without_weights)
    for baseline in args.baselines:
        if baseline in steps.settings.methods:
            write_comparisons(compare_methods(steps, baseline), args.output_dir, baseline=baseline)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", default="recipes/reproduce/local_weights.yaml", help="The grid. Default: local_weights.yaml.")
    add("--model", default=".cache/SmolLM2-135M-Instruct", help="Folder or name of an instruct model.")
    add("--data", type=Path, default=Path("../shared/data"), help="Folder with persona_chat and prefeval.")
    add("--methods", nargs="+", help="Some of the grid's. Default: all.")
    add("--seeds", nargs="+", type=int, help="Default: the grid's.")
    add("--baselines", nargs="*", default=["perce", "ce_faster"], help="Beside CE. Default: perce ce_faster.")
    add("--rows", type=int, help="At most so many rows of each kind, and short answers: a rehearsal.")
    add("--processes", type=int, default=1, help="How many share the grid; 0 writes what is there. Default: 1.")
    add("--output_dir", type=Path, default=Path("outputs/helps"), help="Default: outputs/helps.")
    add("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    workers = [subprocess.Popen([sys.executable, *sys.argv, "--work"]) for _ in range(args.processes)]
    done, looked = 0, time.monotonic()
    while any(worker.poll() is None for worker in workers):
        time.sleep(0.2)
        if time.monotonic() - looked > _SECONDS:
            done, looked = report(args, done), time.monotonic()
    report(args, done)
    finish(args)
    print((args.output_dir / "helps.md").read_text(encoding="utf-8"))
    return max((worker.returncode for worker in workers), default=0)


if __name__ == "__main__":
    raise SystemExit(main())
