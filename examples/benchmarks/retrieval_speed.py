# SPDX-License-Identifier: Apache-2.0

"""
Entries retrieved per second, by method, and the memory that it takes.

    python examples/benchmarks/retrieval_speed.py --entries 100000 --methods recency random bm25
    python examples/benchmarks/retrieval_speed.py --entries 5000 --methods FOLDER --cache

A method is "recency", "random", "bm25", the name or folder of a model of sentence-transformers, or "contriever", whose model
is `--model`. Each user has one row and a history of `--history` entries of `--words` words on average (half as many to one
and a half times as many), drawn from the words of the personas and responses that come with the package, with their
frequencies. What is timed is the call, without loading the model; with `--cache`, the call of a second retriever on the same
cache too. Each method runs in a fresh process. Memory is the peak of that process, and how much of it came with the call (with
the model, where there is one). Linux only (it reads /proc).
"""

import argparse
import multiprocessing
import random
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from trl_perce.benchmarks.persona_qa import answer_of, load_rows
from trl_perce.history.entries import HistoryEntry, HistoryRow
from trl_perce.history.retrieval import Retriever


def make_rows(num_entries: int, history: int, words: int) -> list[HistoryRow]:
    vocabulary = [word for row in load_rows() for text in (row["persona"], answer_of(row)) for word in text.split()]
    generator = random.Random(0)

    def text():
        return " ".join(generator.choices(vocabulary, k=generator.randint(words // 2, words * 3 // 2)))

    prompt = ({"role": "user", "content": "{persona}\n\nWrite."},)
    rows = []
    for user in range(num_entries // history):
        texts = [text() for _ in range(history)]
        entries = tuple(HistoryEntry(text, text, text, time) for time, text in enumerate(texts))
        rows.append(HistoryRow(str(user), str(user), prompt, "response", entries, text(), time=history))
    return rows


def peak_memory() -> float:
    """Of this process so far, in MiB."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measure(method: str, args: argparse.Namespace) -> list[tuple[str, float, float, float]]:
    """Name, seconds, peak memory and its growth by the calls, for each call."""
    rows = make_rows(args.entries, args.history, args.words)
    before = peak_memory()
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for name in [method, f"{method}, cached"][: 1 + args.cache]:
            retriever = Retriever(
                method,
                model=args.model if method == "contriever" else None,
                cache_dir=folder if args.cache else None,
                batch_size=args.batch_size,
                device=args.device,
            )
            load = HistoryRow("load", "load", rows[0].prompt, "response", (HistoryEntry("model", "model"),), "load")
            retriever([load])
            started = time.perf_counter()
            retriever(rows)
            seconds = time.perf_counter() - started
            measured.append((name, seconds, peak_memory(), peak_memory() - before))
    return measured


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["recency", "random", "bm25"])
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--history", type=int, default=50, help="entries of a user")
    parser.add_argument("--words", type=int, default=80, help="words of an entry, on average")
    parser.add_argument("--model", help="name or folder of Contriever's model")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device")
    parser.add_argument(
        "--cache", action="store_true", help="time a second call with the embeddings of the first, too"
    )
    args = parser.parse_args()

    print(f"{args.entries // args.history} rows with {args.history} entries of {args.words} words on average")
    print("| method | seconds | entries/s | peak memory, MiB | of it with the call |\n|---|---|---|---|---|")
    for method in args.methods:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
            for name, seconds, peak, growth in executor.submit(measure, method, args).result():
                print(f"| {name} | {seconds:.2f} | {args.entries / seconds:.0f} | {peak:.0f} | {growth:.0f} |")


if __name__ == "__main__":
    main()
