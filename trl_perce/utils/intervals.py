# SPDX-License-Identifier: Apache-2.0

"""Intervals by Student's t."""

import math

import numpy as np


# 97.5 % quantiles of Student's t with 1 to 8 degrees of freedom, for which the expansion is not good enough
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060)


def student(freedom: int) -> float:
    """
    The 97.5 % quantile of Student's t, which a two-sided 95 % interval takes.

    Args:
        freedom (`int`): Degrees of freedom, 1 or more.

    Returns:
        `float`: To 0.01.
    """
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    return 1.96 + 2.372 / freedom + 2.822 / freedom**2  # Cornish-Fisher expansion


def ratio_interval(parts: np.ndarray, wholes: np.ndarray) -> list[float] | None:
    """
    95 % interval of the ratio `Σ parts / Σ wholes` over independent draws: the ratio's linearized standard error times
    Student's t with `P - 1` degrees of freedom. With all wholes 1 it is the t-interval of a mean.

    Args:
        parts (`np.ndarray`, `np.float64` of shape `(P,)`): Numerators, one a draw.
        wholes (`np.ndarray`, `np.float64` of shape `(P,)`): Denominators of the same draws; their sum is not 0.

    Returns:
        `list[float]`: Low and high end, in this order. `None` for fewer than two draws.
    """
    number = len(parts)
    if number < 2:
        return None
    ratio, freedom = parts.sum() / wholes.sum(), number - 1
    error = math.sqrt(number / freedom * ((parts - ratio * wholes) ** 2).sum()) / abs(wholes.sum())
    return [float(ratio - student(freedom) * error), float(ratio + student(freedom) * error)]
