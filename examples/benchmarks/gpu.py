# SPDX-License-Identifier: Apache-2.0

"""
Everything that this library claims of GPUs, proven on the one at hand, in minutes.

    python examples/benchmarks/gpu.py --minutes 17 --output_dir outputs/gpu     # or `make gpu`
    python examples/benchmarks/gpu.py --rehearse                                # the same on CPU with tiny models

The sections run in this order, each in a process of its own with a time limit of its own:

- `right`: the method against float64 (`pytest -m gpu`);
- `cost`: what a PerCE step costs over one of TRL's SFT (step_cost.py);
- `where`: where the time of a PerCE step goes (where_time_goes.py);
- `fits`: the peak memory at 5,000 tokens, and into which card it fits (fits.py);
- `generation`: how fast `trl-perce evaluate` writes (generation_speed.py);
- `helps`: PerCE, its variants and CE on chats and PrefEval (helps.py, with the grid recipes/reproduce/local_weights.yaml or another
  --recipe), if --model and --data are there.

The moment a section ends, is stopped by its limit, or fails, gpu.json and gpu.md are written anew with what it found until then;
gpu.log holds what it printed. `--only` runs some sections and keeps the others' results of the same folder. `--merge` puts the reports
of several folders into one. Exits with 1 if a section failed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cost_report import markdown
from trl_perce.utils.files import write_json, write_text


ROOT = Path(__file__).resolve().parent.parent.parent
HERE = "examples/benchmarks"  # from there
TASKS = ("reviews", "abstracts", "topics")


@dataclass(frozen=True)
class Section:
    """
    Args:
        title (`str`): Its heading.
        seconds (`float`): Its limit, less where fewer are left.
        commands (`Callable`): Gives the arguments of one `python` after the other, from the parsed arguments.
        result (`str`): Its JSON file in that folder, if it writes one; beside it lies the Markdown of the same name.
    """

    title: str
    seconds: float
    commands: Callable[[argparse.Namespace], list[list[str]]]
    result: str | None


def _right(args):
    # What newer and older packages deprecate is not what is asked here
    workers = [] if args.rehearse else ["--numprocesses", "8", "--override-ini", "filterwarnings=default"]
    return [["-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-vv", "--tb=short", *workers]]


def _cost(args):
    """First eight rows at a time, which keep the card busy; then one at a time, where a fast card waits for the host."""
    if args.rehearse:
        cells = ["--models tiny --profiles topics --accumulation 2 --rounds 1 --steps_per_epoch 2".split()]
    else:
        model = ["--models", "qwen3-4b", "--quantization", "nf4", "--rounds", "2"]
        busy = [*model, "--profiles", *TASKS, "--batch_size", "8", "--accumulation", "1", "--steps_per_epoch", "4"]
        waiting = [*model, "--profiles", "reviews", "--accumulation", "8", "--steps_per_epoch", "2", "--checkpointing"]
        cells = [[*busy, "--checkpointing", "on"], [*waiting, "off"], [*waiting, "on"]]
    every = ["--persona_lengths", "--variants", "sft", "lossce", "drop"]
    return [[f"{HERE}/step_cost.py", *every, *cell] for cell in cells]


def _where(args):
    shape = ["--model", "tiny", "--rows", "topics", "--accumulation", "2"] if args.rehearse else ["--rows", "reviews"]
    return [[f"{HERE}/where_time_goes.py", *shape]]


def _fits(args):
    script = f"{HERE}/fits.py"
    if args.rehearse:
        return [[script, "--models", "tiny", "--lengths", "500"]]
    models = ["--models", "qwen3-4b", "llama-3.1-8b", "qwen3-14b", "--quantization", "nf4", "bf16"]
    t4 = [script, "--models", "qwen3-4b", "--quantization", "nf4-fp16", "--memory_gb", "15"]
    return [[script, *models, "--memory_gb", "12", "16", "24", "48", "80"], t4]


def _generation(args):
    shape = ["--shape", "tiny", "--rows", "4", "--max_new_tokens", "8", "--rounds", "1", "--prompt_tokens", "10", "20"]
    shape = shape if args.rehearse else ["--shape", "qwen3-4b", "--quick"]
    return [[f"{HERE}/generation_speed.py", *shape]]


def _helps(args):
    # A small model's step waits for the host: one process for each core but two, where the card has 5 GiB for each
    processes = min((os.cpu_count() or 1) - 2, int(device().get("memory_gib", 0) // 5))
    shape = ["--processes", str(max(1, processes))]
    if args.rehearse:
        shape = ["--rows", "4", "--seeds", "0", "--methods", "ce", "perce_frozen"]
    grid = ["--recipe", str(args.recipe), "--model", str(args.model), "--data", str(args.data)]
    return [[f"{HERE}/helps.py", *grid, *shape]]


SECTIONS = {
    "right": Section("Right", 240, _right, None),
    "cost": Section("What a step costs", 110, _cost, "step_cost.json"),
    "where": Section("Where the time goes", 70, _where, "where_time_goes.json"),
    "fits": Section("What fits into which card", 60, _fits, "fits.json"),
    "generation": Section("How fast it writes", 90, _generation, "generation_speed.json"),
    "helps": Section("Does it help", 900, _helps, "helps.json"),
}


def run(argv: list[str], seconds: float, log: Path) -> str:
    """Run `python` with these arguments and all that it starts; `"done"`, `"failed"`, or `"stopped"` by the limit."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.setdefault("OMP_NUM_THREADS", "2")  # several processes, each with as many threads as there are cores, crawl
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, *argv], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=env, start_new_session=True
        )
        try:
            return "done" if process.wait(timeout=seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # what it started, too
            except ProcessLookupError:
                pass
            process.wait()


def tests_of(log: str) -> tuple[list[dict], str]:
    """The outcome of each test in pytest's verbose output, and a table of them."""
    found = re.findall(r"^(?:\[gw\d+\] \[ *\d+%\] (\w+) \S*::(.+?)|\S*test_gpu\.py::(.+?) (\w+)(?: \(.*\))? +\[ *\d+%\])\s*$", log, re.M)  # fmt: skip
    tests = [{"test": one or other, "outcome": (first or second).lower()} for first, one, other, second in found]
    counts = {
        outcome: sum(test["outcome"] == outcome for test in tests) for outcome in ("passed", "failed", "skipped")
    }
    lines = [
        ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + ".",
        "",
        "| test | outcome |",
        "|---|---|",
    ]
    lines += [f"| `{test['test']}` | {test['outcome']} |" for test in tests]
    return tests, "\n".join([*lines, ""])


def device() -> dict:
    import torch

    if not torch.cuda.is_available():
        return {"name": "CPU"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def write(args: argparse.Namespace, report: dict) -> None:
    """gpu.json and gpu.md, each whole or as before."""
    card = report["device"]["name"]
    lines = ["# On a GPU", "", f"`python examples/benchmarks/gpu.py`, on {card}.", ""]
    for name, section in SECTIONS.items():
        if name in report["sections"]:
            found = report["sections"][name]
            lines += [
                f"## {section.title}",
                "",
                f"{found['device']}, {found['date']}, {found['seconds']:.0f} s: {found['state']}.",
                "",
            ]
            lines += [found["markdown"]]
    write_json(args.output_dir / "gpu.json", report, indent=1)
    write_text(args.output_dir / "gpu.md", "\n".join(lines))


def why_not(name: str, args: argparse.Namespace) -> str | None:
    """Why a section cannot run here, if so."""
    if name == "helps" and not Path(args.model).exists():
        return f"there is no model in {args.model}"
    if name == "helps" and not (Path(args.data) / "prefeval").exists():
        return f"there is no data in {args.data}"
    return None


def merged(folders: list[Path]) -> dict:
    """
    One report of several runs: of each section the latest that has results; of `cost` every cell, the latest of each.

    Args:
        folders (`list[Path]`): With gpu.json, the earliest run first.
    """
    reports = [json.loads((folder / "gpu.json").read_text()) for folder in folders]
    sections: dict[str, dict] = {}
    for report in reports:
        for name, found in report["sections"].items():
            if found["results"] or name not in sections:
                before = sections.get(name)
                sections[name] = found
                if name == "cost" and before and before["results"]:
                    cells = [*before["results"]["cells"], *found["results"]["cells"]]
                    latest = {json.dumps(cell["settings"], sort_keys=True): cell for cell in cells}
                    found["results"]["cells"] = [*latest.values()]
                    found["markdown"] = markdown(found["results"])
    return {"device": reports[-1]["device"], "sections": sections}


def rehearsal(folder: Path) -> argparse.Namespace:
    """A tiny model and a few rows in place of the real ones."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    bpe = Tokenizer(
        models.BPE({token: index for index, token in enumerate(["<s>", *pre_tokenizers.ByteLevel.alphabet()])}, [])
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<s>", pad_token="<s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"  # fmt: skip
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=512, initializer_range=0.5, **shape), dtype=torch.bfloat16
    ).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    chat = {"user_1_persona": ["I sew."], "user_2_persona": ["I ride a bicycle."]}
    chat["conversation"] = [{"user": 1 + turn % 2, "text": f"What shall I buy, number {turn}?"} for turn in range(6)]
    question = {"topic": "t", "preference": "I sew.", "question": "What?", "response": "Needles.", "answer": 1}
    question["options"] = ["A car.", "Needles.", "A boat.", "A bicycle."]
    for kind, row in (("persona_chat", chat), ("prefeval", question)):
        for split in ("train", "test"):
            rows = [row, json.loads(json.dumps(row).replace("I sew.", "I cook.").replace("I ride", "I own"))]
            rows += [row | {"topic": "education_resources"}] * (split == "train" and kind == "prefeval")
            path = folder / "data" / kind / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return argparse.Namespace(model=folder / "model", data=folder / "data")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=17, help="For all sections together. Default: 17.")
    add("--output_dir", type=Path, default=ROOT / "outputs" / "gpu", help="Default: outputs/gpu.")
    add("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="Sections to run. Default: all.")
    add(
        "--model",
        default=ROOT / ".cache" / "SmolLM2-135M-Instruct",
        help="For `helps`. Default: where smollm2.py puts it.",
    )
    add(
        "--recipe",
        type=Path,
        default=Path("recipes/reproduce/local_weights.yaml"),
        help="For `helps`: the grid. Default: recipes/reproduce/local_weights.yaml.",
    )
    add(
        "--work_dir",
        type=Path,
        help="Keeps what the sections write, such as the runs of `helps`, which go on from there; the rest begins anew. Default: a temporary folder.",
    )
    add("--data", default=ROOT.parent / "shared" / "data", help="For `helps`: folder with persona_chat and prefeval.")
    add(
        "--merge",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="Run nothing: put the reports of these folders into one.",
    )
    add("--rehearse", action="store_true", help="The same sections with tiny models; on a CPU, in about a minute.")
    args = parser.parse_args(arguments)
    end = time.monotonic() + 60 * args.minutes
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.merge:
        write(args, merged(args.merge))
        return 0
    path = args.output_dir / "gpu.json"
    report = json.loads(path.read_text()) if path.exists() else {"sections": {}}
    report["device"] = device()
    with tempfile.TemporaryDirectory() as temporary:
        if args.rehearse:
            args.__dict__ |= vars(rehearsal(Path(temporary)))
        for name in args.only:
            section, folder, started = SECTIONS[name], (args.work_dir or Path(temporary)) / name, time.monotonic()
            folder.mkdir(parents=True, exist_ok=True)
            for stale in filter(None, ("log", section.result)):  # what an earlier run found is not this one's
                (folder / stale).unlink(missing_ok=True)
            limit, reason, log = min(section.seconds, end - started), why_not(name, args), ""
            if reason is None and limit < 5:
                reason = "no time was left"
            state = f"not run: {reason}"
            if reason is None:
                for argv in section.commands(args):
                    argv += ["--output_dir", str(folder)] if section.result else []
                    state = run(argv, started + limit - time.monotonic(), folder / "log")
                    if state != "done":
                        break
                log = (folder / "log").read_text(errors="replace")
            found, markdown = tests_of(log) if section.result is None else ([], "")
            if section.result and (folder / section.result).exists():
                found = json.loads((folder / section.result).read_text())
                markdown = (folder / section.result).with_suffix(".md").read_text()
            report["sections"][name] = {
                **{"state": state, "seconds": time.monotonic() - started, "device": report["device"]["name"]},
                **{"date": time.strftime("%Y-%m-%d"), "results": found, "markdown": markdown},
            }
            write(args, report)
            extra = "\n".join(file.read_text() for file in sorted(folder.glob("*.txt")))
            with open(args.output_dir / "gpu.log", "a", encoding="utf-8") as file:
                file.write(f"===== {name}: {state}\n{log}\n{extra}\n")
            print(f"{name}: {state}, {time.monotonic() - started:.0f} s", flush=True)
            if state == "failed":
                print(log[-2000:], flush=True)
    print((args.output_dir / "gpu.md").read_text())
    return int(any(report["sections"][name]["state"] == "failed" for name in args.only))


if __name__ == "__main__":
    raise SystemExit(main())
