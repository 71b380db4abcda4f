# SPDX-License-Identifier: Apache-2.0

"""
Rows that come one after the other, from a file too large for memory or from anywhere else.

    python examples/streaming.py Qwen/Qwen3-0.6B rows.jsonl

A stream has no length, so `max_steps` says when to stop. The persona is found, masked and trimmed as the rows go by; an error names the row.
On the command line: `dataset_streaming: true`.
"""

# PEFT comes last: `trl_perce` keeps a message of bitsandbytes, which PEFT imports, off the screen
# isort: off
import sys

from datasets import load_dataset
from trl_perce import PerCEConfig, PerCETrainer, PerContrast
from peft import LoraConfig


model, path = sys.argv[1:3]
rows = load_dataset("json", data_files=path, split="train", streaming=True)
trainer = PerCETrainer(
    model=model,
    args=PerCEConfig("outputs/streaming", learning_rate=1e-4, max_steps=2, logging_steps=1),
    train_dataset=rows.shuffle(seed=0, buffer_size=1000),
    peft_config=LoraConfig(target_modules="all-linear", lora_dropout=0.0),
)
trainer.train()

for scores in PerContrast(trainer.model, trainer.processing_class).score(rows):  # as they come, in order
    print(scores.row, f"{scores.is_personal.mean():.0%} personal", scores.response)
