# SPDX-License-Identifier: Apache-2.0

"""Where a reasoning model's thought is in the text of a turn. No model, no tokenizer: text alone."""

import re


# How a thought begins and ends: Qwen, DeepSeek and others; Gemma 4, whose thought begins with its channel's name
MARKERS = (("<think>", "</think>"), ("<|channel>", "<channel|>"))
# The end of a text that a thought goes on from; the last is Harmony's (gpt-oss)
OPEN = re.compile(r"(?:<think>|<\|channel>\w*|<\|channel\|>analysis<\|message\|>)\s*\Z")
_CLOSED = re.compile(r"(.*?)(?:</think>|<channel\|>|<\|end\|>)\s*", re.DOTALL)
_WHOLE = re.compile(
    r"\s*(?:<｜Assistant｜>)?(?:<think>(.*?)</think>|<\|channel>\w*(.*?)<channel\|>|(?:<\|start\|>\w+)?<\|channel\|>analysis<\|message\|>(.*?)<\|end\|>)\s*",
    re.DOTALL,
)


def writes_thoughts(chat_template: str | dict[str, str] | None) -> bool:
    """Whether a chat template has marks of thoughts."""
    return any(mark in str(chat_template) for mark in ("<think>", "<|channel"))


def thought_end(text: str, start: int, empty_only: bool = False) -> int:
    """
    Where the thought that a turn begins with ends.

    Args:
        text (`str`): The turn, with what stands before it, which may open the thought.
        start (`int`): Index of the turn's first character.
        empty_only (`bool`, *optional*, defaults to `False`): Whether to look for thoughts without a word alone.

    Returns:
        `int`: Index of the first character of the answer, behind the marks and the white space after them; `start` if there is no thought
            or nothing closes it.
    """
    found = _CLOSED.match(text, start) if OPEN.search(text[:start]) else _WHOLE.match(text, start)
    while found and not (empty_only and any(map(str.strip, filter(None, found.groups())))):
        start = found.end()
        found = _WHOLE.match(text, start)
    return start
