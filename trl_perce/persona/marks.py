# SPDX-License-Identifier: Apache-2.0

"""Where a row's text says that the persona is: marks (markers, or a column and its placeholder) → character spans."""

import copy
import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import is_conversational, maybe_convert_to_chatml
from trl.trainer.utils import remove_none_values

from .rows import suggest_columns


PLACEHOLDER = "{persona}"

# What pandas and `str` make of a value that is missing
_MISSING = {"nan", "none", "null", "<na>", "nat"}

# Stands in for a span's border while a chat template renders the row. Unicode keeps U+FDD0 free for internal use: it is
# no character, no template treats it as white space, and valid text does not hold it.
_BORDER = "\ufdd0"


# Roles of other formats (ShareGPT's `from`, Gemini's, OASST's) → those that chat templates know
ROLES = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool", "function", "ipython")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant"),
}


class PersonaError(ValueError):
    """
    The persona, who speaks, or a weight cannot be told from a row; the message names the row, the reason and what to write instead.
    """


class Span(NamedTuple):
    """
    A persona in one text of a row.

    Attributes:
        column (`str`): `"prompt"`, `"completion"`, `"messages"` or the text column.
        message (`int` or `None`): Index of the message, `None` where the column holds a string.
        part (`int` or `None`): Index of the content part, `None` where the message's content is a string.
        start (`int`): Index of the persona's first character in that text, marks taken out.
        end (`int`): Index after its last character.
    """

    column: str
    message: int | None
    part: int | None
    start: int
    end: int


def split_at_markers(text: str, start_marker: str, end_marker: str) -> list[str]:
    """
    Split a text at its persona markers. Pieces alternate: the ones at odd indices are personas.

    Args:
        text (`str`): Text with any number of `start_marker … end_marker`.
        start_marker (`str`): Text that opens a persona.
        end_marker (`str`): Text that closes it.

    Returns:
        `list[str]`: An odd number of pieces whose concatenation is the text without its markers.

    Raises:
        `PersonaError`: The markers are not balanced, or one persona lies in another.
    """
    pieces, position, inside = [], 0, False
    while True:
        start = text.find(start_marker, position)
        end = text.find(end_marker, position)
        if start == end == -1:
            break
        is_start = end == -1 or -1 < start < end
        found = start if is_start else end
        if is_start == inside:
            what = (
                f"{start_marker!r} inside of another persona" if inside else f"{end_marker!r} without {start_marker!r}"
            )
            raise PersonaError(
                f"{what} at character {found}: {_excerpt(text, found)}. Write one {start_marker!r} before and one "
                f"{end_marker!r} behind each persona. If the text itself holds a marker, choose other markers "
                "(`persona_start_marker`, `persona_end_marker`) or give the persona in a column."
            )
        pieces.append(text[position:found])
        position = found + len(start_marker if is_start else end_marker)
        inside = is_start
    if inside:
        raise PersonaError(
            f"{start_marker!r} is not closed: {_excerpt(text, position - len(start_marker))}. Write {end_marker!r} "
            "behind the persona."
        )
    return [*pieces, text[position:]]


def split_at_placeholder(text: str, persona: str) -> list[str]:
    """
    Put the persona in the place of each `{persona}`. The persona stays literal text, also where it holds `{persona}` or
    a marker, and so do all other braces.

    Args:
        text (`str`): Text with any number of `{persona}`.
        persona (`str`): What to put there.

    Returns:
        `list[str]`: Pieces as those of [`split_at_markers`].
    """
    outside = text.split(PLACEHOLDER)
    return [piece for text_piece in outside for piece in (text_piece, persona)][:-1]


def mark_persona(
    example: dict[str, Any],
    text_field: str = "text",
    start_marker: str = "<persona>",
    end_marker: str = "</persona>",
    template_kwargs: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], list[Span]]:
    """
    Find the persona in a row that is not yet tokenized: between markers, or in the column `persona`, whose text takes
    the place of `{persona}`.

    Args:
        example (`dict[str, Any]`): A row of any dataset type of TRL's SFT. Its messages are changed in place.
        text_field (`str`, *optional*, defaults to `"text"`): Column of a plain language-modeling row.
        start_marker (`str`, *optional*, defaults to `"<persona>"`): Text that opens a persona.
        end_marker (`str`, *optional*, defaults to `"</persona>"`): Text that closes it.
        template_kwargs (`dict[str, Any]`, *optional*): Arguments of the chat template. Those in the row's own column
            `chat_template_kwargs` go first, key by key.

    Returns:
        `tuple[dict[str, Any], list[Span]]`: The row as TRL shall see it (ChatML and its roles, marks taken out, persona filled in,
        no keys without a value in messages, tools and arguments of the template), and its personas in order. A persona of
        white space alone is none.

    Raises:
        `PersonaError`: The row says neither clearly that it has a persona nor that it has none, or a message's role is
            unknown.
    """
    example = maybe_convert_to_chatml(example)
    _check_messages(example)
    _remove_none(example)
    _merge_template_kwargs(example, template_kwargs)
    _name_roles(example)
    persona = example.get("persona")
    if isinstance(persona, float) and math.isnan(persona):  # pandas' way to say that there is none
        persona = None
    if persona is not None and not isinstance(persona, str):
        raise PersonaError(
            f"column 'persona' holds a {type(persona).__name__}. Write one string (join a list of sentences)."
        )

    spans, has_markers, has_placeholder = [], False, False
    near: str | None = None
    for holder, key, where, is_response in _texts(example, text_field):
        text = holder[key]
        marked = split_at_markers(text, start_marker, end_marker)
        in_markers = len(marked) > 1
        in_column = any(PLACEHOLDER in piece for piece in marked[::2])
        if is_response:
            if in_markers or (in_column and persona is not None):
                raise PersonaError(
                    f"the persona is in the response ({where[0]!r}): {_excerpt(text, 0)}. The response must not "
                    "change when the persona is taken away: move the persona to the prompt."
                )
            continue
        has_markers |= in_markers
        has_placeholder |= in_column
        pair = _find_near_pair(text, start_marker)
        near = near or (f"{where[0]!r} holds {pair!r}" if pair else None)
        if in_column and "persona" not in example:
            raise PersonaError(
                f"{where[0]!r} holds {PLACEHOLDER!r} and there is no column 'persona'. Add the column, or write "
                f"{start_marker}…{end_marker} around the persona."
            )
        pieces = marked if not in_column else split_at_placeholder(text, persona or "")
        position = 0
        for index, piece in enumerate(pieces):
            if index % 2 and piece.strip():
                _check_not_missing(piece)
                spans.append(Span(*where, position, position + len(piece)))
            position += len(piece)
        holder[key] = "".join(pieces)

    if near and not (has_markers or has_placeholder):
        raise PersonaError(
            f"{near}, which looks like a persona marker but is not one. Write {start_marker}…{end_marker}, letter by letter. If the "
            "text is meant as it is, choose other markers (`persona_start_marker`, `persona_end_marker`)."
        )
    if has_markers and (persona or has_placeholder):
        raise PersonaError(
            f"the persona is given both ways, in markers and as column 'persona' with {PLACEHOLDER!r}. Keep one of them."
        )
    if persona and not has_placeholder:
        raise PersonaError(
            f"there is a column 'persona' and no {PLACEHOLDER!r} in the prompt. Write {PLACEHOLDER!r} where the persona "
            "belongs, or remove or rename the column."
        )
    _check_response(example)
    return example, spans


def find_near_markers(text: str, start_marker: str) -> list[str]:
    """
    What somebody may have written for a marker that is not one: `<Persona>`, `[persona]`, `&lt;persona&gt;`, `< persona >`.

    Args:
        text (`str`): Any text.
        start_marker (`str`): Text that opens a persona. Its letters are looked for, whatever is around them.

    Returns:
        `list[str]`: All that are in the text, in order.
    """
    return [match[0] for match in _near_matches(text, start_marker)]


def _near_matches(text: str, start_marker: str) -> list[re.Match]:
    word = re.sub(r"^[\W_]+|[\W_]+$", "", start_marker)
    # Before the search of each text, which a marker without letters, or a text without these, does not need
    if not word or word.casefold() not in text.casefold():
        return []
    pattern = rf"(?:&lt;|[<\[{{＜])\s*[/\\]?\s*{re.escape(word)}\s*[/\\]?\s*(?:&gt;|[>\]}}＞])"
    exact = {start_marker, start_marker.replace("<", "</", 1), PLACEHOLDER}
    return [match for match in re.finditer(pattern, text, re.IGNORECASE) if match[0] not in exact]


def _find_near_pair(text: str, start_marker: str) -> str | None:
    """The first two near-markers with a text between them, and that text. One by itself may be meant."""
    matches = _near_matches(text, start_marker)
    for first, second in zip(matches, matches[1:], strict=False):
        if text[first.end() : second.start()].strip():
            pair = text[first.start() : second.end()]
            return pair if len(pair) <= 60 else f"{pair[:40]}…{second[0]}"
    return None


def is_missing(value: Any) -> bool:
    """
    Whether a persona, or a user's name, is none: nothing, white space, NaN, or what such a value becomes when it is written as text.

    Args:
        value (`Any`): A cell of a table.
    """
    return value is None or value != value or str(value).strip().casefold() in {"", *_MISSING}


def _check_not_missing(persona: str) -> None:
    if is_missing(persona):
        raise PersonaError(
            f"the persona is {persona.strip()!r}, as a missing value becomes when it is written as text. Leave the persona empty "
            "where there is none (in pandas: `df['persona'].fillna('')`)."
        )


def _check_messages(example: dict[str, Any]) -> None:
    """Raise a `PersonaError` where a row in ChatML has no message: TRL tells a conversation by its first one."""
    for column in ("prompt", "messages"):
        if isinstance(example.get(column), list) and not example[column]:
            raise PersonaError(
                f"column {column!r} is an empty list. Write the conversation's messages, or remove the row."
            )


def _check_response(example: dict[str, Any]) -> None:
    """A completion says something, and so does each turn of the assistant; a message has content or calls a tool."""
    for column in ("prompt", "completion", "messages"):
        for index, message in enumerate(example[column] if isinstance(example.get(column), list) else ()):
            if message.get("content") is None and not message.get("tool_calls"):
                raise PersonaError(
                    f"message {index} of {column!r} ({message.get('role')!r}) has no 'content'. Write its text, or remove the row."
                )
    if "prompt" in example:
        column, turns = "completion", [example["completion"]]
    else:
        column = "messages"
        turns = [[message] for message in example.get(column) or () if message["role"] == "assistant"]
    for turn in turns:
        if not _says_something(turn):
            raise PersonaError(
                f"the response in {column!r} is empty: the model would learn to say nothing. Remove the row, or write what it shall "
                "answer."
            )


def _says_something(turn: str | list[dict[str, Any]]) -> bool:
    if isinstance(turn, str):
        return bool(turn.strip())
    return any(
        bool(message["content"].strip())
        if isinstance(message.get("content"), str)
        else any(
            part.get("type") != "text" or (part.get("text") or "").strip() for part in message.get("content") or ()
        )
        for message in turn
    ) or any(message.get(key) for message in turn for key in ("tool_calls", "reasoning_content", "thinking"))


def _remove_none(example: dict[str, Any]) -> None:
    """Arrow gives all tool calls of a table the arguments of each, without a value. The template would write them as null."""
    for column in ("prompt", "completion", "messages", "tools"):
        if isinstance(example.get(column), list):
            example[column] = remove_none_values(example[column])


def _merge_template_kwargs(example: dict[str, Any], shared: dict[str, Any] | None) -> None:
    own = example.get("chat_template_kwargs")
    if not isinstance(own, dict | None):
        raise PersonaError(
            f"column 'chat_template_kwargs' holds a {type(own).__name__}. Write an object, such as {{\"enable_thinking\": false}}."
        )
    if shared or "chat_template_kwargs" in example:  # TRL takes no `None` there
        example["chat_template_kwargs"] = {**(shared or {}), **remove_none_values(own or {})}


def _name_roles(example: dict[str, Any]) -> None:
    """Give the roles of other formats the names that chat templates know, in place."""
    for column in ("prompt", "completion", "messages"):
        messages = example.get(column)
        for index, message in enumerate(messages if isinstance(messages, list) else ()):
            role = message.get("role") if isinstance(message, dict) else None
            name = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
            if name is None:
                raise PersonaError(
                    f"message {index} of {column!r} has the role {role!r}, which chat templates do not know. Write 'system', "
                    "'user', 'assistant' or 'tool'."
                )
            message["role"] = name


def _columns(example: dict[str, Any], text_field: str) -> tuple[str, ...]:
    """The columns whose text TRL will tokenize."""
    if "prompt" in example:
        return ("prompt", "completion")
    return ("messages",) if is_conversational(example) else (text_field,)


def _texts(
    example: dict[str, Any], text_field: str
) -> Iterator[tuple[dict[str, Any], str, tuple[str, int | None, int | None], bool]]:
    """Yield `(holder, key, (column, message, part), is_response)` for each text of the row that TRL will tokenize."""
    for column in _columns(example, text_field):
        if example.get(column) is None:
            raise PersonaError(
                f"column {column!r} is missing or empty. A row has 'messages', 'prompt' and 'completion', {text_field!r}, "
                f"or 'input_ids'; this one has {', '.join(map(repr, example))}.{suggest_columns(example)}"
            )
        if isinstance(example[column], str):
            yield example, column, (column, None, None), column == "completion"
            continue
        for index, message in enumerate(example[column]):
            is_response = column == "completion" or (column == "messages" and message["role"] == "assistant")
            content = message.get("content")
            if isinstance(content, str):
                yield message, "content", (column, index, None), is_response
            for part_index, part in enumerate(content if isinstance(content, list) else ()):
                if isinstance(part.get("text"), str):
                    yield part, "text", (column, index, part_index), is_response


def prompt_texts(example: dict[str, Any], text_field: str) -> list[str]:
    """The texts of a row that are not of its response."""
    return [holder[key] for holder, key, _, is_response in _texts(example, text_field) if not is_response]


def response_texts(example: dict[str, Any], text_field: str = "text") -> list[str]:
    """The texts of a row's responses."""
    return [holder[key] for holder, key, _, is_response in _texts(example, text_field) if is_response]


def render(
    example: dict[str, Any],
    spans: list[Span],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    text_field: str = "text",
) -> tuple[str, list[tuple[int, int]]]:
    """
    The text that TRL tokenizes for a row, and where its personas are in it.

    Conversational rows go through the chat template with a border character at both ends of each persona, which tells
    a persona from the same words elsewhere. White space at the ends of a persona stays outside of the borders meanwhile,
    so that a template that trims a message trims it here too.

    Args:
        example (`dict[str, Any]`): A row from [`mark_persona`].
        spans (`list[Span]`): Its personas.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer with the chat template.
        chat_template (`str`, *optional*): Template to use instead of the tokenizer's.
        text_field (`str`, *optional*, defaults to `"text"`): Column of a plain language-modeling row.

    Returns:
        `tuple[str, list[tuple[int, int]]]`: The text, and the half-open character spans of the personas in it.

    Raises:
        `PersonaError`: The chat template left out a persona, or rendered it more than once.
    """
    marked = copy.deepcopy({column: example[column] for column in _columns(example, text_field)})
    stripped = []
    for column, message, part, start, end in reversed(spans):  # from the end, so that earlier indices stay right
        holder, key = (marked, column) if message is None else (marked[column][message], "content")
        if part is not None:
            holder, key = holder["content"][part], "text"
        text = holder[key]
        persona = text[start:end]
        core_start = start + len(persona) - len(persona.lstrip())
        core_end = end - len(persona) + len(persona.rstrip())
        holder[key] = text[:core_start] + _BORDER + text[core_start:core_end] + _BORDER + text[core_end:]
        stripped.append((text[start:core_start], text[core_end:end]))
    stripped.reverse()

    values = [marked[column] for column in marked]
    if is_conversational(example):
        messages = [message for messages in values for message in messages]
        rendered = render_messages(example, messages, tokenizer, chat_template)
    else:
        rendered = "".join(values)

    pieces = rendered.split(_BORDER)
    if len(pieces) != 2 * len(spans) + 1:
        raise PersonaError(
            f"the chat template rendered {(len(pieces) - 1) / 2:g} of {len(spans)} personas. It leaves out (or repeats) "
            f"the message that holds the persona ({', '.join(sorted({_role(example, span) for span in spans}))}). Put "
            "the persona into a message that the template renders once, such as the first user message."
        )
    text = "".join(pieces)
    found, position = [], 0
    for (before, behind), outside, core in zip(stripped, pieces[::2], pieces[1::2], strict=False):
        start = position + len(outside)
        end = start + len(core)
        position = end
        # The template may have trimmed the white space: take back what it left.
        while before and start > 0 and text[start - 1] == before[-1]:
            start, before = start - 1, before[:-1]
        while behind and end < len(text) and text[end] == behind[0]:
            end, behind = end + 1, behind[1:]
        found.append((start, end))
    return text, found


def render_messages(
    example: dict[str, Any],
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    **kwargs,
) -> str:
    """
    Put messages through the chat template, with the tools and the template's arguments of a row.

    Args:
        example (`dict[str, Any]`): The row.
        messages (`list[dict[str, Any]]`): Its messages, or some of them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer with the chat template.
        chat_template (`str`, *optional*): Template to use instead of the tokenizer's.
        **kwargs: Arguments of the template that go before the row's own, such as `add_generation_prompt`.

    Returns:
        `str`: The text.

    Raises:
        `PersonaError`: The template does not take the messages.
    """
    tools = example.get("tools")
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=chat_template,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            **{**(example.get("chat_template_kwargs") or {}), **kwargs},
        )
    except TemplateError as error:
        raise PersonaError(f"the chat template rejects this conversation: {error}") from error


def persona_turns(example: dict[str, Any], spans: list[Span]) -> list[tuple[str, int]]:
    """
    The system messages that hold a persona and, but for white space, nothing else.

    Args:
        example (`dict[str, Any]`): A row from [`mark_persona`].
        spans (`list[Span]`): Its personas.

    Returns:
        `list[tuple[str, int]]`: Column and index of each.
    """
    found = []
    for column, index in dict.fromkeys((span.column, span.message) for span in spans):
        if index is None or example[column][index]["role"] not in ("system", "developer"):
            continue
        texts = [(holder[key], where) for holder, key, where, _ in _texts(example, "") if where[:2] == (column, index)]
        if not "".join(piece for text, where in texts for piece in _outside(text, spans, where)).strip():
            found.append((column, index))
    return found


def _outside(text: str, spans: list[Span], where: tuple[str, int | None, int | None]) -> list[str]:
    """The pieces of a text around its personas."""
    borders = [0, *(border for span in spans if span[:3] == where for border in span[3:]), len(text)]
    return [text[start:end] for start, end in zip(borders[::2], borders[1::2], strict=True)]


def _role(example: dict[str, Any], span: Span) -> str:
    return repr(span.column if span.message is None else example[span.column][span.message]["role"])


def describe(example: dict[str, Any], spans: list[Span], text_field: str = "text") -> tuple[str, str]:
    """
    What to show of a row beside its response.

    Args:
        example (`dict[str, Any]`): A row from [`mark_persona`].
        spans (`list[Span]`): Its personas.
        text_field (`str`, *optional*, defaults to `"text"`): Column of a plain language-modeling row.

    Returns:
        `tuple[str, str]`: The personas, a blank line between each two, and the query: the last text before the last response, "…"
        for each persona in it, without blank lines. Empty where there is none.
    """
    personas, query, before = [], "", ""
    for holder, key, where, is_response in _texts(example, text_field):
        personas += [holder[key][span.start : span.end] for span in spans if span[:3] == where]
        if is_response:
            query = before
        else:
            before = "…".join(_outside(holder[key], spans, where))
    return "\n\n".join(personas), re.sub(r"\s*\n\s*", "\n", query.strip())


def _excerpt(text: str, position: int, width: int = 30) -> str:
    start, end = max(position - width, 0), position + width
    return repr(("…" if start else "") + text[start:end] + ("…" if end < len(text) else ""))
