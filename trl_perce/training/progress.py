# SPDX-License-Identifier: Apache-2.0

"""
What a training prints: one line a log, in columns, instead of Transformers' dictionaries. Trackers and `trainer_state.json` get all metrics
as before.
"""

import logging
import textwrap
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..utils.screen import WIDTH


_CELL = 8
_TITLES = {
    **{"loss": "loss", "nll": "nll", "pir/mean": "PIR", "pir/personal_fraction": "personal", "weight/mean": "weight"},
    **{"learning_rate": "lr", "tokens/s": "tokens/s", "time_left": "left"},
}
_EVALUATED = ("loss", "nll", "pir/mean", "pir/personal_fraction", "weight/mean")
# Metrics of Transformers, TRL and ours that are in the files alone; any other, such as those of `compute_metrics`, is printed
_IN_FILES = {
    *("epoch", "step", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss", "total_flos"),
    *("weight/at_min", "weight/at_max", "counterfactual/token_ratio", "skipped_steps", "num_input_tokens_seen"),
    *("runtime", "samples_per_second", "steps_per_second", "tokens_per_second", "model_preparation_time"),
}


class _StepLines(TrainerCallback):
    """Prints a line a log, over one of Transformers' callbacks that print."""

    def __init__(self, columns: tuple[str, ...]):
        super().__init__()
        self._columns = columns
        self._has_header = False
        self._num_tokens = 0.0  # of all steps up to the last line
        self._started = self._resumed = time.monotonic()
        self._first_step, self._busy = 0, 0.0  # seconds of steps since the last line

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._has_header = False
        self._first_step, self._busy = state.global_step, 0.0
        self._started = self._resumed = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        now = time.monotonic()
        self._busy, self._resumed = self._busy + now - self._resumed, now

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        self._resumed = time.monotonic()  # neither evaluations nor checkpoints count as steps

    def on_save(self, args, state, control, **kwargs):
        super().on_save(args, state, control, **kwargs)
        self._resumed = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or not state.is_world_process_zero or args.get_process_log_level() > logging.WARNING:
            return
        prefix = next((name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")), "eval")
        if "loss" in logs:
            self._print_cells(state, {**logs, **self._speed(logs, state)})
        elif "train_runtime" in logs:
            self._print(_summary(logs, state.global_step - self._first_step))
        elif f"{prefix}_loss" in logs:  # TRL calls its metrics `eval_…` whatever the dataset's prefix is
            metrics = {name: logs.get(f"{prefix}_{name}", logs.get(f"eval_{name}")) for name in _EVALUATED}
            self._print_cells(state, metrics, f"{prefix}, {_duration(logs.get(f'{prefix}_runtime', 0))}")
        for line in _rest(logs, prefix):
            self._print(line)

    def _speed(self, logs: dict[str, Any], state) -> dict[str, float]:
        """Tokens a second since the last line, and seconds that are left, at the mean pace of the run with all that it does."""
        found, steps = {}, state.global_step - self._first_step
        tokens = logs.get("num_tokens", 0.0)
        if self._busy > 0 and tokens > self._num_tokens:
            found["tokens/s"] = (tokens - self._num_tokens) / self._busy
        self._num_tokens, self._busy = tokens, 0.0
        if steps > 0:
            found["time_left"] = (time.monotonic() - self._started) / steps * (state.max_steps - state.global_step)
        return found

    def _print_cells(self, state, metrics: dict[str, Any], label: str | None = None) -> None:
        step = max(4, len(str(state.max_steps)))
        columns = [name for name in self._columns if label is None or name in _EVALUATED]
        if not self._has_header:
            self._print(" ".join(["step".rjust(step), *(_TITLES[name].rjust(_CELL) for name in self._columns)]))
            self._has_header = True
        cells = [_cell(name, metrics.get(name)).rjust(_CELL) for name in columns]
        line = " ".join([str(state.global_step).rjust(step), *cells])
        if label is not None:
            room = WIDTH - 2 - len(line)
            line += "  " + (label if len(label) <= room else label[: room - 1] + "…")
        self._print(line)

    def _print(self, line: str) -> None:
        raise NotImplementedError


class LinePrinter(_StepLines, PrinterCallback):
    """[`~transformers.PrinterCallback`] with a line a log, for runs without a progress bar."""

    def _print(self, line: str) -> None:
        print(line, flush=True)


class LineProgress(_StepLines, ProgressCallback):
    """[`~transformers.ProgressCallback`] with a line a log above the bar."""

    def _print(self, line: str) -> None:
        tqdm.write(line)


def print_in_lines(trainer: Trainer) -> None:
    """
    Put [`LinePrinter`] or [`LineProgress`] in the place of the callback that a trainer has added to print its logs. One that the user
    has passed stays, and so does that of notebooks.

    Args:
        trainer ([`PerCETrainer`]): Just made.
    """
    callbacks = trainer.callback_handler.callbacks
    kinds: dict[type, Callable[..., TrainerCallback]] = {PrinterCallback: LinePrinter, ProgressCallback: LineProgress}
    printers = [callback for callback in callbacks if isinstance(callback, tuple(kinds))]
    # Two of them: one is the user's, who wants to see what it prints
    if len(printers) != 1 or type(printers[0]) not in kinds:
        return
    of_pir = ("pir/mean", "pir/personal_fraction")
    absent = {"perce": (), "uniform": ("nll", *of_pir, "weight/mean")}.get(trainer.args.token_weighting, of_pir)
    columns = tuple(name for name in _TITLES if name not in absent)
    callbacks[callbacks.index(printers[0])] = kinds[type(printers[0])](columns)


def _cell(name: str, value: Any) -> str:
    """A value in eight characters at most."""
    if not isinstance(value, (int, float)):
        return ""
    if name == "time_left":
        return _duration(value)
    if name == "pir/personal_fraction":
        return f"{100 * value:.1f} %"
    specs = {"learning_rate": (".2e",), "tokens/s": (".0f",)}.get(name, (".3f",))
    texts = [f"{value:{spec}}" for spec in (*specs, ".2e", ".1e", ".0e")]
    return next((text for text in texts if len(text) <= _CELL), texts[-1])


def _duration(seconds: float) -> str:
    """As `h:mm:ss`, from a day on in days."""
    days = seconds / 86400
    return str(timedelta(seconds=int(seconds))) if days < 1 else f"{days:.{1 if days < 1000 else 0}f} d"


def _summary(logs: dict[str, Any], steps: int) -> str:
    loss = f", mean loss {_cell('loss', logs['train_loss'])}" if "train_loss" in logs else ""
    return f"{steps} steps in {_duration(logs['train_runtime'])}{loss}"


def _rest(logs: dict[str, Any], prefix: str) -> list[str]:
    """Lines with the metrics that have no column and that are not known, under their own names."""
    known = {before + name for before in ("", "train_", "eval_", f"{prefix}_") for name in {*_TITLES} | _IN_FILES}
    found = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in logs.items()
        if name not in known
    ]
    return textwrap.wrap(", ".join(found), WIDTH, initial_indent="     ", subsequent_indent="     ")
