# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Where the persona is: marks in a row's text → character spans → one token mask (`persona_mask`).

Everything here works on one row. `dataset.py` runs it over a dataset.
"""

import copy
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any, NamedTuple

from jinja2 import TemplateError
from tokenizers import decoders, pre_tokenizers
from transformers import PreTrainedTokenizerBase
from trl import is_conversational, maybe_convert_to_chatml


PLACEHOLDER = "{persona}"
# Stands in for a span's border while a chat template renders the row. Unicode keeps U+FDD0 free for internal use: it is
# no character, no template treats it as white space, and valid text does not hold it.
_BORDER = "\ufdd0"
# The character that stands for each byte in a byte-level vocabulary: printable ones for themselves, then from U+0100 on
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_PRINTABLE = [ord(character) for character in _ALPHABET if ord(character) < 256]
_BYTES = dict(zip(_ALPHABET, [*_PRINTABLE, *sorted(set(range(256)) - {*_PRINTABLE})], strict=True))


class PersonaError(ValueError):
    """The persona cannot be told from a row's text; the message names the row, the reason and what to write instead."""


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
) -> tuple[dict[str, Any], list[Span]]:
    """
    Find the persona in a row that is not yet tokenized: between markers, or in the column `persona`, whose text takes
    the place of `{persona}`.

    Args:
        example (`dict[str, Any]`): A row of any dataset type of TRL's SFT. Its messages are changed in place.
        text_field (`str`, *optional*, defaults to `"text"`): Column of a plain language-modeling row.
        start_marker (`str`, *optional*, defaults to `"<persona>"`): Text that opens a persona.
        end_marker (`str`, *optional*, defaults to `"</persona>"`): Text that closes it.

    Returns:
        `tuple[dict[str, Any], list[Span]]`: The row as TRL shall see it (ChatML, marks taken out, persona filled in),
        and its personas in order. A persona of white space alone is none.

    Raises:
        `PersonaError`: The row says neither clearly that it has a persona nor that it has none.
    """
    example = maybe_convert_to_chatml(example)
    persona = example.get("persona")
    if persona is not None and not isinstance(persona, str):
        raise PersonaError(
            f"column 'persona' holds a {type(persona).__name__}. Write one string (join a list of sentences)."
        )

    spans, has_markers, has_placeholder = [], False, False
    for holder, key, where, is_response in _texts(example, text_field):
        text = holder[key]
        marked = split_at_markers(text, start_marker, end_marker)
        in_markers = len(marked) > 1
        in_column = any(PLACEHOLDER in piece for piece in marked[::2])
        if is_response:
            if in_markers or (in_column and persona is not None):
                raise PersonaError(
                    f"the persona is inside of the response ({where[0]!r}): {_excerpt(text, 0)}. The response must not "
                    "change when the persona is taken away: move the persona to the prompt."
                )
            continue
        has_markers |= in_markers
        has_placeholder |= in_column
        if in_column and "persona" not in example:
            raise PersonaError(
                f"{where[0]!r} holds {PLACEHOLDER!r} and there is no column 'persona'. Add the column, or write "
                f"{start_marker}…{end_marker} around the persona."
            )
        pieces = marked if not in_column else split_at_placeholder(text, persona or "")
        position = 0
        for index, piece in enumerate(pieces):
            if index % 2 and piece.strip():
                spans.append(Span(*where, position, position + len(piece)))
            position += len(piece)
        holder[key] = "".join(pieces)

    if has_markers and (persona or has_placeholder):
        raise PersonaError(
            f"the persona is given both ways, in markers and as column 'persona' with {PLACEHOLDER!r}. Keep one of them."
        )
    if persona and not has_placeholder:
        raise PersonaError(
            f"there is a column 'persona' and no {PLACEHOLDER!r} in the prompt. Write {PLACEHOLDER!r} where the persona "
            "belongs, or remove or rename the column."
        )
    return example, spans


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
                "or 'input_ids'."
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
        tools = example.get("tools")
        try:
            rendered = tokenizer.apply_chat_template(
                [message for messages in values for message in messages],
                tokenize=False,
                chat_template=chat_template,
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                **(example.get("chat_template_kwargs") or {}),
            )
        except TemplateError as error:
            raise PersonaError(f"the chat template does not take this conversation: {error}") from error
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


def _role(example: dict[str, Any], span: Span) -> str:
    return repr(span.column if span.message is None else example[span.column][span.message]["role"])


def token_mask(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """
    The tokens that hold at least one character of a span.

    A token whose text reaches over a span's border counts as inside: no part of a persona stays in the context. Where a
    tokenizer leaves white space out of its offsets (`trim_offsets`), it belongs to the token behind it.

    Args:
        offsets (`list[tuple[int, int]]`): Half-open character span of each token, in order.
        spans (`list[tuple[int, int]]`): Half-open character spans, in order.

    Returns:
        `list[int]`: For each token 1 (inside of a span) or 0.
    """
    mask, previous_end, first = [], 0, 0
    for start, end in offsets:
        if end > previous_end:
            start = min(start, previous_end)
            previous_end = end
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        mask.append(int(first < len(spans) and spans[first][0] < end and start < end))
    return mask


class TokenBytes(dict):
    """
    The bytes of text that each token stands for, found when first asked for: in byte-level vocabularies (GPT-2's, Llama
    3's, Qwen's) and in those that write a space as `▁` (Gemma's). Of other tokenizers they need not be right, which
    [`byte_mask`] notices.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.tokenizer = tokenizer
        self.byte_level = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)

    def __missing__(self, token_id: int) -> bytes:
        token = self.tokenizer.convert_ids_to_tokens(token_id) or ""
        if self.byte_level:
            # A character that stands for no byte is in an added token, which is as it stands in the text
            known = all(character in _BYTES for character in token)
            value = bytes(_BYTES[character] for character in token) if known else token.encode()
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            value = bytes([int(token[3:5], 16)])
        else:
            value = token.replace("▁", " ").encode()
        self[token_id] = value
        return value


def byte_mask(pieces: list[bytes], text: str, spans: list[tuple[int, int]]) -> list[int] | None:
    """
    [`token_mask`] from the tokens' bytes, without tokenizing the text again.

    Args:
        pieces (`list[bytes]`): Bytes of each token, in order.
        text (`str`): What the tokens should stand for.
        spans (`list[tuple[int, int]]`): Half-open character spans in the text, in order, none of them empty.

    Returns:
        `list[int]` or `None`: For each token 1 (inside of a span) or 0; `None` if the tokens' bytes are not, one after the
        other, those of the text: then they do not tell where the tokens are.
    """
    if b"".join(pieces) != text.encode():
        return None
    ends = list(accumulate(map(len, pieces)))
    mask = [0] * len(pieces)
    for start, end in spans:
        start, end = (len(text[:character].encode()) for character in (start, end))
        first, last = bisect_right(ends, start), bisect_left(ends, end)
        mask[first : last + 1] = [1] * (last + 1 - first)
    return mask


def text_and_offsets(pieces: list[bytes]) -> tuple[str, list[tuple[int, int]]]:
    """
    The text of tokens, and where each of them is in it.

    Args:
        pieces (`list[bytes]`): Bytes of each token, in order.

    Returns:
        `tuple[str, list[tuple[int, int]]]`: The text, with U+FFFD for each byte that is part of no character, and the half-open
        character span of each token. Tokens that share a character (of several bytes) all have it in their span.
    """
    text = b"".join(pieces).decode(errors="surrogateescape")  # which makes one character of each byte that is none
    characters = [index for index, character in enumerate(text) for _ in character.encode(errors="surrogateescape")]
    offsets, position = [], 0
    for piece in pieces:
        start = characters[position] if position < len(characters) else len(text)
        position += len(piece)
        offsets.append((start, characters[position - 1] + 1 if piece else start))
    return re.sub("[\udc80-\udcff]", "\ufffd", text), offsets


def trim_persona(persona_mask: list[int], max_length: int) -> list[int]:
    """
    The tokens that stay when a row must get shorter and only its persona may: persona tokens leave from the end.

    Args:
        persona_mask (`list[int]`): 1 where a token belongs to the persona.
        max_length (`int`): Number of tokens that the row may have.

    Returns:
        `list[int]`: Indices of the tokens that stay, in order. They are more than `max_length` if those outside of the
        persona alone are.
    """
    excess = len(persona_mask) - max_length
    persona = [index for index, is_persona in enumerate(persona_mask) if is_persona]
    removed = set(persona[max(len(persona) - excess, 0) :]) if excess > 0 else set()
    return [index for index in range(len(persona_mask)) if index not in removed]


def persona_stretches(input_ids: list[int], persona_mask: list[int]) -> list[list[int]]:
    """
    The tokens of a row's personas.

    Args:
        input_ids (`list[int]`): Tokens of the row.
        persona_mask (`list[int]`): 1 where a token belongs to a persona.

    Returns:
        `list[list[int]]`: Tokens of each unbroken stretch of them, in order.
    """
    groups = groupby(zip(input_ids, persona_mask, strict=True), key=itemgetter(1))
    return [[token for token, _ in group] for is_persona, group in groups if is_persona]


def swap_persona(
    input_ids: list[int], labels: list[int], persona_mask: list[int], others: list[list[int]]
) -> tuple[list[int], list[int]]:
    """
    Put another row's personas in the places of a row's own: the k-th stretch for the k-th. Where the other row has fewer, the
    last places stay empty; where it has more, the last place takes them all.

    Args:
        input_ids (`list[int]`): Tokens of the row.
        labels (`list[int]`): Its labels, `-100` on tokens that are not scored; those of the personas are not kept.
        persona_mask (`list[int]`): 1 where a token belongs to a persona; at least one does.
        others (`list[list[int]]`): The other row's [`persona_stretches`].

    Returns:
        `tuple[list[int], list[int]]`: Tokens and labels with the other personas, whose labels are `-100`.
    """
    places = len(persona_stretches(input_ids, persona_mask))
    others = [*others[: places - 1], [token for stretch in others[places - 1 :] for token in stretch]]
    new_ids, new_labels, previous = [], [], 0
    for token, label, is_persona in zip(input_ids, labels, persona_mask, strict=True):
        if is_persona and not previous and others:
            stretch = others.pop(0)
            new_ids += stretch
            new_labels += [-100] * len(stretch)
        if not is_persona:
            new_ids.append(token)
            new_labels.append(label)
        previous = is_persona
    return new_ids, new_labels


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
        own = [(span.start, span.end) for span in spans if span[:3] == where]
        personas += [holder[key][start:end] for start, end in own]
        if is_response:
            query = before
        else:
            borders = [0, *(border for span in own for border in span), len(holder[key])]
            before = "…".join(holder[key][start:end] for start, end in zip(borders[::2], borders[1::2], strict=True))
    return "\n\n".join(personas), re.sub(r"\s*\n\s*", "\n", query.strip())


def _excerpt(text: str, position: int, width: int = 30) -> str:
    start, end = max(position - width, 0), position + width
    return repr(("…" if start else "") + text[start:end] + ("…" if end < len(text) else ""))
