# SPDX-License-Identifier: Apache-2.0

"""The E-step: the counterfactual pass over a window, the micro-batches of one optimizer step."""

from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from .collator import DataCollatorForPerCE
from .fused_head import labelled_positions_only
from .log_prob_store import LogProbStore


def split_into_chunks(lengths: list[int], budget: int, padded: bool) -> list[list[int]]:
    """
    Sort rows by length and cut them into chunks under a token budget.

    Args:
        lengths (`list[int]`): Tokens of each row.
        budget (`int`): Tokens that a chunk may have, padding included. A row that is longer is a chunk of its own.
        padded (`bool`): Whether a chunk is padded to its longest row; otherwise its rows are laid end to end.

    Returns:
        `list[list[int]]`: Indices of the rows of each chunk, longest first. Every row is in one chunk.
    """
    chunks: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        # In a padded chunk every row takes the place of the first, which is the longest
        size = lengths[chunks[-1][0]] if padded and chunks else lengths[index]
        if chunks and tokens + size <= budget:
            chunks[-1].append(index)
            tokens += size
        else:
            chunks.append([index])
            tokens = lengths[index]
    return chunks


def tokens_that_fit(device: torch.device, hidden_size: int, itemsize: int) -> int:
    """
    How many tokens a forward pass without gradients may have, by the memory that is free now
    (`counterfactual_batch_tokens="auto"`).

    A layer holds few times its widest activation, which is the MLP's: 64 values a token and hidden dimension is more than
    any usual decoder needs. Half of the free memory is left alone.

    Args:
        device (`torch.device`): Where the model runs.
        hidden_size (`int`): Width of the model.
        itemsize (`int`): Bytes of one activation.

    Returns:
        `int`: Tokens, at least 1.
    """
    if device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        backend = getattr(torch, device.type)
        # What the caching allocator holds without using it is free for us too
        free = backend.mem_get_info(device)[0] + backend.memory_reserved(device) - backend.memory_allocated(device)
    return max(free // 2 // (64 * hidden_size * itemsize), 1)


@torch.no_grad()
def labelled_log_probs(model, batch: dict[str, Any], device: torch.device) -> torch.Tensor:
    """
    Log-probabilities of the labelled tokens of a batch, from one forward pass without gradients.

    Args:
        model ([`~torch.nn.Module`]): With TRL's fused head, or what takes its place ([`logits_head`]).
        batch (`dict[str, Any]`): Input of the model with `"labels"`, padded or flattened.
        device (`torch.device`): Where the model runs.

    Returns:
        `torch.Tensor` of shape `(N,)`: In nats, row after row.
    """
    with labelled_positions_only():
        outputs = model(**send_to_device(batch, device), use_cache=False, fused_lm_head=True)
    return outputs.log_probs[outputs.label_mask]


class EStep:
    """
    Counterfactual log-probabilities `log P_θ(y_i | x, y_<i)` of the trained tokens of a whole window (E-step of the PerCE
    paper). Inside of a window θ does not change, so this is exact, and needs few large forward passes instead of many
    small ones. No gradient, and nothing of the M-step is in memory yet.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.
        collator ([`DataCollatorForPerCE`]): That made the batches.
        hidden_size (`int`): Width of the model, for `batch_tokens="auto"`.
        batch_tokens (`int`, `"auto"` or `None`): As [`PerCEConfig`]'s `counterfactual_batch_tokens`.
        store ([`LogProbStore`], *optional*): Keeps log-probabilities over epochs. If `None`, all are computed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        collator: DataCollatorForPerCE,
        hidden_size: int,
        batch_tokens: int | str | None = None,
        store: LogProbStore | None = None,
    ):
        self.accelerator = accelerator
        self.collator = collator
        self.hidden_size = hidden_size
        self.batch_tokens = batch_tokens
        self.store = store

    @torch.no_grad()
    def __call__(self, model, batches: list[dict[str, Any]], epoch: int | None = None) -> None:
        """
        In each batch, put in place of `"counterfactual_rows"`:

        - `"counterfactual_log_probs"`: `torch.float32` of shape `(K,)`, in nats, one for each of the `K` tokens with
          `"has_counterfactual"`, in their order;
        - `"counterfactual_tokens"`: `int`, the tokens that were run through the model for them, without padding.

        On several processes all of them must call this together: they run equally many forward passes, since wrapped
        models communicate in each.

        Args:
            model ([`~torch.nn.Module`]): The model as it is trained (wrapped).
            batches (`list[dict[str, Any]]`): From the collator; changed in place.
            epoch (`int`, *optional*): Epoch of the window. If `None` (evaluation), nothing is taken from the store.
        """
        window = [batch.pop("counterfactual_rows") for batch in batches]
        rows = [row for batch_rows in window for row in batch_rows]
        log_probs = [None] * len(rows)
        store = None
        if epoch is not None and self.store is not None:
            store = self.store
            store.start_epoch(epoch)
            log_probs = [store.get(row) for row in rows]
        missing = [index for index, known in enumerate(log_probs) if known is None]

        for chunk in self._chunks([len(rows[index]["input_ids"]) for index in missing], batches):
            members = [missing[index] for index in chunk]
            chunk_rows = [rows[index] for index in members] or [_nothing(batches[0])]
            batch = self.collator.counterfactual_batch(chunk_rows)
            scored = labelled_log_probs(model, batch, self.accelerator.device)
            if store is not None:
                scored = scored.cpu()  # where the kept ones are
            counts = [int((rows[index]["labels"] != -100).sum()) for index in members]
            for index, row_log_probs in zip(members, scored.split(counts), strict=False):
                log_probs[index] = row_log_probs
        if store is not None:
            for index in missing:
                store.put(rows[index], log_probs[index])

        computed, start = set(missing), 0
        for batch, batch_rows in zip(batches, window, strict=True):
            indices = range(start, start + len(batch_rows))
            start += len(batch_rows)
            own = [log_probs[index] for index in indices] or [torch.empty(0)]
            batch["counterfactual_log_probs"] = torch.cat(own).to(self.accelerator.device)
            batch["counterfactual_tokens"] = sum(len(rows[i]["input_ids"]) for i in indices if i in computed)

    def _chunks(self, lengths: list[int], batches: list[dict[str, Any]]) -> list[list[int]]:
        """Chunks of rows, then empty ones, so that every process has as many."""
        budget = self.batch_tokens
        if budget is None:
            budget = max(batch["input_ids"].numel() for batch in batches)
        elif isinstance(budget, str):  # "auto"
            itemsize = 2 if self.accelerator.mixed_precision in ("bf16", "fp16") else 4
            budget = tokens_that_fit(self.accelerator.device, self.hidden_size, itemsize)
        chunks = split_into_chunks(lengths, budget, padded=not self.collator.flattens_counterfactual)
        if self.accelerator.num_processes > 1:
            count = torch.tensor([len(chunks)], device=self.accelerator.device)
            chunks += [[]] * (int(self.accelerator.gather(count).max()) - len(chunks))
        return chunks


def _nothing(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """A row of two tokens without labels, for a process that has no row left while another has."""
    tokens = batch["input_ids"][0, :2].cpu().numpy()
    return {"input_ids": tokens, "labels": np.full(2, -100), "attention_mask": np.ones(2, dtype=int)}
