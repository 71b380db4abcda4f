# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad


def has_counterfactual(labels: list[int], persona_mask: list[int]) -> list[int]:
    """
    The trained tokens of a row that the counterfactual pass predicts too.

    These are the trained tokens outside of the persona, less one that nothing stands before once the persona is gone
    (a row that starts with its persona, and no BOS token). Without a persona there are none.

    Args:
        labels (`list[int]`): Labels of the row, `-100` on tokens that are not trained.
        persona_mask (`list[int]`): 1 where a token belongs to the persona.

    Returns:
        `list[int]`: For each token 1 or 0.
    """
    if not any(persona_mask):
        return [0] * len(labels)
    kept_before = accumulate((1 - is_persona for is_persona in persona_mask), initial=0)
    return [
        int(label != -100 and not is_persona and before > 0)
        for label, is_persona, before in zip(labels, persona_mask, kept_before, strict=False)
    ]


@dataclass
class DataCollatorForPerCE(DataCollatorForLanguageModeling):
    """
    Data collator for batches that hold both passes of PerCE.

    The factual pass is TRL's batch, unchanged. Beside it come the following keys, where `B` is the number of rows, `L`
    the length of the longest, `B'` the number of rows that need a counterfactual pass (at least one trained token
    depends on a persona) and `L'` the length of the longest of them without its persona:

    - `"has_counterfactual"`: `torch.bool` of shape `(B, L)`, see [`has_counterfactual`]. In row-major order, its k-th
      token is the k-th labelled token of the counterfactual rows.
    - `"counterfactual_input_ids"`, `"counterfactual_attention_mask"`, `"counterfactual_labels"`: `torch.int64` of shape
      `(B', L')`. Not there if no row needs a counterfactual pass.
    - `"counterfactual_position_ids"`: `torch.int64` of shape `(B', L')`. With `counterfactual="mask"` only.

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
    >>> batch["counterfactual_input_ids"], batch["counterfactual_labels"]
    (tensor([[1, 3, 4]]), tensor([[-100,    3,    4]]))
    ```
    """

    counterfactual: str = "drop"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        paired_rows, counterfactuals, masks = [], [], []
        for example in examples:
            input_ids, labels = example["input_ids"], example.get("labels", example["input_ids"])
            persona_mask = example.get("persona_mask") or [0] * len(input_ids)
            if len(persona_mask) != len(input_ids):
                raise ValueError(
                    f"A row's 'persona_mask' has {len(persona_mask)} values for {len(input_ids)} 'input_ids'. They must be "
                    "equally long."
                )
            paired = has_counterfactual(labels, persona_mask)
            paired_rows.append(torch.tensor(paired, dtype=torch.bool))
            if not any(paired):
                continue
            keep = [self.counterfactual == "mask" or not is_persona for is_persona in persona_mask]
            labels = [token if is_paired else -100 for token, is_paired in zip(input_ids, paired, strict=True)]
            counterfactuals.append(
                {
                    "input_ids": [token for token, kept in zip(input_ids, keep, strict=True) if kept],
                    "labels": [label for label, kept in zip(labels, keep, strict=True) if kept],
                }
            )
            masks.append(torch.tensor([1 - is_persona for is_persona in persona_mask]))

        batch["has_counterfactual"] = pad(
            paired_rows, padding_value=False, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
        )
        if counterfactuals:
            counterfactual = super().torch_call(counterfactuals)
            if self.counterfactual == "mask":
                size = counterfactual["input_ids"].size(1)
                for row, mask in zip(counterfactual["attention_mask"], masks, strict=True):
                    row[: len(mask)] = mask
                # Given, since some models would count positions by the attention mask
                counterfactual["position_ids"] = torch.arange(size).expand(len(masks), size)
            batch |= {f"counterfactual_{key}": value for key, value in counterfactual.items()}
        return batch
