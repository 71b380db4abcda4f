# SPDX-License-Identifier: Apache-2.0

"""
From data of one's own to rows of train, validation and test.

    files ── tables.py ──► records ── chats.py, texts.py ──► rows with histories ── split by users ── retrieval ──► {"persona", "prompt", …}
             benchmarks ─────────────────────────────────────────┘
"""

import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..benchmarks import histories, lamp, longlamp
from ..benchmarks.reading import Skips, random_order
from ..history.entries import HistoryEntry, HistoryRow, to_example, to_examples
from ..history.retrieval import Retriever
from ..utils.files import write_json, write_json_lines
from .arguments import BENCHMARKS, PrepareArguments
from .chats import load_chats
from .columns import Columns, choose_format
from .loaded import NO_HISTORY, NO_OTHER_HISTORY, Loaded
from .secrets import Secrets
from .tables import Record, find_files, read_files
from .texts import load_texts


logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
NAME = "prepare.json"  # of the settings and counts, beside the rows


class Preparation:
    """
    The rows of a source, split and counted; entries are not yet retrieved.

    Args:
        args ([`PrepareArguments`]): What is read, and how.

    Attributes:
        splits (`dict[str, list[HistoryRow]]`): Rows of each split, in the order of the source. No user is in two of them, but for
            benchmarks, whose splits are their own.
        loaded ([`Loaded`]): Format, columns and notes.
        skips ([`~trl_perce.benchmarks.reading.Skips`]): What was left out, and why.
        secrets ([`Secrets`]): What looks like one in the texts.

    Raises:
        `ValueError`: Files, columns or records are wrong; the message names them and says what to write instead.
        `OSError`: There is no such file.
    """

    def __init__(self, args: PrepareArguments):
        self.args, self.skips, self.secrets = args, Skips(), Secrets(args.mask_secrets)
        self.encodings: dict[str, str] = {}
        self.num_records: int | None = None
        self.files: list[Path] = []
        self.splits: dict[str, list[HistoryRow]] = {}
        self.retriever = Retriever(args.retrieval, args.k, cache_dir=".cache/retrieval", seed=args.seed)
        if args.format in ("longlamp", "lamp") or (args.format in BENCHMARKS and _is_split(args.source)):
            self._load_splits(args.format)
            return
        self.files = find_files(args.source)
        records, self.encodings = read_files(self.files, args.encoding)
        self.num_records = len(records)
        columns = Columns(records, args, self.secrets)
        name = args.format or choose_format(columns)
        if name in BENCHMARKS and _is_split(args.source):
            self._load_splits(name)
            return
        if name in BENCHMARKS:
            self.loaded = Loaded(name, self._made(name, records))
        elif name == "texts":
            self.loaded = load_texts(records, columns, args, self.skips)
        else:
            self.loaded = load_chats(records, name, columns, args, self.skips)
        self._split(self._sampled(self.loaded.rows))

    def _load_splits(self, name: str) -> None:
        """Rows of a benchmark, which comes in splits."""
        self.loaded, self.files, self.num_records = Loaded(name), [], None
        for split in self.args.splits or SPLITS:
            try:
                rows = self._load_benchmark(name, split)
            except FileNotFoundError:
                if self.args.splits or split == "train" and name != "lamp":
                    raise
                continue
            if rows:
                self.splits[split] = [self._cleaned(row) for row in rows]
        if not self.splits:
            raise ValueError(f"{self.args.source[0]} has none of the splits {', '.join(self.args.splits or SPLITS)}.")

    def _made(self, name: str, records: list[Record]) -> list[HistoryRow]:
        """Rows of a benchmark's format in any files."""
        if name == "lamp":
            raise ValueError("These look like records of LaMP. Write `--format lamp --task LaMP_4`, or another task.")
        args = self.args
        rows = histories.make_rows(
            [record.values for record in records],
            name,
            lambda number: records[number].where,
            self.skips,
            rows_per_user=args.rows_per_user,
            turns=args.turns,
            max_words=args.max_words,
            seed=args.seed,
        )
        return [self._cleaned(row) for row in rows]

    def _sampled(self, rows: list[HistoryRow]) -> list[HistoryRow]:
        """No more than `rows_per_user` of each user."""
        limit = self.args.rows_per_user
        if limit is None:
            return rows
        of_users: dict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            of_users[row.user].append(index)
        kept = {
            indices[place]
            for indices in of_users.values()
            for place in random_order(len(indices), self.args.seed)[:limit]
        }
        self.skips.add(f"more than {limit} of a user (`rows_per_user`)", len(rows) - len(kept))
        return [row for index, row in enumerate(rows) if index in kept]

    def _split(self, rows: list[HistoryRow]) -> None:
        if not rows:
            raise ValueError(f"No row is left of {self.num_records} records. Left out: {self.left_out()}.")
        units = _units({row.user for row in rows}, self.loaded.groups)
        if self.loaded.groups:
            self.loaded.notes.append(
                f"Users who talk with each other are in the same split: {len(units):,} groups, the largest of "
                f"{max(map(len, units)):,} users."
            )
        sizes = {"validation": self.args.validation_size, "test": self.args.test_size}
        if sizes["validation"] is None:
            sizes["validation"] = 0.1
        order = [units[index] for index in random_order(len(units), self.args.seed)]
        split_of: dict[str, str] = {}
        for split, size in sizes.items():
            taken = _take(order, round(size * sum(map(len, units)))) if size and order else []
            split_of |= {user: split for unit in taken for user in unit}
            order = [unit for unit in order if unit not in taken]
        if not order:
            one, many = "user", "users"
            if self.loaded.groups:
                one, many = (f"{word} of users who talk with each other" for word in ("group", "groups"))
            number = f"is 1 {one}" if len(units) == 1 else f"are {len(units)} {many}"
            raise ValueError(
                f"There {number}, and no two splits share one; none is left to train on. Set `--validation_size 0`, and for a single "
                "one `--test_size 0` too."
            )
        wanted = ["train", *(split for split, size in sizes.items() if size)]
        self.splits = {
            split: [row for row in rows if split_of.get(row.user, "train") == split]
            for split in SPLITS
            if split in wanted
        }

    def _load_benchmark(self, name: str, split: str) -> list[HistoryRow] | None:
        """Rows of a benchmark's own split; `None` of one that is not there."""
        args = self.args
        source, task = args.source[0], args.task or ""
        if name in ("longlamp", "lamp"):
            num_rows: Any = "all" if args.num_rows is None else args.num_rows
            if name == "lamp":
                if split == "test":
                    logger.warning("LaMP has no outputs of its test rows: there is no split 'test'.")
                    return None
                return lamp.load(split, task, path=source, num_rows=num_rows, seed=args.seed)
            path = None if source == "hub" else source
            return longlamp.load(split, task, args.setting, path=path, num_rows=num_rows, seed=args.seed)
        size = None if split == "test" else args.validation_size or None
        if split == "validation" and size is None and not (Path(source) / "validation.jsonl").is_file():
            return None
        return histories.load(
            split,
            source,
            name,
            args.num_rows,
            args.rows_per_user,
            max_words=args.max_words,
            seed=args.seed,
            validation_size=size,
            skips=self.skips,
        )

    def _cleaned(self, row: HistoryRow) -> HistoryRow:
        if not self.args.mask_secrets:
            prompt, history = (m["content"] for m in row.prompt), (e.text for e in row.history)
            for text in (*prompt, row.response, *history, *(row.options or ())):
                self.secrets.clean(text)
            return row
        clean = self.secrets.clean
        return replace(
            row,
            user=self.secrets.name(row.user),
            prompt=tuple({**message, "content": clean(message["content"])} for message in row.prompt),
            response=clean(row.response),
            search=clean(row.search),
            options=None if row.options is None else tuple(map(clean, row.options)),
            history=tuple(
                HistoryEntry(clean(e.text), clean(e.search), clean(e.response) if e.response else None, e.time)
                for e in row.history
            ),
        )

    def left_out(self) -> str:
        """ "3: the response is empty; 2: …", the most frequent reason first."""
        return "; ".join(f"{count:,}: {reason}" for reason, count in self.skips.counts.most_common()) or "nothing"

    def examples(self, rows: Iterable[HistoryRow]) -> list[dict[str, Any]]:
        """
        Rows as they are trained, with the entries of their histories that are retrieved.

        Args:
            rows (`Iterable[HistoryRow]`): Of a split.

        Returns:
            `list[dict[str, Any]]`: `id`, `user`, `persona`, `prompt`, `completion`.
        """
        rows = [*rows]
        if not self.loaded.from_history:
            return [to_example(row, row.history) for row in rows]
        examples = to_examples(rows, self.retriever(rows))
        for row, example in zip(rows, examples, strict=True):
            if not example["persona"]:
                self.skips.add(NO_OTHER_HISTORY if row.history else NO_HISTORY)
        return [example for example in examples if example["persona"]]

    def write(self) -> dict[str, Any]:
        """
        Write the rows of each split, and `prepare.json`. Splits that an earlier run has written and this one does not have are removed.

        Returns:
            `dict[str, Any]`: What `prepare.json` holds.
        """
        folder, splits = Path(self.args.output_dir), {}
        made = {split: self.examples(rows) for split, rows in self.splits.items()}
        for split in SPLITS:
            path = folder / f"{split}.jsonl"
            if split in made:
                write_json_lines(path, made[split])
                splits[split] = {"rows": len(made[split]), "users": len({row["user"] for row in made[split]})}
            elif (folder / NAME).is_file():
                path.unlink(missing_ok=True)
        summary = {
            "format": self.loaded.format,
            "columns": self.loaded.columns,
            "files": [str(file) for file in self.files] or self.args.source,
            "encodings": self.encodings,
            "records": self.num_records,
            "splits": splits,
            "left_out": dict(self.skips.counts.most_common()),
            "secrets": {**self.secrets.counts, "texts": self.secrets.num_texts, "masked": self.args.mask_secrets},
            "settings": {
                name: value for name, value in asdict(self.args).items() if name not in ("dry_run", "tokenizer")
            },
        }
        write_json(folder / NAME, summary)
        return summary


def _is_split(source: list[str]) -> bool:
    """Whether the source is a folder with splits, as those of benchmarks are."""
    return len(source) == 1 and sum((Path(source[0]) / f"{split}.jsonl").is_file() for split in SPLITS) > 1


def check_output(folder: str | Path, sources: Iterable[Path]) -> None:
    """
    See that no file of somebody else's is overwritten.

    Args:
        folder (`str` or `Path`): Where rows will be written.
        sources (`Iterable[Path]`): Files that they are made of.

    Raises:
        `ValueError`: The folder holds a source, or rows that this command has not written.
    """
    folder = Path(folder)
    there = [path for split in SPLITS if (path := folder / f"{split}.jsonl").exists()]
    own = {source.resolve() for source in sources}
    for path in there:
        if path.resolve() in own or not (folder / NAME).is_file():
            what = (
                "a file that is read" if path.resolve() in own else f"not written by this command ({NAME} is missing)"
            )
            raise ValueError(f"`output_dir`: {path} is {what}, and would be overwritten. Choose another folder.")


def _take(order: list[list[str]], number: int) -> list[list[str]]:
    """The first units that have so many users together at most; the first of the smallest ones, if that is none."""
    taken: list[list[str]] = []
    for unit in order:
        if sum(map(len, taken)) + len(unit) <= number:
            taken.append(unit)
    return taken or [min(order, key=len)]


def _units(users: set[str], groups: list[set[str]]) -> list[list[str]]:
    """Users who must be in the same split, since what one says stands in the prompts of another; in the order of their names."""
    parent = {user: user for user in users.union(*groups)}

    def root(user: str) -> str:
        while parent[user] != user:
            parent[user] = user = parent[parent[user]]
        return user

    for group in groups:
        first, *others = sorted(group)
        for other in others:
            parent[root(other)] = root(first)
    units: dict[str, list[str]] = defaultdict(list)
    for user in sorted(users):
        units[root(user)].append(user)
    return [*units.values()]
