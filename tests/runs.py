"""Short trainings of tiny models, and what is read off them."""

import copy

import torch
from datasets import Dataset

import trl_perce.trainer
from conftest import make_tiny_model
from trl_perce import PerCETrainer
from trl_perce.utils.bfloat16 import slow_bf16


# Of real models: a CPU without instructions for bfloat16 would take minutes
FAST_DTYPE = "float32" if slow_bf16() else "bfloat16"

LAYOUTS = {
    "packed": {"packing": True, "max_length": 40},
    "packed, two rows a batch": {"packing": True, "max_length": 31, "per_device_train_batch_size": 2},
    "padding-free": {"padding_free": True, "max_length": None},
    "padded": {"max_length": None},
    "single": {"max_length": None, "per_device_train_batch_size": 1},
}


def to_dataset(rows) -> Dataset:
    return Dataset.from_list([row.tokenized() for row in rows])


def train(make_args, tokenizer, model, rows, **kwargs):
    args = make_args(**{"max_length": None, **kwargs})
    trainer = PerCETrainer(model, args, train_dataset=to_dataset(rows), processing_class=tokenizer)
    trainer.train()
    return trainer


def one_sgd_step(make_args, tokenizer, kind, rows, dtype=torch.float32, **kwargs):
    """Loss of one optimizer step of a kind of tiny model, or of one at hand, and the gradients, read off the parameters: plain SGD with learning rate 1."""
    model = (make_tiny_model(kind) if isinstance(kind, str) else kind).to(dtype)
    before = copy.deepcopy(model.state_dict())
    trainer = train(
        make_args,
        tokenizer,
        model,
        rows,
        **{
            "optim": "sgd",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "max_steps": 1,
        },
        **kwargs,
    )
    gradients = {name: before[name] - value.cpu() for name, value in model.state_dict().items()}
    return trainer.state.log_history[0], gradients


def assert_close(gradients, expected, relative=2e-4):
    assert expected
    for name, gradient in expected.items():
        error = (gradients[name].double() - gradient).norm() / gradient.norm().clamp(min=1e-9)
        assert error < relative, (name, error)


def record_pir(monkeypatch) -> list[torch.Tensor]:
    """PIR of every micro-batch, as the trainer computes it."""
    recorded, original = [], trl_perce.trainer.personal_influence_ratio

    def recorder(*args):
        recorded.append(original(*args))
        return recorded[-1]

    monkeypatch.setattr(trl_perce.trainer, "personal_influence_ratio", recorder)
    return recorded


def pir_by_row(pir: list[torch.Tensor], trainer, rows) -> dict[tuple, torch.Tensor]:
    """PIR of each row with a persona, by its response, which tells the rows apart."""
    columns = trainer.train_dataset
    responses, personas = [], {tuple(row.response) for row in rows if row.persona}
    for labels, lengths in zip(columns["labels"], columns["seq_lengths"] if "seq_lengths" in columns.features else
                               [[len(labels)] for labels in columns["labels"]], strict=True):  # fmt: skip
        start = 0
        for length in lengths:
            response = tuple(label for label in labels[start : start + length] if label != -100)
            responses += [response] if response in personas else []
            start += length
    values = torch.cat(pir).split([len(response) for response in responses])
    return dict(zip(responses, values, strict=True))
