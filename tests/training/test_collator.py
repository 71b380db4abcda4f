import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_perce import DataCollatorForPerCE
from trl_perce.training.collator import has_counterfactual


ROWS = st.lists(
    st.lists(st.tuples(st.integers(4, 99), st.booleans(), st.booleans()), min_size=2, max_size=12),
    min_size=1,
    max_size=4,
)


def to_examples(rows):
    return [
        {
            "input_ids": [token for token, _, _ in row],
            "labels": [token if trained else -100 for token, _, trained in row],
            "persona_mask": [int(is_persona) for _, is_persona, _ in row],
        }
        for row in rows
    ]


def labelled(rows) -> list[int]:
    return [int(token) for row in rows for token in row["labels"] if token != -100]


@given(ROWS, st.sampled_from(["drop", "mask"]), st.booleans())
def test_both_passes_hold_the_same_trained_tokens_in_the_same_order(rows, counterfactual, padding_free):
    examples = to_examples(rows)
    collator = DataCollatorForPerCE(pad_token_id=0, counterfactual=counterfactual, padding_free=padding_free)
    batch = collator(examples)
    assert batch["has_counterfactual"].shape == batch["labels"].shape
    factual = batch["labels"][:, 1:][batch["has_counterfactual"][:, 1:]]
    assert not batch["has_counterfactual"][:, 0].any()
    without_persona = batch["counterfactual_rows"]
    assert factual.tolist() == labelled(without_persona)
    assert all(len(row["input_ids"]) == len(row["labels"]) > 1 and row["labels"][0] == -100 for row in without_persona)
    # The persona is not there, or not seen
    seen = [
        row["input_ids"][row.get("attention_mask", np.ones(len(row["labels"]))) == 1].tolist()
        for row in without_persona
    ]
    outside = [[t for t, m in zip(e["input_ids"], e["persona_mask"], strict=True) if not m] for e in examples]
    paired = [has_counterfactual(e["labels"], e["persona_mask"]).any() for e in examples]
    assert seen == [tokens for tokens, is_paired in zip(outside, paired, strict=True) if is_paired]


@given(ROWS, st.sampled_from(["drop", "mask"]))
def test_a_packed_row_holds_the_counterfactuals_of_its_documents(rows, counterfactual):
    examples = to_examples(rows)
    packed = {column: sum((example[column] for example in examples), []) for column in examples[0]}
    packed["seq_lengths"] = [len(row) for row in rows]
    collator = DataCollatorForPerCE(pad_token_id=0, counterfactual=counterfactual, padding_free=True)
    one, many = collator([packed]), collator(examples)
    assert one.keys() == many.keys()
    assert torch.equal(one["has_counterfactual"], many["has_counterfactual"])
    assert str(one["counterfactual_rows"]) == str(many["counterfactual_rows"])


@given(ROWS, st.booleans())
def test_counterfactual_batches_keep_rows_apart_and_count_positions_anew(rows, padding_free):
    rows = DataCollatorForPerCE(pad_token_id=0)(to_examples(rows))["counterfactual_rows"]
    if not rows:
        return
    batch = DataCollatorForPerCE(pad_token_id=0, padding_free=padding_free).counterfactual_batch(rows)
    labels = batch["labels"][:, 1:]
    assert labels[labels != -100].tolist() == labelled(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    if padding_free:
        assert batch["position_ids"].tolist() == [[position for length in lengths for position in range(length)]]
        assert "attention_mask" not in batch
    else:
        assert batch["attention_mask"].sum(1).tolist() == lengths


@given(ROWS, st.booleans())
def test_the_factual_pass_is_trls_batch(rows, padding_free):
    examples = to_examples(rows)
    ours = DataCollatorForPerCE(pad_token_id=0, padding_free=padding_free)(examples)
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)(examples)
    assert ours.keys() == theirs.keys() | {"has_counterfactual", "counterfactual_rows"}
    for key, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(value))


def test_rows_without_a_persona_or_without_the_column_are_not_in_the_counterfactual_batch():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "persona_mask": [0, 0, 0]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "persona_mask": [0, 1, 0, 0]},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, -100], "persona_mask": [0, 1, 0]},
    ]
    collator = DataCollatorForPerCE(pad_token_id=0, pad_to_multiple_of=8)
    batch = collator(rows)
    counterfactual = collator.counterfactual_batch(batch["counterfactual_rows"])
    assert counterfactual["input_ids"].tolist() == [[5, 7, 8, 0, 0, 0, 0, 0]]
    assert batch["has_counterfactual"].shape == (3, 8) and batch["has_counterfactual"].sum() == 2
    assert collator([{"input_ids": [5, 6]}])["counterfactual_rows"] == []


@pytest.mark.parametrize("padding_free", [False, True])
def test_mask_keeps_positions(padding_free):
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "persona_mask": [0, 1, 0, 0]}
    short = {"input_ids": [6, 7], "labels": [-100, 7], "persona_mask": [0, 0]}
    other = {"input_ids": [9, 6, 7], "labels": [-100, -100, 7], "persona_mask": [1, 0, 0]}
    collator = DataCollatorForPerCE(pad_token_id=0, counterfactual="mask", padding_free=padding_free)
    batch = collator.counterfactual_batch(collator([row, short, other])["counterfactual_rows"])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 6, 7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 0, 1, 1], [0, 1, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]


def test_a_mask_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="'persona_mask' has 1 values for 2 'input_ids'"):
        DataCollatorForPerCE(pad_token_id=0)([{"input_ids": [5, 6], "persona_mask": [1]}])
