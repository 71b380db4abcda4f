# SPDX-License-Identifier: Apache-2.0

"""Counterfactual log-probabilities that are kept over epochs (`counterfactual_refresh_epochs`)."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file

from ..utils.files import written_whole


_FILE = "counterfactual_log_probs_{}.safetensors"


class LogProbStore:
    """
    Log-probabilities of the trained tokens of counterfactual rows, kept for `refresh_epochs` epochs.

    A row is known by the content of its counterfactual (a hash of its tokens and labels), which is all that its
    log-probabilities depend on besides θ. So shuffling, packing, another number of processes and resuming change nothing.
    Holds 4 bytes a trained token and some 300 bytes a row, in memory and on every process.

    Args:
        refresh_epochs (`int`): Epochs after which a row is computed anew: what epoch `e` computes serves the epochs
            before `e + refresh_epochs`.
    """

    def __init__(self, refresh_epochs: int):
        self.refresh_epochs = refresh_epochs
        self.epoch = 0
        self._kept: dict[bytes, tuple[int, torch.Tensor]] = {}
        self._new: dict[bytes, tuple[int, torch.Tensor]] = {}  # of this process, which the others do not know yet

    def start_epoch(self, epoch: int) -> None:
        """
        To be called by all processes together, at any window: if `epoch` is a new one, exchange between processes what
        they computed, since a shuffled row comes to another process next, and forget what is too old.
        """
        if epoch == self.epoch:
            return
        self.epoch = epoch
        for new in gather_object([self._new]):
            self._kept.update(new)
        self._new = {}
        self._kept = {key: entry for key, entry in self._kept.items() if self._is_current(entry)}

    def get(self, row: dict[str, np.ndarray]) -> torch.Tensor | None:
        """Log-probabilities of a counterfactual row in nats, `torch.float32` of shape `(N,)` on the CPU, if known."""
        key = _key(row)
        entry = self._new.get(key) or self._kept.get(key)
        return entry[1] if entry is not None and self._is_current(entry) else None

    def put(self, row: dict[str, np.ndarray], log_probs: torch.Tensor) -> None:
        """Keep the log-probabilities of a row, `torch.float32` of shape `(N,)` on the CPU, computed in this epoch."""
        self._new[_key(row)] = (self.epoch, log_probs.clone())

    def _is_current(self, entry: tuple[int, torch.Tensor]) -> bool:
        return self.epoch < entry[0] + self.refresh_epochs

    def save(self, folder: str, process_index: int, num_processes: int) -> None:
        """Write what this process alone knows, the first process also what all know, to a file of its own in `folder`."""
        os.makedirs(folder, exist_ok=True)  # the first process may not have made it yet
        entries = self._kept | self._new if process_index == 0 else self._new
        if process_index == 0:  # of an earlier save with more processes
            for earlier in Path(folder).glob(_FILE.format("*")):
                if int(earlier.stem.rsplit("_", 1)[1]) >= num_processes:
                    earlier.unlink()
        values = [log_probs for _, log_probs in entries.values()]
        path = os.path.join(folder, _FILE.format(process_index))
        tensors = {
            "keys": torch.tensor([list(key) for key in entries], dtype=torch.uint8),
            "epochs": torch.tensor([epoch for epoch, _ in entries.values()], dtype=torch.int64),
            "lengths": torch.tensor([len(value) for value in values], dtype=torch.int64),
            "log_probs": torch.cat(values) if values else torch.empty(0),
        }
        with written_whole(path) as part:
            save_file(tensors, part)

    def load(self, folder: str) -> int:
        """
        Read the files of all processes of a checkpoint, whatever their number was.

        Returns:
            `int`: Number of rows that are known now. 0 if the checkpoint has none, which costs their passes and nothing else.
        """
        self._kept, self._new = {}, {}
        for path in sorted(Path(folder).glob(_FILE.format("*"))):
            tensors = load_file(path)
            values = tensors["log_probs"].split(tensors["lengths"].tolist())
            for key, epoch, value in zip(tensors["keys"], tensors["epochs"].tolist(), values, strict=True):
                key = bytes(key.tolist())
                if key not in self._kept or self._kept[key][0] < epoch:
                    self._kept[key] = (epoch, value.clone())
        return len(self._kept)


def _key(row: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for column in row.values():
        digest.update(len(column).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(column, dtype=np.int64))
    return digest.digest()
