# SPDX-License-Identifier: Apache-2.0

"""What a comparison has found, in the terminal and as Markdown."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..scoring.heatmap.pieces import printable
from ..utils.files import write_text
from ..utils.markdown import code, escape, table
from ..utils.screen import WIDTH, fit
from . import formats


# Columns of the terminal's tables behind the first, which takes the rest: means, change with its interval, word; cost
_FIGURES, _MEAN = (20, 7), (9, 7, 7)
_COST = (14, 7, 20, 7)


def print_findings(findings: Mapping[str, Any], console) -> None:
    """
    Print what a comparison has found, in 80 columns: the verdict, a table for each arm that is judged, remarks and cost.

    Args:
        findings (`Mapping[str, Any]`): From [`~findings.make_findings`].
        console ([`~rich.console.Console`]): Where to.
    """
    verdict = findings["verdict"]
    blocks = ["\n".join(fit(sentence) for sentence in verdict["sentences"])]
    if findings["measures"]:
        blocks += [_figures(findings, arm, against) for arm, against in formats.pairs(findings)]
        blocks.append(fit(formats.LEGEND))
    blocks += [fit(remark) for remark in verdict["remarks"]]
    if findings["cost"]:
        lines = [formats.COST_HEAD, *formats.cost_lines(findings)]
        blocks.append("\n".join([*(_columns(line, _COST) for line in lines), fit(formats.cost_note(findings))]))
    console.print("\n\n".join(blocks), markup=False, highlight=False, soft_wrap=True)


def _figures(findings: Mapping[str, Any], arm: str, against: str) -> str:
    arms = [*dict.fromkeys((findings["arms"][0], against, arm))]
    widths = (*_MEAN[: len(arms)], *_FIGURES)
    lines = [
        _columns(
            ["", *(findings["labels"][one] for one in arms), f"change to {findings['labels'][against]}", ""], widths
        )
    ]
    for title, measures in formats.groups(findings):
        lines.append(title)
        for measure in measures:
            change = f"{formats.change_text(measure, arm)} {formats.change_interval_text(measure, arm)}"
            means = [formats.mean_text(measure, one) for one in arms]
            lines.append(
                _columns([formats.title_text(measure), *means, change, formats.reading(measure, arm)], widths, "  ")
            )
    return "\n".join(lines)


def _columns(cells: Sequence[str], widths: Sequence[int], indent: str = "") -> str:
    """One line, or as many as the longest cell takes in its column: the first to the left, the others to the right and below."""
    first = WIDTH - sum(widths) - len(widths)
    left = textwrap.wrap(cells[0], first, initial_indent=indent, subsequent_indent=2 * indent)
    others = [textwrap.wrap(cell, width) for cell, width in zip(cells[1:], widths, strict=True)]
    height = max(map(len, (left, *others)))
    rows = zip_longest(*([""] * (height - len(lines)) + lines for lines in (left, *others)))
    return "\n".join(
        " ".join(
            [f"{row[0]:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True))]
        ).rstrip()
        for row in rows
    )


def write_markdown(findings: Mapping[str, Any], path: str | Path) -> None:
    """
    Write `report.md`: what the page holds, but for its plot. Personal words of the answers are bold.

    Args:
        findings (`Mapping[str, Any]`): From [`~findings.make_findings`].
        path (`str` or `Path`): File to write.
    """
    verdict, labels = findings["verdict"], findings["labels"]
    parts = [f"# {_prose(verdict['sentences'][0])}", *map(_prose, verdict["sentences"][1:])]
    parts += [f"> {_prose(remark)}" for remark in verdict["remarks"]]
    parts += ["## How this was decided", _list(map(_prose, verdict["rules"]))]
    if findings["measures"]:
        parts.append("## The figures")
        for title, measures in formats.groups(findings):
            parts += [f"### {escape(title)}", _measures_table(findings, measures)]
        parts += [
            escape(formats.LEGEND),
            "### All intervals, and how many rows each figure is of",
            _intervals_table(findings),
        ]
    parts.append("## The answers, side by side")
    parts.append(
        f"Chosen by rule, not by hand: {escape(findings['answers_rule'])}. Bold words are personal to the untrained model: PIR over "
        f"{findings['threshold']:g}."
        if findings["answers"]
        else "None were generated."
    )
    for answer in findings["answers"]:
        user = "" if answer["user"] is None else f", {escape(printable(str(answer['user'])))}"
        names = {"persona": "persona", "query": "query", "reference": "own reply"}
        lines = [f"{name}: {escape(printable(answer[key] or ''))}" for key, name in names.items()]
        lines += [
            f"{escape(labels[arm])}: {_bold(answer['answers'][arm]['pieces'], findings['threshold']) or '(empty)'}"
            for arm in findings["arms"]
            if arm in answer["answers"]
        ]
        parts += [f"### Row {answer['row']}{user}", _list(lines)]
    if findings["cost"]:
        parts += [
            "## What it cost",
            table(formats.COST_HEAD, [[escape(line[0]), *line[1:]] for line in formats.cost_lines(findings)]),
        ]
        parts.append(escape(formats.cost_note(findings)))
    parts += ["## How it was made", *map(_prose, formats.data_sentences(findings))]
    parts.append(_list(f"{escape(name)}: {escape(value)}" for name, value in findings["settings"]))
    write_text(path, "\n\n".join(parts) + "\n")


def _measures_table(findings: Mapping[str, Any], measures: Sequence[Mapping[str, Any]]) -> str:
    arms, pairs = findings["arms"], formats.pairs(findings)
    head = ["", *(findings["labels"][arm] for arm in arms)]
    head += [formats.against_text(findings, arm, against) for arm, against in pairs]
    lines = [
        [
            formats.title_text(measure),
            *(formats.mean_text(measure, arm) for arm in arms),
            *(_change(measure, arm) for arm, _ in pairs),
            measure["note"],
        ]
        for measure in measures
    ]
    return table([*map(escape, head), ""], [[*map(escape, line)] for line in lines])


def _intervals_table(findings: Mapping[str, Any]) -> str:
    arms, others = findings["arms"], formats.other_changes(findings)
    head = ["", *(findings["labels"][arm] for arm in arms)]
    head += [formats.against_text(findings, arm, against) for arm, against in others]
    lines = [
        [
            formats.title_text(measure),
            *(f"{formats.mean_text(measure, arm)} {formats.mean_interval_text(measure, arm)}" for arm in arms),
            *(_change(measure, arm) for arm, _ in others),
            formats.rows_text(measure),
        ]
        for _, measures in formats.groups(findings)
        for measure in measures
    ]
    return table([*map(escape, head), formats.ROWS_HEAD], [[*map(escape, line)] for line in lines])


def _change(measure: Mapping[str, Any], arm: str) -> str:
    parts = (formats.change_text, formats.change_interval_text, formats.reading)
    return " ".join(part(measure, arm) for part in parts)


def _list(lines) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _bold(pieces: Sequence[tuple[str, float | None]], threshold: float) -> str:
    """The text of an answer in one line. `<b>`, since stars make nothing bold where no space is around them."""
    text = "".join(
        f"<b>{_plain(piece)}</b>" if pir is not None and pir > threshold else _plain(piece) for piece, pir in pieces
    )
    return " ".join(text.replace("</b><b>", "").split())


def _prose(text: str) -> str:
    """A sentence of ours, its code as code."""
    return "".join(code(part) if index % 2 else _plain(part) for index, part in enumerate(text.split("`")))


def _plain(text: str) -> str:
    """As [`escape`] does, but a space at an end stays."""
    return escape(f".{printable(text)}.")[1:-1]
