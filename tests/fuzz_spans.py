"""
Coverage-guided fuzzing of what finds personas in rows and in tokens (`trl_perce.persona`), against plain reference code.

    make fuzz FUZZ="-max_total_time=300"
"""

import re
import sys

import atheris


with atheris.instrument_imports(include=["trl_perce"]):
    from trl_perce.persona.marks import PersonaError, mark_persona, split_at_markers
    from trl_perce.persona.masks import byte_mask, text_and_offsets, token_mask, trim_persona

FRAGMENTS = [
    "<persona>",
    "</persona>",
    "{persona}",
    "<persona",
    "persona>",
    "{",
    "}",
    "<|im_start|>",
    " ",
    "\n",
    "é",
    "👩🏽‍🚀",
    "\u202e",
    "\ufdd0",
]
MARKERS = re.compile("(<persona>|</persona>)")
COUNTS = {"rows": 0, "marked": 0, "refused": 0}


def text_of(data) -> str:
    parts = []
    for _ in range(data.ConsumeIntInRange(0, 8)):
        choice = data.ConsumeIntInRange(0, 2 * len(FRAGMENTS))
        parts.append(FRAGMENTS[choice] if choice < len(FRAGMENTS) else data.ConsumeUnicodeNoSurrogates(6))
    return "".join(parts)


def expected_pieces(text: str) -> list[str] | None:
    """Texts and personas in turn, by a regular expression; `None` where markers do not alternate."""
    parts = MARKERS.split(text)
    if parts[1::2] != ["<persona>", "</persona>"] * (len(parts) // 4):
        return None
    return parts[::2]


def check_row(data) -> None:
    prompt, response, persona = text_of(data), text_of(data), text_of(data)
    is_chat, has_column = data.ConsumeBool(), data.ConsumeBool()
    row = (
        {"prompt": [{"role": "user", "content": prompt}], "completion": [{"role": "assistant", "content": response}]}
        if is_chat
        else {"prompt": prompt, "completion": response}
    )
    if has_column:
        row["persona"] = persona
    in_markers, in_response = expected_pieces(prompt), expected_pieces(response)
    try:
        marked, spans = mark_persona(row)
    except PersonaError:
        COUNTS["refused"] += 1
        # Refused for a reason that can be told from the texts alone
        outside = "".join(in_markers[::2]) if in_markers else ""
        assert (
            in_markers is None
            or in_response is None
            or len(in_response) > 1
            or any("{persona}" in piece for piece in [*in_markers[::2], response])
            or (has_column and persona != "" and "{persona}" not in outside)
        ), (row, prompt, response)
        return
    COUNTS["marked"] += 1
    text = marked["prompt"][0]["content"] if is_chat else marked["prompt"]
    answer = marked["completion"][0]["content"] if is_chat else marked["completion"]
    assert answer == response and in_markers is not None
    if len(in_markers) > 1:
        personas, outside = in_markers[1::2], "".join(in_markers[::2])
        assert text == "".join(in_markers)
    elif has_column:
        personas, outside = [persona] * prompt.count("{persona}"), prompt.replace("{persona}", "")
        assert text == persona.join(prompt.split("{persona}"))
    else:
        personas, outside = [], prompt
        assert text == prompt
    found = [(span.start, span.end) for span in spans]
    assert [text[start:end] for start, end in found] == [own for own in personas if own.strip()]
    left, position = "", 0
    for start, end in found:
        left, position = left + text[position:start], end
    blank = "".join(own for own in personas if not own.strip())
    assert len(left + text[position:]) == len(outside) + len(blank)
    check_tokens(data, text, found)


def check_tokens(data, text: str, spans: list[tuple[int, int]]) -> None:
    """Tokens cut anywhere between two bytes: those that share a character with a persona, and no others, are masked."""
    whole = text.encode()
    cuts = sorted(
        {0, len(whole), *(data.ConsumeIntInRange(0, len(whole)) for _ in range(data.ConsumeIntInRange(0, 12)))}
    )
    pieces = [whole[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    owner = [index for index, character in enumerate(text) for _ in character.encode()]
    inside = [any(start <= owner[byte] < end for start, end in spans) for byte in range(len(whole))]
    expected = [int(any(inside[a:b])) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert byte_mask(pieces, text, spans) == expected
    again, offsets = text_and_offsets(pieces)
    assert again == text and token_mask(offsets, spans) == expected
    length = data.ConsumeIntInRange(0, len(pieces) + 1)
    keep = trim_persona(expected, length)
    assert len(keep) == max(min(len(pieces), length), expected.count(0)) and keep == sorted({*keep})
    assert all(expected[index] for index in range(len(pieces)) if index not in keep)


def test_one_input(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    COUNTS["rows"] += 1
    text = text_of(provider)
    pieces = expected_pieces(text)
    try:
        assert split_at_markers(text, "<persona>", "</persona>") == pieces
    except PersonaError:
        assert pieces is None, text
    check_row(provider)
    if COUNTS["rows"] % 100_000 == 0:
        print(COUNTS, file=sys.stderr)


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
