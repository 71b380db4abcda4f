"""Packed, padding-free, padded and single rows give the same PIR, loss and gradients."""

import pytest
import torch
from datasets import IterableDataset

from conftest import TINY_CONFIGS, make_tiny_model
from reference import FLOAT32, make_rows, reference
from runs import LAYOUTS, assert_close, one_sgd_step, pir_by_row, record_pir, to_dataset, train
from trl_perce import PerCETrainer


@pytest.mark.parametrize("counterfactual", ["drop", "mask"])
@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_pir_is_the_same_in_every_layout(make_args, tokenizer, monkeypatch, kind, counterfactual):
    rows = make_rows(seed=41, count=9)
    assert len({tuple(row.response) for row in rows}) == len(rows)
    found = {}
    for name, layout in LAYOUTS.items():
        recorded = record_pir(monkeypatch)
        options = {"per_device_train_batch_size": 9, "num_train_epochs": 1, "learning_rate": 0.0, **layout}
        options |= {"counterfactual": counterfactual, "train_sampling_strategy": "sequential"}
        args = make_args(**options)
        model = make_tiny_model(kind).double()
        trainer = PerCETrainer(model, args, train_dataset=to_dataset(rows), processing_class=tokenizer)
        trainer.train()
        found[name] = pir_by_row(recorded, trainer, rows)
        monkeypatch.undo()
    expected = found.pop("single")
    assert sum(len(pir) for pir in expected.values()) > 20
    for name, pirs in found.items():
        assert pirs.keys() == expected.keys(), name
        for response, pir in pirs.items():
            torch.testing.assert_close(pir, expected[response], atol=FLOAT32, rtol=0, msg=name)


@pytest.mark.parametrize("normalization", ["none", "sequence"])
@pytest.mark.parametrize("layout", ["packed", "packed, two rows a batch", "padding-free"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_and_gradients_are_those_of_the_formula(make_args, tokenizer, monkeypatch, kind, layout, normalization):
    rows = make_rows(seed=42, count=8)
    layout = {"per_device_train_batch_size": 8, **LAYOUTS[layout]}
    if layout["per_device_train_batch_size"] == 2:
        layout["gradient_accumulation_steps"] = 8  # more than there are: one step holds all rows
    expected = reference(make_tiny_model(kind), rows, normalization=normalization)
    logs, gradients = one_sgd_step(make_args, tokenizer, kind, rows, weight_normalization=normalization, **layout)
    assert logs["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert_close(gradients, expected.gradients)
    ours = sum(len(row.before + row.after + row.response) for row in rows if row.persona)
    theirs = sum(len(row.tokenized()["input_ids"]) for row in rows)
    assert logs["counterfactual/token_ratio"] == pytest.approx(ours / theirs)


@pytest.mark.parametrize("weighting", ["loss", "entropy"])
def test_the_other_weightings_pack_too(make_args, tokenizer, weighting):
    rows = make_rows(seed=43, count=6)
    expected = reference(make_tiny_model("qwen3"), rows, weighting=weighting, normalization="sequence")
    layout = {"packing": True, "max_length": 40, "per_device_train_batch_size": 6}
    logs, gradients = one_sgd_step(
        make_args, tokenizer, "qwen3", rows, token_weighting=weighting, weight_normalization="sequence", **layout
    )
    assert logs["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert_close(gradients, expected.gradients)


def test_the_persona_mask_is_packed_with_its_row(make_args, tokenizer):
    rows = make_rows(seed=44, count=30)
    for data in (to_dataset(rows), IterableDataset.from_generator(lambda: (row.tokenized() for row in rows))):
        trainer = PerCETrainer(
            make_tiny_model("llama"),
            make_args(packing=True, max_length=64, max_steps=1),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
        )
        expected = {tuple(row.tokenized()["input_ids"]): row.tokenized() for row in rows}
        for packed in (trainer.train_dataset, trainer.eval_dataset):
            seen = 0
            for example in packed:
                start = 0
                assert len(example["input_ids"]) <= 64 and sum(example["seq_lengths"]) == len(example["input_ids"])
                for length in example["seq_lengths"]:
                    document = {
                        column: example[column][start : start + length]
                        for column in ("input_ids", "labels", "persona_mask")
                    }
                    assert document == expected[tuple(document["input_ids"])]
                    start, seen = start + length, seen + 1
            assert seen == len(rows)


def test_packing_trims_the_persona_of_a_row_that_is_too_long(make_args, tokenizer):
    rows = make_rows(seed=45, count=8, with_persona=1.0)
    longest = max(len(row.tokenized()["input_ids"]) for row in rows)
    trainer = train(make_args, tokenizer, make_tiny_model("llama"), rows, packing=True, max_steps=1, max_length=longest - 3)  # fmt: skip
    labels = [label for row in trainer.train_dataset["labels"] for label in row if label != -100]
    assert sorted(labels) == sorted(token for row in rows for token in row.response)
