# SPDX-License-Identifier: Apache-2.0

"""
Which tokens of an answer are personal, and who finds them? The identification experiment of the PerCE paper (Appendix A,
Figures 4 and 5) on the 210 annotated answers that come with the package.

    pip install 'trl_perce[demo,judge]'
    python examples/identification.py
    python examples/identification.py --model_name_or_path Qwen/Qwen3-4B \
        --judge_base_url http://localhost:8000/v1 --judge_model Qwen/Qwen3-14B

Writes the tables as `results.json` and the figures as PNG to `outputs/identification`. The judge's finished answers are kept
there too, so that a run that was killed does not ask twice.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import matplotlib
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from trl_perce.benchmarks.persona_qa import (
    AnswerTokens,
    ContentWords,
    accuracy_by_pir,
    answer_of,
    answer_tokens,
    f1_interval,
    in_spans,
    judge_words,
    load_rows,
    match_words,
    precision_recall_curve,
    precision_recall_f1,
)
from trl_perce.evaluation.endpoint import Endpoint
from trl_perce.utils.files import written_whole


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


THRESHOLD = 1.0  # nats, the paper's
THRESHOLDS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
# What the paper says of its own model and data, in %: precision (not known here), recall, F1
PAPER = {"Word matching": "– / 26.5 / 41"}
# Okabe and Ito's palette, which the colour-blind can tell apart
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="scores the tokens (default: SmolLM2-135M-Instruct, from PyPI)")
    parser.add_argument(
        "--split", choices=["all", "train", "test"], default="all", help="210, 159 or 51 rows (default all)"
    )
    parser.add_argument(
        "--counterfactual",
        choices=["drop", "mask", "swap"],
        default="drop",
        help="what PIR compares with (default drop)",
    )
    parser.add_argument("--dtype", default="auto", help="of the model, such as float32 (default: its own)")
    parser.add_argument("--judge_base_url", help="endpoint of the judge, such as http://localhost:8000/v1")
    parser.add_argument("--judge_model", help="name of the judge as its server knows it")
    parser.add_argument("--judge_concurrency", type=int, default=4, help="requests at the same time (default 4)")
    parser.add_argument(
        "--judge_max_tokens", type=int, default=512, help="a judge that thinks needs more (default 512)"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/identification"))
    args = parser.parse_args(arguments)
    if (args.judge_base_url is None) != (args.judge_model is None):
        parser.error("a judge needs both --judge_base_url and --judge_model")
    return args


def summarize(predictions: dict[str, list[np.ndarray]], tokens: list[AnswerTokens]) -> list[dict]:
    """A line of the table of methods for each: shares, and the 95 % interval of F1 over people."""
    actual = np.concatenate([row.is_personal for row in tokens])
    return [
        {
            "method": method,
            **precision_recall_f1(np.concatenate(predicted), actual),
            "f1_interval": f1_interval(predicted, tokens),
        }
        for method, predicted in predictions.items()
    ]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def range_name(part: dict) -> str:
    if part["low"] is None:
        name = f"≤ {part['high']:g}"
    elif part["high"] is None:
        name = f"> {part['low']:g}"
    else:
        name = f"{part['low']:g} … {part['high']:g}"
    return name.replace("-", "−")


def print_tables(console: Console, results: dict) -> None:
    table = Table(title="Finding the personal tokens, in %", box=SIMPLE)
    table.add_column("method", no_wrap=True)
    for heading in ("precision", "recall", "F1", "F1, 95 %", "paper:\nP / R / F1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in results["methods"]:
        shares = (percent(line[name]) for name in ("precision", "recall", "f1"))
        interval = "–".join(percent(end) for end in line["f1_interval"])
        table.add_row(line["method"], *shares, interval, PAPER.get(line["method"], "–"))
    console.print(table)
    console.print(
        f"{results['tokens']} tokens of {results['rows']} answers to {results['people']} people; {percent(results['personal_share'])} % "
        "of the tokens lie in words annotated as personal. The interval of F1 is over people. By word: a word's PIR is the sum over its "
        "tokens. The paper's figures (known for word matching only) are of its own model and data.\n"
    )

    title = f"PerContrast by threshold (average precision {percent(results['average_precision'])} %)"
    table = Table("PIR over", title=title, box=SIMPLE)
    for heading in ("tokens", "precision %", "recall %", "F1 %"):
        table.add_column(heading, justify="right")
    for line in results["thresholds"]:
        shares = (percent(line[name]) for name in ("precision", "recall", "f1"))
        table.add_row(f"{line['threshold']:.2f} nats", str(line["tokens"]), *shares)
    console.print(table)

    title = f"Right decisions of PIR > {THRESHOLD:g}, by range of PIR"
    table = Table("PIR in nats", title=title, box=SIMPLE)
    for heading in ("tokens", "right %"):
        table.add_column(heading, justify="right")
    for part in results["ranges"]:
        table.add_row(range_name(part), str(part["tokens"]), percent(part["right"]))
    console.print(table)


def plot_precision_recall(path: Path, results: dict, curve: tuple[np.ndarray, np.ndarray]) -> None:
    """Figure 4: precision over recall, the curve of PerContrast and a point for each method."""
    precision, recall = curve
    figure, axes = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    label = f"PIR ≥ t, any t (average precision {100 * results['average_precision']:.1f} %)"
    axes.plot(100 * recall, 100 * precision, color=BLUE, linewidth=1.8, label=label)
    styles = zip((BLUE, GREEN, ORANGE, PURPLE), "osD^", strict=True)
    points = [line for line in results["methods"] if line["method"] != "Every token"]
    for line, (colour, marker) in zip(points, styles, strict=False):
        label = f"{line['method']} (F1 {100 * line['f1']:.1f} %)"
        style = {"s": 64, "color": colour, "marker": marker, "edgecolors": "black", "zorder": 3, "clip_on": False}
        axes.scatter(100 * line["recall"], 100 * line["precision"], **style, label=label)
    share = 100 * results["personal_share"]
    axes.axhline(share, color=GREY, linestyle="--", linewidth=1.2, label=f"by chance ({share:.1f} %)")
    axes.set(xlabel="Recall of personal tokens (%)", ylabel="Precision (%)", xlim=(0, 100), ylim=(0, 104))
    axes.set_title(f"Finding personal tokens, {results['tokens']:,} tokens of {results['rows']} answers", fontsize=11)
    axes.grid(alpha=0.3)
    figure.legend(
        fontsize=8.5, loc="outside lower center", ncols=2
    )  # beside the axes: a point may be anywhere in them
    save(figure, path)


def plot_ranges(path: Path, results: dict) -> None:
    """Figure 5: share of right decisions in each range of PIR, with the number of tokens."""
    figure, axes = plt.subplots(figsize=(7.6, 4.4), layout="constrained")
    for position, part in enumerate(results["ranges"]):
        personal = part["low"] is not None and part["low"] >= THRESHOLD
        style = {"color": ORANGE, "hatch": "//"} if personal else {"color": BLUE}
        right = 100 * (part["right"] or 0)
        axes.bar(position, right, width=0.82, edgecolor="white", **style)
        text = f"{right:.0f} %\nn = {part['tokens']}" if part["tokens"] else "n = 0"
        axes.text(position, right + 1.5, text, ha="center", va="bottom", fontsize=8)
    names = [range_name(part) for part in results["ranges"]]
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=9)
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=BLUE),
        plt.Rectangle((0, 0), 1, 1, facecolor=ORANGE, edgecolor="white", hatch="//"),
    ]
    labels = [f"decision: not personal (PIR ≤ {THRESHOLD:g})", f"decision: personal (PIR > {THRESHOLD:g})"]
    axes.legend(handles, labels, fontsize=8.5, loc="upper center", ncols=2)
    axes.set(
        xlabel="PIR of the token (nats; a range holds its upper end)", ylabel="Right decisions (%)", ylim=(0, 126)
    )
    axes.set_yticks(range(0, 101, 20))
    axes.set_title("How often the decision is right, by range of PIR", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def save(figure, path: Path) -> None:
    with written_whole(path) as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict:
    args, started, console = parse_arguments(arguments), time.time(), Console(highlight=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("trl_perce").setLevel(logging.INFO)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = load_rows(("train", "test") if args.split == "all" else (args.split,))
    judgement = None
    if args.judge_model is not None:  # first: what is wrong with its address shows before a model is loaded
        judge = Endpoint(
            args.judge_base_url,
            args.judge_model,
            max_tokens=args.judge_max_tokens,
            concurrency=args.judge_concurrency,
            cache_path=args.output_dir / "judge.answers.jsonl",
        )
        judgement = judge_words(rows, judge)
    model = args.model_name_or_path
    if model is None:
        from smollm2 import ensure_smollm2

        model = ensure_smollm2()

    from trl_perce import PerContrast

    loading = time.time()
    scorer = PerContrast(model, counterfactual=args.counterfactual, model_init_kwargs={"dtype": args.dtype})
    scores = scorer.score(rows)
    scored = time.time() - loading
    tokens = [answer_tokens(row, row_scores) for row, row_scores in zip(rows, scores, strict=True)]
    pir, actual = (np.concatenate([getattr(row, name) for row in tokens]) for name in ("pir", "is_personal"))

    content_words = ContentWords()
    matched = [match_words(row["persona"], answer_of(row), content_words) for row in rows]
    personal_words = [
        [(word.start, word.end) for word in row_scores.words if word.is_personal] for row_scores in scores
    ]
    predictions = {
        "PerContrast": [row.pir > THRESHOLD for row in tokens],
        "PerContrast, by word": [
            in_spans(row.offsets, spans) for row, spans in zip(tokens, personal_words, strict=True)
        ],
        "Word matching": [in_spans(row.offsets, spans) for row, spans in zip(tokens, matched, strict=True)],
    }
    if judgement is not None:
        predictions["LLM judge"] = [
            in_spans(row.offsets, spans) for row, spans in zip(tokens, judgement.spans, strict=True)
        ]
    predictions["Every token"] = [np.ones(len(row.pir), dtype=bool) for row in tokens]

    thresholds, precision, recall, average_precision = precision_recall_curve(pir, actual)
    results = {
        "model": args.model_name_or_path or "SmolLM2-135M-Instruct",
        "rows": len(rows),
        "people": len({row.person for row in tokens}),
        "tokens": len(pir),
        "personal_share": float(actual.mean()),
        "content_words": content_words.method,
        "judge": args.judge_model,
        "judge_words": judgement and judgement.words,
        "judge_words_not_in_the_answer": judgement and judgement.rejected,
        "judge_replies_without_a_list": judgement and judgement.unparseable,
        "methods": summarize(predictions, tokens),
        "average_precision": average_precision,
        "thresholds": [
            {
                "threshold": threshold,
                "tokens": int((pir > threshold).sum()),
                **precision_recall_f1(pir > threshold, actual),
            }
            for threshold in THRESHOLDS
        ],
        "ranges": accuracy_by_pir(pir, actual, threshold=THRESHOLD),
    }
    print_tables(console, results)
    with written_whole(args.output_dir / "results.json") as part:
        part.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    plot_precision_recall(args.output_dir / "precision_recall.png", results, (precision, recall))
    plot_ranges(args.output_dir / "right_by_pir.png", results)
    console.print(f"{args.output_dir}: results.json, precision_recall.png, right_by_pir.png")
    console.print(f"{time.time() - started:.0f} s, {scored:.0f} of them to load and score.")
    return results


if __name__ == "__main__":
    main()
