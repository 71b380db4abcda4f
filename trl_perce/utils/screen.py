# SPDX-License-Identifier: Apache-2.0

"""Text for a screen of 80 columns."""

import logging
import shlex
import textwrap
from collections.abc import Sequence


WIDTH = 80


def fit(text: str) -> str:
    """A text in lines of 80 columns. What has no space in it, such as a path, is not broken."""
    lines = (textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))
    return "\n".join(lines)


def say(text: str) -> None:
    """Print a text ([`fit`])."""
    print(fit(text))


class _Fitted(logging.Formatter):
    def format(self, record):
        return fit(super().format(record))


def fit_warnings() -> None:
    """Have warnings that no handler takes, and Python therefore prints itself, fit."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Fitted())


def to_copy(words: Sequence[str]) -> str:
    """
    A command for a shell: in one line if it fits, else with a line for each option.

    Args:
        words (`Sequence[str]`): The command and its arguments.

    Returns:
        `str`: The command, quoted.
    """
    line = shlex.join(words)
    if len(line) <= WIDTH:
        return line
    starts = [0, *(index for index, word in enumerate(words) if word.startswith("--")), len(words)]
    return " \\\n    ".join(shlex.join(words[start:end]) for start, end in zip(starts, starts[1:], strict=False))


def duration(seconds: float) -> str:
    """A time in the two units that matter: `42 s`, `3 min 07 s`, `2 h 05 min`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
