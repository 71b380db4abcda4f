"""Weights that come with the rows: the loss is −(1/n) Σ w_i log P, however the rows are laid out."""

import math

import pytest
import torch
from datasets import Dataset, IterableDataset

from conftest import make_tiny_model
from reference import make_rows, reference
from runs import LAYOUTS, assert_close, one_sgd_step, to_dataset
from trl_perce import DataCollatorForTokenWeights, PerCETrainer


def make_weighted_rows(seed, count):
    """Rows with weights of 0, under PerCE's bounds, between them and over them."""
    rows = make_rows(seed, count)
    generator = torch.Generator().manual_seed(seed)
    for row in rows:
        weights = 8 * torch.rand(len(row.response), generator=generator) ** 2
        row.weights = torch.where(weights < 0.4, 0, weights).tolist()
    assert {0.0} < {weight for row in rows for weight in row.weights}
    return rows


@pytest.mark.parametrize("normalization", ["none", "sequence"])
@pytest.mark.parametrize("layout", ["packed", "packed, two rows a batch", "padding-free", "padded", "single"])
def test_loss_and_gradients_are_those_of_the_formula(make_args, tokenizer, layout, normalization):
    rows = make_weighted_rows(seed=51, count=8)
    layout = {"per_device_train_batch_size": 8, **LAYOUTS[layout]}
    if layout["per_device_train_batch_size"] < 8:
        layout["gradient_accumulation_steps"] = 8
    expected = reference(make_tiny_model("qwen3"), rows, "given", normalization=normalization)
    logs, gradients = one_sgd_step(
        make_args, tokenizer, "qwen3", rows, token_weighting="given", weight_normalization=normalization, **layout
    )
    assert logs["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert_close(gradients, expected.gradients)
    weights = [weight for row in rows for weight in row.weights]
    assert logs["weight/mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)
    assert "nll" in logs and not {"pir/mean", "counterfactual/token_ratio", "weight/at_min"} & logs.keys()


@pytest.mark.filterwarnings("ignore:.*keep_end")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "options, keep",
    [
        ({}, None),  # tokens of the persona leave
        ({"truncate_persona": False}, slice(20)),
        ({"truncate_persona": False, "truncation_mode": "keep_end"}, slice(-20, None)),
    ],
)
def test_weights_stay_with_their_tokens_in_rows_that_are_too_long(make_args, tokenizer, options, keep, streaming):
    row = {
        "input_ids": [*range(4, 34)],
        "labels": [-100] * 8 + [*range(12, 34)] if keep else [-100] * 18 + [*range(22, 34)],
        "persona_mask": [0, 0] + [1] * 15 + [0] * 13,
        "token_weights": [token / 4 for token in range(4, 34)],
    }
    rows = IterableDataset.from_generator(lambda: iter([row] * 3)) if streaming else Dataset.from_list([row] * 3)
    trainer = PerCETrainer(
        make_tiny_model("llama"),
        make_args(token_weighting="given", max_length=20, max_steps=1, **options),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    for batch in trainer.get_train_dataloader():
        tokens = batch["input_ids"][0].tolist()
        assert len(tokens) == 20 and (keep is None or tokens == row["input_ids"][keep])
        assert batch["token_weights"].tolist() == [[token / 4 for token in tokens]] * len(batch["input_ids"])


def test_evaluation_is_weighted_and_rows_without_weights_count_as_one(make_args, tokenizer, caplog):
    rows = make_weighted_rows(seed=52, count=6)
    data = to_dataset(rows)
    bare = data.map(lambda row, index: {"token_weights": row["token_weights"] if index else None}, with_indices=True)
    trainer = PerCETrainer(
        make_tiny_model("llama"),
        make_args(token_weighting="given", max_length=None, per_device_eval_batch_size=6),
        train_dataset=data,
        eval_dataset={"same": data, "bare": bare, "none": data.remove_columns("token_weights")},
        processing_class=tokenizer,
    )
    assert "bare dataset: 1 of 6 rows have no weights and count as plain CE" in caplog.text
    assert "none dataset: 6 of 6 rows have no weights" in caplog.text and "train dataset" not in caplog.text
    metrics = trainer.evaluate()
    expected = {"same": reference(trainer.model, rows, "given").loss}
    expected["none"] = reference(trainer.model, rows, "uniform").loss
    rows[0].weights = [1.0] * len(rows[0].response)
    expected["bare"] = reference(trainer.model, rows, "given").loss
    for name, loss in expected.items():
        assert metrics[f"eval_{name}_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "weights, reason",
    [
        ([1.0, 1.0], "as long as 'input_ids' \\(3 tokens\\), got 2 values"),
        ([1.0, -0.5, 1.0], "has -0.5 at token 1"),
        ([1.0, 1.0, math.nan], "has nan at token 2"),
        ([1.0, math.inf, 1.0], "has inf at token 1"),
        ([1.0, None, 1.0], "has None at token 1"),
    ],
)
def test_weights_that_do_not_fit_are_named_before_the_model_loads(make_args, tokenizer, weights, reason):
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "persona_mask": [0, 0, 0]}
    rows = Dataset.from_list([row | {"token_weights": [1.0] * 3}, row | {"token_weights": weights}])
    for data in (rows, rows.to_iterable_dataset()):
        with pytest.raises(ValueError, match=f"train dataset, row 1: 'token_weights' .*{reason}"):
            args = make_args(token_weighting="given", max_steps=1)
            PerCETrainer("no/such-model", args, train_dataset=data, processing_class=tokenizer)
    if None not in weights:
        with pytest.raises(ValueError, match="A row's 'token_weights' must be"):
            DataCollatorForTokenWeights(pad_token_id=0)([*rows])


@pytest.mark.parametrize(
    "columns, options, reason",
    [
        ({}, {}, "none of 2 rows has weights. Add a column 'token_weights'"),
        ({"token_weights": [5.0, 0.0, 0.0]}, {}, "all weights of 2 rows are 0"),
        ({}, {"dataset_kwargs": {"skip_prepare_dataset": True}}, "'input_ids', 'labels' and 'token_weights'"),
        ({"text": "a", "input_ids": None}, {}, "'token_weights' goes with tokenized rows"),
    ],
)
def test_no_weights_at_all(make_args, tokenizer, columns, options, reason):
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], **columns}
    if "text" in columns:
        row = {"text": "a", "token_weights": [1.0]}
    args = make_args(token_weighting="given", **options)
    with pytest.raises(ValueError, match=reason):
        PerCETrainer("no/such-model", args, train_dataset=Dataset.from_list([row] * 2), processing_class=tokenizer)


@pytest.mark.parametrize("weighting", ["uniform", "perce"])
def test_weights_that_are_not_used_are_said(make_args, tokenizer, weighting, caplog):
    rows = make_weighted_rows(seed=53, count=3)
    args = make_args(token_weighting=weighting, max_length=None)
    trainer = PerCETrainer(make_tiny_model("llama"), args, train_dataset=to_dataset(rows), processing_class=tokenizer)
    assert f"3 of 3 rows have weights, which `token_weighting='{weighting}'` does not use" in caplog.text
    assert "token_weights" not in next(iter(trainer.get_train_dataloader()))


def test_a_collator_without_the_weights(make_args, tokenizer):
    rows = to_dataset(make_weighted_rows(seed=54, count=2))
    with pytest.raises(
        ValueError, match="does not pass the weights of the rows on. Pass a `DataCollatorForTokenWeights`"
    ):
        PerCETrainer("no/such-model", make_args(token_weighting="given"), lambda rows: rows, rows, None, tokenizer)
