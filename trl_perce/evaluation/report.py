# SPDX-License-Identifier: Apache-2.0

"""What an evaluation found, for people: its outcome in the terminal, and all of it in `report.md`."""

from pathlib import Path
from typing import Any

from ..utils.files import write_text
from ..utils.markdown import code, escape, table


# Predictions that the report shows, and characters of each text
_EXAMPLES = 3
_LONG = 400
# What the terminal shows: a title, and names of metrics, or how they begin
_SHOWN = {
    "Overlap with the references": ("rougeL", "meteor", "bleu"),
    "Words of a persona in an answer": (
        *("uptake/own", "uptake/other"),
        *("swapped/uptake/own", "swapped/uptake/other"),
    ),
    "Likelihood of the references, in nats a token": ("log_likelihood/personal", "log_likelihood/other"),
    "What the persona adds to it": ("pir/personal", "pir/other"),
    "Which of the options is chosen: share that is right, and nats": ("options/",),
    "The judge's ratings, 1 to 5": ("judge/",),
    "Answers: tokens, and the share that ended before the limit": ("num_tokens", "finished"),
}
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
    "log_likelihood/personal_without": "personal tokens, without a persona",
    "log_likelihood/other_without": "other tokens, without a persona",
    "log_likelihood/personal_swapped": "personal tokens, with another user's persona",
    "log_likelihood/other_swapped": "other tokens, with another user's persona",
    "pir/personal": "nats the persona adds to a personal token",
    "pir/other": "nats the persona adds to any other token",
    "personal_fraction": "share of personal tokens",
    "own_personal_fraction": "share that this model finds personal",
    "options/likelihood": "share of rows whose right option is the likeliest",
    "options/without": "the same without a persona",
    "options/swapped": "the same with another user's persona",
    "options/pir": "share whose right option gains the most from the persona",
    "options/pir_margin": "nats the right option gains over the mean option",
}


def print_result(result: dict[str, Any], console) -> None:
    """
    Print what an evaluation found, in 80 columns: the answer first, then the metrics of `_SHOWN`. The report has them all.

    Args:
        result (`dict[str, Any]`): From [`~evaluate.evaluate`].
        console ([`~rich.console.Console`]): Where to.
    """
    users = f" of {result['users']} users" if result["users"] else ""
    console.print(_verdict(result), markup=False)
    console.print(f"{result['rows']} rows{users}. Means, with 95 % intervals over {'users' if users else 'rows'}.\n")
    tests, metrics = (result["baseline"] or {}).get("tests"), result["metrics"]
    of_tests = ("baseline", "change") if tests is not None else ()
    console.print(_line("", "mean", *of_tests, "95 % interval", *(["p"] if of_tests else [])))
    for title, names in _SHOWN.items():
        found = [name for shown in names for name in metrics if _is_of(name, shown)]
        if found:
            console.print(title, markup=False)
        for name in found:
            mean = metrics[name]["mean"]
            if tests is None:
                cells = [interval_text(metrics[name]["interval"])]
            else:  # the interval is of the change
                cells = ["", "", "", ""] if name not in tests else _test_cells(mean, tests[name])
            console.print(_line(f"  {name}", number_text(mean), *cells), markup=False)
    console.print()
    for text in _remarks(result):
        console.print(text, markup=False)


def _line(name: str, mean: str, *cells: str) -> str:
    *numbers, interval = cells[:-1] if len(cells) > 1 else cells
    end = [f"{cells[-1]:>5}"] if len(cells) > 1 else []
    return " ".join([f"{name:<25}", *(f"{cell:>8}" for cell in (mean, *numbers)), f"{interval:>18}", *end])


def _is_of(name: str, shown: str) -> bool:
    return name.startswith(shown) if shown.endswith("/") else name == shown


def _verdict(result: dict[str, Any]) -> str:
    """The answer to what is asked: better than the baseline, or else personal at all. Intervals that overlap leave it unclear."""
    if result["baseline"] is not None:
        shown = [name for names in _SHOWN.values() for name in names if name not in ("num_tokens", "finished")]
        tests = result["baseline"]["tests"]
        tests = {name: test for name, test in tests.items() if any(_is_of(name, one) for one in shown)}
        higher = [name for name, test in tests.items() if test["interval"] and test["interval"][0] > 0]
        lower = [name for name, test in tests.items() if test["interval"] and test["interval"][1] < 0]
        parts = [f"{word}: {', '.join(names)}" for word, names in (("higher", higher), ("lower", lower)) if names]
        rest = len(tests) - len(higher) - len(lower)
        parts += [f"no clear change in {rest} {'others' if parts else 'metrics'}"] if rest else []
        return f"Against the baseline: {'; '.join(parts) or 'nothing to compare'}."
    if not result["predicted"]:
        return "Personal? Cannot say by answers: none were predicted (`prediction_rows` is 0)."
    own, other = (result["metrics"].get(f"uptake/{whose}") for whose in ("own", "other"))
    if not (own and other and own["interval"] and other["interval"]):
        return "Personal? Cannot say: it takes the personas of at least two users."
    answer = "No" if own["mean"] <= other["mean"] else "Unclear"
    if own["interval"][0] > other["interval"][1]:
        answer = "Yes"
    return (
        f"Personal? {answer}: {own['mean']:.2f} words of its persona in an answer, {other['mean']:.2f} of another's."
    )


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
    if too_long := result["too_long"]:
        remarks.append(f"{too_long} of {rows} rows have no prediction: their prompts are too long for `max_length`.")
    if predicted < rows - too_long:
        remarks.append(
            f"{predicted} of {rows} rows were predicted (`prediction_rows`), of as many users as possible; likelihoods are of all."
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
