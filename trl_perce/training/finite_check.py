# SPDX-License-Identifier: Apache-2.0

"""NaN and infinity in training: which row they come from, and that no step is made with them."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.tensor import DTensor

from ..utils.logger import get_logger


logger = get_logger(__name__)

# Steps in a row that `on_nonfinite="skip"` leaves out before it takes the model for broken
MAX_SKIPPED_IN_A_ROW = 10
_SHOWN_ROWS = 8


class FiniteCheck:
    """
    Sees to it that no optimizer step is made from values that are not finite: log-probabilities or PIR of a trained token, or
    the gradient.

    It costs one number that is read from the device at each optimizer step.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.
        action (`str`): `"stop"` or `"skip"`, as [`PerCEConfig`]'s `on_nonfinite`.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*): What is trained on, tokenized. Rows are
            named by their index in it, and by its column `id` if there is one.

    Attributes:
        skipped_steps (`int`): Steps that were left out so far.
    """

    def __init__(self, accelerator: Accelerator, action: str, dataset):
        self.accelerator, self.action, self.dataset = accelerator, action, dataset
        self.skipped_steps = self._in_a_row = 0
        self.start([])

    def start(self, batches: list[dict[str, Any]]) -> None:
        """Begin with a new window (the micro-batches of an optimizer step)."""
        self._batches = batches
        self._bad: list[torch.Tensor] = []

    def note(self, bad: torch.Tensor) -> None:
        """
        Note the next micro-batch of the window.

        Args:
            bad (`torch.Tensor` of dtype `torch.bool` and shape `(B, L)`): Where a trained token has a value that is not finite.
                Columns are aligned to the end of the batch's.
        """
        self._bad.append(bad)

    def is_good(self, step: int, grad_norm: torch.Tensor | float) -> bool:
        """
        Whether the step may be made. To be asked on all processes, between the last backward pass and the optimizer.

        Args:
            step (`int`): The step's number, for the message.
            grad_norm (`torch.Tensor` or `float`): Norm of the whole gradient.

        Returns:
            `bool`: `False` if the step must be left out (`action="skip"`).

        Raises:
            `FloatingPointError`: With `action="stop"`, or where too many steps in a row were left out. The message names the rows.
        """
        device = self.accelerator.device
        # The head, and so the log-probabilities, may be on another device (`device_map`)
        found = torch.stack([torch.tensor(False, device=device), *(bad.any().to(device) for bad in self._bad)]).any()
        # With fp16 the gradient overflows now and then: its scaler leaves the step out and scales less
        if self.accelerator.scaler is None:
            norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else torch.as_tensor(grad_norm)
            found = found | ~torch.isfinite(norm.to(device)).all()
        if self.accelerator.num_processes > 1:
            found = self.accelerator.reduce(found.float().reshape(1)) > 0
        if not found.item():
            self._in_a_row = 0
            return True
        message = f"Step {step}: {self._describe()}"
        self._in_a_row += 1
        if self.action == "skip" and self._in_a_row <= MAX_SKIPPED_IN_A_ROW:
            self.skipped_steps += 1
            logger.warning(
                f"{message} The step is left out (`on_nonfinite='skip'`).",
                main_process_only=self.accelerator.num_processes == 1,
            )
            return False
        if self.action == "skip":
            raise FloatingPointError(
                f"{message} It is step {self._in_a_row} in a row: the model itself is broken. Continue from an earlier checkpoint "
                "with a lower `learning_rate`."
            )
        before = "" if self.accelerator.distributed_type == DistributedType.DEEPSPEED else ", before the step was made"
        raise FloatingPointError(
            f"{message} Training stops{before}. Check these rows, lower `learning_rate`, or train in bfloat16 or "
            "float32 instead of float16; `on_nonfinite: skip` leaves such steps out."
        )

    def _describe(self) -> str:
        rows = [row for batch, bad in zip(self._batches, self._bad, strict=False) for row in _rows(batch, bad)]
        if rows:
            return f"log-probabilities or PIR are NaN or infinite in {self._name(rows)}."
        rows = [
            row for batch in self._batches for row in _rows(batch, torch.ones_like(batch["input_ids"], dtype=bool))
        ]
        if not rows:
            return "the gradient is NaN or infinite."
        own = "" if self.accelerator.num_processes == 1 else f" on process {self.accelerator.process_index}"
        return f"the gradient is NaN or infinite; the step's rows{own} are {self._name(rows)}."

    def _name(self, rows: list[list[int]]) -> str:
        """Rows by their places in the dataset, which is searched for them, since a batch does not know them."""
        names = {}
        if isinstance(self.dataset, Dataset):
            wanted = {tuple(row) for row in rows}
            with_ids = "id" in self.dataset.column_names
            for index, input_ids in enumerate(self.dataset.with_format(None).select_columns("input_ids")):
                key = tuple(input_ids["input_ids"])
                if key in wanted and key not in names:
                    names[key] = f"row {index}" + (f" (id {self.dataset[index]['id']!r})" if with_ids else "")
        shown = [names.get(tuple(row), f"a row of {len(row)} tokens that begins with {row[:8]}") for row in rows]
        more = len(shown) - _SHOWN_ROWS
        return ", ".join(shown[:_SHOWN_ROWS]) + (f" and {more} more" if more > 0 else "")


def _rows(batch: dict[str, Any], bad: torch.Tensor) -> list[list[int]]:
    """Token ids of the rows of a batch, or documents of a flattened one, with a token that is `bad`."""
    ids = batch["input_ids"]
    bad = (
        torch.nn.functional.pad(bad, (ids.size(1) - bad.size(1), 0))
        if bad.size(1) < ids.size(1)
        else bad[:, -ids.size(1) :]
    )
    found = []
    for row in bad.any(1).nonzero()[:, 0].tolist():
        if "attention_mask" in batch:
            kept = batch["attention_mask"][row].bool()
            found.append(ids[row][kept].tolist())
            continue
        starts = (batch["position_ids"][row] == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], ids.size(1)], strict=True):
            if end - start > 1 and bad[row, start:end].any():  # padding at the end has position 0 everywhere
                found.append(ids[row, start:end].tolist())
    return found
