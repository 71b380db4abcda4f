# SPDX-License-Identifier: Apache-2.0

"""
Does PIR rank models as accuracy does? Of the runs of grids whose rows have options, such as local_preferences.yaml: how often the right
option is the likeliest, against what needs no wrong option to be scored, or no threshold.

    python examples/judge_of_models.py recipes/reproduce/local_preferences.yaml recipes/reproduce/local_gemma.yaml

Prints a line for each model and method, means over seeds, and Spearman's rank correlation with the accuracy over all runs and over those of each
model.
"""

import argparse
import json

import pandas as pd

from trl_perce.cli.reproduce import make_steps
from trl_perce.reproduce.settings import load_settings


ACCURACY = "options/likelihood"
JUDGES = {
    "options/pir": "the right option gains most from the persona",
    "options/pir_margin": "PIR of the right option over the mean option (nats)",
    "pir/personal": "PIR of a personal token of the right option (nats)",
    "log_likelihood/personal": "log P of a personal token of it (nats)",
    "log_likelihood/other": "log P of another token of it (nats)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("configs", nargs="+", metavar="config", help="YAML files of grids")
    args = parser.parse_args()
    try:
        runs = pd.DataFrame([run for config in args.configs for run in read_runs(config)])
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if runs.empty:
        parser.exit(2, "There is no finished evaluation of rows with options in these grids.\n")
    runs = runs.drop_duplicates(["model", "task", "method", "seed"])
    names = [ACCURACY, *(name for name in JUDGES if name in runs)]
    print(
        "| model | method | runs | right option likeliest | " + " | ".join(JUDGES[name] for name in names[1:]) + " |"
    )
    print("|---|---|---:|" + "---:|" * len(names))
    for (model, method), own in runs.groupby(["model", "method"], sort=False):
        print(f"| {model} | {method} | {len(own)} | " + " | ".join(f"{own[name].mean():.3f}" for name in names) + " |")
    print(
        "\n| rank correlation with the first, over | runs | " + " | ".join(JUDGES[name] for name in names[1:]) + " |"
    )
    print("|---|---:|" + "---:|" * (len(names) - 1))
    models = [(model, own) for model, own in runs.groupby("model", sort=False)]
    for name, own in [*models, *([("all", runs)] if len(models) > 1 else [])]:
        ranks = own[names].rank().corr()[ACCURACY]
        print(f"| {name} | {len(own)} | " + " | ".join(f"{ranks[judge]:+.2f}" for judge in names[1:]) + " |")


def read_runs(config: str) -> list[dict]:
    """
    The means of a grid's evaluations of rows with options: of each model as it comes, and of each run on its own task. Tasks that are made of
    another's rows have other questions, and are left out.
    """
    steps = make_steps(load_settings(config))
    evaluations = [({"model": model, "task": task, "method": "untrained", "seed": -1}, parts[0])
                   for (model, task), parts in steps.untrained.items() if steps.settings.tasks[task].of is None]  # fmt: skip
    evaluations += [
        ({"model": cell.model, "task": task, "method": cell.method, "seed": cell.seed}, parts[0])
        for (cell, task), parts in steps.evaluate.items()
        if task == cell.task
    ]
    runs = []
    for run, step in evaluations:
        if step.path.is_file():
            metrics = json.loads(step.path.read_text(encoding="utf-8"))["result"]["metrics"]
            if ACCURACY in metrics:
                runs.append(run | {name: metrics[name]["mean"] for name in (ACCURACY, *JUDGES) if name in metrics})
    return runs


if __name__ == "__main__":
    main()
