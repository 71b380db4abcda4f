# SPDX-License-Identifier: Apache-2.0

"""What an evaluation found, for people: a table in the terminal and `report.md`."""

from pathlib import Path
from typing import Any

from ..utils.files import write_text
from ..utils.markdown import code, escape, table


# Predictions that the report shows, and characters of each text
_EXAMPLES = 3
_LONG = 400
NOTES = {
    "rouge1": "F-measure of words shared with the reference",
    "rouge2": "F-measure of pairs of words shared with the reference",
    "rougeL": "F-measure of the longest common subsequence",
    "meteor": "METEOR, with synonyms from WordNet",
    "bleu": "sentence BLEU, 0 to 100",
    "uptake/own": "content words of the row's persona in the prediction",
    "uptake/other": "content words of another user's persona",
    "num_tokens": "generated tokens",
    "finished": "share that ended before the limit",
    "log_likelihood/personal": "nats a personal token of the reference",
    "log_likelihood/other": "nats any other token of the reference",
    "log_likelihood/personal_swapped": "personal tokens, with another user's persona",
    "log_likelihood/other_swapped": "other tokens, with another user's persona",
    "pir/personal": "nats the persona adds to a personal token",
    "pir/other": "nats the persona adds to any other token",
    "personal_fraction": "share of personal tokens",
    "own_personal_fraction": "share that this model finds personal",
    "options/likelihood": "share of rows whose right option is the likeliest",
    "options/pir": "share whose right option gains the most from the persona",
    "options/pir_margin": "nats the right option gains over the mean option",
}


def print_result(result: dict[str, Any], console) -> None:
    """
    Print an evaluation's table.

    Args:
        result (`dict[str, Any]`): From [`~evaluate.evaluate`].
        console ([`~rich.console.Console`]): Where to.
    """
    head, lines = _cells(result)
    shown = [*range(4), len(head) - 1]  # a baseline's columns come by themselves: all do not fit side by side
    _print_table([[line[index] for index in shown] for line in (head, *lines)], console)
    compared = [[line[0], *line[4:-1]] for line in lines if any(line[4:-1])]
    if compared:
        console.print()
        _print_table([[*line, ""] for line in ([head[0], *head[4:-1]], *compared)], console)
    for text in _remarks(result):
        console.print(text, markup=False)


def _print_table(lines: list[list[str]], console) -> None:
    """Lines of which the first is the head. The last column, of words, is broken where it does not fit."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    last = len(lines[0]) - 1
    for index, name in enumerate(lines[0]):
        shown.add_column(name, justify="right" if 0 < index < last else "left", no_wrap=index < last)
    for line in lines[1:]:
        shown.add_row(*line)
    console.print(shown)


def write_report(result: dict[str, Any], predictions: list[dict[str, Any]], path: str | Path) -> None:
    """
    Write `report.md`: the table, how it was made, and some predictions.

    Args:
        result (`dict[str, Any]`): From [`~evaluate.evaluate`].
        predictions (`list[dict[str, Any]]`): Lines of `predictions.jsonl`.
        path (`str` or `Path`): Where to.
    """
    head, lines = _cells(result)
    parts = [
        "# Evaluation",
        table(head, [[code(line[0]), *line[1:]] for line in lines]),
        *map(escape, _remarks(result)),
    ]
    settings = [[code(name), code(value)] for name, value in result["settings"].items()]
    parts += ["## Settings", table(("", "value"), settings), "## Predictions"]
    for line in predictions[:_EXAMPLES]:
        parts.append(f"Row {line['row']}:")
        names = ("persona", "query", "prediction", "reference")
        parts.append("\n".join(f"- {name}: {escape(_shortened(line[name]))}" for name in names))
    write_text(path, "\n\n".join(parts) + "\n")


def _cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table's head and lines, as text."""
    tests = (result["baseline"] or {}).get("tests")
    head = ["metric", "mean", "95 % interval", "rows"]
    if tests is not None:
        head += ["baseline", "difference", "95 % interval", "p"]
    lines = []
    for name, entry in result["metrics"].items():
        line = [name, number_text(entry["mean"]), interval_text(entry["interval"]), str(entry["rows"])]
        if tests is not None:
            test = tests.get(name)
            line += ["", "", "", ""] if test is None else _test_cells(entry["mean"], test)
        lines.append([*line, NOTES.get(name.removeprefix("swapped/"), "")])
    return [*head, ""], lines


def _test_cells(mean: float, test: dict[str, Any]) -> list[str]:
    difference = test["difference"]
    return [
        number_text(mean - difference),
        f"{difference:+.3f}",
        interval_text(test["interval"]),
        f"{test['p_value']:.3f}",
    ]


def _remarks(result: dict[str, Any]) -> list[str]:
    rows, predicted, trimmed = result["rows"], result["predicted"], result["trimmed"]
    remarks = []
    if predicted < rows:
        remarks.append(
            f"{rows - predicted} of {rows} rows have no prediction: their prompts are too long for `max_length`."
        )
    if result["unanswered"]:
        remarks.append(
            f"{result['unanswered']} of {predicted} predictions are empty: the model thought until `max_new_tokens` was used up, or ended "
            "without an answer. They are counted as they are. Raise `max_new_tokens`, or switch thinking off."
        )
    if trimmed["rows"]:
        remarks.append(
            f"The personas of {trimmed['rows']} of {rows} prompts were trimmed to fit into `max_length` with "
            f"`max_new_tokens`, by {trimmed['tokens']} tokens in all."
        )
    if result["personal_by"] is not None:
        remarks.append(
            f"Which tokens of the references are personal, was decided by: {result['personal_by']}. To compare models, let the "
            "same one decide for all (`reference_scores`)."
        )
    if any(name.startswith("swapped/") for name in result["metrics"]):
        remarks.append(
            "swapped/…: predictions with another user's persona in the prompt, which uptake/other counts then."
        )
    if result["judge"] is not None:
        unparsable = sum(criterion["unparsable"] for criterion in result["judge"]["criteria"].values())
        remarks.append(
            f"judge/…: ratings from 1 to 5 by {result['judge']['model']}; {unparsable} replies could not be read."
            + (f" {cut} were cut off: raise `judge_max_tokens`." if (cut := result["judge"]["cut"]) else "")
        )
    if result["baseline"] is not None:
        remarks.append(
            f"Baseline: {result['baseline']['folder']}. Differences are to it, row by row; p by sign flips of users (or rows)."
        )
    return remarks


def number_text(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def interval_text(interval: list[float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONG else text[:_LONG] + "…"
