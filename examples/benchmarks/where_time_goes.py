# SPDX-License-Identifier: Apache-2.0

"""
Where the time of a step goes: of SFT, LossCE and PerCE by the clock and on the device alone, and of PerCE its E-step and M-step.

    python examples/benchmarks/where_time_goes.py --model qwen3-4b --quantization nf4 --rows reviews --accumulation 2

On a fast card the host cannot launch kernels as fast as the card runs them, so that seconds by the clock tell more of the host than
of the method. What the kernels of a step take on the device is what a slower card, which the host keeps busy, waits for.
Writes where_time_goes.json, .md and .txt (the profiler's table of a PerCE step).
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from trl import SFTTrainer
from trl.kernels.chunked_logprob import _use_triton

import measure
from cost_report import NAMES
from flops import Row, step_ratio_floor
from measure import Run, be_quiet, environment, train
from shapes import CONFIGS, LORA_RANK, QUANTIZATIONS, build_model
from step_cost import PROFILES, RESPONSE
from trl_perce import PerCETrainer
from trl_perce.utils.files import write_text


STEPS = 4  # the first warms up, the last is profiled
PARTS = ("E-step", "M-step")


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Profiled:
    """Over a trainer: the seconds of each E-step (with the fetching of the batches) and M-step, and a profile of the last step."""

    def get_batch_samples(self, *args, **kwargs):
        if len(Notes.seconds["E-step"]) == STEPS - 1:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
            Notes.profiler = profile(activities=activities)
            Notes.profiler.__enter__()
        started = now()
        with record_function("E-step"):
            result = super().get_batch_samples(*args, **kwargs)
        Notes.seconds["E-step"].append(now() - started)
        Notes.seconds["M-step"].append(0.0)
        return result

    def training_step(self, *args, **kwargs):
        started = now()
        with record_function("M-step"):
            result = super().training_step(*args, **kwargs)
        Notes.seconds["M-step"][-1] += now() - started
        return result


class Notes:
    """Of the run that is under way."""

    seconds: dict[str, list[float]] = {}
    profiler: profile | None = None


class ProfiledPerCETrainer(Profiled, PerCETrainer):
    pass


class ProfiledSFTTrainer(Profiled, SFTTrainer):
    pass


def profile_step(model, variant: str, run: Run, device: str) -> tuple[dict, str]:
    """Seconds of each part by the clock (median of the steps between) and on the device (of the last step), and the table."""
    Notes.seconds = {part: [] for part in PARTS}
    train(model, variant, run, device)
    Notes.profiler.__exit__(None, None, None)
    averages = Notes.profiler.key_averages()
    found = {"clock": {part: statistics.median(seconds[1:-1]) for part, seconds in Notes.seconds.items()}}
    found["device"] = {event.key: event.device_time_total / 1e6 for event in averages if event.key in PARTS}
    found["host_waits"] = sum(event.count for event in averages if event.key == "cudaStreamSynchronize")
    found["launches"] = sum(event.count for event in averages if event.key in ("cudaLaunchKernel", "cuLaunchKernelEx"))
    keys = ("self_device_time_total", "self_cpu_time_total") if device == "cuda" else ("self_cpu_time_total",)
    return found, "\n\n".join(averages.table(sort_by=key, row_limit=25, max_name_column_width=60) for key in keys)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(CONFIGS), default="qwen3-4b")
    add("--quantization", choices=QUANTIZATIONS, default="nf4")
    add("--rows", choices=list(PROFILES), default="reviews")
    add("--accumulation", type=int, default=2)
    add("--checkpointing", choices=["on", "off"], default="on")
    add("--output_dir", type=Path, default=Path("outputs/where_time_goes"))
    args = parser.parse_args(arguments)
    be_quiet()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole, question = PROFILES[args.rows]
    row, checkpointing = Row(whole - question, question, RESPONSE), args.checkpointing == "on"
    model = build_model(CONFIGS[args.model], args.quantization, device)
    run = Run(row, 1, args.accumulation, checkpointing, steps_per_epoch=STEPS, epochs=1)
    measure.PerCETrainer, measure.SFTTrainer = ProfiledPerCETrainer, ProfiledSFTTrainer
    scores_all = not _use_triton(torch.device(device))

    result = {"environment": environment(), "variants": {}}
    result["settings"] = {name: str(value) for name, value in vars(args).items() if name != "output_dir"}
    lines = [
        f"{args.model} {args.quantization}, {args.rows}, accumulation {args.accumulation}, checkpointing {args.checkpointing}. "
        "On the device: the kernels of one step, whatever the host did meanwhile.",
        "",
        "| | by the clock, s | ratio to SFT | on the device, s | ratio to SFT | floor | E-step: clock | device | launches | host waits |",
        "|---|" + "---:|" * 9,
    ]
    for variant in ("sft", "lossce", "drop"):
        found, table = profile_step(model, variant, run, device)
        floor = step_ratio_floor(
            model.config, row, LORA_RANK, checkpointing, "drop" if variant == "drop" else None, 1, scores_all
        )
        found["floor"] = 1.0 if variant == "sft" else floor
        result["variants"][variant] = found
        totals = [sum(found[kind].values()) for kind in ("clock", "device")]
        sft = [sum(result["variants"]["sft"][kind].values()) for kind in ("clock", "device")]
        ratios = [f"{total / base:.3f}" if base else "–" for total, base in zip(totals, sft, strict=True)]
        lines.append(
            f"| {NAMES[variant]} | {totals[0]:.3f} | {ratios[0]} | {totals[1]:.3f} | {ratios[1]} | {found['floor']:.3f} "
            f"| {found['clock']['E-step']:.3f} | {found['device'].get('E-step', 0):.3f} | {found['launches']:,} "
            f"| {found['host_waits']:,} |"
        )
        texts = {"json": json.dumps(result, indent=1), "md": "\n".join([*lines, ""]), "txt": table}
        for ending, text in texts.items():
            write_text(args.output_dir / f"where_time_goes.{ending}", text)
    print(texts["md"])


if __name__ == "__main__":
    main()
