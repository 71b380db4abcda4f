"""Counterfactual log-probabilities that are kept for some epochs (`counterfactual_refresh_epochs`)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from conftest import make_tiny_model
from reference import make_rows, response_log_probs
from runs import to_dataset
from trl_perce import PerCETrainer
from trl_perce.training.log_prob_store import LogProbStore


def row(*tokens, labels=None):
    return {"input_ids": np.array(tokens), "labels": np.array(labels or [-100, *tokens[1:]])}


@given(st.integers(1, 5), st.integers(0, 6), st.integers(0, 6))
def test_a_row_is_kept_for_as_many_epochs_as_asked(refresh_epochs, computed, later):
    store = LogProbStore(refresh_epochs)
    store.start_epoch(computed)
    store.put(row(5, 6, 7), torch.tensor([-1.0, -2.0]))
    store.start_epoch(computed + later)
    kept = store.get(row(5, 6, 7))
    assert (kept is not None) == (later < refresh_epochs)
    assert kept is None or kept.tolist() == [-1.0, -2.0]


def test_a_row_is_known_by_all_that_its_log_probs_depend_on():
    store = LogProbStore(2)
    known = {**row(5, 6, 7), "attention_mask": np.array([1, 0, 1])}
    store.put(known, torch.tensor([-1.0]))
    assert store.get({**row(5, 6, 7), "attention_mask": np.array([1, 0, 1], dtype=np.int8)}) is not None
    for other in (
        row(5, 6, 7),
        {**row(5, 6, 8), "attention_mask": np.array([1, 0, 1])},
        {**row(5, 6, 7, labels=[-100, -100, 7]), "attention_mask": np.array([1, 0, 1])},
        {**row(5, 6, 7), "attention_mask": np.array([1, 1, 1])},
    ):
        assert store.get(other) is None


def test_the_files_of_several_processes_are_read_by_any_number(tmp_path):
    stores = [LogProbStore(3), LogProbStore(3)]
    for index, store in enumerate(stores):
        store.start_epoch(index)  # the second process is one epoch ahead for the row that both know
        store.put(row(1, 2), torch.tensor([-float(index)]))
        store.put(row(9, index + 3), torch.tensor([-0.5]))
        store.save(str(tmp_path), index, 2)
    one = LogProbStore(3)
    assert one.load(str(tmp_path)) == 3
    one.start_epoch(1)
    assert one.get(row(1, 2)).tolist() == [-1.0] and one.get(row(9, 3)).tolist() == [-0.5]
    one.start_epoch(3)  # what epoch 0 computed is too old now
    assert one.get(row(1, 2)).tolist() == [-1.0] and one.get(row(9, 3)) is None
    one.save(str(tmp_path), 0, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["counterfactual_log_probs_0.safetensors"]
    assert LogProbStore(3).load(str(tmp_path)) == 2
    empty = tmp_path / "empty"
    LogProbStore(3).save(str(empty), 0, 1)
    assert LogProbStore(3).load(str(empty)) == 0


class Snapshots(TrainerCallback):
    """The model at the start of each epoch."""

    def __init__(self):
        self.models = []

    def on_epoch_begin(self, args, state, control, model, **kwargs):
        self.models.append({name: value.clone() for name, value in model.state_dict().items()})


@pytest.mark.parametrize(
    "layout", [{"max_length": None}, {"packing": True, "max_length": 40}], ids=["padded", "packed"]
)
def test_kept_log_probs_are_those_of_the_epoch_that_computed_them(make_args, tokenizer, layout):
    rows = make_rows(seed=61, count=8)
    personas = {tuple(row.response): row for row in rows if row.persona}
    options = {"counterfactual_refresh_epochs": 2, "num_train_epochs": 4, "learning_rate": 5e-2, "optim": "sgd"}
    snapshots = Snapshots()
    trainer = PerCETrainer(
        make_tiny_model("llama"),
        make_args(**{**options, **layout}, per_device_train_batch_size=8),  # an epoch is one step
        train_dataset=to_dataset(rows),
        processing_class=tokenizer,
        callbacks=[snapshots],
    )
    windows, original = [], trainer.get_batch_samples

    def recorder(*args):
        windows.append(original(*args))
        return windows[-1]

    trainer.get_batch_samples = recorder
    trainer.train()
    assert len(windows) == len(snapshots.models) == 4
    for epoch, ((batch,), _) in enumerate(windows):
        # Epochs 0 and 2 compute, epochs 1 and 3 keep: the model of epoch 1 is not asked
        assert (batch["counterfactual_tokens"] > 0) == (epoch in (0, 2))
        model = make_tiny_model("llama")
        model.load_state_dict(snapshots.models[epoch // 2 * 2])
        model = model.double().eval()
        labels = batch["labels"][:, 1:][batch["has_counterfactual"][:, 1:]].tolist()
        expected = []
        while labels:  # rows in the order of this epoch, told by their responses
            response = next(response for response in personas if tuple(labels[: len(response)]) == response)
            labels = labels[len(response) :]
            with torch.no_grad():
                context = personas[response].before + personas[response].after
                expected.append(response_log_probs(model, context, list(response))[0])
        assert torch.allclose(batch["counterfactual_log_probs"].double(), torch.cat(expected), atol=2e-5)
        assert len(expected) == len(personas)


def test_another_training_starts_with_nothing(make_args, tokenizer):
    rows = make_rows(seed=62, count=4)
    trainer = PerCETrainer(
        make_tiny_model("llama"),
        make_args(max_length=None, counterfactual_refresh_epochs=9, num_train_epochs=2, per_device_train_batch_size=4),
        train_dataset=to_dataset(rows),
        processing_class=tokenizer,
    )
    for _ in range(2):
        trainer.train()
        ratios = [log["counterfactual/token_ratio"] for log in trainer.state.log_history if "loss" in log]
        assert ratios[0] > 0 and ratios[1] == 0


def test_a_resumed_run_keeps_them(tmp_path, make_args, tokenizer):
    rows = to_dataset(make_rows(seed=63, count=12, with_persona=1.0))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 8

    def trainer(name, callbacks=None):
        options = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 4, "per_device_train_batch_size": 2}
        options |= {"counterfactual_refresh_epochs": 3, "learning_rate": 1e-2, "max_length": None}
        return PerCETrainer(
            make_tiny_model("qwen3"),
            make_args(output_dir=str(tmp_path / name), **options),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            callbacks=callbacks,
        )

    whole, stopped, resumed = trainer("whole"), trainer("stopped", [Stop()]), trainer("stopped")
    whole.train()
    stopped.train()
    assert stopped.state.global_step == 8  # in the middle of the second of four epochs of six steps
    stored = load_file(tmp_path / "stopped" / "checkpoint-8" / "counterfactual_log_probs_0.safetensors")
    assert stored["lengths"].numel() == 12 and stored["epochs"].tolist() == [0] * 12
    assert not list(tmp_path.rglob("*.part"))
    resumed.train(resume_from_checkpoint=True)
    logs = [[log for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert [log["loss"] for log in logs[0]] == [log["loss"] for log in logs[1]]
    computed = [[log["counterfactual/token_ratio"] > 0 for log in log] for log in logs]
    assert computed[0] == computed[1] == [True] * 6 + [False] * 12 + [True] * 6
    one, two = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
