# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Where PerCE gains over CE, in a grid that `trl-perce reproduce` has made: by how personal a token is to the untrained model, by the length
of the persona, by the share of personal tokens; and what the weights did in training.

    python examples/conditions.py outputs/reproduce/local

Differences are in log P of a test response's token (nats), PerCE less CE, means over tokens and seeds. Intervals are 95 % over users
(percentile bootstrap, all seeds of a user together). Tables in Markdown.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from trl_perce.files import read_lines


EDGES = [-np.inf, -1.0, -0.2, 0.2, 1.0, 2.0, 4.0, np.inf]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="`output_dir` of the grid")
    parser.add_argument("--methods", nargs="+", default=["perce", "perce_sequence", "lossce", "entce"])
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    for model in sorted((args.folder / "runs").iterdir()):
        for task in sorted(model.iterdir()):
            folder = args.folder / "untrained" / model.name / task.name
            untrained = [*read_lines(folder / "scores" / "scores.jsonl")]
            users = [line["user"] or line["row"] for line in read_lines(folder / "metrics.jsonl")]
            runs = find_runs(task, args.learning_rate)
            for method in args.methods:
                seeds = sorted(runs["ce"].keys() & runs[method].keys())
                if seeds:
                    gains = [gains_of(runs[method][seed], runs["ce"][seed], task.name) for seed in seeds]
                    report(f"{model.name}, {task.name}: {method}", untrained, users, gains, seeds)
            weights(task.name, runs)


def find_runs(folder: Path, learning_rate: float) -> dict[str, dict[int, Path]]:
    """Folders of finished runs at a learning rate and the default clip range, by method and seed."""
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for run in folder.iterdir():
        match = re.fullmatch(r"(\w+)-lr([\d.e-]+)-clip0\.8-5-seed(\d+)", run.name)
        if match and float(match[2]) == learning_rate and (run / folder.name / "scores" / "scores.jsonl").is_file():
            found[match[1]][int(match[3])] = run
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


def ratio(rows: list[np.ndarray], chosen: list[np.ndarray], users: list, samples: int = 4000) -> str:
    """Mean over the chosen tokens and its interval over users."""
    index = {user: number for number, user in enumerate(dict.fromkeys(users))}
    sums, counts = np.zeros(len(index)), np.zeros(len(index))
    for row, own, user in zip(rows, chosen, users, strict=True):
        sums[index[user]] += row[own].sum()
        counts[index[user]] += own.sum()
    if not counts.sum():
        return "–"
    draws = np.random.default_rng(0).multinomial(len(index), np.full(len(index), 1 / len(index)), samples)
    with np.errstate(invalid="ignore"):
        means = (draws @ sums) / (draws @ counts)
    low, high = np.nanquantile(means, [0.025, 0.975])
    return f"{sums.sum() / counts.sum():+.3f} [{low:+.3f}, {high:+.3f}]"


def name_of(low: float, high: float) -> str:
    return f"≤ {high:g}" if np.isinf(low) else f"> {low:g}" if np.isinf(high) else f"{low:g} … {high:g}"


def weights(task: str, runs: dict[str, dict[int, Path]]) -> None:
    """What the weights did in training: means over log lines and seeds."""
    print(
        f"\n### {task}: weights in training\n\n| method | mean weight | PIR > 1 at the start | at the end |\n|---|---:|---:|---:|"
    )
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
            print(f"| {method} | {mean:.2f} | {shares} |")


if __name__ == "__main__":
    main()
