"""No step is made with NaN or infinity, and the message names the row. Private seam: `Trainer._get_grad_norm` (transformers 5.23)."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

import trl_perce.trainer
from conftest import make_tiny_model
from reference import make_rows
from trl_perce import PerCETrainer
from trl_perce.training.finite_check import MAX_SKIPPED_IN_A_ROW


BROKEN = 399  # a token whose embedding is NaN
ROWS = [row.tokenized() for row in make_rows(seed=5, count=12, vocab=BROKEN, with_persona=1.0)]


def with_broken(*indices):
    """The rows; of those at the indices, the last token of the persona is the broken one."""
    rows = [{**row, "input_ids": [*row["input_ids"]], "id": f"r{index}"} for index, row in enumerate(ROWS)]
    for index in indices:
        last = len(rows[index]["persona_mask"]) - 1 - rows[index]["persona_mask"][::-1].index(1)
        rows[index]["input_ids"][last] = BROKEN
    return rows


def make_trainer(make_args, tokenizer, rows, **kwargs):
    model = make_tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN] = math.nan
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    options = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", "max_length": None}
    options |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "weight_decay": 0.1, "num_train_epochs": 1}
    args = make_args(**options | kwargs)
    return PerCETrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def trainable(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("weighting", ["perce", "loss", "entropy"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_it_stops_before_the_step_and_names_the_row(make_args, tokenizer, weighting, padding_free):
    options = {"token_weighting": weighting, "padding_free": padding_free, "gradient_accumulation_steps": 2}
    trainer = make_trainer(make_args, tokenizer, with_broken(6), **options)
    reference = make_trainer(make_args, tokenizer, with_broken()[:4], **options)
    reference.train()
    # Laid end to end, the next row has NaN too: what it does not attend to counts 0 times, and 0 times NaN is NaN
    rows = r"row 6 \(id 'r6'\)" + (r", row 7 \(id 'r7'\)" if padding_free else "")
    with pytest.raises(FloatingPointError, match=rf"Step 2: .* in {rows}\. Training stops") as error:
        trainer.train()
    assert "row 4" not in str(error.value) and "on_nonfinite" in str(error.value)
    assert_equal(trainable(trainer), trainable(reference))  # as after the first step


def test_plain_ce_names_the_rows_of_the_step(make_args, tokenizer):
    trainer = make_trainer(make_args, tokenizer, with_broken(3), token_weighting="uniform")
    with pytest.raises(FloatingPointError, match=r"gradient is NaN.* rows are row 2 \(id 'r2'\), row 3 \(id 'r3'\)"):
        trainer.train()


@pytest.mark.parametrize("weighting", ["perce", "uniform"])
def test_a_step_that_is_left_out_is_as_if_its_rows_were_not_there(make_args, tokenizer, caplog, weighting):
    options = {"token_weighting": weighting, "on_nonfinite": "skip", "max_grad_norm": 0.0}
    trainer = make_trainer(make_args, tokenizer, with_broken(2, 9), **options)
    trainer.train()
    good = [row for index, row in enumerate(with_broken()) if index not in (2, 3, 8, 9)]  # two rows a step
    reference = make_trainer(make_args, tokenizer, good, **options)
    reference.train()
    assert_equal(trainable(trainer), trainable(reference))
    assert all(value.isfinite().all() for value in trainable(trainer).values())
    assert [log["skipped_steps"] for log in trainer.state.log_history if "loss" in log] == [0, 1, 1, 1, 2, 2]
    assert caplog.text.count("The step is left out") == 2 and "row 9 (id 'r9')" in caplog.text


def test_an_infinite_pir_does_not_count_as_the_largest_weight(make_args, tokenizer, monkeypatch):
    """Clipped, it would be a weight like any other, and the gradient finite."""
    original, calls = trl_perce.trainer.personal_influence_ratio, []

    def once_infinite(factual, counterfactual):
        calls.append(0)
        if len(calls) == 2:
            counterfactual = counterfactual.clone()
            counterfactual[-1] = -math.inf  # of the second row of the micro-batch
        return original(factual, counterfactual)

    monkeypatch.setattr(trl_perce.trainer, "personal_influence_ratio", once_infinite)
    trainer = make_trainer(make_args, tokenizer, with_broken())
    with pytest.raises(FloatingPointError, match=r"Step 2: log-probabilities or PIR .* in row 3 \(id 'r3'\)\."):
        trainer.train()


def test_an_infinite_gradient(make_args, tokenizer):
    trainer = make_trainer(make_args, tokenizer, with_broken())
    steps = []
    parameter = next(value for value in trainer.model.parameters() if value.requires_grad)

    def overflow(gradient):
        steps.append(0)
        return gradient * math.inf if len(steps) == 3 else gradient

    parameter.register_hook(overflow)
    with pytest.raises(FloatingPointError, match=r"Step 3: the gradient is NaN .* are row 4 \(id 'r4'\), row 5"):
        trainer.train()


def test_skipping_ends_when_nothing_else_is_left(make_args, tokenizer):
    rows = with_broken(*range(12)) * 2
    trainer = make_trainer(make_args, tokenizer, rows, on_nonfinite="skip")
    with pytest.raises(
        FloatingPointError, match=f"step {MAX_SKIPPED_IN_A_ROW + 1} in a row: the model itself is broken"
    ):
        trainer.train()


def test_rows_of_a_stream_are_told_by_their_tokens(make_args, tokenizer):
    trainer = make_trainer(make_args, tokenizer, with_broken(0))
    stream = Dataset.from_list(with_broken(0)).to_iterable_dataset()
    args = make_args(max_steps=2, max_length=None)
    trainer = PerCETrainer(trainer.model, args, train_dataset=stream, processing_class=tokenizer)
    ids = with_broken(0)[0]["input_ids"]
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert f"a row of {len(ids)} tokens that begins with {ids[:8]}" in str(error.value)


def test_bad_action(make_args):
    with pytest.raises(ValueError, match="`on_nonfinite` is 'ignore'"):
        make_args(on_nonfinite="ignore")
