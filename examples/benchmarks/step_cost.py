# SPDX-License-Identifier: Apache-2.0

"""
What a PerCE step costs over a step of TRL's SFT: time against its arithmetic floor, and peak memory.

    python examples/benchmarks/step_cost.py --models smollm2-135m --persona_lengths 256 1024 --profiles reviews

In one process, on one model with random weights, TRL's `SFTTrainer` and `PerCETrainer` train in turn (A B A B …) from the same
adapters on the same rows. A run is `epochs × steps_per_epoch` optimizer steps, where the epochs are as many as the longest
refresh of the variants; its first step does not count. A step's time is the mean over the epochs of their medians over all
rounds, so that `refresh3` is told by whole periods. The floor of the ratio is counted in flops.py.

Writes step_cost.json after every cell, and of it step_cost.md and one picture for each model. A cell that is in
step_cost.json with the same settings and device is not measured again. On CPU, Linux with glibc only.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm
from trl.kernels.chunked_logprob import _use_triton

from cost_report import markdown, plot
from flops import Row, step_ratio_floor
from measure import VARIANTS, Run, be_quiet, environment, train, within_memory
from shapes import CONFIGS, LORA_RANK, build_model
from trl_perce.utils.files import write_json, write_text


# LongLaMP's mean prompt lengths with and without persona, in tokens of Qwen3 (Table 6 of the paper)
PROFILES = {"abstracts": (975, 65), "reviews": (2063, 169), "topics": (1055, 55)}
QUESTION, RESPONSE = 65, 250  # tokens; the paper's responses have 200 to 300
DEFAULTS = {
    "cuda": {
        "models": ["qwen3-4b"],
        "quantization": ["bf16", "nf4"],
        "persona_lengths": [256, 512, 1024, 2048, 4096, 8192, 16384],
        "accumulation": [1, 8],
        "checkpointing": ["on", "off"],
        "rounds": 3,
        "steps_per_epoch": 4,
    },
    "cpu": {
        "models": ["smollm2-135m"],
        "quantization": ["bf16"],
        "persona_lengths": [256, 512, 1024],
        "accumulation": [1],
        "checkpointing": ["off"],
        "rounds": 2,
        "steps_per_epoch": 2,
    },
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=list(CONFIGS), help="Shapes. Default: smollm2-135m on CPU, qwen3-4b on a GPU.")
    add("--quantization", nargs="+", choices=["bf16", "nf4"], help="Base weights. Default: bf16; on a GPU both.")
    add("--persona_lengths", nargs="*", type=int, help="Tokens. Default: 256 to 1024 on CPU, to 16384 on a GPU.")
    add(
        "--profiles", nargs="*", choices=list(PROFILES), default=list(PROFILES), help="LongLaMP's tasks. Default: all."
    )
    add("--accumulation", nargs="+", type=int, help="Micro-batches a step. Default: 1; on a GPU 1 and 8.")
    add("--checkpointing", nargs="+", choices=["on", "off"], help="Default: off; on a GPU both.")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="Trainers. Default: all.")
    add("--rounds", type=int, help="Runs of each variant. Default: 2 on CPU, 3 on a GPU.")
    add("--steps_per_epoch", type=int, help="Optimizer steps, at least 2. Default: 2 on CPU, 4 on a GPU.")
    add("--batch_size", type=int, default=1, help="Rows on the device at a time. Default: 1.")
    add("--question", type=int, default=QUESTION, help=f"Tokens, beside --persona_lengths. Default: {QUESTION}.")
    add("--response", type=int, default=RESPONSE, help=f"Tokens. Default: {RESPONSE}.")
    add("--counterfactual_batch_tokens", help="As in PerCEConfig: a number or 'auto'. Default: PerCEConfig's.")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output_dir", type=Path, default=Path("outputs/step_cost"), help="Default: outputs/step_cost.")
    args = parser.parse_args(arguments)
    for name, default in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.steps_per_epoch < 2:
        parser.error("--steps_per_epoch must be at least 2, since the first step of a run does not count.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that PyTorch can use. Write --device cpu.")
    if args.counterfactual_batch_tokens not in (None, "auto"):
        args.counterfactual_batch_tokens = int(args.counterfactual_batch_tokens)
    return args


def cells_of(args: argparse.Namespace) -> list[tuple[str, dict]]:
    """What to measure: the kind of rows ("length" or the profile's name) and the settings, model after model."""
    lengths = [("length", persona, args.question) for persona in args.persona_lengths]
    lengths += [(name, PROFILES[name][0] - PROFILES[name][1], PROFILES[name][1]) for name in args.profiles]
    kinds = itertools.product(args.models, args.quantization, args.checkpointing, args.accumulation, lengths)
    return [
        (
            rows,
            {
                "model": model,
                "quantization": quantization,
                "persona": persona,
                "question": question,
                "response": args.response,
                "batch_size": args.batch_size,
                "accumulation": accumulation,
                "checkpointing": checkpointing,
                "variants": args.variants,
                "rounds": args.rounds,
                "steps_per_epoch": args.steps_per_epoch,
                "counterfactual_batch_tokens": args.counterfactual_batch_tokens,
                "lora_rank": LORA_RANK,
            },
        )
        for model, quantization, checkpointing, accumulation, (rows, persona, question) in kinds
    ]


def measure_cell(model: PeftModel, settings: dict, device: str, progress: tqdm) -> dict[str, dict]:
    """
    Measure the variants in turn.

    Returns:
        `dict[str, dict]`: For each variant its `floor`, and either `seconds` a step, `peak_bytes` and all `step_seconds` (by
            round and epoch), or `out_of_memory`.
    """
    row = Row(settings["persona"], settings["question"], settings["response"])
    checkpointing = settings["checkpointing"] == "on"
    refresh = {name: (VARIANTS[name] or {}).get("counterfactual_refresh_epochs", 1) for name in settings["variants"]}
    run = Run(
        row=row,
        batch_size=settings["batch_size"],
        accumulation=settings["accumulation"],
        checkpointing=checkpointing,
        steps_per_epoch=settings["steps_per_epoch"],
        epochs=max(refresh.values()),
        counterfactual_batch_tokens=settings["counterfactual_batch_tokens"],
    )
    sft_scores_all = not _use_triton(torch.device(device))
    results = {}
    for name in settings["variants"]:
        counterfactual = (VARIANTS[name] or {}).get("counterfactual")
        floor = step_ratio_floor(
            model.config, row, LORA_RANK, checkpointing, counterfactual, refresh[name], sft_scores_all
        )
        floor = 1.0 if name == "sft" else floor
        results[name] = {"floor": floor, "step_seconds": [], "peak_bytes": 0}
    for _ in range(settings["rounds"]):
        for name, result in results.items():
            progress.set_postfix_str(
                f"{settings['model']} {settings['quantization']}, persona {row.persona}, accumulation "
                f"{run.accumulation}, checkpointing {settings['checkpointing']}: {name}"
            )
            if "out_of_memory" not in result:
                measured = within_memory(train, model, name, run, device)
                if measured is None:
                    results[name] = {"floor": result["floor"], "out_of_memory": True}
                else:
                    epochs, peak = measured
                    del epochs[0][0]  # the first step warms up
                    result["step_seconds"].append(epochs)
                    result["peak_bytes"] = max(result["peak_bytes"], peak)
            progress.update()
    for result in results.values():
        if "out_of_memory" not in result:
            result["seconds"] = seconds_per_step(result["step_seconds"])
    return results


def seconds_per_step(rounds: list[list[list[float]]]) -> float:
    """Mean over the epochs of the median, over all rounds, of the steps of that epoch."""
    return statistics.mean(statistics.median(itertools.chain(*same_epoch)) for same_epoch in zip(*rounds, strict=True))


def measured_before(entries: list[dict], settings: dict) -> bool:
    device = environment()["device"]
    return any(entry["settings"] == settings and entry["environment"]["device"] == device for entry in entries)


def measure_all(args: argparse.Namespace) -> None:
    path = args.output_dir / "step_cost.json"
    report = json.loads(path.read_text()) if path.exists() else {"cells": []}
    cells = [(rows, settings) for rows, settings in cells_of(args) if not measured_before(report["cells"], settings)]
    runs = len(cells) * args.rounds * len(args.variants)
    model, built = None, None
    with tqdm(total=runs, unit="run", disable=not sys.stderr.isatty()) as progress:
        for rows, settings in cells:
            kind = settings["model"], settings["quantization"]
            if kind != built:
                model = None  # before the next one is built
                gc.collect()
                model, built = build_model(CONFIGS[kind[0]], kind[1], args.device), kind
            results = measure_cell(model, settings, args.device, progress)
            cell = {"rows": rows, "settings": settings, "environment": environment(), "results": results}
            report["cells"].append(cell)
            write_json(path, report, indent=1)
            write_text(path.with_suffix(".md"), markdown(report))
            plot(report, args.output_dir)
    print(markdown(report))


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    be_quiet()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    measure_all(args)


if __name__ == "__main__":
    main()
