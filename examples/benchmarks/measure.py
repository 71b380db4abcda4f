# SPDX-License-Identifier: Apache-2.0

"""Step times and peak memory of TRL's SFT and of PerCE, on one model that both train in turn."""

import datetime
import gc
import importlib.metadata
import logging
import re
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from flops import Row
from trl_perce import PerCEConfig, PerCETrainer
from trl_perce.utils.memory import peak_resident, reset_peak_resident


# `trl_perce` is ours: where it is only on the path, it has no metadata
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
# What each PerCE variant says to `PerCEConfig`; "sft" is TRL's own trainer
VARIANTS: dict[str, dict | None] = {
    "sft": None,
    # PerCE's training pass without its counterfactual pass: on CPU it scores fewer positions than TRL's SFT
    "lossce": {"token_weighting": "loss"},
    "drop": {"counterfactual": "drop", "counterfactual_refresh_epochs": 1},
    "mask": {"counterfactual": "mask", "counterfactual_refresh_epochs": 1},
    "refresh3": {"counterfactual": "drop", "counterfactual_refresh_epochs": 3},
}


@dataclass(frozen=True)
class Run:
    """
    What a trainer is given to do.

    Args:
        row ([`Row`]): Lengths of every row.
        batch_size (`int`): Rows on the device at a time.
        accumulation (`int`): Micro-batches of an optimizer step.
        checkpointing (`bool`): Gradient checkpointing.
        steps_per_epoch (`int`): Optimizer steps of an epoch.
        epochs (`int`): Epochs over the same rows.
        counterfactual_batch_tokens (`int` or `str`, *optional*): As in [`PerCEConfig`]; its default if `None`.
        fp16 (`bool`, *optional*, defaults to `False`): Autocast to float16 with a gradient scaler, instead of to bfloat16.
    """

    row: Row
    batch_size: int
    accumulation: int
    checkpointing: bool
    steps_per_epoch: int
    epochs: int
    counterfactual_batch_tokens: int | str | None = None
    fp16: bool = False


class StepTimes(TrainerCallback):
    """
    Notes the seconds of each optimizer step, one list an epoch. A step lasts from the end of the one before, since the
    trainer fetches the step's batches, and PerCE scores them, before `on_step_begin`.
    """

    def __init__(self):
        self.epochs: list[list[float]] = []

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epochs.append([])
        self.ended = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        started, self.ended = self.ended, self._now()
        self.epochs[-1].append(self.ended - started)


def within_memory(function, *arguments):
    """What the function returns, or `None` if it runs out of memory."""
    result = None
    try:
        result = function(*arguments)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # PyTorch's words on CPU
            raise
    return result


def environment() -> dict:
    """Where and with what it is measured."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        device = f"{found[1] if found else 'CPU'}, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "command": re.sub(r" --output_dir \S+", "", shlex.join(["python", *sys.argv])),
    }


def be_quiet() -> None:
    """Nothing on the screen but what is measured."""
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("trl_perce").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # names that TRL and transformers are about to change


def reset_peak_memory(device: str) -> None:
    """Start to measure, from what is held now. On CPU, Linux with glibc only."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak_resident()


def peak_memory(device: str) -> int:
    """Peak since the last reset, in bytes: allocated by PyTorch on a GPU, resident in the process on CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_resident()


def random_rows(run: Run, vocab_size: int, seed: int = 0) -> Dataset:
    """As many tokenized rows as an epoch takes: persona, question and response of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    row, rows = run.row, []
    for _ in range(run.batch_size * run.accumulation * run.steps_per_epoch):
        input_ids = torch.randint(1, vocab_size, (row.length,), generator=generator).tolist()
        prompt = row.persona + row.question
        rows.append(
            {
                "input_ids": input_ids,
                "labels": [-100] * prompt + input_ids[prompt:],
                "persona_mask": [1] * row.persona + [0] * (row.length - row.persona),
            }
        )
    return Dataset.from_list(rows)


def padding_tokenizer() -> PreTrainedTokenizerFast:
    """The rows are tokenized; trainers ask for a tokenizer all the same, for its padding token."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>")


@contextmanager
def untouched(model: PeftModel) -> Iterator[None]:
    """Takes off the model what trainers put on it: trained adapters, patched forwards, checkpointing and its hooks."""
    adapters = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    base = model.get_base_model()
    try:
        yield
    finally:
        for name, weight in model.named_parameters():
            if name in adapters:
                weight.grad = None
                weight.data = adapters[name]
        for module in (model, base):
            vars(module).pop("forward", None)
        base.gradient_checkpointing_disable()
        base.get_input_embeddings()._forward_hooks.clear()  # set twice, by TRL and by transformers, which knows of one


def train(model: PeftModel, variant: str, run: Run, device: str) -> tuple[list[list[float]], int]:
    """
    Train once from the model's adapters, which are as before when it ends.

    Args:
        model ([`~peft.PeftModel`]): From [`build_model`].
        variant (`str`): One of `VARIANTS`.
        run ([`Run`]): What to train.
        device (`str`): `"cpu"` or `"cuda"`.

    Returns:
        `tuple[list[list[float]], int]`: Seconds of each step, one list an epoch, and the peak memory in bytes.
    """
    times = StepTimes()
    rows = random_rows(run, model.config.vocab_size)
    with untouched(model), tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": run.batch_size,
            "gradient_accumulation_steps": run.accumulation,
            "gradient_checkpointing": run.checkpointing,
            "num_train_epochs": run.epochs,
            "max_length": None,
            "bf16": not run.fp16,
            "fp16": run.fp16,
            "use_cpu": device == "cpu",
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        given = {"model": model, "processing_class": padding_tokenizer(), "callbacks": [times]}
        reset_peak_memory(device)
        if variant == "sft":
            rows = rows.remove_columns("persona_mask")
            trainer = SFTTrainer(args=SFTConfig(**settings), train_dataset=rows, **given)
        else:
            settings |= VARIANTS[variant]
            if run.counterfactual_batch_tokens is not None:
                settings["counterfactual_batch_tokens"] = run.counterfactual_batch_tokens
            trainer = PerCETrainer(args=PerCEConfig(**settings), train_dataset=rows, **given)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return times.epochs, peak_memory(device)
