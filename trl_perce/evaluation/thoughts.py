# SPDX-License-Identifier: Apache-2.0

"""What a reasoning model thinks, told from what it answers. No model, no tokenizer: text alone."""

import re
from typing import NamedTuple

from ..persona.thoughts import MARKERS, OPEN


# Harmony (gpt-oss): a message is in a channel, and only what is in "final" is the answer
_HARMONY = re.compile(r"\s*(?:<\|start\|>\w+)?<\|channel\|>")
_MESSAGE = re.compile(
    r"<\|channel\|>\s*(\w+)(?:(?!<\|message\|>).)*<\|message\|>(.*?)(?:<\|(?:end|return|call|start)\|>|\Z)", re.DOTALL
)


class Reply(NamedTuple):
    """
    What a model wrote, in parts.

    Attributes:
        thought (`str` or `None`): What it thought, without the marks around it; `None` if the text has no thought.
        answer (`str`): The rest; all of the text if it has no thought. Without white space at its ends.
        is_cut (`bool`): Whether the thought has no end, so that there is no answer.
    """

    thought: str | None
    answer: str
    is_cut: bool


def split_thought(text: str, is_open: bool = False) -> Reply:
    """
    Tell a thought from the answer behind it. A thought stands at the beginning of the text. A mark that closes what nothing in the text
    has opened ends a thought that the chat template has opened, so that all before it is none of the answer.

    Args:
        text (`str`): What a model wrote, special tokens included: some models' marks are such.
        is_open (`bool`, *optional*, defaults to `False`): Whether the prompt ends within a thought ([`opens_thought`]), so that all of the
            text is one if nothing closes it.

    Returns:
        [`Reply`]: Thought and answer.
    """
    if _HARMONY.match(text):
        messages = _MESSAGE.findall(text)
        answers = [content for channel, content in messages if channel == "final"]
        thoughts = [content.strip() for channel, content in messages if channel != "final"]
        if not messages:  # cut off in the name of the channel
            thoughts = [_HARMONY.sub("", text, count=1).strip()]
        return Reply("\n".join(thoughts) if thoughts else None, "".join(answers).strip(), not answers)
    thoughts, rest = [], text.strip()
    while True:
        opening, closing = next(
            ((opening, closing) for opening, closing in MARKERS if rest.startswith(opening)), ("", "")
        )
        if not opening:
            closing = _first_closing(rest)
            if not closing and not (is_open and not thoughts):
                return Reply("\n".join(thoughts) if thoughts else None, rest, False)
        thought, end, behind = rest.removeprefix(opening).partition(closing or MARKERS[0][1])
        thoughts.append(thought.strip())
        if not end:
            return Reply("\n".join(thoughts), "", True)
        rest = behind.strip()


def opens_thought(prompt: str) -> bool:
    """
    Whether a prompt ends within a thought, as some chat templates have it.

    Args:
        prompt (`str`): The prompt, or its end, special tokens included.
    """
    return OPEN.search(prompt) is not None


def _first_closing(text: str) -> str:
    """The mark that closes a thought before any opens one; empty if there is none."""
    found = [(text.find(mark), mark) for marks in MARKERS for mark in marks if mark in text]
    first = min(found, default=(0, ""))[1]
    return first if first in {closing for _, closing in MARKERS} else ""
