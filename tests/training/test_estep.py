"""The E-step over a window: the same numbers as micro-batch by micro-batch, in fewer forward passes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from conftest import make_tiny_model
from reference import FLOAT32, make_rows
from runs import to_dataset
from trl_perce import PerCETrainer
from trl_perce.training.estep import split_into_chunks, tokens_that_fit


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120), st.booleans())
def test_chunks_hold_every_row_once_and_keep_to_the_budget(lengths, budget, padded):
    chunks = split_into_chunks(lengths, budget, padded)
    flat = [index for chunk in chunks for index in chunk]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)

    def size(chunk):
        return len(chunk) * lengths[chunk[0]] if padded else sum(lengths[index] for index in chunk)

    for chunk in chunks:
        assert size(chunk) <= budget or len(chunk) == 1
    for chunk, following in zip(chunks, chunks[1:], strict=False):  # no chunk is cut too early
        assert size([*chunk, following[0]]) > budget


def make_trainer(make_args, tokenizer, rows, kind="llama", **kwargs):
    options = {"max_length": None, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    return PerCETrainer(
        make_tiny_model(
            kind
        ).double(),  # so that what does not depend on the budget agrees to many digits on any machine
        make_args(**{**options, "train_sampling_strategy": "sequential", "check_model": False, **kwargs}),
        train_dataset=to_dataset(rows),
        eval_dataset=to_dataset(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


def windows_and_forwards(trainer):
    """Trains; what `get_batch_samples` gave in the first window, and the shape of each forward's tokens until then."""
    windows, shapes, original = [], [], trainer.get_batch_samples
    hook = trainer.model.base_model.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append((tuple(kwargs["input_ids"].shape), module.training)),
        with_kwargs=True,
    )

    def recorder(*args):
        shapes.clear()
        windows.append((*original(*args), [*shapes]))
        return windows[-1][:2]

    trainer.get_batch_samples = recorder
    trainer.train()
    hook.remove()
    (window,) = windows
    return window


@pytest.mark.parametrize("budget", [None, 1, 30, "auto"])
@pytest.mark.parametrize("options", [{}, {"counterfactual": "mask"}, {"padding_free": True}], ids=str)
def test_the_window_gives_what_each_micro_batch_gives_alone(make_args, tokenizer, options, budget):
    rows = make_rows(seed=31, count=8)
    trainer = make_trainer(make_args, tokenizer, rows, counterfactual_batch_tokens=budget, **options)
    batches, _, forwards = windows_and_forwards(trainer)
    assert len(batches) == 4 and all(training for _, training in forwards)

    personas = sum(bool(row.persona) for row in rows)
    tokens = sum(shape[0] * shape[1] for shape, _ in forwards)
    if budget == 1:
        assert len(forwards) == personas
    elif budget == 30:
        assert len(forwards) < personas and all(shape[0] == 1 or shape[0] * shape[1] <= 30 for shape, _ in forwards)
    elif budget == "auto":
        assert len(forwards) == 1
    if budget == 1 or options.get("padding_free"):  # nothing is padded
        kept = [
            row.before + row.after + row.response + (row.persona if "counterfactual" in options else [])
            for row in rows
        ]
        assert tokens == sum(len(tokens) for tokens, row in zip(kept, rows, strict=True) if row.persona)

    # One micro-batch after the other, with the parameters that the window had
    fresh = make_trainer(make_args, tokenizer, rows, **options)
    compared = 0
    for batch, expected in zip(batches, fresh.get_train_dataloader(), strict=True):
        fresh._e_step(fresh.model, [expected])
        torch.testing.assert_close(
            batch["counterfactual_log_probs"], expected["counterfactual_log_probs"], atol=FLOAT32, rtol=0
        )
        assert batch["counterfactual_tokens"] == expected["counterfactual_tokens"]
        assert "counterfactual_rows" not in batch
        compared += batch["counterfactual_log_probs"].numel()
    assert compared == sum(len(row.response) for row in rows if row.persona)


def test_losses_do_not_depend_on_the_budget(make_args, tokenizer):
    rows = make_rows(seed=32, count=12)
    logs = []
    for budget in (1, "auto"):
        options = {"max_steps": 3, "learning_rate": 1e-2, "per_device_eval_batch_size": 5}
        trainer = make_trainer(make_args, tokenizer, rows, counterfactual_batch_tokens=budget, **options)
        trainer.train()
        logs.append(
            [log["loss"] for log in trainer.state.log_history if "loss" in log] + [trainer.evaluate()["eval_loss"]]
        )
    assert len(logs[0]) == 4 and logs[0] == pytest.approx(logs[1], rel=1e-6)


def test_the_window_after_an_evaluation_is_in_training_mode_again(make_args, tokenizer):
    # Otherwise dropout, checkpointing and schedule-free optimizers would differ between the two passes
    trainer = make_trainer(make_args, tokenizer, make_rows(seed=33, count=8))
    trainer.model.eval()
    _, _, forwards = windows_and_forwards(trainer)
    assert forwards and all(training for _, training in forwards)


def test_auto_leaves_half_of_the_free_memory():
    import psutil

    tokens = tokens_that_fit(torch.device("cpu"), hidden_size=1024, itemsize=2)
    assert tokens * 64 * 1024 * 2 == pytest.approx(psutil.virtual_memory().available / 2, rel=0.2)


def test_the_budget_comes_from_the_command_line_too():
    from trl_perce.cli.train import make_parser

    for text, value in (("auto", "auto"), ("4096", 4096)):
        argv = ["--model_name_or_path", "x", "--dataset_name", "y", "--bf16", "False", "--output_dir", "z"]
        args = make_parser().parse_args_and_config([*argv, "--counterfactual_batch_tokens", text])[1]
        assert args.counterfactual_batch_tokens == value
