# SPDX-License-Identifier: Apache-2.0

"""
Where PerCE gains over CE, in a grid that `trl-perce reproduce` has made: by how personal a token is to the untrained model, by the length
of the persona, by the share of personal tokens; and what the weights did in training. Beside the overlap of the answers stands what the
persona itself would get, cut to an answer's length: copying alone.

    python examples/conditions.py recipes/reproduce/local.yaml

Differences are in log P of a test response's token (nats), PerCE less CE, means over tokens and seeds. Intervals are 95 % over users
(bootstrap, all seeds of a user together). Tables in Markdown.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from trl_perce.cli.reproduce import make_steps
from trl_perce.evaluation.likelihood import ratio_values
from trl_perce.evaluation.metrics import text_metrics
from trl_perce.reproduce.settings import load_settings
from trl_perce.reproduce.steps import Steps
from trl_perce.utils.files import read_lines
from trl_perce.utils.statistics import bootstrap_interval


EDGES = [-np.inf, -1.0, -0.2, 0.2, 1.0, 2.0, 4.0, np.inf]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", help="YAML file of the grid")
    parser.add_argument("--methods", nargs="+", default=["perce", "perce_sequence", "lossce", "entce"])
    parser.add_argument("--output_dir", help="folder of the grid, if not the file's")
    args = parser.parse_args()
    steps = make_steps(load_settings(args.config, **({"output_dir": args.output_dir} if args.output_dir else {})))
    for (model, task), (evaluation, *_) in steps.untrained.items():
        untrained = [*read_lines(evaluation.folder / "scores" / "scores.jsonl")]
        users = [line["user"] or line["row"] for line in read_lines(evaluation.folder / "metrics.jsonl")]
        for rate in steps.settings.learning_rates:
            runs = find_runs(steps, model, task, rate)
            for method in args.methods:
                seeds = sorted(runs["ce"].keys() & runs[method].keys())
                if seeds:
                    gains = [gains_of(runs[method][seed], runs["ce"][seed], task) for seed in seeds]
                    report(f"{model}, {task}, learning rate {rate:g}: {method}", untrained, users, gains, seeds)
            weights(task, runs)
            overlap(task, evaluation.folder, runs)


def find_runs(steps: Steps, model: str, task: str, rate: float) -> dict[str, dict[int, Path]]:
    """Folders of finished runs with the first clip range, by method and seed."""
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for cell, step in steps.train.items():
        wanted = (cell.model, cell.task, cell.learning_rate, cell.clip) == (
            model,
            task,
            rate,
            steps.settings.clip_ranges[0],
        )
        if wanted and (step.folder / task / "scores" / "scores.jsonl").is_file():
            found[cell.method][cell.seed] = step.folder
    return found


def gains_of(run: Path, baseline: Path, task: str) -> list[np.ndarray]:
    """Of each test row, the differences of its tokens' log-probabilities."""
    own, theirs = ([*read_lines(one / task / "scores" / "scores.jsonl")] for one in (run, baseline))
    return [np.subtract(a["log_probs"], b["log_probs"]) for a, b in zip(own, theirs, strict=True)]


def report(title: str, untrained: list[dict], users: list, gains: list[list[np.ndarray]], seeds: list[int]) -> None:
    # One array a row, means over seeds: a seed's tokens are those of all others
    rows = [np.mean([seed[row] for seed in gains], axis=0) for row in range(len(untrained))]
    pir = [np.array(line["pir"], float) for line in untrained]
    print(f"\n### {title} − ce, seeds {', '.join(map(str, seeds))}\n")
    print("| PIR of a token to the untrained model | tokens | log P |\n|---|---:|---:|")
    for low, high in zip(EDGES[:-1], EDGES[1:], strict=True):
        chosen = [(own > low) & (own <= high) for own in pir]
        print(f"| {name_of(low, high)} | {sum(map(np.sum, chosen)):,} | {ratio(rows, chosen, users)} |")
    personal = [own > 1 for own in pir]
    lengths = np.array([line["num_persona_tokens"] for line in untrained])
    shares = np.array([own.mean() for own in personal])
    print("\n| personal tokens of rows with | rows | log P |\n|---|---:|---:|")
    for what, values, form in (
        ("a persona of {} tokens", lengths, "{:.0f}"),
        ("{} of their tokens personal", shares, "{:.0%}"),
    ):
        thirds = np.quantile(values, [0, 1 / 3, 2 / 3, 1])
        for low, high in zip(thirds[:-1], thirds[1:], strict=True):
            inside = (values >= low) & ((values <= high) if high == thirds[-1] else (values < high))
            chosen = [own & is_in for own, is_in in zip(personal, inside, strict=True)]
            if not inside.any():
                continue
            bounds = f"{form.format(low)} to {form.format(high)}"
            print(f"| {what.format(bounds)} | {inside.sum()} | {ratio(rows, chosen, users)} |")


def ratio(rows: list[np.ndarray], chosen: list[np.ndarray], users: list) -> str:
    """Mean over the chosen tokens and its interval over users."""
    sums = np.array([row[own].sum() for row, own in zip(rows, chosen, strict=True)])
    counts = np.array([own.sum() for own in chosen])
    if not counts.sum():
        return "–"
    low, high = bootstrap_interval(ratio_values(sums, counts), users)
    return f"{sums.sum() / counts.sum():+.3f} [{low:+.3f}, {high:+.3f}]"


def name_of(low: float, high: float) -> str:
    return f"≤ {high:g}" if np.isinf(low) else f"> {low:g}" if np.isinf(high) else f"{low:g} … {high:g}"


def weights(task: str, runs: dict[str, dict[int, Path]]) -> None:
    """What the weights did in training: means over log lines and seeds."""
    title = f"\n### {task}: weights in training\n\n| method | mean weight | PIR > 1 at the start | at the end |\n|---|---:|---:|---:|\n"
    for method, by_seed in runs.items():
        logs = []
        for run in by_seed.values():
            history = (
                json.loads((run / "trainer_state.json").read_text())["log_history"]
                if (run / "trainer_state.json").is_file()
                else []
            )
            logs.append([log for log in history if "weight/mean" in log and "loss" in log])
        logs = [log for log in logs if log]
        if logs:
            mean = np.mean([line["weight/mean"] for log in logs for line in log])
            has_pir = "pir/personal_fraction" in logs[0][0]
            ends = (
                [np.mean([log[end]["pir/personal_fraction"] for log in logs]) for end in (0, -1)] if has_pir else None
            )
            shares = f"{ends[0]:.1%} | {ends[1]:.1%}" if ends else "– | –"
            print(f"{title}| {method} | {mean:.2f} | {shares} |")
            title = ""


def overlap(task: str, untrained: Path, runs: dict[str, dict[int, Path]]) -> None:
    """ROUGE-L and METEOR of the answers, and of the persona in the prompt, cut to as many words as CE's answers have."""
    answers = {"untrained": answers_of(untrained)}
    for method, by_seed in runs.items():
        answers[method] = [line for run in by_seed.values() for line in answers_of(run / task)]
    if not answers["untrained"] or not answers.get("ce"):
        return
    length = round(np.mean([len(line["prediction"].split()) for line in answers["ce"]]))
    for name, folder in (("the persona", untrained), ("another user's persona", untrained / "swapped")):
        answers[f"{name}, its first {length} words"] = [
            line | {"prediction": " ".join(line["persona"].split()[:length])} for line in answers_of(folder)
        ]
    print(f"\n### {task}: overlap with the reference\n\n| answer | ROUGE-L | METEOR |\n|---|---:|---:|")
    for name, lines in answers.items():
        if lines:
            texts = ([line[key] for line in lines] for key in ("prediction", "reference"))
            scores = text_metrics(*texts, num_proc=1)
            print(f"| {name} | {scores['rougeL'].mean():.3f} | {scores['meteor'].mean():.3f} |")


def answers_of(folder: Path) -> list[dict]:
    path = folder / "predictions.jsonl"
    return [*read_lines(path)] if path.is_file() else []


if __name__ == "__main__":
    main()
