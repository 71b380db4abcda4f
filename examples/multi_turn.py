# SPDX-License-Identifier: Apache-2.0

"""
Conversations of several turns: every reply of the assistant is trained, and the persona stands in the system message.

    python examples/multi_turn.py Qwen/Qwen3-0.6B

In the counterfactual the persona is out of the context of *all* replies.
"""

# PEFT comes last: `trl_perce` keeps a message of bitsandbytes, which PEFT imports, off the screen
# isort: off
import sys

from datasets import Dataset
from trl_perce import PerCEConfig, PerCETrainer, PerContrast
from peft import LoraConfig


conversation = {
    "persona": "I sew my own dresses, mostly from linen.",
    "messages": [
        {"role": "system", "content": "The user says of themselves: {persona}"},
        {"role": "user", "content": "What should I buy?"},
        {"role": "assistant", "content": "A new set of needles."},
        {"role": "user", "content": "And for the summer?"},
        {"role": "assistant", "content": "Three metres of light linen, in a colour that you do not have yet."},
    ],
}
args = PerCEConfig("outputs/multi-turn", learning_rate=1e-4, max_steps=2, logging_steps=1)
trainer = PerCETrainer(
    model=sys.argv[1],
    args=args,
    train_dataset=Dataset.from_list([conversation] * 8),
    peft_config=LoraConfig(target_modules="all-linear", lora_dropout=0.0),
)
trainer.train()

scores = PerContrast(trainer.model, trainer.processing_class).score(conversation)
for word in scores.words:
    print(f"{word.pir:+.2f}  {word.text}")
