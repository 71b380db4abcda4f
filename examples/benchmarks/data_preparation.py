# SPDX-License-Identifier: Apache-2.0

"""
How fast PerCE prepares a dataset, against TRL's own preparation of the same rows: the personas found, tokenized, masked
and trimmed.

    python examples/benchmarks/data_preparation.py --rows 100000 --output_dir outputs/data_preparation

The rows are synthetic: prompt and completion as messages, the persona between markers, of `--persona_tokens` on average
(half as long to one and a half times as long). `max_length` is set so that about one row in fifteen is too long: PerCE
trims its persona, TRL cuts its end. TRL gets the same rows without markers. What is timed is the constructor, as a user
calls it: `SFTTrainer(…)` against `PerCETrainer(…)` on a model of one tiny layer.

- Speed: the rows are prepared in pieces of `--piece`, TRL and PerCE in turns, each without any cache; medians over the
  pieces of rows a second and of their ratio. For each `--num_proc` (1 is `dataset_num_proc=None`).
- Memory: peak of the anonymous memory (without the pages of mapped files, which the system takes back when it needs them)
  of a fresh process that prepares a quarter of the rows, and of one that prepares them all.
- Second start: a fresh process that prepares all rows again, with the first one's cache.

Needs about 0.2 MB of disk a row while it runs, in a temporary folder (`TMPDIR`). Linux only (it reads /proc).
"""

import argparse
import json
import logging
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from trl import SFTConfig, SFTTrainer

from trl_perce import PerCEConfig, PerCETrainer


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from smollm2 import ensure_smollm2  # noqa: E402


CLASSES = {"TRL": (SFTTrainer, SFTConfig), "PerCE": (PerCETrainer, PerCEConfig)}


def generate_rows(rows: int, persona_tokens: int, words: tuple[str, ...], markers: bool, seed: int = 0):
    """Yield rows of English words in sentences, the frequent words more often, as in a text."""
    generator = np.random.default_rng(seed)

    def text(size: int) -> str:
        # Ranks after Zipf's law, wrapped around; every ninth word or so ends a sentence
        drawn = [words[rank % len(words)] for rank in generator.zipf(1.2, size)]
        ends = generator.random(size) < 0.11
        pieces, starts = [], True
        for word, end in zip(drawn, ends, strict=True):
            pieces.append((word.capitalize() if starts else word) + ("." if end else ""))
            starts = end
        return " ".join(pieces)

    start, end = ("<persona>", "</persona>") if markers else ("", "")
    for _ in range(rows):
        # A full stop is a token too
        size = int(generator.integers(persona_tokens // 2, persona_tokens * 3 // 2) / 1.11)
        prompt = f"About me:\n{start}{text(size)}{end}\n\n{text(20)}?"
        yield {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": text(60)}],
        }


def prepare(name: str, dataset: Dataset, tokenizer, persona_tokens: int, num_proc: int, output_dir: str) -> float:
    """Build a trainer and return the seconds that it took."""
    trainer_class, config_class = CLASSES[name]
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **shape))
    args = config_class(
        output_dir,
        max_length=int(1.45 * persona_tokens) + 120,
        dataset_num_proc=num_proc if num_proc > 1 else None,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    started = time.perf_counter()
    trainer_class(model, args, train_dataset=dataset, processing_class=tokenizer)
    return time.perf_counter() - started


def prepare_alone(arrow_file: str, rows: int, persona_tokens: int, output_dir: str) -> tuple[float, float]:
    """Prepare the first rows of a file with PerCE; return the seconds and the peak of the anonymous memory in MiB."""
    quiet()
    tokenizer = AutoTokenizer.from_pretrained(ensure_smollm2())
    dataset = Dataset.from_file(arrow_file).select(range(rows))
    peak, done = 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = prepare("PerCE", dataset, tokenizer, persona_tokens, 1, output_dir)
    done.set()
    watcher.join()
    return seconds, peak


def quiet() -> None:
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("trl_perce").setLevel(logging.ERROR)  # how many rows are trimmed, for each piece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--persona_tokens", type=int, default=1500, help="mean length of a persona")
    parser.add_argument("--piece", type=int, default=5000, help="rows that one timed preparation gets")
    parser.add_argument("--num_proc", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output_dir", help="folder for the numbers as JSON")
    options = parser.parse_args()
    quiet()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the library warns at each fork
    tokenizer = AutoTokenizer.from_pretrained(ensure_smollm2())
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    # A tuple: `from_generator` takes a list for shards
    words = tuple(token[1:] for token in vocabulary if re.fullmatch("Ġ[a-z]{2,}", token))

    with tempfile.TemporaryDirectory() as folder:
        # TRL's rows and ours, so that neither finds a cache of the other
        made = {
            name: Dataset.from_generator(
                generate_rows,
                cache_dir=f"{folder}/{name}",
                gen_kwargs={
                    "rows": options.rows,
                    "persona_tokens": options.persona_tokens,
                    "words": words,
                    "markers": name == "PerCE",
                },
            )
            for name in CLASSES
        }
        result = {"rows": options.rows, "persona_tokens": options.persona_tokens, "speed": {}}
        starts = range(0, options.rows, options.piece)
        progress = tqdm(total=len(starts) * 2 * len(options.num_proc), disable=None, desc="Preparing")
        for name in CLASSES:  # imports and the like happen once
            prepare(name, made[name].select(range(8)), tokenizer, options.persona_tokens, 1, f"{folder}/out")
            made[name].cleanup_cache_files()
        for num_proc in options.num_proc:
            speeds = {name: [] for name in CLASSES}
            for turn, start in enumerate(starts):
                size = min(options.piece, options.rows - start)
                for name in list(CLASSES)[:: -1 if turn % 2 else 1]:
                    piece = made[name].select(range(start, start + size))
                    seconds = prepare(name, piece, tokenizer, options.persona_tokens, num_proc, f"{folder}/out")
                    speeds[name].append(size / seconds)
                    piece.cleanup_cache_files()
                    progress.update()
            ratios = [ours / theirs for ours, theirs in zip(speeds["PerCE"], speeds["TRL"], strict=True)]
            result["speed"][num_proc] = {
                **{f"{name} rows/s": statistics.median(speed) for name, speed in speeds.items()},
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
        progress.close()

        arrow_file = made["PerCE"].cache_files[0]["filename"]
        spawn = multiprocessing.get_context("spawn")
        for key, rows in (
            ("a quarter", options.rows // 4),
            ("all rows", options.rows),
            ("second start", options.rows),
        ):
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                arguments = (arrow_file, rows, options.persona_tokens, f"{folder}/out")
                seconds, peak = pool.submit(prepare_alone, *arguments).result()
            result[key] = {"rows": rows, "seconds": seconds, "peak MiB": peak}

    print(f"{options.rows} rows, personas of {options.persona_tokens} tokens, pieces of {options.piece} rows")
    print(f"{'processes':>10}{'TRL rows/s':>12}{'PerCE rows/s':>14}{'ratio':>8}   (smallest, largest of the pieces)")
    for num_proc, speed in result["speed"].items():
        spread = f"({min(speed['ratios']):.3f}, {max(speed['ratios']):.3f})"
        print(f"{num_proc:10}{speed['TRL rows/s']:12.1f}{speed['PerCE rows/s']:14.1f}{speed['ratio']:8.3f}   {spread}")
    print(f"\n{'PerCE alone':14}{'rows':>8}{'seconds':>10}{'peak MiB':>10}")
    for key in ("a quarter", "all rows", "second start"):
        run = result[key]
        print(f"{key:14}{run['rows']:8}{run['seconds']:10.1f}{run['peak MiB']:10.0f}")
    if options.output_dir:
        Path(options.output_dir).mkdir(parents=True, exist_ok=True)
        path = Path(options.output_dir) / "data_preparation.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"\nWritten to {path}")


if __name__ == "__main__":
    main()
