# SPDX-License-Identifier: Apache-2.0

"""
What fits into which card: the peak memory of PerCE training, one row at a time with gradient checkpointing, under a limit.

    python examples/benchmarks/fits.py --models qwen3-4b llama-3.1-8b --quantization nf4 bf16 --lengths 5000 --memory_gb 12 16 24

For each model (random weights of the published shape, LoRA r 16 on all linear layers), quantization and length, PyTorch may
allocate what a card of so many GiB leaves beside this card's own CUDA context, the smallest limit first, until two training steps
go through: "fits" is seen, not estimated. Writes fits.json and fits.md after each try; what is in fits.json is kept. On a CPU, which is not
limited, it measures the peak alone.
"""

import argparse
import gc
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from flops import Row
from measure import Run, be_quiet, environment, train, within_memory
from shapes import CONFIGS, QUANTIZATIONS, build_model
from trl_perce.utils.files import write_json, write_text


GIB = 2**30
QUESTION, RESPONSE = 169, 250  # LongLaMP's reviews, and the paper's responses


def context_bytes() -> int:
    """What the CUDA context takes, outside of PyTorch's allocator."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def two_steps(model, length: int, fp16: bool, device: str) -> int | None:
    """Peak memory in bytes of two PerCE steps (the second has the optimizer's states beside it); `None` if out of memory."""
    row = Row(length - QUESTION - RESPONSE, QUESTION, RESPONSE)
    run = Run(row, batch_size=1, accumulation=1, checkpointing=True, steps_per_epoch=2, epochs=1, fp16=fp16)
    measured = within_memory(train, model, "drop", run, device)
    return None if measured is None else measured[1]


def tries(model, quantization: str, length: int, limits: list[float], device: str):
    """Yield a `dict` for each limit that was tried, the smallest first, up to the first one that fits."""
    fp16 = quantization.endswith("fp16")
    if device == "cpu":
        yield {"memory_gb": None, "peak_bytes": two_steps(model, length, fp16, device)}
        return
    total, context = torch.cuda.get_device_properties(0).total_memory, context_bytes()
    for limit in sorted(limits):
        gc.collect()
        torch.cuda.empty_cache()
        weights = torch.cuda.memory_allocated()
        allowed = limit * GIB - context
        peak, reserved = None, None
        if allowed > weights:
            torch.cuda.set_per_process_memory_fraction(min(allowed / total, 1.0))
            peak = two_steps(model, length, fp16, device)
            reserved = torch.cuda.max_memory_reserved()
            torch.cuda.set_per_process_memory_fraction(1.0)
        yield {
            **{"memory_gb": limit, "peak_bytes": peak, "reserved_bytes": reserved if peak else None},
            **{"weights_bytes": weights, "context_bytes": context},
        }
        if peak is not None:
            return


def markdown(entries: list[dict]) -> str:
    lines = [
        "| model | base weights | tokens a row | card | fits | peak GiB | reserved GiB | weights GiB | context GiB |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for entry in entries:
        sizes = [entry.get(f"{name}_bytes") for name in ("peak", "reserved", "weights", "context")]
        shown = ["–" if size is None else f"{size / GIB:.2f}" for size in sizes]
        card = "no limit" if entry["memory_gb"] is None else f"{entry['memory_gb']:g} GiB"
        fits = "no" if entry["peak_bytes"] is None else "yes"
        lines.append(
            f"| {entry['model']} | {entry['quantization']} | {entry['length']:,} | {card} | {fits} | {' | '.join(shown)} |"
        )
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=list(CONFIGS), default=["qwen3-4b"], help="Shapes. Default: qwen3-4b.")
    add("--quantization", nargs="+", choices=QUANTIZATIONS, default=["nf4"], help="Base weights. Default: nf4.")
    add("--lengths", nargs="+", type=int, default=[5000], help="Tokens of a row. Default: 5000.")
    add("--memory_gb", nargs="+", type=float, default=[12, 16, 24], help="Cards, in GiB. Default: 12 16 24.")
    add("--output_dir", type=Path, default=Path("outputs/fits"), help="Default: outputs/fits.")
    args = parser.parse_args(arguments)
    if min(args.lengths) <= QUESTION + RESPONSE:
        parser.error(f"--lengths must be over {QUESTION + RESPONSE}, the tokens of question and response.")
    be_quiet()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    device, path = "cuda" if torch.cuda.is_available() else "cpu", args.output_dir / "fits.json"
    entries = json.loads(path.read_text())["entries"] if path.exists() else []
    kinds = [(model, quantization) for quantization in args.quantization for model in args.models]
    for name, quantization in tqdm(kinds, disable=not sys.stderr.isatty()):
        model = build_model(CONFIGS[name], quantization, device)
        for length in args.lengths:
            for found in tries(model, quantization, length, args.memory_gb, device):
                entries.append({"model": name, "quantization": quantization, "length": length, **found})
                write_json(path, {"environment": environment(), "entries": entries}, indent=1)
                write_text(args.output_dir / "fits.md", markdown(entries))
        del model
        gc.collect()
    print(markdown(entries))


if __name__ == "__main__":
    main()
