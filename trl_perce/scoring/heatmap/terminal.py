# SPDX-License-Identifier: Apache-2.0

"""The heatmap in the terminal."""

from collections.abc import Iterable

from ..scores import TokenScores
from .palette import PALETTE, colour
from .pieces import MAX_PERSONA, MAX_QUERY, NOTHING_TO_DRAW, check_positive, most_personal, pieces_of, shorten, summary


# In the terminal a token nearer to 0 has no background: pale on dark, it would be louder than the personal ones
_FAINT = 1.0


def print_heatmap(scores: Iterable[TokenScores], console, num_rows: int = 4) -> None:
    """
    Print the most personal row of each of a few personas. Where the console has no colours (a pipe, a file, `NO_COLOR`) a personal token
    is written `[needles +3.1]`.

    Args:
        scores (`Iterable[TokenScores]`): Scores of the rows.
        console ([`~rich.console.Console`]): Where to print.
        num_rows (`int`, *optional*, defaults to `4`): Rows to print.

    Raises:
        `ValueError`: `num_rows` is not positive.
    """
    from rich.table import Table
    from rich.text import Text

    check_positive("num_rows", num_rows)
    has_colours = console.is_terminal and console.color_system is not None and not console.no_color
    rows = most_personal(scores, num_rows)
    lines: list = [] if rows else [Text(NOTHING_TO_DRAW)]
    for row in rows:
        texts = {
            "Persona": Text(shorten(row.persona, MAX_PERSONA)),
            "Query": Text(shorten(row.query, MAX_QUERY)),
            "Response": _coloured(row) if has_colours else Text(_bracketed(row)),
        }
        lines.append(Text(summary(row), style="bold" if has_colours else ""))
        if has_colours:
            grid = Table.grid(padding=(0, 2))
            for label, text in texts.items():
                grid.add_row(Text(label, style="dim"), text)
            lines.append(grid)
        else:
            lines += [Text(f"{label:10}") + text for label, text in texts.items()]
        lines.append(Text())
    if rows and has_colours:
        steps = [Text(f" {pir:+.0f} ", style=_style(pir)) for pir in (-5, -3, -1, 1, 3, 5)]
        lines.append(Text.assemble("PIR in nats ", *steps, f"  underlined: personal (PIR > {rows[0].threshold:g})"))
    elif rows:
        lines.append(Text(f"[…]: a personal token (PIR > {rows[0].threshold:g}) and its PIR in nats"))
    for line in lines:
        console.print(line, highlight=False)


def _style(pir: float) -> str:
    return f"{PALETTE['light']['text']} on {colour(pir)}"


def _coloured(scores: TokenScores):
    from rich.text import Text

    response = Text()
    for text, unit in pieces_of(scores):
        if unit is None:
            response.append(text)
            continue
        style = "dim" if unit.is_special else _style(unit.pir) if abs(unit.pir) >= _FAINT else ""
        response.append(text, style=f"{style} underline" if unit.pir > scores.threshold else style)
    return response


def _bracketed(scores: TokenScores) -> str:
    return "".join(
        f"[{text} {unit.pir:+.1f}]" if unit is not None and unit.pir > scores.threshold else text
        for text, unit in pieces_of(scores)
    )
