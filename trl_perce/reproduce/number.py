# SPDX-License-Identifier: Apache-2.0

"""A figure of a table: its mean, its two intervals, and how it is written."""

from dataclasses import dataclass

import numpy as np

from ..utils.statistics import ratio_interval


METRIC_LABELS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "meteor": "METEOR",
    "em": "EM",
    "f1": "F1",
    "log_likelihood/personal": "log P personal",
    "log_likelihood/other": "log P other",
    "log_likelihood/personal_swapped": "log P personal, swapped",
    "uptake": "uptake",
    "uptake_swapped": "uptake of the right persona, swapped",
    "uptake_of_swapped": "uptake of the other persona, swapped",
    "uptake_chance": "uptake of another persona, by chance",
    "personal_fraction": "personal tokens",
    "tokens/with_persona": "with persona",
    "tokens/without_persona": "without persona",
    "alignment@6-10": "mean of 6 to 10",
    "n_ir": "N-IR",
    **{f"alignment@{k}": f"k = {k}" for k in range(1, 11)},
}
"""Metrics as tables and plots name them; others stand under their own name."""

_SHARES = {"rouge1", "rouge2", "rougeL", "meteor", "em", "f1", "personal_fraction"}
_DIGITS = {"log_likelihood": 3, "n_ir": 3, "tokens": 1, "train": 4}


def rate_text(rate: float) -> str:
    """A learning rate as it is written in papers, such as `"2e-4"`."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def unit(metric: str) -> tuple[float, int]:
    """
    How a metric is shown.

    Args:
        metric (`str`): Its name in the records.

    Returns:
        `tuple[float, int]`: What it is multiplied by (100 for shares from 0 to 1, as in the paper), and decimals.
    """
    return (100.0 if metric in _SHARES else 1.0), _DIGITS.get(metric.split("/")[0], 2)


@dataclass(frozen=True)
class Number:
    """
    A figure of ours, in the units of the records.

    Attributes:
        metric (`str`): What it is of.
        kind (`str`): `"value"`, `"gain"` (a ratio to another figure, less 1), `"difference"` or `"variance"`.
        mean (`float`, *optional*): Over seeds. `None` if no run has a value.
        sd (`float`, *optional*): Standard deviation over seeds (n − 1). `None` with one seed.
        seed_interval (`list[float]`, *optional*): 95 % t-interval of the mean over seeds. `None` with one seed.
        row_interval (`list[float]`, *optional*): The runs' 95 % intervals over rows, bounds averaged over seeds. `None` if a
            run has none.
        seeds (`int`): Runs with a value.
        rows (`list[int]`): Fewest and most rows of such a run.
        without_value (`int`): Runs whose value is NaN.
    """

    metric: str
    kind: str
    mean: float | None
    sd: float | None
    seed_interval: list[float] | None
    row_interval: list[float] | None
    seeds: int
    rows: list[int]
    without_value: int

    @property
    def text(self) -> str:
        """`mean [row interval] ± half of the seed interval`."""
        if self.mean is None:
            return "no value"
        scale, digits = unit(self.metric)
        if self.kind == "gain":
            scale, digits = 100.0, 1
        scale = scale**2 if self.kind == "variance" else scale
        sign, end = "+" if self.kind in ("gain", "difference") else "", " %" if self.kind == "gain" else ""
        text = f"{self.mean * scale:{sign}.{digits}f}{end}"
        if self.row_interval is not None:
            low, high = (f"{bound * scale:.{digits}f}" for bound in self.row_interval)
            text += f" [{low}, {high}]"
        if self.seed_interval is not None:
            text += f" ± {(self.seed_interval[1] - self.seed_interval[0]) / 2 * scale:.{digits}f}"
        if self.without_value:
            text += f" ({self.seeds} of {self.seeds + self.without_value} runs)"
        return text.replace("-", "−")


@dataclass(frozen=True)
class Quoted:
    """A figure of the paper, in the paper's unit: scores and gains in percent. `digits` is `None` where it has all of its own."""

    quoted: float
    digits: int | None

    @property
    def text(self) -> str:
        form = "g" if self.digits is None else f".{self.digits}f"
        return f"paper: {self.quoted:{form}} (quoted)".replace("-", "−")


def make_number(metric, kind, parts, wholes=None, row_interval=None, rows=(), without_value=0) -> Number:
    """
    A [`Number`] from one value a seed: the mean, or, with `wholes`, the ratio of means.

    Args:
        metric, kind, row_interval, rows, without_value: As in [`Number`].
        parts (`Sequence[float]`): One a seed.
        wholes (`Sequence[float]`, *optional*): One a seed.

    Returns:
        [`Number`]: With its interval over seeds.
    """
    parts = np.asarray(parts, dtype=float)
    wholes = np.ones_like(parts) if wholes is None else np.asarray(wholes, dtype=float)
    return Number(
        metric=metric,
        kind=kind,
        mean=float(parts.sum() / wholes.sum()) if len(parts) else None,
        sd=_sd(parts, wholes) if len(parts) > 1 else None,
        seed_interval=ratio_interval(parts, wholes),
        row_interval=row_interval,
        seeds=len(parts),
        rows=list(rows),
        without_value=without_value,
    )


def _sd(parts: np.ndarray, wholes: np.ndarray) -> float:
    """Standard deviation of the values; of a ratio, linearized as in [`ratio_interval`], which a whole of 0 does not break."""
    residuals = parts - parts.sum() / wholes.sum() * wholes
    return float(np.sqrt((residuals**2).sum() / (len(parts) - 1)) / abs(wholes.mean()))
