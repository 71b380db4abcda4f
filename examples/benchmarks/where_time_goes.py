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

"""
Where the time of a PerCE step goes: its E-step and its M-step by the clock, against their arithmetic, and by the profiler.

    python examples/benchmarks/where_time_goes.py --model qwen3-4b --quantization nf4 --rows reviews

The device is waited for at both ends of each part. Writes where_time_goes.json, .md and .txt (the profiler's tables).
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import measure
from flops import Row, scoring_pass, training_pass
from measure import Run, be_quiet, environment, train
from shapes import CONFIGS, LORA_RANK, QUANTIZATIONS, build_model
from step_cost import PROFILES, RESPONSE
from trl_perce import PerCETrainer
from trl_perce.files import written_whole


STEPS = 4  # the first warms up, the last is profiled


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class TimedTrainer(PerCETrainer):
    """Notes the seconds of each E-step, and of all micro-batches of each M-step, and profiles the last step."""

    e_seconds: list[float] = []
    m_seconds: list[float] = []
    profiler: profile | None = None

    def get_batch_samples(self, *args, **kwargs):
        if len(self.e_seconds) == STEPS - 1:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
            type(self).profiler = profile(activities=activities)
            self.profiler.__enter__()
        started = now()
        with record_function("E-step"):
            result = super().get_batch_samples(*args, **kwargs)
        self.e_seconds.append(now() - started)
        self.m_seconds.append(0.0)
        return result

    def training_step(self, *args, **kwargs):
        started = now()
        with record_function("M-step"):
            result = super().training_step(*args, **kwargs)
        self.m_seconds[-1] += now() - started
        return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(CONFIGS), default="qwen3-4b")
    add("--quantization", choices=QUANTIZATIONS, default="nf4")
    add("--rows", choices=list(PROFILES), default="reviews")
    add("--accumulation", type=int, default=8)
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
    measure.PerCETrainer = TimedTrainer
    train(model, "drop", run, device)
    profiler = TimedTrainer.profiler
    profiler.__exit__(None, None, None)

    config = model.config
    e_flops = args.accumulation * scoring_pass(config, row.length - row.persona, row.response, LORA_RANK)
    m_flops = args.accumulation * training_pass(config, row.length, row.response, LORA_RANK, checkpointing)
    e_seconds, m_seconds = (statistics.median(s[1:-1]) for s in (TimedTrainer.e_seconds, TimedTrainer.m_seconds))
    averages = profiler.key_averages()
    busy = {event.key: event.device_time_total / 1e6 for event in averages if event.key in ("E-step", "M-step")}
    result = {
        "environment": environment(),
        "settings": {name: str(value) for name, value in vars(args).items() if name != "output_dir"},
        "seconds": {"E-step": e_seconds, "M-step": m_seconds},
        "share": e_seconds / m_seconds,
        "share_of_arithmetic": e_flops / m_flops,
        "tflops": {"E-step": e_flops / e_seconds / 1e12, "M-step": m_flops / m_seconds / 1e12},
        "profiled_device_seconds": busy,
        "host_waits": sum(
            e.count for e in averages if e.key in ("cudaStreamSynchronize", "aten::item", "aten::nonzero")
        ),
    }
    lines = [
        f"{args.model} {args.quantization}, {args.rows}, accumulation {args.accumulation}, checkpointing {args.checkpointing}:",
        "",
        "| part | seconds | of the M-step | of its arithmetic | TFLOP/s | device busy in the profiled step, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for part, share, arithmetic in (("E-step", result["share"], e_flops / m_flops), ("M-step", 1.0, 1.0)):
        lines.append(
            f"| {part} | {result['seconds'][part]:.3f} | {share:.3f} | {arithmetic:.3f} | {result['tflops'][part]:.1f} "
            f"| {busy.get(part, 0):.3f} |"
        )
    tables = "\n\n".join(
        averages.table(sort_by=key, row_limit=25, max_name_column_width=60)
        for key in ("self_device_time_total" if device == "cuda" else "self_cpu_time_total", "self_cpu_time_total")
    )
    texts = {"json": json.dumps(result, indent=1), "md": "\n".join([*lines, ""]), "txt": tables}
    for ending, text in texts.items():
        with written_whole(args.output_dir / f"where_time_goes.{ending}") as part:
            part.write_text(text)
    print(texts["md"])


if __name__ == "__main__":
    main()
