# SPDX-License-Identifier: Apache-2.0

"""Which of a row's tokens are the persona's: character spans → one token mask (`persona_mask`), and what is done with it."""

import copy
import re
from bisect import bisect_left, bisect_right
from functools import cached_property
from itertools import accumulate, groupby
from operator import itemgetter

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase

from .marks import PersonaError


# The character that stands for each byte in a byte-level vocabulary: printable ones for themselves, then from U+0100 on
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_PRINTABLE = [ord(character) for character in _ALPHABET if ord(character) < 256]
_BYTES = dict(zip(_ALPHABET, [*_PRINTABLE, *sorted(set(range(256)) - {*_PRINTABLE})], strict=True))


def token_mask(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """
    The tokens that hold at least one character of a span.

    A token whose text reaches over a span's border counts as inside: no part of a persona stays in the context.

    Args:
        offsets (`list[tuple[int, int]]`): Half-open character span of each token, in order, white space that is a part of it
            included.
        spans (`list[tuple[int, int]]`): Half-open character spans, in order.

    Returns:
        `list[int]`: For each token 1 (inside of a span) or 0.
    """
    mask, first = [], 0
    for start, end in offsets:
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
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A fast tokenizer, where anything is asked for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.tokenizer = tokenizer

    @cached_property
    def byte_level(self) -> bool:
        return isinstance(self.tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)

    @cached_property
    def _backend(self) -> Tokenizer:
        """Without its last step, which adds tokens, and may take white space off the offsets (`trim_offsets`)."""
        backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        backend.post_processor = processors.Sequence([])
        backend.no_truncation()
        backend.no_padding()
        return backend

    def offsets(self, text: str, ids: list[int]) -> list[tuple[int, int]] | None:
        """
        Where a text's tokens are in it, told by the tokenizer.

        Args:
            text (`str`): The text.
            ids (`list[int]`): Its tokens, those that the tokenizer adds at both ends included, if any.

        Returns:
            `list[tuple[int, int]]` or `None`: Half-open character span of each token, empty of those that are added; `None` if the
            text has other tokens.
        """
        own = self._backend.encode(text, add_special_tokens=False)
        for before in range(len(ids) - len(own.ids) + 1):
            behind = len(ids) - len(own.ids) - before
            if ids[before : len(ids) - behind] == own.ids:
                return [(0, 0)] * before + own.offsets + [(0, 0)] * behind
        return None

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


def mask_tokens(ids: list[int], text: str, spans: list[tuple[int, int]], token_bytes: TokenBytes) -> list[int] | None:
    """
    [`token_mask`] of a text's tokens, wherever it can be had from.

    Args:
        ids (`list[int]`): Tokens of the text.
        text (`str`): The text.
        spans (`list[tuple[int, int]]`): Half-open character spans in it, in order, none of them empty.
        token_bytes ([`TokenBytes`]): Of the tokenizer.

    Returns:
        `list[int]` or `None`: For each token 1 (inside of a span) or 0; `None` if the text has other tokens.

    Raises:
        `PersonaError`: The tokenizer has one unknown token for a word of which a part is in a span and a part is not.
    """
    mask = byte_mask([token_bytes[token] for token in ids], text, spans)
    if mask is not None:
        return mask
    # The tokenizer adds, changes or leaves out characters: ask it where its tokens are
    offsets = token_bytes.offsets(text, ids)
    if offsets is None:
        return None
    mask, unknown = token_mask(offsets, spans), token_bytes.tokenizer.unk_token_id
    for token, (start, end), is_inside in zip(ids, offsets, mask, strict=True):
        if token == unknown and is_inside and not any(first <= start and end <= last for first, last in spans):
            raise PersonaError(
                f"the tokenizer knows no part of {text[start:end]!r}, of which a part is the persona's and a part is not: both would "
                "be taken away together. Write a space between them."
            )
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
