# SPDX-License-Identifier: Apache-2.0

"""TRL's batches, and beside them the rows without their personas, or the weights that come with the rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad


def has_counterfactual(labels: Sequence[int], persona_mask: Sequence[int]) -> np.ndarray:
    """
    The trained tokens of a row that the counterfactual pass predicts too.

    These are the trained tokens outside of the persona, less one that nothing stands before once the persona is gone
    (a row that starts with its persona, and no BOS token). Without a persona there are none.

    Args:
        labels (`Sequence[int]`): Labels of the row, `-100` on tokens that are not trained.
        persona_mask (`Sequence[int]`): 1 where a token belongs to the persona.

    Returns:
        `np.ndarray` of dtype `bool`: For each token whether the counterfactual pass predicts it.
    """
    outside = np.asarray(persona_mask) == 0
    trained = np.asarray(labels) != -100
    if outside.all():
        return np.zeros_like(trained)
    kept_before = np.cumsum(outside) - outside
    return trained & outside & (kept_before > 0)


@dataclass
class DataCollatorForPerCE(DataCollatorForLanguageModeling):
    """
    Data collator for batches that hold both passes of PerCE.

    The factual pass is TRL's batch, unchanged: padded, or with `padding_free=True` flattened to one row. Beside it come
    two keys, where `(B, L)` is the shape of `"input_ids"`:

    - `"has_counterfactual"`: `torch.bool` of shape `(B, L)`, see [`has_counterfactual`].
    - `"counterfactual_rows"`: a list of the rows (of a packed row: the documents) with at least one such token, in
      order. Each is a `dict` of `np.int64` arrays of shape `(L',)`, its own length without its persona: `"input_ids"`,
      `"labels"` (`-100` but on the tokens that `has_counterfactual`), and with `counterfactual="mask"` also
      `"attention_mask"`. They are not padded, since the E-step batches them anew over a whole window
      ([`~DataCollatorForPerCE.counterfactual_batch`]).

    The k-th token with `has_counterfactual`, in row-major order, is the k-th labelled token of the counterfactual rows.

    Args:
        pad_token_id (`int`):
            Token ID to use for padding.
        counterfactual (`str`, *optional*, defaults to `"drop"`):
            `"drop"`: persona tokens leave the counterfactual sequence. `"mask"`: they stay at their positions with
            attention mask 0, and `L'` is the length with persona.

    The other arguments are those of [`~trl.trainer.sft_trainer.DataCollatorForLanguageModeling`].

    Raises:
        `ValueError`: A row's `persona_mask` is not as long as its `input_ids`.

    Example:
    ```python
    >>> collator = DataCollatorForPerCE(pad_token_id=0)
    >>> batch = collator([{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4], "persona_mask": [0, 1, 0, 0]}])
    >>> batch["counterfactual_rows"]
    [{'input_ids': array([1, 3, 4]), 'labels': array([-100,    3,    4])}]
    ```
    """

    counterfactual: str = "drop"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        flags, rows = [], []
        for example in examples:
            input_ids = np.asarray(example["input_ids"])
            labels = np.asarray(example.get("labels", input_ids))
            persona_mask = np.asarray(example.get("persona_mask", np.zeros_like(input_ids)))
            if len(persona_mask) != len(input_ids):
                raise ValueError(
                    f"A row's 'persona_mask' has {len(persona_mask)} values for {len(input_ids)} 'input_ids'. They must be "
                    "equally long."
                )
            borders = np.cumsum(example.get("seq_lengths", ()))[:-1].astype(int)  # of the documents of a packed row
            columns = (np.split(column, borders) for column in (input_ids, labels, persona_mask))
            for own_ids, own_labels, own_mask in zip(*columns, strict=True):
                paired = has_counterfactual(own_labels, own_mask)
                flags.append(torch.from_numpy(paired))
                if paired.any():
                    rows.append(self._counterfactual_row(own_ids, own_labels, own_mask, paired))
        if self.padding_free:
            flags = [torch.cat(flags)]
        batch["has_counterfactual"] = pad(
            flags, padding_value=False, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
        )
        batch["counterfactual_rows"] = rows
        return batch

    def _counterfactual_row(self, input_ids, labels, persona_mask, paired) -> dict[str, np.ndarray]:
        labels = np.where(paired, labels, -100)
        if self.counterfactual == "mask":
            return {"input_ids": input_ids, "labels": labels, "attention_mask": 1 - persona_mask}
        kept = persona_mask == 0
        return {"input_ids": input_ids[kept], "labels": labels[kept]}

    @property
    def flattens_counterfactual(self) -> bool:
        """Whether [`~DataCollatorForPerCE.counterfactual_batch`] lays its rows end to end instead of padding them."""
        return self.padding_free and self.counterfactual == "drop"

    def counterfactual_batch(self, rows: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        """
        A batch of the counterfactual pass, as the model takes it.

        Args:
            rows (`list[dict[str, np.ndarray]]`): Some of the `"counterfactual_rows"` of one or many batches.

        Returns:
            `dict[str, Any]`: As TRL's collator makes it of these rows: padded, or with `padding_free=True` flattened, where
            positions count in the shortened sequence. With `counterfactual="mask"` always padded, persona tokens have
            attention mask 0, and positions are those of the whole sequence.
        """
        if self.counterfactual == "drop":
            return super().torch_call(rows)
        batch = DataCollatorForLanguageModeling(
            self.pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of, return_position_ids=True
        )(rows)
        for attention_mask, row in zip(batch["attention_mask"], rows, strict=True):
            attention_mask[: len(row["attention_mask"])] = torch.from_numpy(row["attention_mask"])
        return batch


@dataclass
class DataCollatorForTokenWeights(DataCollatorForLanguageModeling):
    """
    Data collator for rows that come with the weights of their tokens (`token_weighting="given"`).

    To TRL's batch, padded or with `padding_free=True` flattened to one row, it adds `"token_weights"`: `torch.float32` of the shape of
    `"input_ids"`, 0 on padding.

    The arguments are those of [`~trl.trainer.sft_trainer.DataCollatorForLanguageModeling`].

    Raises:
        `ValueError`: A row has no `token_weights`, or not as many as `input_ids`; or they are negative, NaN or infinite.

    Example:
    ```python
    >>> collator = DataCollatorForTokenWeights(pad_token_id=0)
    >>> batch = collator([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "token_weights": [1.0, 0.5, 2.0]}])
    >>> batch["token_weights"]
    tensor([[1.0000, 0.5000, 2.0000]])
    ```
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        weights = [torch.tensor(example.get("token_weights") or (), dtype=torch.float32) for example in examples]
        for own, example in zip(weights, examples, strict=True):
            if len(own) != len(example["input_ids"]) or not (torch.isfinite(own) & (own >= 0)).all():
                raise ValueError(
                    f"A row's 'token_weights' must be as many finite numbers, not negative, as its {len(example['input_ids'])} "
                    f"'input_ids', and are {len(own)}: {own.tolist()[:5]}."
                )
        if self.padding_free:
            weights = [torch.cat(weights)]
        batch["token_weights"] = pad(
            weights, padding_value=0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
        )
        return batch
