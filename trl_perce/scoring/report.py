# SPDX-License-Identifier: Apache-2.0

"""
The report on scored data: is it worth PerCE, what will the weights be, which rows to look at.

All means and shares of PIR are over the tokens that have one.
"""

import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.files import write_text
from ..utils.markdown import code, table
from ..utils.statistics import ratio_interval
from .scores import TokenScores


MIN_EXCESS = 0.02
"""
Personal tokens beyond chance, as a share of all tokens, that make PerCE worth its pass. Beyond chance: tokens with a PIR over
the threshold, less those with one under its negative. A persona that says nothing moves log-probabilities both ways, about
equally often, so the second share is what chance puts into the first. At 2 % and the paper's bounds such tokens have 11 % of
the loss's weight at the very most (0.02 · 5 against 0.98 · 0.8); below it PerCE is close to CE with a learning rate of 0.8
times. Where to draw the line is a judgement of this package and not of the paper.
"""

MIN_PERSONAS = 10
"""
Personas below which nothing is said. The interval comes from the spread over personas (rows with the same one are no
independent draws), and the spread over fewer is a guess itself.
"""

MIN_WORD_COUNT = 3
"""Occurrences that a word needs in the list by mean PIR: the mean of one or two is the chance of one or two rows."""

_QUANTILES = (1, 5, 25, 50, 75, 95, 99)
_ROW_QUANTILES = (0, 5, 25, 50, 75, 95, 100)
_EDGES = (-5.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 5.0)
_MOST_WORDS, _MOST_WORDS_SHOWN, _MOST_ROWS_SHOWN = 100, 15, 30
# Work of a training step in forward passes. A backward pass through all weights is two: gradients of the activations and
# of the weights; frozen weights need the first alone. Activation checkpointing runs each forward twice.
_STEP_FORWARDS = {"full": 3, "full_checkpointing": 4, "lora": 2, "lora_checkpointing": 3}


def make_report(scores: Iterable[TokenScores], settings: dict[str, Any]) -> dict[str, Any]:
    """
    Sum up scored rows, in one pass. Holds 4 bytes a token, some 30 a row and what the words and personas need.

    Args:
        scores (`Iterable[TokenScores]`): Scores of all rows, also of those that are skipped or have no persona.
        settings (`dict[str, Any]`): How they were made: `"model"`, `"adapter"` (`None` if there is none), `"dataset"`,
            `"counterfactual"`, `"weight_clip_min"` and `"weight_clip_max"`.

    Returns:
        `dict[str, Any]`: Plain values for JSON; what cannot be computed is `None`. PIR in nats, shares from 0 to 1.

        - `"verdict"`: `"answer"` (`"yes"`, `"hardly"`, `"unclear"` or `"cannot say"`) and `"text"`, the reasons in words.
        - `"settings"`: As given.
        - `"rows"`: `"total"`, `"scored"`, `"skipped"` (reason → rows), `"with_pir"`, `"without_persona"` (scored, and no
          token has a PIR), `"without_personal_token"` and `"negative_mean_pir"` (their indices, of rows with PIR).
        - `"tokens"`: `"total"` and `"with_pir"`, of the scored rows' responses.
        - `"pir"`: `"mean"`, `"quantiles"` (percent → PIR) and `"histogram"` (`"over"` < PIR ≤ `"up_to"`).
        - `"personal"`: `"threshold"`, `"tokens"`, `"share"`, `"mirror_share"` (PIR under minus the threshold), `"excess"`
          (the difference), `"share_interval"` and `"excess_interval"` (95 %, over personas, if there are
          [`MIN_PERSONAS`]), `"personas"`, `"row_share"` (`"mean"` and `"quantiles"` over rows).
        - `"weights"`: `"mean"`, `"at_min"`, `"at_max"` (shares) and `"of_personal"` (the personal tokens' share of all
          weight), over all tokens, those without a PIR included, as the trainer logs them.
        - `"words"`: `"number"` (different ones), `"by_mean"` and `"by_sum"`: the words with a mean PIR over the threshold, each
          with `"word"` (case-folded), `"mean"`, `"sum"`, `"count"` and `"rows"`, 100 at most.
        - `"persona_tokens"`: `"mean"` and `"quantiles"` over rows with PIR.
        - `"cost"`: `"tokens"`, `"counterfactual_tokens"`, `"forward_ratio"` (the second over the first) and
          `"step_ratio"`: extra work in relation to a training step, by the kind of training.
    """
    rows: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    pir, row_shares, persona_tokens = array("f"), array("d"), array("q")
    no_personal, negative = [], []
    personas: dict[int, np.ndarray] = {}
    words: dict[str, list] = {}
    sums: Counter[str] = Counter()
    weight = personal_weight = 0.0
    threshold = None
    clip_min, clip_max = np.float32(settings["weight_clip_min"]), np.float32(settings["weight_clip_max"])

    for row in scores:
        rows["total"] += 1
        threshold = row.threshold if threshold is None else threshold
        if row.skipped is not None:
            skipped[row.skipped] += 1
            continue
        has_pir = np.isfinite(row.pir)
        is_personal = row.is_personal & has_pir
        sums["tokens"] += len(row.pir)
        weight += float(row.weights.sum(dtype=np.float64))
        personal_weight += float(row.weights[is_personal].sum(dtype=np.float64))
        sums["at_min"] += int((row.weights <= clip_min).sum())
        sums["at_max"] += int((row.weights >= clip_max).sum())
        sums["factual"] += row.num_tokens
        sums["counterfactual"] += row.num_counterfactual_tokens
        if not has_pir.any():
            rows["without_persona"] += 1
            continue
        row_pir = row.pir[has_pir]
        pir.frombytes(row_pir.astype(np.float32).tobytes())
        counts = np.array([len(row_pir), is_personal.sum(), (row_pir < -row.threshold).sum()], dtype=np.float64)
        personas[hash(row.persona)] = personas.get(hash(row.persona), 0) + counts
        row_shares.append(counts[1] / counts[0])
        persona_tokens.append(row.num_persona_tokens)
        if not counts[1]:
            no_personal.append(row.row)
        if row_pir.mean(dtype=np.float64) < 0:
            negative.append(row.row)
        _count_words(words, row)

    pir = np.frombuffer(pir, dtype=np.float32) if pir else np.empty(0, dtype=np.float32)
    report = {
        "verdict": {},
        "settings": dict(settings),
        "rows": {
            "total": rows["total"],
            "scored": rows["total"] - sum(skipped.values()),
            "skipped": dict(skipped.most_common()),
            "with_pir": len(row_shares),
            "without_persona": rows["without_persona"],
            "without_personal_token": no_personal,
            "negative_mean_pir": negative,
        },
        "tokens": {"total": sums["tokens"], "with_pir": len(pir)},
        "pir": {"mean": _mean(pir), "quantiles": _quantiles(pir, _QUANTILES), "histogram": _histogram(pir)},
        "personal": {
            "threshold": threshold,
            **_personal(np.array(list(personas.values())).reshape(-1, 3)),
            "row_share": {"mean": _mean(row_shares), "quantiles": _quantiles(row_shares, _ROW_QUANTILES)},
        },
        "weights": {
            "mean": _ratio(weight, sums["tokens"]),
            "at_min": _ratio(sums["at_min"], sums["tokens"]),
            "at_max": _ratio(sums["at_max"], sums["tokens"]),
            "of_personal": _ratio(personal_weight, weight),
        },
        "words": _most_personal(words, threshold),
        "persona_tokens": {"mean": _mean(persona_tokens), "quantiles": _quantiles(persona_tokens, _ROW_QUANTILES)},
        "cost": _cost(sums["factual"], sums["counterfactual"]),
    }
    report["verdict"] = _verdict(report)
    return report


def write_report(report: dict[str, Any], folder: str | Path) -> None:
    """
    Write `report.md`, to read, and `report.json`, with all of it.

    Args:
        report (`dict[str, Any]`): From [`make_report`].
        folder (`str` or `Path`): Where to; made if there is none.
    """
    for name, text in (
        ("report.json", json.dumps(report, ensure_ascii=True, allow_nan=False, indent=2) + "\n"),
        ("report.md", _markdown(report)),
    ):
        write_text(Path(folder) / name, text)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values) -> float | None:
    return float(np.mean(values, dtype=np.float64)) if len(values) else None


def _quantiles(values, percents: tuple[int, ...]) -> dict[str, float | None]:
    found = np.percentile(values, percents) if len(values) else [None] * len(percents)
    return {str(q): None if value is None else float(value) for q, value in zip(percents, found, strict=True)}


def _histogram(pir: np.ndarray) -> list[dict[str, Any]]:
    # A value on an edge is in the bin below it, as a personal token is one *over* the threshold
    bins = np.searchsorted(np.array(_EDGES, dtype=np.float32), pir, side="left")
    counts = np.bincount(bins, minlength=len(_EDGES) + 1).tolist()
    return [
        {"over": low, "up_to": high, "tokens": count, "share": _ratio(count, len(pir))}
        for low, high, count in zip((None, *_EDGES), (*_EDGES, None), counts, strict=True)
    ]


def _personal(counts: np.ndarray) -> dict[str, Any]:
    """Shares of all tokens from `[tokens, personal, mirror]` of each persona, `np.float64` of shape `(P, 3)`."""
    tokens, personal, mirror = counts.sum(0).tolist()
    return {
        "tokens": int(personal),
        "share": _ratio(personal, tokens),
        "mirror_share": _ratio(mirror, tokens),
        "excess": _ratio(personal - mirror, tokens),
        "share_interval": _interval(counts[:, 1], counts[:, 0]),
        "excess_interval": _interval(counts[:, 1] - counts[:, 2], counts[:, 0]),
        "personas": len(counts),
    }


def _interval(parts: np.ndarray, wholes: np.ndarray) -> list[float] | None:
    """[`ratio_interval`] over personas. `None` for fewer than [`MIN_PERSONAS`]."""
    return None if len(parts) < MIN_PERSONAS else ratio_interval(parts, wholes)


def _count_words(words: dict[str, list], row: TokenScores) -> None:
    """Add a row to word → `[sum of PIR, occurrences, rows, last row]`."""
    for word in row.words:
        if not math.isfinite(word.pir):
            continue
        entry = words.setdefault(word.text.casefold(), [0.0, 0, 0, None])
        entry[0] += word.pir
        entry[1] += 1
        entry[2] += entry[3] != row.row
        entry[3] = row.row


def _most_personal(words: dict[str, list], threshold: float | None) -> dict[str, Any]:
    personal = [
        {"word": word, "mean": total / count, "sum": total, "count": count, "rows": rows}
        for word, (total, count, rows, _) in words.items()
        if threshold is not None and total / count > threshold
    ]
    often = [entry for entry in personal if entry["count"] >= MIN_WORD_COUNT]
    # Function words (the, and) have a mean near 0: this leaves them out in every language
    return {
        "number": len(words),
        "by_mean": sorted(often, key=lambda entry: (-entry["mean"], entry["word"]))[:_MOST_WORDS],
        "by_sum": sorted(personal, key=lambda entry: (-entry["sum"], entry["word"]))[:_MOST_WORDS],
    }


def _cost(tokens: int, counterfactual_tokens: int) -> dict[str, Any]:
    ratio = _ratio(counterfactual_tokens, tokens)
    return {
        "tokens": tokens,
        "counterfactual_tokens": counterfactual_tokens,
        "forward_ratio": ratio,
        "step_ratio": {kind: None if ratio is None else ratio / forwards for kind, forwards in _STEP_FORWARDS.items()},
    }


def _verdict(report: dict[str, Any]) -> dict[str, str]:
    rows, personal, tokens = report["rows"], report["personal"], report["tokens"]
    if not rows["total"]:
        return {"answer": "cannot say", "text": "There are no rows."}
    if not rows["scored"]:
        return {"answer": "cannot say", "text": f"All {rows['total']:,} rows are skipped."}
    if not rows["with_pir"]:
        text = f"None of the {rows['scored']:,} scored rows has a persona, without which PerCE is plain SFT."
        return {"answer": "hardly", "text": text}

    interval = personal["excess_interval"]
    number = personal["personas"]
    threshold = personal["threshold"]
    text = (
        f"The persona makes {_percent(personal['share'])} of the {tokens['with_pir']:,} tokens clearly more likely (PIR > "
        f"{threshold:g}, the personal tokens) and {_percent(personal['mirror_share'])} clearly less likely (PIR < "
        f"−{threshold:g}). Chance does not explain the difference, {_percent(personal['excess'])}{_between(interval)}; "
        f"PerCE is worth a try if it is at least {_percent(MIN_EXCESS)}. In the PerCE loss the personal tokens would have "
        f"{_percent(report['weights']['of_personal'])} of the weight, in plain SFT they have "
        f"{_percent(_ratio(personal['tokens'], tokens['total']))}. Mean PIR is {_nats(report['pir']['mean'])} nats."
    )
    if number < MIN_PERSONAS:
        reason = f"{number} {'persona is' if number == 1 else 'personas are'} too few to tell; score {MIN_PERSONAS} or more."
        return {"answer": "cannot say", "text": f"{reason} {text}"}
    if interval[0] >= MIN_EXCESS:
        return {"answer": "yes", "text": text}
    if interval[1] < MIN_EXCESS:
        return {"answer": "hardly", "text": text}
    return {
        "answer": "unclear",
        "text": f"{text} The interval includes {_percent(MIN_EXCESS)}: score more rows.",
    }


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share * 100:.1f} %"


def _nats(value: float | None) -> str:
    if value is None:
        return "–"
    return (f"{value:+.3f}" if abs(value) < 1e6 else f"{value:+.3g}").replace("-", "−")


def _between(interval: list[float] | None) -> str:
    return "" if interval is None else f" (95 % interval {interval[0] * 100:.1f} to {interval[1] * 100:.1f} %)"


def _markdown(report: dict[str, Any]) -> str:
    verdict, rows, personal = report["verdict"], report["rows"], report["personal"]
    answer = {"yes": "Yes", "hardly": "Hardly", "unclear": "Unclear", "cannot say": "Cannot say yet"}[
        verdict["answer"]
    ]
    adapter = report["settings"]["adapter"]
    made_with = {
        "model": report["settings"]["model"],
        **({} if adapter is None else {"adapter": adapter}),
        "dataset": report["settings"]["dataset"],
        **{name: report["settings"][name] for name in ("counterfactual", "precision") if name in report["settings"]},
    }
    sections = [
        f"**Is this data worth PerCE? {answer}.** {verdict['text']}",
        "PIR is what this model makes of the persona: a small or an untrained one makes less of it than a better one, so the data "
        f"may hold more than is seen here. Intervals are over the {personal['personas']:,} personas with PIR, since rows with the "
        "same one are no independent draws.",
        "# PerContrast report",
        ", ".join(f"{name} {code(value)}" for name, value in made_with.items()) + ". PIR in nats. Means and shares are over "
        "the tokens that have a PIR, unless said.",
        "## Rows",
        table(
            ["rows", "number"],
            [
                ["total", rows["total"]],
                *([f"skipped: {code(reason)}", number] for reason, number in rows["skipped"].items()),
                ["scored", rows["scored"]],
                ["… without a persona (weight 1, no PIR)", rows["without_persona"]],
                ["… with PIR", rows["with_pir"]],
                ["…… without a personal token", len(rows["without_personal_token"])],
                ["…… with a mean PIR below 0", len(rows["negative_mean_pir"])],
            ],
        ),
        f"Response tokens of the scored rows: {report['tokens']['total']:,}, of which {report['tokens']['with_pir']:,} have a "
        "PIR.",
        "## PIR",
        f"Mean {_nats(report['pir']['mean'])} nats.",
        _quantile_table(report["pir"]["quantiles"], _nats),
        _bars(report["pir"]["histogram"]),
        "## Personal tokens",
        f"{personal['tokens']:,} tokens, {_percent(personal['share'])}{_between(personal['share_interval'])}. Of a row's "
        f"tokens, in the mean over rows, {_percent(personal['row_share']['mean'])}; over rows:",
        _quantile_table(personal["row_share"]["quantiles"], _percent),
        "## Weights",
        *_weights_text(report),
        "## Most personal words",
        *_words_text(report["words"]),
        "## Rows to look at",
        _row_list("No personal token: PerCE gives them little but the smallest weight. Candidates to drop.", rows["without_personal_token"]),
        _row_list(
            "Mean PIR below 0: the response is less likely with the persona than without it. A wrong persona, an answer that "
            "ignores it, or, in a short response, chance.",
            rows["negative_mean_pir"],
        ),
        "## Personas",
        f"Tokens of a row's persona, over rows with PIR: mean {_number(report['persona_tokens']['mean'])}.",
        _quantile_table(report["persona_tokens"]["quantiles"], _number),
        "## Cost of PerCE",
        *_cost_text(report["cost"]),
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def _weights_text(report: dict[str, Any]) -> list[str]:
    weights, settings = report["weights"], report["settings"]
    return [
        f"Clipped to [{settings['weight_clip_min']:g}, {settings['weight_clip_max']:g}], over all tokens, as the trainer logs "
        "them:",
        table(
            ["mean", "at the lower bound", "at the upper bound", "of personal tokens"],
            [
                [
                    "–" if weights["mean"] is None else f"{weights['mean']:.3f}",
                    *(_percent(weights[name]) for name in ("at_min", "at_max", "of_personal")),
                ]
            ],
        ),
    ]


def _words_text(words: dict[str, Any]) -> list[str]:
    parts = [
        f"Of {words['number']:,} different words, those whose mean PIR is that of a personal token, which function words (*the*, "
        "*and*) do not reach. PIR of a word: the sum over its tokens."
    ]
    for title, entries in (
        (f"By mean PIR, if they occur {MIN_WORD_COUNT} times or more:", words["by_mean"]),
        ("By summed PIR:", words["by_sum"]),
    ):
        lines = [
            [code(entry["word"]), _nats(entry["mean"]), _nats(entry["sum"]), entry["count"], entry["rows"]]
            for entry in entries[:_MOST_WORDS_SHOWN]
        ]
        parts += [title, table(["word", "mean PIR", "summed", "times", "rows"], lines) if lines else "None."]
    return parts


def _cost_text(cost: dict[str, Any]) -> list[str]:
    kinds = {
        "full": "full fine-tuning",
        "full_checkpointing": "full fine-tuning, activation checkpointing",
        "lora": "LoRA",
        "lora_checkpointing": "LoRA, activation checkpointing",
    }
    lines = [[kinds[kind], _STEP_FORWARDS[kind], _percent(ratio)] for kind, ratio in cost["step_ratio"].items()]
    return [
        f"The counterfactual pass runs over {cost['counterfactual_tokens']:,} tokens, the factual pass over "
        f"{cost['tokens']:,}: {_percent(cost['forward_ratio'])} of a forward pass on top. In relation to a training step:",
        table(["training", "forwards of a step", "extra work"], lines),
        "Assumed: work grows with the tokens; a backward pass is two forwards (full fine-tuning) or one (frozen base weights); "
        "activation checkpointing adds one. Not counted: the part of attention that grows with the square of the length, "
        "which makes the factual pass dearer than said here, and padding.",
    ]


def _quantile_table(quantiles: dict[str, float | None], form) -> str:
    names = {"0": "smallest", "50": "median", "100": "largest"}
    head = ["quantile", *(names.get(percent, f"{percent} %") for percent in quantiles)]
    return table(head, [["", *(form(value) for value in quantiles.values())]])


def _bars(histogram: list[dict[str, Any]]) -> str:
    highest = max((entry["tokens"] for entry in histogram), default=0)
    lines = []
    for entry in histogram:
        low, high = entry["over"], entry["up_to"]
        name = f"≤ {high:g}" if low is None else f"> {low:g}" if high is None else f"{low:g} to {high:g}"
        bar = "█" * max(round(30 * entry["tokens"] / highest), 1) if entry["tokens"] else ""
        lines.append([name.replace("-", "−"), entry["tokens"], _percent(entry["share"]), bar])
    head, rule = "| PIR (over … up to) | tokens | share | |", "|---|---:|---:|:---|"
    return "\n".join([head, rule, *(f"| {name} | {count:,} | {share} | {bar} |" for name, count, share, bar in lines)])


def _row_list(title: str, indices: list[int]) -> str:
    if not indices:
        return f"{title} **None.**"
    shown = ", ".join(str(index) for index in indices[:_MOST_ROWS_SHOWN])
    rest = len(indices) - _MOST_ROWS_SHOWN
    more = f" and {rest:,} more (`report.json` has all)" if rest > 0 else ""
    return f"{title} **{len(indices):,} rows**: {shown}{more}."


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
