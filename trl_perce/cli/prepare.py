# SPDX-License-Identifier: Apache-2.0

"""
`trl-perce prepare`: from data of one's own to rows that `train`, `score` and `evaluate` take.

    trl-perce prepare logs.jsonl --user_column user_id --persona_column notes --output_dir data
"""

import math
import sys

from .common import check_config_keys, check_rest, check_writable, disable_progress_bars, fail


HELP = "Turn your data (chat logs, mails, posts, tables) into rows of train, validation and test"
_PREVIEW_ROWS = 3


def make_parser():
    from trl_perce.prepare.arguments import (
        OutputArguments,
        PersonaArguments,
        PrepareArguments,
        RowArguments,
        SourceArguments,
    )

    from .parser import GroupedParser

    parser = GroupedParser(
        (PrepareArguments,),
        {
            PrepareArguments: "more",
            SourceArguments: "source",
            PersonaArguments: "persona",
            RowArguments: "rows",
            OutputArguments: "splits and output",
        },
        prog="trl-perce prepare",
        description=f"{HELP}. The files may stand in front, without --source. No user is in two splits, and no history holds the "
        "response or anything later. Writes train.jsonl, validation.jsonl, test.jsonl and prepare.json, with the counts of all that "
        "is left out, to --output_dir. No model is loaded, but for `--retrieval` with an encoder.",
    )
    parser.usage = "%(prog)s FILE ... [--config FILE] [--option value ...]"
    return parser


def run(argv: list[str]) -> int:
    """
    Prepare rows and print what became of the data.

    Args:
        argv (`list[str]`): Arguments after `trl-perce prepare`.

    Returns:
        `int`: Exit code. Arguments, files or records that are wrong exit with 2, and nothing is written.
    """
    if argv and not argv[0].startswith("-"):
        argv = ["--source", *argv]
    parser = make_parser()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        check_config_keys(parser, argv)
        args, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
        check_rest(parser, unknown, launch=False)
        if unknown:
            raise ValueError(f"{unknown[0]!r} stands where no file is expected. Write files in front of the options.")
        _run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail("trl-perce prepare", error, 2)
    return 0


def _run(args) -> None:
    from rich.console import Console

    from trl_perce.prepare.prepare import Preparation, check_output

    check_writable(args.output_dir)
    preparation = Preparation(args)
    console = Console(highlight=False, markup=False)
    _print_source(preparation, console)
    if args.dry_run:
        _preview(preparation, console)
        _print_counts(preparation, {split: len(rows) for split, rows in preparation.splits.items()}, console)
        console.print("Nothing is written: `--dry_run`.")
        return
    check_output(args.output_dir, preparation.files)
    summary = preparation.write()
    _print_counts(preparation, {split: made["rows"] for split, made in summary["splits"].items()}, console)
    names = ", ".join(f"{split}.jsonl" for split in summary["splits"])
    console.print(f"Written to {args.output_dir}: {names}, prepare.json", soft_wrap=True)


def _print_source(preparation, console) -> None:
    loaded, files = preparation.loaded, preparation.files
    what = str(files[0]) if len(files) == 1 else f"{len(files):,} files" if files else preparation.args.source[0]
    if preparation.num_records is not None:
        what += f": {preparation.num_records:,} records"
    console.print(f"{what}, read as `{loaded.format}`", soft_wrap=True)
    if loaded.columns:
        console.print("Columns: " + ", ".join(f"{kind} {name!r}" for kind, name in loaded.columns.items()))
    for path, encoding in preparation.encodings.items():
        console.print(
            f"{path} is read as {encoding}, since it is not UTF-8. Another one: `--encoding`.", soft_wrap=True
        )
    for note in loaded.notes:
        console.print(note)
    console.print()


def _preview(preparation, console) -> None:
    """Show rows of the first split. Entries are told by BM25, where the encoder is a model that would have to be loaded."""
    from trl_perce.benchmarks.reading import random_order
    from trl_perce.history.retrieval import Retriever
    from trl_perce.prepare.preview import message_pieces, print_legend, print_row, print_weights, token_pieces

    args, loaded = preparation.args, preparation.loaded
    split, rows = next(iter(preparation.splits.items()))
    rows = [rows[index] for index in sorted(random_order(len(rows), args.seed)[:_PREVIEW_ROWS])]
    if loaded.from_history and args.retrieval not in ("bm25", "recency", "random"):
        preparation.retriever = Retriever("bm25", args.k)
        console.print(f"The entries below are found by bm25: {args.retrieval!r} is not loaded in a dry run.\n")
    examples = preparation.examples(rows)
    shown = [(message_pieces(example), "") for example in examples]
    if args.tokenizer is not None:
        shown = [*token_pieces(examples, args.tokenizer)]
    print_legend(console)
    for example, (pieces, counts) in zip(examples, shown, strict=True):
        title = f"{split}, row {example['id']} of user {example['user']}"
        print_row(f"{title} ({counts})" if counts else title, pieces, console)
    if args.model_name_or_path is not None:
        print_weights(examples, args.model_name_or_path, console)


def _print_counts(preparation, rows: dict[str, int], console) -> None:
    from trl_perce.compare.verdict import MIN_USERS

    users = {split: len({row.user for row in made}) for split, made in preparation.splits.items()}
    for split, count in rows.items():
        console.print(f"{split:10} {count:>9,} rows of {users[split]:,} users")
    held_out, total = users.get("test", 0), sum(users.values())
    if 0 < held_out < MIN_USERS:
        hint = f": write --test_size {math.ceil(100 * MIN_USERS / total) / 100:g}" if total > 2 * MIN_USERS else ""
        console.print(f"\nToo few to judge a model by: `compare` needs {MIN_USERS} users in test{hint}.")
    counts = preparation.skips.counts
    if counts:
        console.print(f"\nLeft out: {counts.total():,}")
        for reason, count in counts.most_common():
            console.print(f"{count:>20,}  {reason}", soft_wrap=len(reason) > 57)
    secrets = preparation.secrets
    if found := secrets.describe():
        what = "masked" if secrets.mask else "kept; `--mask_secrets` masks them"
        console.print(f"\nLook like secrets: {found}, in {secrets.num_texts:,} texts ({what}).")
    console.print()
