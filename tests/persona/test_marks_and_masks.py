import copy
import json
import re
from importlib import resources

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trl_perce.persona.marks import PersonaError, mark_persona, render, split_at_markers, split_at_placeholder
from trl_perce.persona.masks import TokenBytes, byte_mask, mask_tokens, token_mask, trim_persona


# Public template of Mistral-7B-Instruct-v0.2; TRL ships none of Mistral.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
)
# A template that trims with Jinja and one that drops system messages
TRIMMING = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</>{% endfor %}"
DROPPING = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
)
REPEATING = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
)

SHIPPED = [
    "qwen3",
    "qwen3_instruct_2507",
    "qwen2_5",
    "llama3",
    "llama3_1",
    "llama3_2",
    "gemma",
    "gemma3",
    "phi3",
    "phi3_5",
]
PERSONAS = [
    "I sew my own dresses.",
    "naïve café, 北京に住んでいます, Ελλάδα",
    "👩🏽‍🚀 loves 🧵🪡 and 🐈‍⬛",
    "two\nlines\n\nand a tab\t.",
    "  spaces before",
    "spaces behind \n ",
    "\n\n both \n\n",
    "needles",  # stands in the question and in the answer too
    "a {brace} and {{ jinja }} and {% raw %}",
    "<think>no</think>",
]


def template_of(name: str) -> str:
    if name == "mistral":
        return MISTRAL
    return resources.files("trl").joinpath(f"chat_templates/{name}.jinja").read_text(encoding="utf-8")


def with_special_tokens(tokenizer, template):
    """A copy that knows the control tokens of a template, as the model's own tokenizer does."""
    tokenizer = copy.deepcopy(tokenizer)
    found = set(re.findall(r"<\|\w+\|>|<\w+_of_\w+>", template))
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(found)})
    return tokenizer


def persona_text(tokenizer, example, spans, template=None):
    """Decode the tokens that `persona_mask` keeps out of the counterfactual pass, and those that it leaves there."""
    text, found = render(example, spans, tokenizer, template)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = token_mask(encoded["offset_mapping"], found)
    inside = [token for token, m in zip(encoded["input_ids"], mask, strict=True) if m]
    outside = [token for token, m in zip(encoded["input_ids"], mask, strict=True) if not m]
    return tokenizer.decode(inside), tokenizer.decode(outside), encoded["input_ids"]


# ── markers and placeholder ──────────────────────────────────────────────────────────────────────────────────────────


def test_markers_any_number_of_times_adjacent_and_empty():
    assert split_at_markers("a", "<p>", "</p>") == ["a"]
    assert split_at_markers("a<p>b</p>c<p>d</p>", "<p>", "</p>") == ["a", "b", "c", "d", ""]
    assert split_at_markers("<p>b</p><p>c</p>", "<p>", "</p>") == ["", "b", "", "c", ""]
    assert split_at_markers("a<p></p>c", "<p>", "</p>") == ["a", "", "c"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a <p> b", "'<p>' is not closed"),
        ("a </p> b", "'</p>' without '<p>' at character 2"),
        ("<p> a <p> b </p></p>", "'<p>' inside of another persona at character 6"),
        ("<p> a </p></p>", "'</p>' without '<p>'"),
    ],
)
def test_unbalanced_and_nested_markers(text, reason):
    with pytest.raises(PersonaError, match=reason):
        split_at_markers(text, "<p>", "</p>")


pieces = st.lists(st.text(st.sampled_from("ab <>/{}\n🧵"), max_size=8), min_size=1, max_size=7)


@given(pieces)
def test_splitting_gives_back_what_was_joined(parts):
    parts = parts if len(parts) % 2 else parts[:-1]
    assume(all("[[" not in part and "]]" not in part for part in parts))
    text = "".join(p if i == 0 else ("[[" if i % 2 else "]]") + p for i, p in enumerate(parts))
    assert split_at_markers(text, "[[", "]]") == parts


@given(st.text(max_size=20), st.text(st.sampled_from("ab {}persona<>/"), max_size=20), st.text(max_size=20))
def test_the_persona_of_a_column_stays_literal(before, persona, behind):
    assume("{persona}" not in before + behind and "{persona}" not in before + "{persona}"[:-1])
    parts = split_at_placeholder(before + "{persona}" + behind, persona)
    if len(parts) == 3:  # else `before` and `{persona}` overlap into another placeholder
        assert parts == [before, persona, behind]


def test_a_column_with_a_marker_a_placeholder_and_braces_inside():
    persona = "I write {persona} and <persona>x</persona> and {0}"
    example, spans = mark_persona(
        {"prompt": "Keep {this}: {persona}! And {}", "completion": "ok {y}", "persona": persona}
    )
    assert example["prompt"] == f"Keep {{this}}: {persona}! And {{}}"
    (span,) = spans
    assert example["prompt"][span.start : span.end] == persona


def test_the_placeholder_may_stand_inside_of_markers_as_literal_text():
    example, spans = mark_persona({"text": "<persona>I write {persona} tags</persona> x"})
    assert example["text"] == "I write {persona} tags x"
    assert example["text"][spans[0].start : spans[0].end] == "I write {persona} tags"


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_column_is_no_persona(empty):
    example, spans = mark_persona({"prompt": "Me: {persona}. Hi", "completion": "x", "persona": empty})
    assert (example["prompt"], spans) == ("Me: . Hi", [])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a <persona> b", "completion": "c"}, "is not closed"),
        ({"prompt": "a {persona} b", "completion": "c"}, "there is no column 'persona'"),
        ({"prompt": "a b", "completion": "c", "persona": "I sew"}, "no '{persona}' in the prompt"),
        ({"prompt": "<persona>x</persona> {persona}", "completion": "c", "persona": "I sew"}, "both ways"),
        ({"prompt": "<persona>x</persona>", "completion": "c", "persona": "I sew"}, "both ways"),
        ({"prompt": "a", "completion": "<persona>c</persona>"}, "is in the response"),
        ({"prompt": "a", "completion": "c {persona}", "persona": "I sew"}, "is in the response"),
        ({"messages": [{"role": "assistant", "content": "<persona>c</persona>"}]}, "is in the response"),
        ({"prompt": "a {persona}", "completion": "c", "persona": ["I", "sew"]}, "holds a list. Write one string"),
        ({"prompt": "a"}, "column 'completion' is missing"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"conversations": []}, "'messages' is an empty list"),
        ({"prompt": [], "completion": [{"role": "assistant", "content": "c"}]}, "'prompt' is an empty list"),
        ({"question": "a"}, "column 'text' is missing"),
    ],
)
def test_rows_that_are_unclear(row, reason):
    with pytest.raises(PersonaError, match=reason):
        mark_persona(row)


def test_braces_in_a_response_are_text():
    example, spans = mark_persona({"prompt": "a", "completion": "f'{persona}'"})
    assert example["completion"] == "f'{persona}'" and spans == []


# ── templates ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*SHIPPED, "mistral", "smollm2"])
@pytest.mark.parametrize("persona", PERSONAS)
def test_templates(name, persona, smollm2_tokenizer):
    template = None if name == "smollm2" else template_of(name)
    tokenizer = smollm2_tokenizer if template is None else with_special_tokens(smollm2_tokenizer, template)
    clean = [
        {"role": "user", "content": f"Past:\n{persona}\nnow needles, {persona.strip()}? {persona}"},
        {"role": "assistant", "content": "Buy needles."},
    ]
    marked = [
        {
            "role": "user",
            "content": f"Past:\n<persona>{persona}</persona>\nnow needles, {persona.strip()}? <persona>{persona}</persona>",
        },
        {"role": "assistant", "content": "Buy needles."},
    ]
    example, spans = mark_persona({"messages": marked})
    assert example["messages"] == clean and len(spans) == 2
    inside, outside, ids = persona_text(tokenizer, example, spans, template)
    expected = tokenizer.apply_chat_template(clean, chat_template=template, tokenize=True)["input_ids"]
    assert ids == expected
    # The very persona, twice, and not its repetition in the question. A neighbouring space may be one of its tokens'.
    assert inside.split() == (persona + " " + persona).split()
    assert "".join(outside.split()).count("".join(persona.split())) == 1 + (persona == "needles") * 2
    assert "Buy needles." in outside


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_persona_that_is_a_whole_message(role, smollm2_tokenizer):
    messages = [
        {"role": role, "content": "<persona>  I sew.\n</persona>"},
        {"role": "user" if role == "system" else "assistant", "content": "Hello"},
    ]
    example, spans = mark_persona({"messages": messages})
    inside, outside, _ = persona_text(smollm2_tokenizer, example, spans, TRIMMING)
    assert inside == "I sew." and outside.startswith(f"<{role}></>")


def test_a_template_that_loses_or_repeats_the_persona_is_named(tokenizer):
    example, spans = mark_persona(
        {"messages": [{"role": "system", "content": "<persona>I sew.</persona>"}, {"role": "user", "content": "Hi"}]}
    )
    with pytest.raises(PersonaError, match=r"rendered 0 of 1 personas.*'system'"):
        render(example, spans, tokenizer, DROPPING)
    example, spans = mark_persona({"messages": [{"role": "user", "content": "<persona>I sew.</persona>"}]})
    with pytest.raises(PersonaError, match="rendered 2 of 1 personas"):
        render(example, spans, tokenizer, REPEATING)
    with pytest.raises(PersonaError, match="rejects this conversation.*must alternate"):
        messages = [{"role": "system", "content": "<persona>x</persona>"}, {"role": "user", "content": "Hi"}]
        render(*mark_persona({"messages": messages}), tokenizer, MISTRAL)


def test_content_in_parts(smollm2_tokenizer):
    template = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}|{% endfor %}{% endfor %}"
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "me <persona>I sew</persona>"}]
    example, spans = mark_persona({"messages": [{"role": "user", "content": parts}]})
    inside, outside, _ = persona_text(smollm2_tokenizer, example, spans, template)
    assert inside.strip() == "I sew" and outside == "Hi|me|"


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def tilings(draw):
    """A text cut into tokens, and disjoint spans in it."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=30))
    offsets, position = [], 0
    for length in lengths:
        offsets.append((position, position + length))
        position += length
    cuts = sorted(draw(st.lists(st.integers(0, position), max_size=8)))
    spans = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b]
    return offsets, spans


@given(tilings())
def test_a_token_is_masked_exactly_if_it_holds_a_character_of_a_span(tiling):
    offsets, spans = tiling
    characters = {c for start, end in spans for c in range(start, end)}
    assert token_mask(offsets, spans) == [int(any(c in characters for c in range(*offset))) for offset in offsets]


@settings(max_examples=60)
@given(st.text(st.sampled_from("ab é🧵👩🏽‍🚀北\n\t {}"), min_size=1, max_size=40), st.data())
def test_no_byte_of_the_persona_stays_on_a_real_tokenizer(smollm2_tokenizer, text, data):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    encoded = smollm2_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = token_mask(encoded["offset_mapping"], [(start, end)] if start < end else [])
    # Bytes of each token, independently of offsets: this vocabulary is byte-level
    sizes = [len(smollm2_tokenizer.convert_ids_to_tokens(token)) for token in encoded["input_ids"]]
    assert sum(sizes) == len(text.encode())
    first, last, position = len(text[:start].encode()), len(text[:end].encode()), 0
    for size, masked in zip(sizes, mask, strict=True):
        overlaps = position < last and position + size > first and start < end
        # A token that is a part of one character counts as that character
        assert masked or not overlaps
        position += size
    assert start < end or not any(mask)


def check_byte_mask(tokenizer, text, data):
    """`byte_mask` of the tokenizer's tokens is `token_mask` of the offsets that it gives itself."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    spans = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    token_bytes = TokenBytes(tokenizer)
    mask = byte_mask([token_bytes[token] for token in encoded["input_ids"]], text, spans)
    assert mask == token_mask(encoded["offset_mapping"], spans)


TEXTS = st.text(st.sampled_from("ab é🧵👩🏽‍🚀北\n\t {}.▁"), max_size=40)


@settings(max_examples=200)
@given(TEXTS, st.data())
def test_the_tokens_bytes_give_the_mask_of_the_offsets(smollm2_tokenizer, text, data):
    pieces = data.draw(st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", text, text[::-1], "needles, "])))
    check_byte_mask(smollm2_tokenizer, "".join(pieces), data)


@pytest.fixture(scope="module")
def gemma_like():
    """A vocabulary that writes a space as `▁` and falls back on bytes, as Gemma's does."""
    tokens = [*"▁ab.é", "▁▁", "▁a", "▁ab", "ab", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("▁", "▁"), ("▁", "a"), ("a", "b"), ("▁a", "b")]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@settings(max_examples=200)
@given(st.text(st.sampled_from("ab é🧵北\n."), max_size=30), st.data())
def test_the_tokens_bytes_of_a_vocabulary_with_byte_fallback(gemma_like, text, data):
    check_byte_mask(gemma_like, text, data)


def test_tokens_that_are_not_the_texts_are_noticed(gemma_like, smollm2_tokenizer):
    for tokenizer, text, others in (
        (gemma_like, "a▁b", []),  # its tokens say "a b"
        (smollm2_tokenizer, "I sew", smollm2_tokenizer("!")["input_ids"]),
    ):
        token_bytes = TokenBytes(tokenizer)
        pieces = [token_bytes[token] for token in tokenizer(text)["input_ids"] + others]
        assert byte_mask(pieces, text, [(0, 1)]) is None


@given(tilings())
def test_bytes_of_a_text_of_one_byte_a_character(tiling):
    offsets, spans = tiling
    size = offsets[-1][1]
    assert byte_mask([b"a" * (end - start) for start, end in offsets], "a" * size, spans) == token_mask(offsets, spans)


@given(st.lists(st.integers(0, 1), max_size=40), st.integers(0, 45))
def test_trimming_takes_persona_tokens_from_the_end_and_no_others(mask, max_length):
    keep = trim_persona(mask, max_length)
    removed = [i for i in range(len(mask)) if i not in keep]
    assert keep == sorted(keep) and all(mask[i] for i in removed)
    assert len(keep) == max(min(len(mask), max_length), mask.count(0))
    # No kept persona token stands behind a removed one
    assert not removed or not any(mask[i] for i in keep if i > removed[0])


def test_spans_survive_json():
    _, spans = mark_persona({"messages": [{"role": "user", "content": "<persona>a</persona>"}]})
    assert json.loads(json.dumps(spans)) == [["messages", 0, None, 0, 1]]


# ── tokenizers of which only their offsets tell ──────────────────────────────────────────────────────────────────────

WORDS = ["I sew my own dresses and love linen. What should I buy? A new set of needles, 🧵 naïve café."] * 4


def byte_level(trim_offsets, add_prefix_space, normalizer, adds_tokens):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    bpe.decoder = decoders.ByteLevel()
    if normalizer is not None:
        bpe.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<s>", "</s>"], "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=400, **options))
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if adds_tokens:
        ends = (("</s>", 1), ("<s>", 0))
        bpe.post_processor = processors.RobertaProcessing(*ends, trim_offsets, add_prefix_space)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.fixture(scope="module")
def odd_tokenizers():
    kinds = [(True, None, False), (False, normalizers.Lowercase(), False), (True, None, True), (False, None, True)]
    return [[byte_level(trims, *kind) for trims in (True, False)] for kind in kinds]


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from(["I", "sew", " ", "  ", "\n", "é", "🧵", ".", " Wh", "linen"]), min_size=1).map("".join),
    st.data(),
)
def test_trimmed_offsets_give_the_mask_of_whole_ones(odd_tokenizers, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    spans = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b]
    for trimming, whole in odd_tokenizers:
        for adds in (False, True):
            encoded = whole(text, add_special_tokens=adds, return_offsets_mapping=True)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
            assert trimming(text, add_special_tokens=adds)["input_ids"] == ids
            assert mask_tokens(ids, text, spans, TokenBytes(trimming)) == token_mask(offsets, spans)


@pytest.fixture(scope="module")
def word_piece():
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    options = {"special_tokens": ["[UNK]", "[CLS]", "[SEP]"], "show_progress": False}
    pieces.train_from_iterator(WORDS, trainers.WordPieceTrainer(vocab_size=120, **options))
    pieces.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]")


def test_word_pieces(word_piece):
    token_bytes = TokenBytes(word_piece)

    def split(before, persona, behind):
        text = before + persona + behind
        ids = word_piece(text)["input_ids"]
        mask = mask_tokens(ids, text, [(len(before), len(before) + len(persona))], token_bytes)
        return [[token for token, own in zip(ids, mask, strict=True) if own == inside] for inside in (0, 1)]

    def ids_of(*texts):
        return [token for text in texts for token in word_piece(text, add_special_tokens=False)["input_ids"]]

    for before, persona, behind in [
        ("I buy ", "my dresses ", "and linen"),  # the blank is no part of the word behind
        ("I buy", " my dresses", " and linen"),
        ("buy:", "my dresses", ".linen"),
        ("I buy 北京 ", "🧵 ", "and 🧵"),
    ]:
        outside, inside = split(before, persona, behind)
        assert (outside, inside) == ([1, *ids_of(before, behind), 2], ids_of(persona))
    with pytest.raises(
        PersonaError, match="knows no part of 'linen🧵', of which a part is the persona's.*Write a space"
    ):
        split("I buy linen", "🧵", " now")
    assert mask_tokens([1, 5, 2], "I sew", [(0, 1)], token_bytes) is None
