# SPDX-License-Identifier: Apache-2.0

"""
`make demo`: fine-tune SmolLM2-135M-Instruct with PerCE on a LoRA adapter, and show what it learned.

Trains through the command line's own code on the persona questions that come with the package (159 rows of 53 people),
then scores the answers of 17 other people with the adapter off ("before") and on ("after").
"""

import os
import sys


os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")  # Transformers shows a bar of GGUF files even in a pipe

import contextlib
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from smollm2 import ensure_smollm2
from trl_perce import PerContrast
from trl_perce.benchmarks.persona_qa import answer_tokens, load_rows
from trl_perce.scoring.heatmap.pieces import most_personal
from trl_perce.scoring.heatmap.terminal import print_heatmap
from trl_perce.utils.bfloat16 import slow_bf16


ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipes/SmolLM2-135M-Instruct/persona_qa/config_lora.yaml"
OUTPUT = "outputs/demo"
# Name in the log → heading
COLUMNS = {
    **{"loss": "loss", "nll": "nll", "pir/mean": "PIR", "pir/personal_fraction": "PIR > 1"},
    **{"weight/mean": "weight", "weight/at_min": "at min", "weight/at_max": "at max"},
    "counterfactual/token_ratio": "tokens",
}


def main() -> None:
    console, started = Console(highlight=False), time.time()
    os.chdir(ROOT)
    folder = ensure_smollm2()
    arguments = ["--config", RECIPE, "--model_name_or_path", os.path.relpath(folder), "--output_dir", OUTPUT]
    console.rule("Train")
    if slow_bf16():
        arguments += ["--dtype", "float32", "--bf16", "false"]
        console.print("This CPU is slow at the recipe's bfloat16, so it trains in float32.\n")
    pairs = (f"{name} {value}" for name, value in zip(arguments[::2], arguments[1::2], strict=True))
    console.print(" \\\n    ".join(["$ trl-perce train", *pairs]) + "\n", soft_wrap=True)

    from trl_perce.cli import train

    trainer = train.main(*train.make_parser().parse_args_and_config(arguments))
    logs = trainer.state.log_history

    console.rule("What the log says")
    table = Table("step", *COLUMNS.values())
    for log in (log for log in logs if "loss" in log):
        table.add_row(str(log["step"]), *(f"{log[name]:.3f}" for name in COLUMNS))
    console.print(table)
    console.print(
        "loss: weighted, nll: not weighted, both in nats a token. PIR: mean, in nats, and the share of tokens over 1. weight: "
        "mean, and the shares at its bounds 0.8 and 5. tokens: those of the counterfactual pass over the factual one's.\n"
    )

    console.rule("Held-out answers of people who were not in the training data")
    rows = load_rows(("test",))
    scorer = PerContrast(trainer.model, trainer.processing_class, use_cpu=True, disable_tqdm=True)
    after = scorer.score(rows)
    with trainer.model.disable_adapter():
        before = scorer.score(rows)
    answers = [answer_tokens(row, scores) for row, scores in zip(rows, after, strict=True)]
    is_personal = np.concatenate([answer.is_personal for answer in answers])
    table = Table("tokens", "number", "log-likelihood before", "after", "PIR before", "after")
    for name, chosen in (("in personal words", is_personal), ("others", ~is_personal)):
        means = [
            np.concatenate(
                [getattr(one, column)[answer.indices] for one, answer in zip(scores, answers, strict=True)]
            )[chosen].mean()
            for column in ("log_probs", "pir")
            for scores in (before, after)
        ]
        table.add_row(
            name, str(chosen.sum()), *(f"{mean:.3f}" for mean in means[:2]), *(f"{mean:+.3f}" for mean in means[2:])
        )
    console.print(table)
    console.print("Means over tokens, in nats. The adapter is off before and on after.\n")

    console.rule("The most personal answers of two people, coloured by PIR")
    print_heatmap(after, console, num_rows=2)

    console.rule("What the model itself answers to them")
    for scores in most_personal(after, 2):
        row = rows[scores.row]
        console.print(f"[dim]Question[/]  {row['prompt'][-1]['content'].rsplit(chr(10), 1)[-1]}")
        for name, adapter in (("Before", trainer.model.disable_adapter()), ("After", contextlib.nullcontext())):
            with adapter:
                console.print(f"[dim]{name:8}[/]  {_answer(trainer, row)}", highlight=False)
        console.print()

    console.print(f"The adapter is in [bold]{OUTPUT}[/]; plain PEFT loads it.")
    console.print(f"{time.time() - started:.0f} s, peak memory {_peak() / 2**30:.1f} GiB.")


def _answer(trainer, row: dict) -> str:
    """The likeliest answer, on one line, of at most 40 tokens."""
    tokenizer = trainer.processing_class
    messages = [
        {**message, "content": message["content"].replace("{persona}", row["persona"])} for message in row["prompt"]
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tokens = trainer.model.generate(**prompt, do_sample=False, max_new_tokens=40)[0, prompt["input_ids"].size(1) :]
    text = " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())
    return text if tokens[-1] == tokenizer.eos_token_id else f"{text} …"


def _peak() -> int:
    """The most memory that this process held, in bytes."""
    if os.name == "nt":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
