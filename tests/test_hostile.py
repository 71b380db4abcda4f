"""
Hostile and odd texts, end to end over the preparation of data: markers, control tokens of chat templates, right-to-left and
zero-width characters, huge and empty ones. The persona never leaks into the counterfactual, markers never reach the model, and what
cannot be used is an error that names the row.
"""

import json

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_perce import DataCollatorForPerCE, PerCEConfig, PerContrast, PersonaError
from trl_perce.cli.main import main
from trl_perce.scoring.preparation import Preparation


FRAGMENTS = [
    *(
        "<persona>",
        "</persona>",
        "{persona}",
        "{",
        "}",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_start|>assistant\n",
    ),
    *(
        "\ufdd0",
        "\u200b",
        "\u200d",
        "\u202e",
        "\u2066",
        "\ufeff",
        "\u0301",
        "שלום",
        "مرحبا",
        "👩‍👩‍👧",
        "🧵",
        "北京",
        "é",
    ),
    *(
        "\0",
        "\x1b[31m",
        "\r\n",
        "\u2028",
        "\x85",
        "\t",
        "   ",
        "\n\n",
        "{{ messages }}",
        "{% for x in y %}",
        "'; DROP",
        "%s",
        "\\",
    ),
    *("I sew", " linen", "needles.", "a", " "),
]
texts = st.one_of(st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join), st.text(max_size=12))
CANARIES = ["Zqx", "Wvk"]  # at both ends of the persona; nothing else has them
MARKS = ("<persona>", "</persona>", "{persona}")


@pytest.fixture(scope="module")
def prepare(smollm2_tokenizer, tmp_path_factory):
    args = PerCEConfig(
        str(tmp_path_factory.mktemp("run")), use_cpu=True, bf16=False, max_length=None, report_to="none"
    )
    preparation = Preparation(smollm2_tokenizer, args)

    def prepared(row):
        """The tokenized row, or `None` if it was left out."""
        rows, _ = next(preparation(Dataset.from_list([row]), "hostile").blocks())
        return rows[0] if rows and rows[0].get("input_ids") else None

    return prepared


def decode(tokenizer, tokens) -> str:
    return tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)


def check(row, persona, response, tokenizer, outside):
    """What must hold of a tokenized row."""
    ids, mask, labels = (np.array(row[name]) for name in ("input_ids", "persona_mask", "labels"))
    (counterfactual,) = DataCollatorForPerCE(0)([row])["counterfactual_rows"]
    kept = decode(tokenizer, counterfactual["input_ids"])
    assert not any(canary in kept for canary in CANARIES)
    assert any(canary in decode(tokenizer, ids) for canary in CANARIES)
    masked = decode(tokenizer, ids[mask == 1])
    assert (
        persona.strip() in masked
        or "\ufffd" in masked
        or not tokenizer.decode(tokenizer(persona)["input_ids"]) == persona
    )
    # The response is the same in both, token for token
    assert (ids[labels != -100] == labels[labels != -100]).all() and not mask[labels != -100].any()
    trained = counterfactual["labels"][counterfactual["labels"] != -100]
    assert trained.tolist() == labels[labels != -100].tolist()
    for mark in MARKS:  # ours are gone; those of the texts stay what they are
        assert decode(tokenizer, ids).count(mark) == sum(text.count(mark) for text in (persona, response, *outside))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(persona=texts, before=texts, behind=texts, response=texts, system=st.none() | texts)
def test_a_persona_in_a_column(prepare, smollm2_tokenizer, persona, before, behind, response, system):
    persona = f"{CANARIES[0]}{persona}{CANARIES[1]}"
    messages = [{"role": "user", "content": f"{before}: {{persona}} {behind}"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    row = {"persona": persona, "prompt": messages, "completion": [{"role": "assistant", "content": response + "."}]}
    outside = (before, behind, system or "")
    try:
        found = prepare(row)
    except PersonaError as error:
        assert str(error).startswith("Row 0 of the hostile dataset: ") or "hostile" in str(error)
        # An error only where there is something to tell: a mark outside of the persona, or a border's character
        assert any(mark in text for mark in (*MARKS, "\ufdd0") for text in (*outside, response, persona))
        return
    if any(mark in text for mark in MARKS[2:] for text in outside):
        return  # a second place for the persona, which is the user's to choose
    check(found, persona, response, smollm2_tokenizer, outside)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(persona=texts, before=texts, behind=texts, response=texts)
def test_a_persona_between_markers(prepare, smollm2_tokenizer, persona, before, behind, response):
    persona = f"{CANARIES[0]}{persona}{CANARIES[1]}"
    content = f"{before}: <persona>{persona}</persona> {behind}"
    row = {
        "prompt": [{"role": "user", "content": content}],
        "completion": [{"role": "assistant", "content": response + "."}],
    }
    parts = (persona, before, behind, response)
    try:
        found = prepare(row)
    except PersonaError as error:
        assert "ow 0" in str(error)
        assert any(mark in text for mark in (*MARKS, "\ufdd0") for text in parts)
        return
    if any(mark in text for mark in MARKS for text in parts):
        return  # balanced markers of the user's own: more personas
    check(found, persona, response, smollm2_tokenizer, (before, behind))


def test_a_persona_of_a_megabyte(tiny_model):
    scorer = PerContrast(tiny_model, use_cpu=True, bf16=False, max_length=128)
    row = {
        "persona": "I sew my own dresses. " * 48_000,
        "prompt": [{"role": "user", "content": "Me: {persona}\nWhat should I buy?"}],
        "completion": [{"role": "assistant", "content": "A new set of needles."}],
    }
    scores = scorer.score(row)
    assert len(row["persona"]) > 1e6 and np.isfinite(scores.pir).all() and "needles" in "".join(scores.tokens)


ROW = {
    "persona": "I sew.",
    "prompt": [{"role": "user", "content": "Me: {persona}\nWhat now?"}],
    "completion": [{"role": "assistant", "content": "Needles."}],
}


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"persona": "half \ud83d"}, "Row 1.*half of a surrogate pair"),
        ({"completion": [{"role": "assistant", "content": "half \ud83d"}]}, "Row 1.*half of a surrogate pair"),
        ({"persona": 7}, "Row 1: column 'persona' is a number, while it is a text in row 0"),
        ({"prompt": None}, "[Rr]ow 1.*'prompt'"),
        ({"completion": None}, "[Rr]ow 1.*'completion'"),
        ({"prompt": "text and no messages"}, "Row 1: column 'prompt' is a text, while it is a list in row 0"),
    ],
    ids=["surrogate", "surrogate in a message", "number", "no prompt", "no completion", "mixed"],
)
def test_rows_of_python_that_cannot_be_are_named(tiny_model, bad, message):
    scorer = PerContrast(tiny_model, use_cpu=True, bf16=False)
    with pytest.raises(PersonaError, match=message):
        scorer.score([ROW, {**ROW, **bad}, ROW])


@pytest.mark.parametrize(
    "line, message",
    [
        (
            json.dumps({**ROW, "persona": "half \ud83d"}),
            "rows.jsonl cannot be read. Line 2: column 'persona' holds half",
        ),
        (json.dumps({**ROW, "persona": 7}), "row 1: column 'persona' holds a int"),
        (json.dumps({**ROW, "prompt": None}), "row 1"),
        ('{"persona": "I sew', "rows.jsonl cannot be read. Line 2 is no JSON"),
    ],
    ids=["surrogate", "number", "null", "cut"],
)
def test_files_that_cannot_be_are_named(tiny_model, tmp_path, capsys, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "score",
                "--model_name_or_path",
                tiny_model,
                "--dataset_name",
                str(path),
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 2 and "trl-perce score: error: " in error and message in error.replace("Row", "row")
    ), error
