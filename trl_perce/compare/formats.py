# SPDX-License-Identifier: Apache-2.0

"""How the figures of a comparison are written, alike in the page, in Markdown and in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.screen import duration
from .verdict import SAME


# Unit → what stands behind a title, factor, decimals
_UNITS = {
    "nats": ("nats", 1, 2),
    "share": ("%", 100, 1),
    "words": ("words", 1, 2),
    "tokens": ("tokens", 1, 1),
    "score": ("", 1, 2),
}
NOTHING = "–"
LEGEND = (
    "In brackets: 95 % intervals. “Unclear”: the interval holds 0. “Same”: there is no change, or for other tokens none beyond "
    f"{SAME:g} nats. Changes of a percentage are percentage points."
)


def unit_text(measure: Mapping[str, Any]) -> str:
    """The unit of a measure's figures: `"nats"`, `"%"` (changes are percentage points), `"words"`, `"tokens"` or none."""
    return _UNITS[measure["unit"]][0]


def title_text(measure: Mapping[str, Any]) -> str:
    """A measure's title with its unit."""
    unit = unit_text(measure)
    return f"{measure['title']} ({unit})" if unit else measure["title"]


def mean_text(measure: Mapping[str, Any], arm: str) -> str:
    """The mean of an arm, in the measure's unit."""
    return _number(measure, measure["arms"].get(arm, {}).get("mean"))


def mean_interval_text(measure: Mapping[str, Any], arm: str) -> str:
    """The 95 % interval of an arm's mean, or nothing."""
    return _interval(measure, measure["arms"].get(arm, {}).get("interval"))


def change_text(measure: Mapping[str, Any], arm: str) -> str:
    """The change of an arm against the one that it is compared with, signed."""
    return _number(measure, measure["changes"].get(arm, {}).get("difference"), "+")


def change_interval_text(measure: Mapping[str, Any], arm: str) -> str:
    """The 95 % interval of a change, or nothing."""
    return _interval(measure, measure["changes"].get(arm, {}).get("interval"), "+")


def reading(measure: Mapping[str, Any], arm: str) -> str:
    """
    What a change means, in a word.

    Returns:
        `str`: `"better"` or `"worse"` where the interval does not hold 0, `"higher"` or `"lower"` where neither is better, `"unclear"`
            where it holds 0, `"same"` where all of it is as good as 0. Nothing where there is no interval.
    """
    interval = measure["changes"].get(arm, {}).get("interval")
    if interval is None:
        return ""
    if -measure["same"] <= interval[0] and interval[1] <= measure["same"]:
        return "same"
    if interval[0] <= 0 <= interval[1]:
        return "unclear"
    way = "higher" if interval[0] > 0 else "lower"
    return way if measure["better"] is None else "better" if way == measure["better"] else "worse"


def pairs(findings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The arms that are judged, PerCE first as in the verdict, each with the one that it is judged against."""
    untrained, baseline, trained = findings["arms"][0], findings["baseline"], findings["arms"][1:]
    judged = sorted((arm for arm in trained if arm != baseline), key=lambda arm: arm != "perce")
    return [(arm, baseline) for arm in judged] or [(arm, untrained) for arm in trained]


def other_changes(findings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The trained arms that are not judged, each with the untrained model: what training does at all."""
    judged = [arm for arm, _ in pairs(findings)]
    return [(arm, findings["arms"][0]) for arm in findings["arms"][1:] if arm not in judged]


def against_text(findings: Mapping[str, Any], arm: str, against: str) -> str:
    """`PerCE against CE`."""
    return f"{findings['labels'][arm]} against {findings['labels'][against]}"


def groups(findings: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Title and measures of each group that has any."""
    by_key = {
        group["key"]: [measure for measure in findings["measures"] if measure["group"] == group["key"]]
        for group in findings["groups"]
    }
    return [(group["title"], by_key[group["key"]]) for group in findings["groups"] if by_key[group["key"]]]


ROWS_HEAD = "rows (users)"


def rows_text(measure: Mapping[str, Any]) -> str:
    """As in `ROWS_HEAD`: `240 (42)`."""
    return f"{measure['rows']:,}" + (f" ({measure['users']:,})" if measure["users"] else "")


def data_sentences(findings: Mapping[str, Any]) -> list[str]:
    """What was trained and tested on, and what there is to say of it."""
    data = findings["data"]
    tested = f"tested on {_rows(data['test_rows'], data['test_users'])} held out"
    sentences = [f"Trained on {_rows(data['train_rows'])}, {tested}."]
    sentences.append(
        f"Answers were generated for {_rows(data['predicted_rows'])}, and {data['irrelevant_rows']:,} questions asked to which the "
        "persona does not matter."
        if data["irrelevant_rows"]
        else f"Answers were generated for {_rows(data['predicted_rows'])}."
    )
    return [*sentences, *data["notes"]]


COST_HEAD = ("", "training time", "ratio", "peak memory", "ratio")


def cost_lines(findings: Mapping[str, Any]) -> list[list[str]]:
    """A line an arm, as in `COST_HEAD`: label, mean training time over seeds, peak memory, and their ratios to the baseline's."""
    cost, baseline = findings["cost"], findings["baseline"]
    lines = []
    for arm, own in cost.items():
        seconds, memory = _mean(own["train_seconds"]), own["peak_memory"] or {}
        base = cost.get(baseline, {"train_seconds": [], "peak_memory": None}) if arm != baseline else own
        base_memory = base["peak_memory"] or {}
        lines.append(
            [
                findings["labels"][arm],
                NOTHING if seconds is None else duration(seconds),
                _ratio(seconds, _mean(base["train_seconds"])),
                f"{memory['bytes'] / 2**30:.1f} GiB ({memory['of']})" if memory else NOTHING,
                _ratio(memory.get("bytes"), base_memory.get("bytes")),
            ]
        )
    return lines


def cost_note(findings: Mapping[str, Any]) -> str:
    """What the figures of the cost are of."""
    seeds = max((len(own["train_seconds"]) for own in findings["cost"].values()), default=0)
    over = f"Times are means over {seeds} seeds" if seeds > 1 else "One training each"
    return f"{over}; ratios are to {findings['labels'][findings['baseline']]}."


def _rows(rows: int, users: int | None = None) -> str:
    text = f"{rows:,} row{'' if rows == 1 else 's'}"
    return f"{text} of {users:,} user{'' if users == 1 else 's'}" if users else text


def _number(measure: Mapping[str, Any], value: float | None, sign: str = "") -> str:
    _, factor, decimals = _UNITS[measure["unit"]]
    if value is None:
        return NOTHING
    text = f"{value * factor:{sign}z.{decimals}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("+")


def _interval(measure: Mapping[str, Any], interval: Sequence[float] | None, sign: str = "") -> str:
    return "" if interval is None else "[" + ", ".join(_number(measure, end, sign) for end in interval) + "]"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f} ×" if value is not None and base else NOTHING
