# SPDX-License-Identifier: Apache-2.0

"""Content that is given in parts (`[{"type": "text", "text": …}]`), for chat templates that take a text."""

from itertools import accumulate
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .marks import PersonaError, Span


# Between two parts, as vLLM and llama.cpp join them for such templates
_BETWEEN = "\n"


def takes_parts(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> bool:
    """
    Whether a chat template renders content in parts as it renders the same text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer with the chat template.
        chat_template (`str`, *optional*): Template to use instead of the tokenizer's.

    Returns:
        `bool`: Also `True` of a template that does not take a text.
    """
    for roles in (("user", "assistant"), ("system", "user", "assistant")):
        texts = {role: f"{role} speaks" for role in roles}
        rendered = []
        for in_parts in (False, True):
            messages = [
                {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}
                for role, text in texts.items()
            ]
            try:
                own = tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False)
            except (TemplateError, TypeError):
                own = ""
            rendered.append(own)
        if all(text in rendered[0] for text in texts.values()) and rendered[0] != rendered[1]:
            return False
    return True


def join_parts(example: dict[str, Any], spans: list[Span]) -> list[Span]:
    """
    Make one text of the parts of each message, in place, a line break between two.

    Args:
        example (`dict[str, Any]`): A row from [`~trl_perce.persona.marks.mark_persona`].
        spans (`list[Span]`): Its personas.

    Returns:
        `list[Span]`: The personas in the joined texts.

    Raises:
        `PersonaError`: A part is not a text.
    """
    starts: dict[tuple[str, int | None], list[int]] = {}
    for column in ("prompt", "completion", "messages"):
        for index, message in enumerate(example[column] if isinstance(example.get(column), list) else ()):
            parts = message.get("content")
            if not isinstance(parts, list):
                continue
            for part in parts:
                if not isinstance(part.get("text"), str):
                    raise PersonaError(
                        f"message {index} of {column!r} has a part of the type {part.get('type')!r}, and the chat template takes "
                        "text alone. Remove the part, or use a model whose chat template takes it."
                    )
            texts = [part["text"] for part in parts]
            starts[column, index] = [0, *accumulate(len(text) + len(_BETWEEN) for text in texts)]
            message["content"] = _BETWEEN.join(texts)
    joined = []
    for span in spans:
        if span.part is not None:
            shift = starts[span.column, span.message][span.part]
            span = span._replace(part=None, start=span.start + shift, end=span.end + shift)
        joined.append(span)
    return joined
