# SPDX-License-Identifier: Apache-2.0

"""Who speaks in a conversation: the roles of other formats, and which part of the text is the assistant's."""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import is_conversational
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from .marks import PersonaError, render_messages


# A call of Transformers' function in a chat template, and the date's format
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class Turns(NamedTuple):
    """
    How the trained tokens of a dataset's rows are told.

    Attributes:
        by (`str`): Possible values are:

            - `"trl"`: by TRL alone (prompt and completion, plain text, rows that are already tokenized).
            - `"marks"`: by TRL, from the `{% generation %}` marks of the chat template.
            - `"prefix"`: by [`assistant_spans`], since the template has no marks and TRL knows none for it.
            - `"all"`: every token is trained, as `assistant_only_loss=False` asks for; those that are not the assistant's
              are counted.

        chat_template (`str` or `None`): Template to render the rows with, `None` for the tokenizer's own. A template that asks for
            the date has that of today in it: tokens and text of a row may be made on different days, some of them out of the cache.
    """

    by: str
    chat_template: str | None = None


def is_messages(row: dict[str, Any]) -> bool:
    """Whether a row from [`~trl_perce.persona.marks.mark_persona`] is one conversation, without a completion of its own."""
    return not {"prompt", "input_ids"} & row.keys() and is_conversational(row)


def choose_turns(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, assistant_only_loss: bool | None) -> Turns:
    """
    How to tell the trained tokens of the rows of a dataset.

    Args:
        row (`dict[str, Any]`): One of its rows, from [`~trl_perce.persona.marks.mark_persona`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer with the chat template.
        assistant_only_loss (`bool` or `None`): As in [`PerCEConfig`].

    Returns:
        [`Turns`]: What to do.

    Raises:
        `ValueError`: `assistant_only_loss` is `True` and the rows are not conversations, or have a completion and a chat
            template without marks.
    """
    turns = _choose(row, tokenizer, assistant_only_loss)
    template = turns.chat_template or tokenizer.chat_template
    if not isinstance(template, str) or not _DATE.search(template):
        return turns
    today = datetime.now()
    return turns._replace(chat_template=_DATE.sub(lambda call: json.dumps(today.strftime(call[2])), template))


def _choose(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, assistant_only_loss: bool | None) -> Turns:
    messages = is_messages(row)
    if "input_ids" in row or (not messages and not assistant_only_loss):
        return Turns("trl")
    if not is_conversational(row):
        raise ValueError(
            "`assistant_only_loss` is True, and the rows are not conversations. Leave it out: of a prompt and a completion the "
            "completion is trained."
        )
    if assistant_only_loss is False:
        return Turns("all")
    template = tokenizer.chat_template
    if template is not None and has_generation_markers(template):
        return Turns("marks")
    try:
        return Turns("marks", get_training_chat_template(tokenizer))
    except (ValueError, TypeError, TemplateError):  # TRL knows none for it, or the template does not take TRL's probes
        if not messages:
            raise
    return Turns("prefix")


def assistant_spans(
    example: dict[str, Any],
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
) -> list[tuple[int, int]]:
    """
    Where the assistant's turns are in a conversation's text: each begins behind the messages before it and the generation
    prompt, where the model is when it answers, and ends where the conversation up to it ends.

    Args:
        example (`dict[str, Any]`): A row with `messages`, from [`~trl_perce.persona.marks.mark_persona`].
        text (`str`): Its text, from [`~trl_perce.persona.marks.render`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer with the chat template.
        chat_template (`str`, *optional*): Template to use instead of the tokenizer's.

    Returns:
        `list[tuple[int, int]]`: Half-open character spans, in order.

    Raises:
        `PersonaError`: The conversation begins with the assistant, or the template renders a part of it otherwise than
            within the whole.
    """
    messages, spans = example["messages"], []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise PersonaError(
                "the conversation begins with the assistant, where this chat template does not tell the header from the "
                "response. Remove the turn, or write a system or user message before it."
            )
        borders = [
            _border(
                example,
                messages[:count],
                text,
                tokenizer,
                chat_template,
                f"the assistant's turn (message {index})",
                "Use a chat template with {% generation %} marks (`chat_template_path`), or write each reply as a row with 'prompt' and "
                "'completion'. `assistant_only_loss: false` trains every token.",
                add_generation_prompt=prompt,
            )
            for count, prompt in ((index, True), (index + 1, False))
        ]
        start, end = borders
        if start < end:
            spans.append((start, end))
    return spans


def message_spans(
    example: dict[str, Any],
    trained: Sequence[int],
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
) -> list[tuple[int, int]]:
    """
    The parts of a conversation's text in which the trained tokens of single messages are: each begins where the messages before
    it end, and reaches to the next message that is trained.

    Args:
        example (`dict[str, Any]`): A row with `messages`, or `prompt` and `completion`.
        trained (`Sequence[int]`): Indices of the messages that are trained, in order, over prompt and completion.
        text (`str`): Its text, from [`~trl_perce.persona.marks.render`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer with the chat template.
        chat_template (`str`, *optional*): Template to use instead of the tokenizer's.

    Returns:
        `list[tuple[int, int]]`: Half-open character spans, one for each of `trained`. They lie side by side and cover the text.

    Raises:
        `PersonaError`: The template renders a part of the conversation otherwise than within the whole.
    """
    messages = [message for column in ("prompt", "completion", "messages") for message in example.get(column) or ()]
    borders = [
        _border(
            example,
            messages[:index],
            text,
            tokenizer,
            chat_template,
            f"the 'weight' of message {index}",
            "Leave out the weights of this conversation, or write each reply as a row with 'prompt' and 'completion'.",
            add_generation_prompt=False,
        )
        for index in trained[1:]
    ]
    return [*zip([0, *borders], [*borders, len(text)], strict=True)]


def _border(example, messages, text, tokenizer, chat_template, what: str, remedy: str, add_generation_prompt) -> int:
    """Where the first messages of a conversation end in its text."""
    part = render_messages(example, messages, tokenizer, chat_template, add_generation_prompt=add_generation_prompt)
    if not text.startswith(part):
        raise PersonaError(
            f"{what} cannot be told apart from the rest: the chat template renders the first {len(messages)} messages"
            f"{' with the generation prompt' if add_generation_prompt else ''} otherwise than within the whole conversation. {remedy}"
        )
    return len(part)
