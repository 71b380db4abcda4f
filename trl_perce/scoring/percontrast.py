# SPDX-License-Identifier: Apache-2.0

"""PerContrast: how much likelier each token of a response becomes when the persona is in the prompt."""

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from ..config import PerContrastConfig, autocast_dtype
from ..persona.marks import PersonaError
from ..persona.masks import TokenBytes, persona_stretches, swap_persona, text_and_offsets
from ..persona.rows import find_bad_row
from ..training.checks import keep_4bit_weights_trainable_on_cpu, load_tokenizer
from ..training.collator import DataCollatorForPerCE
from ..training.estep import labelled_log_probs, split_into_chunks
from ..training.fused_head import Head
from ..training.model_check import ModelCheck
from ..training.placement import check_placement, input_device
from ..training.weighting import perce_weights, personal_influence_ratio
from ..utils.bfloat16 import warn_of_slow_bf16
from ..utils.share import EVERYTHING, Share
from .loading import find_adapter, load_model, load_scoring_tokenizer
from .preparation import UNTRAINED, Preparation, PreparedRows
from .scores import TokenScores


logger = logging.getLogger(__name__)

NONFINITE = "the model's log-probabilities are NaN or infinite"


class PerContrast:
    """
    Score how personal each token of a response is, with PerContrast from [Rethinking Personalization in Large Language Models
    at the Token Level](https://huggingface.co/papers/2603.06595):

    `PIR(y_i; θ) = log P_θ(y_i | p, x, y_<i) − log P_θ(y_i | x, y_<i)`

    Rows are prepared and batched as [`PerCETrainer`] does it. The model runs in its own dtype; with `bf16=True` (or `fp16=True`) it runs
    under autocast, as in a training with that setting, and the scores are those that it would train with. Rows are sorted
    by length, only the tokens of the response are scored, and a row without a persona pays no counterfactual pass.

    On several processes (Accelerate) each scores all rows that it is given, and has all scores; those of a model in parts must give the
    same rows. To share rows out: `PartialState().split_between_processes`, or `trl-perce score --num_processes`.

    Example:

    ```python
    >>> from trl_perce import PerContrast

    >>> scores = PerContrast("HuggingFaceTB/SmolLM2-135M-Instruct").score(
    ...     {
    ...         "persona": "I sew my own dresses.",
    ...         "prompt": "About me: {persona}\\nWhat should I buy?\\n",
    ...         "completion": "A new set of needles.",
    ...     }
    ... )
    >>> [word.text for word in scores.words if word.is_personal]
    ['set', 'needles']
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Name or folder of a model or of an adapter, which is loaded with `model_init_kwargs` (its own dtype by default); or a
            model, which is run where it is, with its adapters, in evaluation mode. It is left as it was.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer, which must give character offsets. If `None`, it is loaded from the model's name.
        args ([`PerContrastConfig`], *optional*):
            Configuration. If `None`, it is made of `config`.
        **config:
            Fields of [`PerContrastConfig`], such as `counterfactual="swap"`.

    Raises:
        `TypeError`: Both `args` and `config` are given, `args` is of another class, or `config` has an unknown field.
        `ValueError`: A value of `config` is out of its range.
    """

    def __init__(
        self,
        model,
        processing_class: PreTrainedTokenizerBase | None = None,
        args: PerContrastConfig | None = None,
        **config,
    ):
        if args is not None and config:
            raise TypeError(f"Pass `args` or {', '.join(map(repr, config))}, not both.")
        if not isinstance(args, PerContrastConfig | None):
            raise TypeError(f"`args` must be a `PerContrastConfig`, got a `{type(args).__name__}`.")
        self.args = PerContrastConfig(**config) if args is None else args
        if isinstance(model, str):
            base, adapter = find_adapter(model)
            self.tokenizer = load_scoring_tokenizer(base, adapter, self.args, processing_class)
            model = load_model(base, adapter, self.args)
        else:
            self.tokenizer = load_tokenizer(model, self.args, processing_class)
        self.model = model
        self._preparation = Preparation(self.tokenizer, self.args)
        pad_token_id = self.tokenizer.pad_token_id
        self._collator = DataCollatorForPerCE(
            pad_token_id=0 if pad_token_id is None else pad_token_id,  # hidden by the attention mask
            counterfactual="mask" if self.args.counterfactual == "mask" else "drop",
        )
        self._head: Head | None = None  # where not TRL's scores
        self._model_is_checked = not self.args.check_model
        self._token_bytes = TokenBytes(self.tokenizer)
        self._special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}

    def score(self, rows) -> TokenScores | list[TokenScores] | Iterator[TokenScores]:
        """
        Score rows.

        Args:
            rows (`dict` or iterable of `dict` or [`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                One row, or many, of any type that [`PerCETrainer`] takes.

        Returns:
            [`TokenScores`] for one row, a list of them in the order of the rows for many, and for a streaming dataset an
            iterator over them, in order, which reads 1,000 rows at a time. A row that the trainer would leave out has no tokens
            and says why in `skipped`.

        Raises:
            `PersonaError`: A row's persona is unclear (the message names the row), or all are the same and `counterfactual="swap"`.
            `TypeError`: They are no rows, such as a name of a file.
            `ValueError`: There is no row, or it holds images.
            `ModelCheckError`: The model would be scored wrongly (`check_model`); the message says what to set.
            `FloatingPointError`: With `on_nonfinite="stop"`: a log-probability is NaN or infinite. The message names the row.
        """
        if type(rows) is dict:  # a `DatasetDict` is one, too
            return [*self.iterate(self.prepare([rows]))][0]
        scores = _in_order(self.iterate(self.prepare(rows)))
        return scores if isinstance(rows, IterableDataset) else [*scores]

    def prepare(self, rows) -> PreparedRows:
        """Prepare many rows as the trainer does, for [`~PerContrast.iterate`]. Takes and raises what [`~PerContrast.score`] does."""
        if isinstance(rows, (Dataset, IterableDataset)):
            return self._preparation(rows, "scored")
        if not isinstance(rows, Iterable) or isinstance(rows, (str, dict)):
            raise TypeError(
                f"`rows` is a {type(rows).__name__}. Give a row such as {{'prompt': …, 'completion': …}}, a list of them, or a "
                "dataset (of a file: `load_dataset('json', data_files=path, split='train')`)."
            )
        with _without_bars():
            return self._preparation(_to_dataset(rows), "scored")

    def iterate(
        self, prepared: PreparedRows, done: Collection[int] = (), share: Share = EVERYTHING
    ) -> Iterator[TokenScores]:
        """
        Score prepared rows, each as soon as its batch is done: in blocks of 1,000 rows, the longest of a block first.

        Args:
            prepared ([`PreparedRows`]): From a [`Preparation`].
            done (`Collection[int]`, *optional*): Indices of rows to pass over. A batch of which any is missing is scored as a whole,
                so that a run that was killed ends as if it had not been.
            share ([`Share`], *optional*): What this process scores, where several share the work. By default all.

        Yields:
            [`TokenScores`]: Of each row of the share that is not in `done`, those that are skipped included.
        """
        total = None if prepared.num_rows is None else prepared.num_rows - len(done)
        with share.bar(total, "PerContrast", self.args.disable_tqdm) as bar:
            for rows, skipped in share.of(self._chunks(prepared, done)):
                left_out = (
                    TokenScores.left_out(index, reason, self.args.personal_threshold)
                    for index, reason in skipped.items()
                )
                for scores in chain(left_out, self._score_chunk(rows) if rows else ()):
                    if scores.row not in done:
                        share.advance(bar)
                        yield scores

    def _chunks(
        self, prepared: PreparedRows, done: Collection[int]
    ) -> Iterator[tuple[list[dict[str, Any]], dict[int, str]]]:
        """The rows of each batch that is not done as a whole, and of each block those that are left out."""
        earlier: list[list[list[int]]] = []
        for rows, skipped in prepared.blocks():
            if self.args.counterfactual == "swap":
                earlier = _find_other_personas(rows, earlier)
            skipped |= {row["_row"]: UNTRAINED for row in rows if not _is_scored(row).any()}
            rows = [row for row in rows if row["_row"] not in skipped]
            if skipped:
                yield [], skipped
            lengths = [len(row["input_ids"]) for row in rows]
            for indices in split_into_chunks(lengths, self.args.score_batch_tokens, padded=True):
                chunk = [rows[index] for index in indices]
                if any(row["_row"] not in done for row in chunk):
                    yield chunk, {}

    def _score_chunk(self, rows: list[dict[str, Any]]) -> Iterator[TokenScores]:
        """Score rows that fit into one batch."""
        passes = [self._passes(row) for row in rows]
        with self._scoring():
            self._check_model_once(rows)
            factual = self._log_probs([factual for factual, _, _ in passes])
            counterfactual = iter(self._log_probs([without for _, without, _ in passes if without is not None]))
        for row, (_, without, paired), log_probs in zip(rows, passes, factual, strict=True):
            counterfactual_log_probs = np.full_like(log_probs, np.nan)
            if without is not None:
                counterfactual_log_probs[paired] = next(counterfactual)
            if not (np.isfinite(log_probs).all() and np.isfinite(counterfactual_log_probs[paired]).all()):
                yield self._nonfinite(row)
                continue
            yield self._scores(
                row, log_probs, counterfactual_log_probs, 0 if without is None else len(without["input_ids"])
            )

    def _check_model_once(self, rows: list[dict[str, Any]]) -> None:
        if self._model_is_checked:
            return
        tokens = [token for row in rows for token in row["input_ids"]]
        check = ModelCheck(
            self.model, tokens[:256], self._device, autocast_dtype(self.args), self._collator.pad_token_id
        )
        self._head = check.run(flattened=False, mask=self.args.counterfactual == "mask")
        self._model_is_checked = True

    @property
    def _device(self) -> torch.device:
        return input_device(self.model)

    def _nonfinite(self, row: dict[str, Any]) -> TokenScores:
        if self.args.on_nonfinite == "stop":
            raise FloatingPointError(
                f"Row {row['_row']}: {NONFINITE}. Check the row, or score in bfloat16 or float32 instead of float16; "
                "`on_nonfinite='skip'` leaves such rows out."
            )
        logger.warning(f"Row {row['_row']} is left out: {NONFINITE}.")
        return TokenScores.left_out(row["_row"], NONFINITE, self.args.personal_threshold)

    def _passes(self, row: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None, np.ndarray]:
        """
        The row with its persona, the row without it (`None` if it has none), and for each scored token whether the pass without
        it predicts it too.
        """
        input_ids, labels, persona_mask = (np.array(row[key]) for key in ("input_ids", "labels", "persona_mask"))
        batch = self._collator([{"input_ids": input_ids, "labels": labels, "persona_mask": persona_mask}])
        paired = batch["has_counterfactual"][0].numpy()
        without = next(iter(batch["counterfactual_rows"]), None)
        if without is not None and self.args.counterfactual == "swap":
            swapped = swap_persona(input_ids, np.where(paired, labels, -100), persona_mask, row["_other"])
            without = dict(zip(("input_ids", "labels"), map(np.array, swapped), strict=True))
        factual = {"input_ids": input_ids, "labels": labels, "attention_mask": np.ones_like(input_ids)}
        return factual, without, paired[labels != -100]

    def _log_probs(self, rows: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        """Log-probabilities (nats, `float32`) of each row's labelled tokens, batched by length."""
        log_probs: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(rows)
        lengths = [len(row["input_ids"]) for row in rows]
        model = self.model if self._head is None else self._head(self.model)
        for chunk in split_into_chunks(lengths, self.args.score_batch_tokens, padded=True):
            batch = self._collator.counterfactual_batch([rows[index] for index in chunk])
            scored = labelled_log_probs(model, batch, self._device).float().cpu().numpy()
            counts = [int((rows[index]["labels"] != -100).sum()) for index in chunk]
            for index, own in zip(chunk, np.split(scored, np.cumsum(counts)[:-1]), strict=True):
                log_probs[index] = own
        return log_probs

    def _scores(
        self,
        row: dict[str, Any],
        log_probs: np.ndarray,
        counterfactual_log_probs: np.ndarray,
        num_counterfactual_tokens: int,
    ) -> TokenScores:
        mask, ids = np.array(row["persona_mask"]), np.array(row["input_ids"])
        persona, query = row["_persona"], row["_query"]
        trained = _is_scored(row)
        if persona is None:  # the row came tokenized
            context = (mask == 0) & ~trained & (np.arange(len(ids)) < trained.argmax())
            persona = self.tokenizer.decode(ids[mask == 1])
            query = self.tokenizer.decode(ids[context], skip_special_tokens=True).strip()
        ids = ids[trained].tolist()
        response, offsets = text_and_offsets([self._token_bytes[token] for token in ids])

        pir = personal_influence_ratio(torch.from_numpy(log_probs), torch.from_numpy(counterfactual_log_probs))
        weights = perce_weights(pir, self.args.weight_clip_min, self.args.weight_clip_max)
        weights[pir.isnan()] = 1
        return TokenScores(
            row=row["_row"],
            persona=persona,
            query=query,
            response=response,
            tokens=[response[start:end] for start, end in offsets],
            offsets=offsets,
            is_special=np.array([token in self._special for token in ids], dtype=bool),
            log_probs=log_probs,
            counterfactual_log_probs=counterfactual_log_probs,
            pir=pir.numpy(),
            weights=weights.numpy(),
            is_personal=(pir > self.args.personal_threshold).numpy(),
            threshold=self.args.personal_threshold,
            num_tokens=len(mask),
            num_counterfactual_tokens=num_counterfactual_tokens,
            num_persona_tokens=int(mask.sum()),
        )

    @contextmanager
    def _scoring(self):
        """The model in evaluation mode and with TRL's fused head, and back as it was."""
        model = extract_model_from_parallel(self.model)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        keep_4bit_weights_trainable_on_cpu(base)
        check_placement(base)
        training = {module: module.training for module in self.model.modules()}
        own_forward = base.__dict__.get("forward")
        dtype = autocast_dtype(self.args)
        warn_of_slow_bf16(base, dtype)
        try:
            self.model.eval()
            add_fused_lm_head(base)
            with torch.autocast(input_device(base).type, dtype, enabled=dtype is not None):
                yield
        finally:
            if own_forward is None:
                del base.forward
            else:
                base.forward = own_forward
            for module, mode in training.items():
                module.training = mode


def _in_order(scores: Iterable[TokenScores]) -> Iterator[TokenScores]:
    waiting, expected = {}, 0
    for one in scores:
        waiting[one.row] = one
        while expected in waiting:
            yield waiting.pop(expected)
            expected += 1


def _is_scored(row: dict[str, Any]) -> np.ndarray:
    return np.array(row["labels"]) != -100


def _find_other_personas(rows: list[dict[str, Any]], earlier: list[list[list[int]]]) -> list[list[list[int]]]:
    """
    Note with each row that has a persona, as `"_other"`, that of the next row with another one; behind the last row comes the
    first. Where all rows have the same, it is one of the `earlier` block's. Returns this block's personas.
    """
    own = [persona_stretches(row["input_ids"], row["persona_mask"]) for row in rows]
    rows, own = (
        [row for row, persona in zip(rows, own, strict=True) if persona],
        [persona for persona in own if persona],
    )
    others: list[list[list[int]] | None] = [None] * len(own)
    for position in reversed(range(2 * len(own))):  # twice round: the next other one may be behind the end
        here, following = position % len(own), (position + 1) % len(own)
        others[here] = own[following] if own[following] != own[here] else others[following]
    for row, persona, other in zip(rows, own, others, strict=True):
        row["_other"] = other or next((candidate for candidate in earlier if candidate != persona), None)
        if row["_other"] is None:
            raise PersonaError(
                f"`counterfactual='swap'` finds no other persona for row {row['_row']}: the {len(own)} rows with a persona that "
                "are read together all have the same. Give rows of several users, or use 'drop'."
            )
    return own or earlier


def _to_dataset(rows: Iterable[dict[str, Any]]) -> Dataset:
    rows = [*rows]
    if not all(isinstance(row, dict) for row in rows):
        raise PersonaError(find_bad_row(rows))
    # `Dataset.from_list` takes the columns of the first row alone
    columns = dict.fromkeys(column for row in rows for column in row)
    table = {column: [row.get(column) for row in rows] for column in columns}
    try:
        return Dataset.from_dict(table)
    except (UnicodeEncodeError, pa.ArrowException) as error:
        problem = find_bad_row(rows)
        if problem is not None:
            raise PersonaError(problem) from error
        return Dataset.from_dict(
            table, on_mixed_types="use_json"
        )  # an argument of tools is a number here and a text there


@contextmanager
def _without_bars():
    """Without the progress bars of `datasets`, of which a few rows would draw half a dozen."""
    were_disabled = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
