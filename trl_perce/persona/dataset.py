# SPDX-License-Identifier: Apache-2.0

"""
`marks.py` and `masks.py` over whole datasets, map-style or streaming: before TRL's preparation (`mark_dataset`) and behind its
tokenization (`add_persona_mask`).
"""

import copy
import json
import re
from collections.abc import Iterable
from itertools import groupby, islice
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Json, List, Value
from transformers import PreTrainedTokenizerBase
from trl import is_conversational, pack_dataset
from trl.data_utils import common_prefix_length, get_dataset_column_names
from trl.trainer.utils import global_then_local_main_first

from .. import __version__
from ..config import copy_config
from ..utils.logger import get_logger
from .marks import (
    PersonaError,
    Span,
    describe,
    find_near_markers,
    mark_persona,
    persona_turns,
    prompt_texts,
    render,
    render_messages,
    response_texts,
)
from .masks import TokenBytes, mask_tokens, text_and_offsets, trim_persona
from .parts import join_parts, takes_parts
from .rows import suggest_columns
from .thoughts import MARKERS, thought_end, writes_thoughts
from .turns import Turns, assistant_spans, is_messages, message_spans
from .weights import check_token_weights, message_weights


logger = get_logger(__name__)

# Columns that live between the two functions. JSON, since Arrow cannot infer the type of lists that are all empty.
SPANS_COLUMN = "_persona_spans"
# Number of tokens that were trimmed, or one of the following
_TRIMMED_COLUMN = "_persona_trimmed"
_LEFT_OUT = -1  # does not fit without its persona
_CUT = -2  # by TRL, since it has no persona to trim
_UNLABELLED = -3  # fits, but TRL drops it: no token of it is trained
# Number of tokens, before anything is trimmed, that are not the assistant's; -1 where it cannot be told
_OTHERS_COLUMN = "_others"

# Columns that the chat template reads
_CONVERSATIONAL = ("prompt", "completion", "messages", "tools", "chat_template_kwargs")

# What is looked at ahead: a streaming dataset cannot be counted, so its first rows stand for it.
_SAMPLE = 100
# Tokens before a turn that may open its thought, and of a turn's beginning that hold a thought without a word
_THOUGHT_OPENING, _EMPTY_THOUGHT = 16, 32
# Rows that are read at a time
_BATCH = 1000


def mark_dataset(dataset, name: str, args, formatting_func=None):
    """
    Find the persona in each row ([`~trl_perce.persona.marks.mark_persona`]). Rows that are already tokenized stay as they are.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Any dataset type of TRL's SFT.
        name (`str`): What to call it in messages, such as `"train"`.
        args ([`PerCEConfig`]): Gives the markers, the text column and `chat_template_kwargs`.
        formatting_func (`Callable[[dict], str]`, *optional*): As in [`~trl.SFTTrainer`].

    Returns:
        The dataset as TRL shall see it, with a column of spans.

    Raises:
        `ValueError`: The dataset is empty.
        `PersonaError`: A row's persona or a role is unclear, or a conversation has no turn that is trained; the message names
            the row.
    """
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset has a transform (`with_transform`), whose rows may change. Write its result into the "
            "dataset with `Dataset.map`, or let it give tokenized rows ('input_ids', 'labels', 'persona_mask') and pass "
            "`dataset_kwargs={'skip_prepare_dataset': True}`."
        )
    columns = _first_row(dataset, name).keys()
    if "input_ids" in columns:
        return dataset
    return _map(
        dataset,
        _mark_row,
        args,
        f"Finding the personas of {name} dataset",
        {
            "name": name,
            "formatting_func": formatting_func,
            "text_field": args.dataset_text_field,
            "start_marker": args.persona_start_marker,
            "end_marker": args.persona_end_marker,
            "assistant_only": args.assistant_only_loss is not False,
            "template_kwargs": args.chat_template_kwargs,
            "whole": _trained_whole(args),
        },
        features=_marked_features(dataset, args, formatting_func) if isinstance(dataset, Dataset) else None,
        # `maybe_convert_to_chatml` renames it
        remove_columns=["conversations"] if "conversations" in columns else None,
    )


def _marked_features(dataset: Dataset, args, formatting_func) -> Features | None:
    """
    Types of the marked columns, where something is nested in them: as JSON, in which each row keeps its own keys. `None` where Arrow's
    own will do.
    """
    features = dataset.features.copy()
    nested = [column for column in (*_CONVERSATIONAL, "conversations") if _is_nested(features.get(column))]
    if not nested and not args.chat_template_kwargs:
        return None
    features |= {column: List(Json()) if isinstance(features[column], List) else Json() for column in nested}
    if features.pop("conversations", None) is not None:  # which get other keys, too
        features["messages"] = List(Json())
    if args.chat_template_kwargs:
        features["chat_template_kwargs"] = Json()
    if formatting_func is not None:
        features["text"] = Value("string")
    features[SPANS_COLUMN] = Value("string")
    return features


def _is_nested(feature) -> bool:
    """Whether a column holds more than text, or messages of more than texts."""
    if isinstance(feature, List) and isinstance(feature.feature, dict):
        return any(not isinstance(value, Value) for value in feature.feature.values())
    return not isinstance(feature, Value | None)


def count_personas(dataset, name: str, args, required: bool) -> int:
    """
    Count the rows with a persona, and log how many have none.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): From [`mark_dataset`].
        name (`str`): What to call it in messages.
        args ([`PerCEConfig`]): Gives the weighting and the markers.
        required (`bool`): Whether PerCE needs a row with a persona; otherwise none is worth a warning.

    Returns:
        `int`: Rows with a persona; of a streaming dataset those among its first 100.

    Raises:
        `PersonaError`: No row has a persona, and `required`.
    """
    streaming = isinstance(dataset, IterableDataset)
    flags = [has_persona(example) for example in _sample(dataset, (SPANS_COLUMN, "persona_mask"))]
    rows = len(flags) if streaming else len(dataset)
    found = sum(flags)
    others = islice(dataset, rows) if streaming else dataset.select(np.flatnonzero(~np.array(flags, dtype=bool)))
    if args.token_weighting == "perce" and found == 0:
        message = f"{name} dataset: no row {f'of the first {rows} ' if streaming else ''}has a persona."
        if required:
            raise PersonaError(
                f"{message}{_near_markers(others, args)}{suggest_columns(_first_row(dataset, name))} Write "
                f"{args.persona_start_marker}…{args.persona_end_marker} around the persona in the prompt, or add a column "
                "'persona' and write {persona} where it belongs. To train plain CE, set `token_weighting='uniform'`."
            )
        logger.warning(f"{message} Its loss is plain CE.")
    elif args.token_weighting == "perce" and found < rows and not streaming:
        logger.warning(
            f"{name} dataset: {rows - found} of {rows} rows have no persona and count as plain CE (weight 1)."
            f"{_near_markers(others, args)}"
        )
    return found


def count_weights(dataset, name: str, args, required: bool) -> None:
    """
    Check the weights that come with the rows, and log how many rows have none, or whose are not used.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): From [`mark_dataset`]; of a streaming dataset the first 100
            rows are looked at.
        name (`str`): What to call it in messages.
        args ([`PerCEConfig`]): Gives the weighting.
        required (`bool`): Whether with `token_weighting="given"` a row must have weights; otherwise none is worth a warning.

    Raises:
        `PersonaError`: With `token_weighting="given"`: weights do not fit (the message names the row), no row has any and `required`, or
            all are 0.
    """
    columns = _first_row(dataset, name).keys()
    if "token_weights" in columns and "input_ids" not in columns:
        raise PersonaError(
            f"{name} dataset: the column 'token_weights' goes with tokenized rows, and there is no column 'input_ids'. Give the "
            "assistant's messages a 'weight' instead, or remove the column."
        )
    given, whole = args.token_weighting == "given", _trained_whole(args)
    found = rows = weightless = 0
    wanted = _weighed_columns(dataset) if "input_ids" not in columns else ("input_ids", "labels", "token_weights")
    if "input_ids" in columns and "token_weights" not in columns:
        wanted = ()
    for rows, example in enumerate(_sample(dataset, wanted), start=1):
        weights = example.get("token_weights")
        if "input_ids" not in columns:
            weights = [weight for _, weight in message_weights(example, whole)]
            if not given and {*weights} <= {0, 1}:  # 0 holds with every weighting: the message is not trained
                weights = None
        elif given and weights is not None:
            with _naming_row(name, rows - 1):
                check_token_weights(weights, len(example["input_ids"]))
            labels = example.get("labels") or example["input_ids"]
            weights = [weight for weight, label in zip(weights, labels, strict=True) if label != -100]
        found += bool(weights)
        weightless += bool(weights) and not any(weights or ())
    rows = rows if isinstance(dataset, IterableDataset) else len(dataset)
    of_rows = f"of {'the first ' if isinstance(dataset, IterableDataset) else ''}{rows} rows"
    if not given:
        if found:
            logger.warning(
                f"{name} dataset: {found} {of_rows} have weights, which `token_weighting='{args.token_weighting}'` does not use. Set "
                "`token_weighting='given'` to train with them."
            )
    elif found == 0 and required:
        raise PersonaError(
            f"{name} dataset: none {of_rows} has weights. Add a column 'token_weights' to tokenized rows, with one number for each of "
            "'input_ids', or a key 'weight' to the assistant's messages. To train plain CE, set `token_weighting='uniform'`."
        )
    elif found and found == weightless:
        raise PersonaError(
            f"{name} dataset: all weights {of_rows} are 0, so that nothing would be trained. Write others."
        )
    elif found < rows:
        logger.warning(f"{name} dataset: {rows - found} {of_rows} have no weights and count as plain CE (weight 1).")
    if given and weightless:
        logger.warning(
            f"{name} dataset: {weightless} {of_rows} have weights of 0 alone, and nothing is learned from them."
        )


def _weighed_columns(dataset) -> tuple[str, ...]:
    """The columns of conversations, where a message of them may have a weight."""
    if not isinstance(dataset, Dataset):
        return _CONVERSATIONAL
    columns = [column for column in ("prompt", "completion", "messages") if column in dataset.column_names]
    kinds = "".join(repr(dataset.features[column]) for column in columns)
    return (*columns,) if "'weight'" in kinds or "Json" in kinds else ()


def _trained_whole(args) -> dict[str, bool]:
    """Of which kinds of conversations all messages are trained ([`~trl_perce.persona.weights.message_weights`])."""
    return {"prompt": args.completion_only_loss is False, "messages": args.assistant_only_loss is False}


def _sample(dataset, columns: Iterable[str]) -> Iterable[dict[str, Any]]:
    """Some columns of all rows, in batches, which is much faster; of a streaming dataset its first 100 rows."""
    if isinstance(dataset, IterableDataset):
        return islice(dataset, _SAMPLE)
    there = [column for column in columns if column in dataset.column_names]
    batches = dataset.select_columns(there).iter(_BATCH) if there else ()
    return (dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True))


def _near_markers(rows: Iterable[dict[str, Any]], args) -> str:
    """How many rows, of those without a persona, hold what may be meant for a marker, in words; empty if none does."""
    count, first = 0, None
    for example in rows:
        if "input_ids" in example:
            continue
        found = [
            near
            for text in prompt_texts(example, args.dataset_text_field)
            for near in find_near_markers(text, args.persona_start_marker)
        ]
        count, first = count + bool(found), first or next(iter(found), None)
    if not count:
        return ""
    return f" {count} of them: with {first!r} or the like, which is no marker and is read as text."


def has_persona(example: dict[str, Any]) -> bool:
    """Whether a row from [`mark_dataset`] has a persona."""
    return example.get(SPANS_COLUMN, "[]") != "[]" or any(example.get("persona_mask") or ())


def check_rendering(dataset, name: str, tokenizer: PreTrainedTokenizerBase, turns: Turns, args) -> None:
    """
    Render the first row with a persona, if it is among the first 100 rows, so that a chat template that loses it, or in which
    the assistant's turns cannot be told, is found before the model loads.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): From [`mark_dataset`].
        name (`str`): What to call it in messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer with the chat template.
        turns ([`~trl_perce.persona.turns.Turns`]): How the trained tokens are told.
        args ([`PerCEConfig`]): Gives the text column and `counterfactual`.

    Raises:
        `PersonaError`: The chat template loses the persona, or the assistant's turns, or has no conversation without the turn that
            `counterfactual="drop_turn"` leaves out.
    """
    by_prefix = turns.by == "prefix"
    joins = _joins_parts(tokenizer, turns)
    for index, example in enumerate(islice(dataset, _SAMPLE)):
        spans = _spans(example)
        if spans and (turns.chat_template or tokenizer.chat_template) and not is_conversational(example):
            logger.warning_once(
                f"{name} dataset: the texts are not messages, so the chat template is not applied. For a chat model, write "
                '[{"role": "user", "content": …}].'
            )
        unread = _unread_arguments(example, turns.chat_template or tokenizer.chat_template)
        if unread:
            logger.warning_once(f"{name} dataset: the chat template does not read {unread} of `chat_template_kwargs`.")
        if spans or (by_prefix and index == 0):
            with _naming_row(name, index):
                spans = join_parts(example, spans) if joins else spans
                render(example, spans, tokenizer, turns.chat_template, args.dataset_text_field)
                # As TRL has it: a template may write another text where a persona's borders are in it
                text, _ = render(example, [], tokenizer, turns.chat_template, args.dataset_text_field)
                if by_prefix:
                    assistant_spans(example, text, tokenizer, turns.chat_template)
                if args.counterfactual == "drop_turn":
                    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                    _with_turn(example, spans, [0] * len(ids), ids, tokenizer, turns.chat_template)
        if spans:
            return


def _unread_arguments(example: dict[str, Any], template: str | dict[str, str] | None) -> str:
    names = example.get("chat_template_kwargs") or ()
    return ", ".join(f"`{name}`" for name in names if not re.search(rf"\b{re.escape(name)}\b", str(template)))


def _joins_parts(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> bool:
    has_template = turns.chat_template or tokenizer.chat_template
    return bool(has_template) and not takes_parts(tokenizer, turns.chat_template)


def describe_rows(dataset, name: str, args):
    """
    Remember of each row what is to be shown of it beyond its tokens.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): From [`mark_dataset`].
        name (`str`): What to call it in messages.
        args ([`PerCEConfig`]): Gives the text column.

    Returns:
        The dataset with the columns `_row`, the row's index, and `_persona` and `_query`
        ([`~trl_perce.persona.marks.describe`]; `None` where the row came tokenized).
    """
    return _map(dataset, _describe_row, args, f"Describing {name} dataset", {"text_field": args.dataset_text_field})


def add_persona_mask(dataset, name: str, tokenizer: PreTrainedTokenizerBase, turns: Turns, args):
    """
    Turn the spans of tokenized rows into a `persona_mask`, and trim the persona of rows that are too long. Where TRL cannot
    tell the assistant's turns, take the labels off all other tokens; and off messages with the weight 0. With
    `token_weighting="given"`, put the weights that come with the rows into `token_weights`.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            From [`mark_dataset`], then tokenized by TRL: with `input_ids` and `labels`, not yet truncated.
        name (`str`): What to call it in messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer that TRL used.
        turns ([`~trl_perce.persona.turns.Turns`]): How the trained tokens are told, and the template that TRL used.
        args ([`PerCEConfig`]): Gives `max_length`, `truncate_persona`, `counterfactual`, the weighting and the text column.

    Returns:
        `tuple`: The dataset with `persona_mask`, a list of 0 and 1 as long as `input_ids`, and where weights are given
            `token_weights`, as long; and whether every row is known to be as TRL's truncation would leave it. Rows whose question and response alone are over `max_length` are left
            out, counted and logged.

    Raises:
        `PersonaError`: A mask cannot be aligned with TRL's tokens, or the assistant's turns cannot be told; the message names
            the row and the reason.
    """
    features = None
    if isinstance(dataset, Dataset):  # small integers: the mask is as long as the tokens
        features = dataset.features.copy()
        features.pop(SPANS_COLUMN, None)
        features.setdefault("persona_mask", List(Value("int8")))
        features[_TRIMMED_COLUMN] = Value("int32")
        if args.token_weighting == "given":
            features.setdefault("token_weights", List(Value("float32")))
        if turns.by == "all":
            features[_OTHERS_COLUMN] = Value("int32")
    dataset = _map(
        dataset,
        _mask_row,
        args,
        f"Masking the personas of {name} dataset",
        {
            "name": name,
            "tokenizer": tokenizer,
            "token_bytes": TokenBytes(tokenizer),
            "turns": turns.by,
            "chat_template": turns.chat_template,
            "text_field": args.dataset_text_field,
            "max_length": args.max_length,
            "truncate_persona": args.truncate_persona,
            "keep_end": args.truncation_mode == "keep_end",
            "drop_turn": args.counterfactual == "drop_turn",
            "untrained_thoughts": "all"
            if args.answer_only_loss
            else "empty"
            if writes_thoughts(turns.chat_template or tokenizer.chat_template)
            else "none",
            "given": args.token_weighting == "given",
            "whole": _trained_whole(args),
        },
        remove_columns=[SPANS_COLUMN] if SPANS_COLUMN in get_dataset_column_names(dataset) else None,
        features=features,
    )
    if turns.by == "all":
        _warn_of_others(dataset, name)
        dataset = dataset.remove_columns(_OTHERS_COLUMN)
    report = _TrimReport(name, args.max_length)
    if isinstance(dataset, IterableDataset):
        dataset, is_final = dataset.filter(report.keeps, with_indices=True), False
    else:
        trimmed = dataset.with_format("numpy")[_TRIMMED_COLUMN][:]
        report.add(trimmed)
        report.log()
        if report.left_out == report.rows:
            raise PersonaError(
                f"{name} dataset: no row fits into `max_length={args.max_length}` without its persona. Raise `max_length`."
            )
        if report.left_out:
            dataset = dataset.select(np.flatnonzero(trimmed != _LEFT_OUT))
        is_final = not np.isin(trimmed, (_CUT, _UNLABELLED)).any()
    return dataset.remove_columns(_TRIMMED_COLUMN), is_final


def tokenize_with_mask(prepare, dataset, name: str, processing_class, tokenizer, turns: Turns, args):
    """
    Let TRL tokenize a dataset and build its labels (where the chat template takes texts, parts of content are joined first), then find the persona's tokens and trim it ([`add_persona_mask`]). What is
    left to truncate is left to TRL.

    Args:
        prepare (`Callable`): `SFTTrainer._prepare_dataset`, bound.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): From [`mark_dataset`].
        name (`str`): What to call it in messages.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): For TRL.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer in it.
        turns ([`~trl_perce.persona.turns.Turns`]): How the trained tokens are told. `prepare` must use its template.
        args ([`PerCEConfig`]): Configuration of the trainer.

    Returns:
        `tuple`: As [`add_persona_mask`].
    """
    streaming = isinstance(dataset, IterableDataset)
    if (streaming or any(_is_nested(dataset.features.get(column)) for column in _CONVERSATIONAL)) and _joins_parts(
        tokenizer, turns
    ):
        dataset = _map(dataset, _join_row, args, f"Joining content parts of {name} dataset", {"name": name})
    whole = copy_config(args, max_length=None, shuffle_dataset=False, assistant_only_loss=turns.by == "marks")
    dataset = prepare(dataset, processing_class, whole, False, None, name)
    return add_persona_mask(dataset, name, tokenizer, turns, args)


def pack_dataset_with_mask(dataset, name: str, args):
    """
    Pack rows as TRL does, with their `persona_mask`, and where weights come with the rows with `token_weights`.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            From [`add_persona_mask`], then truncated (and shuffled, if `args.shuffle_dataset`) by TRL.
        name (`str`): What to call it in messages.
        args ([`PerCEConfig`]): Gives `max_length`, the packing strategy and the weighting.

    Returns:
        The dataset with the columns of [`~trl.pack_dataset`], `persona_mask` and `token_weights`.
    """
    columns = ["input_ids", "labels", "persona_mask", *(["token_weights"] if args.token_weighting == "given" else [])]
    kwargs = {}
    if isinstance(dataset, Dataset):  # `IterableDataset.map` supports neither
        kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Packing {name} dataset"}
    with global_then_local_main_first():
        dataset = dataset.select_columns(columns)
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, kwargs)
    # Packing goes by length: as TRL, shuffle what comes out too
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def _warn_of_others(dataset, name: str) -> None:
    """Say how many tokens are trained that are not the assistant's; of a streaming dataset those of its first 100 rows."""
    streaming = isinstance(dataset, IterableDataset)
    if streaming:
        counts = np.array([example[_OTHERS_COLUMN] for example in islice(dataset, _SAMPLE)])
    else:
        counts = dataset.with_format("numpy")[_OTHERS_COLUMN][:]
    unknown = int((counts < 0).sum())
    logger.warning(
        f"{name} dataset: `assistant_only_loss=False` trains {int(counts[counts > 0].sum())} tokens that are not the "
        f"assistant's, in {'the first ' if streaming else ''}{len(counts)} {'row' if len(counts) == 1 else 'rows'}"
        f"{f' ({unknown} of them not counted: the chat template does not show whose turn it is)' if unknown else ''}. Leave it out to "
        "train only the assistant's turns."
    )


class _TrimReport:
    """Counts what does not fit into `max_length`. A streaming dataset logs as it goes, at 1, 10, 100 … rows."""

    def __init__(self, name: str, max_length: int | None):
        self.name, self.max_length = name, max_length
        self.rows = self.trimmed_rows = self.trimmed_tokens = self.left_out = self.cut = 0
        self._next_log = 1

    def add(self, trimmed: np.ndarray) -> None:
        self.rows += len(trimmed)
        self.left_out += int((trimmed == _LEFT_OUT).sum())
        self.cut += int((trimmed == _CUT).sum())
        self.trimmed_rows += int((trimmed > 0).sum())
        self.trimmed_tokens += int(trimmed[trimmed > 0].sum())

    def keeps(self, example: dict[str, Any], index: int) -> bool:
        if index >= self.rows:  # not yet counted by an earlier pass over the stream
            self.add(np.array([example[_TRIMMED_COLUMN]]))
        if self.trimmed_rows + self.left_out + self.cut >= self._next_log:
            self._next_log *= 10
            self.log()
        return example[_TRIMMED_COLUMN] != _LEFT_OUT

    def log(self) -> None:
        if self.trimmed_rows:
            logger.warning(
                f"{self.name} dataset: trimmed the persona of {self.trimmed_rows} of {self.rows} rows, by "
                f"{self.trimmed_tokens} tokens in all, to fit into `max_length={self.max_length}`."
            )
        if self.left_out:
            logger.warning(
                f"{self.name} dataset: left out {self.left_out} of {self.rows} rows, whose question and response alone "
                f"are longer than `max_length={self.max_length}`."
            )
        if self.cut:
            logger.warning(
                f"{self.name} dataset: {self.cut} of {self.rows} rows are longer than `max_length={self.max_length}` and "
                "no persona may be trimmed (there is none, or `truncate_persona` is off): TRL cuts them."
            )


def _first_row(dataset, name: str) -> dict[str, Any]:
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"The {name} dataset is empty. Give it at least one row.")
    return row


def _map(dataset, function, args, desc: str, fn_kwargs: dict[str, Any], **kwargs):
    if isinstance(dataset, Dataset):  # `IterableDataset.map` supports neither
        kwargs |= {"num_proc": args.dataset_num_proc, "desc": desc}
    # `datasets` knows a module's function by its name alone: another version of it must not find this one's cache
    fn_kwargs = {**fn_kwargs, "version": __version__}
    with global_then_local_main_first():
        return dataset.map(function, with_indices=True, fn_kwargs=fn_kwargs, **kwargs)


class _naming_row:
    """Context manager that puts the row in front of the message of a [`PersonaError`]."""

    def __init__(self, name: str, index: int):
        self.where = f"{name} dataset, row {index}: "

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, PersonaError):
            raise PersonaError(self.where + str(error)) from error


def _spans(example: dict[str, Any]) -> list[Span]:
    return [Span(*span) for span in json.loads(example.get(SPANS_COLUMN, "[]"))]


def _mark_row(
    example,
    index,
    version,
    name,
    formatting_func,
    text_field,
    start_marker,
    end_marker,
    assistant_only,
    template_kwargs,
    whole,
):
    for column in {"prompt", "completion", "messages", "conversations"} & {*example}:
        # Marks are taken out in place, and a stream may hand out the same messages again
        example[column] = copy.deepcopy(example[column])
    with _naming_row(name, index):
        if formatting_func is not None:
            # `SFTTrainer` writes the formatted text to this column
            example["text"] = formatting_func(example)
        example, spans = mark_persona(example, text_field, start_marker, end_marker, template_kwargs)
        if assistant_only and is_messages(example):
            if not any(message["role"] == "assistant" for message in example["messages"]):
                raise PersonaError(
                    "no message of the conversation is the assistant's, so that nothing of it would be trained. Remove the row, "
                    "or set `assistant_only_loss: false` to train every token."
                )
        message_weights(example, whole)
    # The row itself: what was not read of it passes on as it is
    example[SPANS_COLUMN] = json.dumps(spans)
    return example


def _join_row(example, index, version, name):
    with _naming_row(name, index):
        example[SPANS_COLUMN] = json.dumps(join_parts(example, _spans(example)))
    return example


def _describe_row(example, index, version, text_field) -> dict[str, Any]:
    persona, query = None, None
    if "input_ids" not in example:
        persona, query = describe(example, _spans(example), text_field)
    return {"_row": index, "_persona": persona, "_query": query}


def _mask_row(
    example,
    index,
    version,
    name,
    tokenizer,
    token_bytes,
    turns,
    chat_template,
    text_field,
    max_length,
    truncate_persona,
    keep_end,
    drop_turn,
    untrained_thoughts,
    given,
    whole,
) -> dict[str, Any]:
    ids, labels = example["input_ids"], example["labels"]
    spans, text = _spans(example), None
    with _naming_row(name, index):
        if spans:
            text, char_spans = render(example, spans, tokenizer, chat_template, text_field)
            mask = _tokens_in(char_spans, text, ids, tokenizer, token_bytes, is_conversational(example))
        else:
            mask = example.get("persona_mask") or [0] * len(ids)
            _check_mask(mask, ids)
        # What leaves in the counterfactual pass. Trimmed is the persona alone.
        leaving = _with_turn(example, spans, mask, ids, tokenizer, chat_template) if drop_turn and spans else mask
        row: dict[str, Any] = {"persona_mask": leaving}
        if turns in ("prefix", "all"):
            try:
                text = text or render(example, [], tokenizer, chat_template, text_field)[0]
                turn_spans = assistant_spans(example, text, tokenizer, chat_template)
                own = _tokens_in(turn_spans, text, ids, tokenizer, token_bytes, True)
                if turns == "prefix":
                    labels = [label if is_own else -100 for label, is_own in zip(labels, own, strict=True)]
                    row["labels"] = labels
                else:
                    row[_OTHERS_COLUMN] = len(own) - sum(own)
            except PersonaError:
                if turns == "prefix":
                    raise
                row[_OTHERS_COLUMN] = -1  # they are only counted
        weights = example.get("token_weights")
        if given and weights is not None:
            check_token_weights(weights, len(ids))
        by_message = message_weights(example, whole) if SPANS_COLUMN in example else []  # else it came tokenized
        if any(weight != 1 if given else weight == 0 for _, weight in by_message):
            text = text or render(example, [], tokenizer, chat_template, text_field)[0]
            weights = [1.0] * len(ids)
            spans_of = message_spans(example, [index for index, _ in by_message], text, tokenizer, chat_template)
            for span, (_, weight) in zip(spans_of, by_message, strict=True):
                own = _tokens_in([span], text, ids, tokenizer, token_bytes, True)
                weights = [weight if is_own else other for other, is_own in zip(weights, own, strict=True)]
            row["labels"] = labels = [label if weight else -100 for label, weight in zip(labels, weights, strict=True)]

    if SPANS_COLUMN in example and turns != "all" and untrained_thoughts != "none" and is_conversational(example):
        row["labels"] = labels = _without_thoughts(example, ids, labels, token_bytes, untrained_thoughts == "empty")

    if given:
        row["token_weights"] = weights or [1.0] * len(ids)
    trimmed = 0
    if max_length is not None and len(ids) > max_length:
        ours: dict[str, list] = {key: row[key] for key in ("persona_mask", "token_weights") if key in row}
        if not truncate_persona or not any(mask):
            # TRL truncates `input_ids` and `labels` next, in the same way
            part = slice(-max_length, None) if keep_end else slice(max_length)
            return {**row, **{key: column[part] for key, column in ours.items()}, _TRIMMED_COLUMN: _CUT}
        keep = trim_persona(mask, max_length)
        if len(keep) > max_length:
            return {**row, _TRIMMED_COLUMN: _LEFT_OUT}
        if not any(mask[position] for position in keep):
            ours["persona_mask"] = mask
        columns = {"input_ids": ids, "labels": labels, **ours}
        row |= {key: [column[position] for position in keep] for key, column in columns.items()}
        trimmed = len(ids) - len(keep)
    is_labelled = any(label != -100 for label in row.get("labels", labels))
    return {**row, _TRIMMED_COLUMN: trimmed if is_labelled else _UNLABELLED}


def _without_thoughts(
    example: dict[str, Any], ids: list[int], labels: list[int], token_bytes: TokenBytes, empty_only: bool
) -> list[int]:
    """The labels, and -100 on the thoughts that trained turns begin with; if `empty_only`, on those that the template has added."""
    if empty_only and any(mark in text for text in response_texts(example) for _, mark in MARKERS):
        return labels  # which are somebody's own
    labels, position = [*labels], 0
    for is_trained, run in groupby(labels, lambda label: label != -100):
        first, position = position, position + len([*run])
        if not is_trained:
            continue
        begin = max(first - _THOUGHT_OPENING, 0)
        end = min(position, first + _EMPTY_THOUGHT) if empty_only else position
        text, offsets = text_and_offsets([token_bytes[token] for token in ids[begin:end]])
        start = offsets[first - begin][0]
        thought = thought_end(text, start, empty_only)
        for index, (_, behind) in enumerate(offsets[first - begin :], first):
            if start < behind <= thought:
                labels[index] = -100
    return labels


def _tokens_in(
    char_spans: list[tuple[int, int]], text: str, ids: list[int], tokenizer, token_bytes: TokenBytes, chat: bool
) -> list[int]:
    """For each token of a text 1, where it holds a character of a span, or 0."""
    mask = mask_tokens(ids, text, char_spans, token_bytes)
    if mask is None:
        raise _other_tokens(tokenizer(text, add_special_tokens=not chat)["input_ids"], ids, tokenizer)
    return mask


def _with_turn(
    example: dict[str, Any], spans: list[Span], mask: list[int], ids: list[int], tokenizer, chat_template: str | None
) -> list[int]:
    """The mask, and 1 on all tokens of system messages that are personas and nothing else."""
    turns = persona_turns(example, spans)
    if not turns:
        return mask
    columns = ("prompt", "completion") if "prompt" in example else ("messages",)
    kept = [
        message for column in columns for index, message in enumerate(example[column]) if (column, index) not in turns
    ]
    text = render_messages(example, kept, tokenizer, chat_template)
    without = tokenizer(text, add_special_tokens=False)["input_ids"]
    first, shorter = common_prefix_length(ids, without), len(ids) - len(without)
    if ids[:first] + ids[first + max(shorter, 0) :] != without:
        last = common_prefix_length(ids[:first:-1], without[:first:-1])
        raise PersonaError(
            "`counterfactual='drop_turn'`: where the system message is left out, the chat template writes other text "
            f"({tokenizer.decode(without[first : len(without) - last])!r}). Set it to 'drop', or write that text in front of the "
            "persona, in the system message."
        )
    return [int(own or first <= position < first + shorter) for position, own in enumerate(mask)]


def _check_mask(mask: list[int], ids: list[int]) -> None:
    if len(mask) != len(ids) or not set(mask) <= {0, 1}:
        raise PersonaError(
            f"'persona_mask' must be a list of 0 and 1 as long as 'input_ids' ({len(ids)} tokens), got {len(mask)} values "
            f"from {sorted(set(mask))[:5]}."
        )


def _other_tokens(ids: list[int], trl_ids: list[int], tokenizer) -> PersonaError:
    first = next(
        (i for i, (a, b) in enumerate(zip(ids, trl_ids, strict=False)) if a != b), min(len(ids), len(trl_ids))
    )
    return PersonaError(
        f"the persona cannot be aligned: the row's text gives other tokens than TRL's tokenization, from token {first} on "
        f"({tokenizer.decode(ids[first : first + 5])!r} instead of {tokenizer.decode(trl_ids[first : first + 5])!r}). The "
        "chat template renders a message differently when its text changes (it cuts or rewrites it). Use another chat "
        "template, or move the persona."
    )
