# SPDX-License-Identifier: Apache-2.0

"""
Turn users' histories into rows with `persona`, `prompt` and `completion`, which `trl-perce train`, `score` and `evaluate` take.

    python examples/make_rows.py rows my_data data/mine                     # your own: {"user", "history", "query", "response"}
    python examples/make_rows.py reviews data/product_reviews data/product_review        # from examples/get_data.py
    python examples/make_rows.py longlamp hub data/product_review --task product_review --retrieval contriever
    python examples/make_rows.py lamp LaMP_5 data/paper_titles --task LaMP_5

The second argument is the folder with the source's files, or `hub` for LongLaMP from the Hub. What the files of `rows`, `reviews`,
`posts`, `chats` and `preferences` look like is said in `trl_perce/benchmarks/histories.py`.
"""

import argparse
import logging
from pathlib import Path

from trl_perce.benchmarks import histories, lamp, longlamp
from trl_perce.history.entries import HistoryRow, to_examples
from trl_perce.history.retrieval import Retriever
from trl_perce.utils.files import write_json_lines


FORMATS = ("rows", "reviews", "posts", "chats", "preferences")


def load(args: argparse.Namespace, split: str) -> list[HistoryRow]:
    """Rows of a split with their users' whole histories."""
    if args.kind in FORMATS:
        return histories.load(
            split,
            args.source,
            args.kind,
            args.num_rows,
            args.rows_per_user,
            max_words=args.max_words,
            seed=args.seed,
            validation_size=args.validation_size,
        )
    num_rows = "all" if args.num_rows is None else args.num_rows
    if args.kind == "lamp":
        return lamp.load(split, args.task, path=args.source, num_rows=num_rows, seed=args.seed)
    path = None if args.source == "hub" else args.source
    return longlamp.load(split, args.task, args.setting, path=path, num_rows=num_rows, seed=args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*FORMATS, "longlamp", "lamp"])
    parser.add_argument("source", help="folder of the source's files, or `hub`")
    parser.add_argument("output", type=Path, help="folder for train.jsonl and test.jsonl")
    parser.add_argument(
        "--splits", nargs="+", default=["train", "test"], help="also: validation (LaMP has no test outputs)"
    )
    parser.add_argument("--task", help="of LongLaMP: abstract_generation, …; of LaMP: LaMP_4, …")
    parser.add_argument("--setting", default="user", help="of LongLaMP: user (default) or temporal")
    parser.add_argument(
        "--retrieval", default="bm25", help="bm25 (default), contriever, recency, random, or an encoder"
    )
    parser.add_argument("--k", type=int, default=4, help="history entries a persona (default 4)")
    parser.add_argument("--num_rows", type=int, help="rows a split, sampled (default all)")
    parser.add_argument("--rows_per_user", type=int, default=2, help="rows a user or conversation (default 2)")
    parser.add_argument("--max_words", type=int, default=300, help="leave out longer responses (default 300 words)")
    parser.add_argument(
        "--validation_size",
        type=float,
        help="with --splits train validation …: share of the training users that are held out, such as 0.1, where the source "
        "has no validation.jsonl",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kind in ("longlamp", "lamp") and args.task is None:
        parser.error(f"{args.kind} needs --task")
    if args.validation_size is not None and (args.kind not in FORMATS or "validation" not in args.splits):
        parser.error(
            "--validation_size needs `validation` among the --splits, and one of the kinds " + ", ".join(FORMATS)
        )

    logging.basicConfig(format="%(message)s")
    retriever = Retriever(args.retrieval, args.k, cache_dir=".cache/retrieval", seed=args.seed)
    try:
        loaded = {split: load(args, split) for split in args.splits}
    except (ValueError, OSError) as error:
        parser.exit(2, f"make_rows.py: error: {error}\n")
    for split, rows in loaded.items():
        path = args.output / f"{split}.jsonl"
        write_json_lines(path, to_examples(rows, retriever(rows)))
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
