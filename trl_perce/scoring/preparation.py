# SPDX-License-Identifier: Apache-2.0

"""Rows for scoring: as the trainer would see them, without a trainer."""

import copy
import functools
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from ..config import PerCEConfig, copy_config
from ..persona.dataset import check_rendering, count_personas, describe_rows, mark_dataset, tokenize_with_mask
from ..persona.turns import choose_turns
from ..training.checks import chat_template


# Rows that are read, and sorted by length, together
BLOCK = 1000
TOO_LONG = "question and response alone are longer than `max_length`"
UNTRAINED = "no token of it is trained"
_COLUMNS = ["_row", "_persona", "_query", "input_ids", "labels", "persona_mask"]


class PreparedRows:
    """
    Rows that are ready to be scored.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): With the columns `_row` (index in the dataset that was
            given), `_persona`, `_query` (texts), `input_ids`, `labels` and `persona_mask`.
        read (`list[int]`): One number: how many rows were given. Of a streaming dataset it grows while they are read.
        skipped (`dict[int, str]`): Index of a row that is not in `dataset` → the reason, where it is known.
    """

    def __init__(self, dataset: Dataset | IterableDataset, read: list[int], skipped: dict[int, str]):
        self.dataset = dataset
        self.read = read
        self.skipped = skipped

    @property
    def num_rows(self) -> int | None:
        """Number of rows that were given, `None` of a streaming dataset."""
        return self.read[0] if isinstance(self.dataset, Dataset) else None

    def blocks(self) -> Iterator[tuple[list[dict[str, Any]], dict[int, str]]]:
        """
        Yield the rows in order, 1,000 at a time, with the indices of those that were left out before and among them. The label
        of a first token is `-100`.
        """
        expected = 0
        for columns in self.dataset.select_columns(_COLUMNS).iter(BLOCK):
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            for row in rows:
                row["labels"][:1] = [-100][: len(row["labels"])]  # nothing stands before the first token to predict it
            present = {row["_row"] for row in rows}
            yield rows, self._reasons(index for index in range(expected, max(present)) if index not in present)
            expected = max(present) + 1
        yield [], self._reasons(range(expected, self.read[0]))

    def _reasons(self, indices: Iterable[int]) -> dict[int, str]:
        return {index: self.skipped.get(index, f"{TOO_LONG}, or {UNTRAINED}") for index in indices}


class Preparation:
    """
    Prepare rows as [`PerCETrainer`] does: find the persona, tokenize and build the labels with TRL, mask the persona's tokens
    and trim it to `max_length`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A fast tokenizer. It is not changed.
        args ([`PerCEConfig`]): Configuration of the trainer; nothing is packed or shuffled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: PerCEConfig):
        self.args = copy_config(
            args, packing=False, padding_free=False, shuffle_dataset=False, token_weighting="perce"
        )
        template = chat_template(args)
        if args.eos_token is not None or template is not None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.eos_token = args.eos_token or tokenizer.eos_token
            tokenizer.chat_template = template or tokenizer.chat_template
        self.tokenizer = tokenizer

    def __call__(self, dataset: Dataset | IterableDataset, name: str, needs_persona: bool = False) -> PreparedRows:
        """
        Prepare a dataset.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Of any type that the trainer takes.
            name (`str`): What to call it in messages.
            needs_persona (`bool`, *optional*, defaults to `False`): Whether it is an error if no row has a persona (of a streaming
                dataset: none of the first 100).

        Returns:
            [`PreparedRows`]: Rows, and which were left out.

        Raises:
            `PersonaError`: A row's persona or who speaks in it is unclear (the message names the row), or no row has a persona
                and `needs_persona`.
            `ValueError`: There is no row, it holds images, or `assistant_only_loss` does not go with it.
        """
        args = self.args
        first: dict[str, Any] = next(iter(dataset), {})
        if "image" in first or "images" in first:
            raise ValueError(f"The {name} dataset holds images, which are not scored. Remove the image columns.")
        streaming = isinstance(dataset, IterableDataset)
        read = [0 if streaming else len(dataset)]

        def note(example, index):
            read[0] = max(read[0], index + 1)
            return example

        dataset = mark_dataset(dataset, name, args)
        if needs_persona:
            count_personas(dataset, name, args, required=True)
        turns = choose_turns(next(iter(dataset)), self.tokenizer, args.assistant_only_loss)
        check_rendering(dataset, name, self.tokenizer, turns, args)
        dataset = dataset.map(note, with_indices=True) if streaming else dataset
        dataset = describe_rows(dataset, name, args)

        completion_only_loss = args.completion_only_loss
        if completion_only_loss is None:
            completion_only_loss = "prompt" in first and "completion" in first
        # What `SFTTrainer._prepare_dataset` reads of a trainer (TRL 1.16; tests/test_seams.py)
        trainer = SimpleNamespace(
            _tokenizer=self.tokenizer, chat_template=turns.chat_template, completion_only_loss=completion_only_loss
        )
        prepare = functools.partial(SFTTrainer._prepare_dataset, trainer)
        dataset, is_final = tokenize_with_mask(prepare, dataset, name, self.tokenizer, self.tokenizer, turns, args)
        fits = _rows_in(dataset)
        dataset = prepare(
            dataset, self.tokenizer, copy_config(args, max_length=None) if is_final else args, False, None, name
        )
        every = set() if streaming else {*range(read[0])}
        skipped = dict.fromkeys(every - fits, TOO_LONG) | dict.fromkeys(fits - _rows_in(dataset), UNTRAINED)
        return PreparedRows(dataset, read, skipped)


def _rows_in(dataset) -> set[int]:
    return {*dataset["_row"]} if isinstance(dataset, Dataset) else set()
