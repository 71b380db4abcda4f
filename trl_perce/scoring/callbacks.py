# SPDX-License-Identifier: Apache-2.0

"""Scores of the same few rows again and again while a model trains."""

import math
import os
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..config import PerContrastConfig, copy_config, describe_precision
from .heatmap.page import write_html
from .percontrast import PerContrast
from .scores import TokenScores


_COLUMNS = ["step", "row", "response", "mean PIR", "personal share", "personal words"]
_PREPARED = ("input_ids", "labels", "persona_mask")


class PerContrastCallback(TrainerCallback):
    r"""
    A [`~transformers.TrainerCallback`] that scores the same few rows again and again while a model trains, so that one sees which
    tokens become personal: before the first step, at every evaluation and at every checkpoint.

    - The log gets `percontrast/pir_mean` (nats, over the tokens with a PIR) and `percontrast/personal_fraction`.
    - Weights & Biases, Trackio and TensorBoard get a table `percontrast`: for each row and step the response, its mean PIR, its
      share of personal tokens and its personal words.
    - Each checkpoint's folder gets a heatmap, `percontrast.html`.

    Personas and responses do not go to the Hub: with `push_to_hub` heatmaps are written to `_percontrast` in the `output_dir`, which
    is not uploaded, and TensorBoard, whose files are, gets no table.

    Training goes on as it would without it, and rows are scored in its precision (`bf16`, `fp16`). With several processes, each scores the same rows, and the first writes.

    Example:

    ```python
    >>> trainer = PerCETrainer(...)
    >>> trainer.add_callback(PerContrastCallback(trainer, num_rows=8))
    >>> trainer.train()
    ```

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer to which the callback will be attached: a [`PerCETrainer`] of any weighting.
        rows (iterable of `dict` or [`~datasets.Dataset`], *optional*):
            Rows to score, of any type that the trainer takes. If `None`, the first rows with a persona of the trainer's evaluation
            dataset (of several: of the first).
        num_rows (`int`, *optional*, defaults to `8`):
            How many of them.

    Raises:
        `ValueError`: There are no rows: none is given and the trainer has no evaluation dataset, none has a persona, or they
            are packed.
    """

    def __init__(self, trainer, rows=None, num_rows: int = 8):
        self.trainer = trainer
        args = copy_config(trainer.args, PerContrastConfig, disable_tqdm=True)
        self._scorer = PerContrast(trainer.model, trainer.processing_class, args)
        rows = [*islice(_rows_with_persona(trainer, rows), num_rows)]
        if not rows:
            raise ValueError("No row to score has a persona. Pass other `rows` to `PerContrastCallback`.")
        self._prepared = self._scorer.prepare(rows)
        self._scored_at: int | None = None
        self._scores: list[TokenScores] = []
        self._table: list[list[Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._score(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self._score(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self._score(state.global_step)
        path = os.path.join(args.output_dir, f"checkpoint-{state.global_step}", "percontrast.html")
        if args.push_to_hub:
            path = os.path.join(args.output_dir, "_percontrast", f"step-{state.global_step}.html")
        if state.is_world_process_zero:
            settings = {
                "model": self.trainer.model.config.name_or_path,
                "adapter": None,
                "dataset": f"rows of the evaluation at step {state.global_step}",
                "precision": describe_precision(self._scorer.args, self.trainer.model.dtype),
                **{name: getattr(args, name) for name in ("counterfactual", "weight_clip_min", "weight_clip_max")},
            }
            write_html(self._scores, path, settings)

    def _score(self, step: int) -> None:
        """Score and log, once a step."""
        if step == self._scored_at:
            return
        trainer = self.trainer
        self._scorer.model = trainer.model_wrapped
        self._scores = sorted(self._scorer.iterate(self._prepared), key=lambda scores: scores.row)
        self._scored_at = step
        pir, is_personal = (
            np.concatenate([getattr(scores, name) for scores in self._scores]) for name in ("pir", "is_personal")
        )
        mean, share = _mean_pir_and_share(pir, is_personal)
        # Not `trainer.log`, which would also log, and forget, what training has gathered since its last log
        Trainer.log(trainer, {"percontrast/pir_mean": mean, "percontrast/personal_fraction": share})
        if trainer.is_world_process_zero():
            for scores in self._scores:
                words = " ".join(word.text for word in scores.words if word.is_personal)
                own = _mean_pir_and_share(scores.pir, scores.is_personal)
                self._table.append([step, scores.row, scores.response, *own, words])
            self._log_table(step)

    def _log_table(self, step: int) -> None:
        trainer, report_to = self.trainer, self.trainer.args.report_to
        table = pd.DataFrame(columns=_COLUMNS, data=self._table)
        if "wandb" in report_to:
            import wandb

            wandb.log({"percontrast": wandb.Table(dataframe=table)})
        if "trackio" in report_to:
            import trackio

            trackio.log({"percontrast": trackio.Table(dataframe=table)})
        if "tensorboard" in report_to and not trainer.args.push_to_hub:
            (writer,) = (
                callback.tb_writer
                for callback in trainer.callback_handler.callbacks
                if isinstance(callback, TensorBoardCallback)
            )
            lines = [_COLUMNS, ["---"] * len(_COLUMNS), *self._table[-len(self._scores) :]]
            text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
            writer.add_text("percontrast", text, step)


def _rows_with_persona(trainer, rows):
    """The given rows, or those of the evaluation dataset that have a persona, which the trainer has prepared."""
    if rows is not None:
        return iter(rows)
    dataset = trainer.eval_dataset
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    if dataset is None:
        raise ValueError("The trainer has no evaluation dataset. Pass `rows` to `PerContrastCallback`.")
    if trainer.args.eval_packing or (trainer.args.eval_packing is None and trainer.args.packing):
        raise ValueError("The trainer's evaluation dataset is packed. Pass `rows` to `PerContrastCallback`.")
    return ({key: row[key] for key in _PREPARED} for row in dataset if any(row["persona_mask"]))


def _mean_pir_and_share(pir: np.ndarray, is_personal: np.ndarray) -> tuple[float, float]:
    """Mean PIR (nats) and share of personal tokens, over the tokens that have a PIR; NaN if none has."""
    known = ~np.isnan(pir)
    if not known.any():
        return math.nan, math.nan
    return float(pir[known].mean()), float(is_personal[known].mean())


def _cell(value) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
