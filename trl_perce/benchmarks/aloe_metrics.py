# SPDX-License-Identifier: Apache-2.0

"""
The figures of ALOE: alignment level per round, its average over rounds 6 to 10 (Tables 4 and 9), and the rate at which it improves.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..evaluation.ratings import mean_of_known


logger = logging.getLogger(__name__)

LATE_ROUNDS = (6, 10)  # first and last of those that are averaged
_SAMPLES = 2000  # of the bootstrap


def alignment_levels(ratings: np.ndarray) -> np.ndarray:
    """
    ALOE's alignment level AL(k): the mean rating of the replies of round k.

    Args:
        ratings (`np.ndarray` of shape `(…, C, K)`): From 1 to 5, of `C` conversations and `K` rounds; NaN where there is none.

    Returns:
        `np.ndarray` of shape `(…, K)`: From 1 to 5; NaN where no reply of a round has a rating.
    """
    return mean_of_known(ratings, axis=-2)


def late_average(levels: np.ndarray) -> np.ndarray:
    """
    The average of AL(6) … AL(10).

    Args:
        levels (`np.ndarray` of shape `(…, K)`): Alignment levels.

    Returns:
        `np.ndarray` of shape `(…)`: From 1 to 5; NaN where a level is not known or there are fewer rounds.
    """
    first, last = LATE_ROUNDS
    if levels.shape[-1] < last:
        return np.full(levels.shape[:-1], np.nan)
    return levels[..., first - 1 : last].mean(-1)


def improvement(levels: np.ndarray) -> dict[str, np.ndarray]:
    """
    How alignment improves over the rounds: the regression line `b k + a` with the least squares through AL(k).

    The normalised rate is that of `N-AL(k) = (AL(k) − min AL) / (max AL − min AL)`, with the extremes over the rounds: a model's
    trend, whatever range its levels have. R², the share of the variance that the line explains, says how steady it is; it
    is the same for AL and N-AL, since the second is a linear map of the first.

    ALOE's published code stops at AL(k). The definition is that of its paper as others restate it (the README of
    github.com/Naproxen-Network/PersonalizedLLM_Benchmark gives the same two formulas).

    Args:
        levels (`np.ndarray` of shape `(…, K)`): Alignment levels. Rounds with NaN are left out.

    Returns:
        `dict[str, np.ndarray]`: `"ir"`, the slope `b` in ratings per round; `"n_ir"`, per round; `"n_r2"`, from 0 to 1; each of
        shape `(…)`, NaN with fewer than two known levels, the last two also where all levels are equal.
    """
    known = np.isfinite(levels)
    rounds = np.where(known, np.arange(1.0, levels.shape[-1] + 1), np.nan)
    x = np.where(known, rounds - mean_of_known(rounds, -1)[..., None], 0.0)
    y = np.where(known, levels - mean_of_known(levels, -1)[..., None], 0.0)
    spread = np.where(known, levels, -np.inf).max(-1) - np.where(known, levels, np.inf).min(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = (x * y).sum(-1) / (x * x).sum(-1)
        flat = ~(spread > 1e-12)  # equal but for rounding
        n_r2 = slope**2 * (x * x).sum(-1) / (y * y).sum(-1)
        return {
            "ir": slope,
            "n_ir": np.where(flat, np.nan, slope / spread),
            "n_r2": np.where(flat, np.nan, n_r2),
        }


def figures(ratings: np.ndarray) -> dict[str, np.ndarray]:
    """All figures of ratings of shape `(…, C, K)`: `"alignment"` of shape `(…, K)`, the others of shape `(…)`."""
    levels = alignment_levels(ratings)
    return {"alignment": levels, "alignment_late": late_average(levels), **improvement(levels)}


def summarize(ratings: Sequence[Sequence[float | None]], seed: int = 0) -> dict[str, Any]:
    """
    The figures of a run with 95 % intervals by the percentile bootstrap over conversations.

    Args:
        ratings (`Sequence[Sequence[float or None]]`): Of each conversation and round; `None` where the judge's reply could not
            be read.
        seed (`int`, *optional*, defaults to `0`): Of the bootstrap.

    Returns:
        `dict[str, Any]`: `"conversations"`; `"unparsable"`, ratings that are not there; `"rounds"`, of each `"round"`,
        `"alignment"` (`"value"`, `"interval"`) and `"rated"`, the number of ratings; `"alignment_late"` (rounds 6 to 10),
        `"ir"`, `"n_ir"`, `"n_r2"`, each with `"value"` and `"interval"`. `None` where a figure is not defined, and for an
        interval where it is not in more than 5 % of the bootstrap's samples.
    """
    table = np.array(ratings, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(table), size=(_SAMPLES, len(table)))
    values, sampled = figures(table), figures(table[drawn])
    levels = zip(values["alignment"], sampled["alignment"].T, np.isfinite(table).sum(0), strict=True)
    return {
        "conversations": len(table),
        "unparsable": int(np.isnan(table).sum()),
        "rounds": [
            {"round": number, "alignment": _with_interval(value, samples), "rated": int(rated)}
            for number, (value, samples, rated) in enumerate(levels, 1)
        ],
        **{name: _with_interval(values[name], sampled[name]) for name in ("alignment_late", "ir", "n_ir", "n_r2")},
    }


def _with_interval(value: np.ndarray, samples: np.ndarray) -> dict[str, Any]:
    samples = samples[np.isfinite(samples)]
    known = np.isfinite(value)
    interval = np.quantile(samples, (0.025, 0.975)).tolist() if known and len(samples) >= 0.95 * _SAMPLES else None
    return {"value": float(value) if known else None, "interval": interval}


def aloe_records(
    result: dict[str, Any],
    model: str,
    method: str,
    train_task: str | None = None,
    learning_rate: float | None = None,
    clip: tuple[float, float] | None = None,
    seed: int | None = None,
) -> list[dict[str, Any]]:
    """
    The figures of a run as the records of which `trl-perce reproduce` makes tables. Figures that are not defined are left out,
    with a warning.

    Args:
        result (`dict[str, Any]`): From [`summarize`] or [`~aloe.run_aloe`].
        model (`str`): Name of the start model.
        method (`str`): How it was trained, such as `"perce"`, or `"untrained"`.
        train_task (`str`, *optional*): What it was trained on.
        learning_rate (`float`, *optional*): Of the training.
        clip (`tuple[float, float]`, *optional*): Bounds of the weights.
        seed (`int`, *optional*): Of the training.

    Returns:
        `list[dict[str, Any]]`: With the metrics `"alignment@1"` …, `"alignment@6-10"` and `"n_ir"`; `rows` is the number of
        ratings for a round, that of conversations for the others.
    """
    figures = {f"alignment@{row['round']}": (row["alignment"], row["rated"]) for row in result["rounds"]}
    figures["alignment@6-10"] = (result["alignment_late"], result["conversations"])
    figures["n_ir"] = (result["n_ir"], result["conversations"])
    undefined = [metric for metric, (figure, _) in figures.items() if figure["value"] is None]
    if undefined:
        logger.warning(
            f"ALOE, {model}, {method}: no value for {', '.join(undefined)}, since ratings or rounds are missing"
        )
    run: dict[str, Any] = {"model": model, "train_task": train_task, "task": "aloe", "method": method}
    run |= {"learning_rate": learning_rate, "clip": None if clip is None else list(clip), "seed": seed}
    return [
        {**run, "metric": metric, **figure, "rows": rows}
        for metric, (figure, rows) in figures.items()
        if metric not in undefined
    ]
