import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_perce import DataCollatorForPerCE


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


@given(ROWS, st.sampled_from(["drop", "mask"]))
def test_both_passes_hold_the_same_trained_tokens_in_the_same_order(rows, counterfactual):
    examples = to_examples(rows)
    batch = DataCollatorForPerCE(pad_token_id=0, counterfactual=counterfactual)(examples)
    factual = batch["labels"][:, 1:][batch["has_counterfactual"][:, 1:]]
    assert not batch["has_counterfactual"][:, 0].any()
    if "counterfactual_labels" not in batch:
        assert factual.numel() == 0
        return
    labels = batch["counterfactual_labels"][:, 1:]
    assert factual.tolist() == labels[labels != -100].tolist()
    # The persona is not there, or not seen
    seen = batch["counterfactual_input_ids"][batch["counterfactual_attention_mask"] == 1].tolist()
    with_pass = [e for e, row in zip(examples, batch["has_counterfactual"], strict=True) if row.any()]
    outside = [t for e in with_pass for t, m in zip(e["input_ids"], e["persona_mask"], strict=True) if not m]
    assert seen == outside


@given(ROWS)
def test_the_factual_pass_is_trls_batch(rows):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    examples = to_examples(rows)
    ours = DataCollatorForPerCE(pad_token_id=0)(examples)
    for key, value in DataCollatorForLanguageModeling(pad_token_id=0)(examples).items():
        assert torch.equal(ours[key], value)


def test_rows_without_a_persona_or_without_the_column_are_not_in_the_counterfactual_batch():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "persona_mask": [0, 0, 0]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "persona_mask": [0, 1, 0, 0]},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, -100], "persona_mask": [0, 1, 0]},
    ]
    batch = DataCollatorForPerCE(pad_token_id=0, pad_to_multiple_of=8)(rows)
    assert batch["counterfactual_input_ids"].tolist() == [[5, 7, 8, 0, 0, 0, 0, 0]]
    assert batch["has_counterfactual"].shape == (3, 8) and batch["has_counterfactual"].sum() == 2
    assert "counterfactual_input_ids" not in DataCollatorForPerCE(pad_token_id=0)([{"input_ids": [5, 6]}])


def test_mask_keeps_positions():
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "persona_mask": [0, 1, 0, 0]}
    batch = DataCollatorForPerCE(pad_token_id=0, counterfactual="mask")([row])
    assert batch["counterfactual_input_ids"].tolist() == [[5, 6, 7, 8]]
    assert batch["counterfactual_attention_mask"].tolist() == [[1, 0, 1, 1]]
    assert batch["counterfactual_position_ids"].tolist() == [[0, 1, 2, 3]]


def test_a_mask_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="'persona_mask' has 1 values for 2 'input_ids'"):
        DataCollatorForPerCE(pad_token_id=0)([{"input_ids": [5, 6], "persona_mask": [1]}])
