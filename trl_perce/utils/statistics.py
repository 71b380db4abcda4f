# SPDX-License-Identifier: Apache-2.0

"""
How sure a mean is: intervals and tests for values of rows that belong to users, and for several seeds.

Rows of one user are not independent. Where `groups` are given, the user is the unit that is drawn, not the row; the mean
stays the mean of the rows.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np


Interval = tuple[float, float]


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """
    Interval of a mean by the percentile bootstrap ([`scipy.stats.bootstrap`]). With few groups it is too narrow: in
    simulations with skewed values, of 95 % intervals 94 % held the mean with 100 groups, 92 % with 30, 87 % with 10.

    Args:
        values (`Sequence[float]` of length `R`): Values of the rows.
        groups (`Sequence` of length `R`, *optional*): The user of each row. By default each row stands alone.
        samples (`int`, *optional*, defaults to `10_000`): Bootstrap samples.
        seed (`int`, *optional*, defaults to `0`): Of the samples.
        level (`float`, *optional*, defaults to `0.95`): Share of intervals that hold the mean.

    Returns:
        `tuple[float, float]` or `None`: Low and high end; `None` where there are fewer than two groups, which tell nothing.

    Raises:
        `ValueError`: A value is not finite, or the lengths differ.
    """
    from scipy import stats

    values = _checked(values)
    sums, counts = _by_group(values, groups)
    if len(sums) < 2:
        return None
    low, high = stats.bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=samples,
        batch=max(1, 2_000_000 // len(sums)),  # 16 MB an array
        confidence_level=level,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(low), float(high)


def paired_test(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """
    Do two runs differ on the same rows? The p-value is that of the sign-flip permutation test ([`scipy.stats.permutation_test`]):
    if the runs did not differ, each user's two results could as well be swapped. It holds with any number of users, where a
    paired bootstrap says too often that there is a difference when there are few; with `G` users it cannot fall below
    `2 / 2^G`. The interval of the difference is that of [`bootstrap_interval`].

    It is about these two runs, not about two methods: runs with other seeds would differ, too. For several seeds see
    [`mean_over_seeds`].

    Args:
        a (`Sequence[float]` of length `R`): Values of the rows in one run.
        b (`Sequence[float]` of length `R`): Values of the same rows in the other.
        groups (`Sequence` of length `R`, *optional*): The user of each row.
        samples (`int`, *optional*, defaults to `10_000`): Permutations (all of them, if there are not more) and bootstrap samples.
        seed (`int`, *optional*, defaults to `0`): Of both.
        level (`float`, *optional*, defaults to `0.95`): Of the interval.

    Returns:
        `dict[str, Any]`: `"difference"`, the mean of `a` minus that of `b`; `"interval"`, see [`bootstrap_interval`];
        `"p_value"`, two-sided.

    Raises:
        `ValueError`: A value is not finite, the lengths differ, or there are no rows.
    """
    from scipy import stats

    a, b = _checked(a), _checked(b)
    if len(a) != len(b):
        raise ValueError(f"One run has {len(a)} rows, the other {len(b)}: a paired test needs the same rows.")
    if not len(a):
        raise ValueError("There are no rows to compare.")
    differences = a - b
    sums, _ = _by_group(differences, groups)
    p_value = 1.0  # with one user, either sign is as likely
    if len(sums) > 1:
        p_value = stats.permutation_test(
            (sums,),
            lambda sums, axis: sums.sum(axis) / len(differences),
            permutation_type="samples",
            vectorized=True,
            n_resamples=samples,
            batch=max(1, 2_000_000 // len(sums)),
            rng=np.random.default_rng(seed),
        ).pvalue
    return {
        "difference": float(differences.mean()),
        "interval": bootstrap_interval(differences, groups, samples, seed, level),
        "p_value": float(p_value),
    }


def mean_over_seeds(
    values_by_seed: Sequence[Sequence[float]], groups: Sequence[Hashable] | None = None, level: float = 0.95
) -> dict[str, Any]:
    """
    Mean over runs with several seeds on the same rows, with an interval for new seeds and new users: what the method
    gives, not what these runs gave. For the difference between two methods, pass the difference of their values, seed by seed.

    Values are taken as a sum of a seed's effect, a user's effect and the rest, all at random ("crossed random effects without
    replication"). From the mean squares between seeds, between users, and of the rest, the variance of the mean is

        V = (MS_seeds + MS_users − MS_rest) / (seeds · users)

    and the interval is `mean ± t · √V`, with Satterthwaite's degrees of freedom, not below the least of the mean squares'. A bootstrap over seeds and users would not
    do: with three seeds it can hardly reach beyond the lowest and the highest, so that where seeds matter most, only 3 of 4 of its
    95 % intervals hold the mean. With three seeds this interval is wide where seeds differ; that is how it is.

    Args:
        values_by_seed (`Sequence[Sequence[float]]` of shape `(S, R)`): Values of the same `R` rows with each of `S` seeds.
        groups (`Sequence` of length `R`, *optional*): The user of each row. By default each row stands alone.
        level (`float`, *optional*, defaults to `0.95`): Share of intervals that hold the mean.

    Returns:
        `dict[str, Any]`: `"mean"`, of all values, and `"interval"`: low and high end, or `None` where there are fewer than two
        seeds or two users. For one seed, [`bootstrap_interval`] is an interval over users alone.

    Raises:
        `ValueError`: A value is not finite, or the lengths differ.
    """
    from scipy import stats

    values = np.stack([_checked(row_values) for row_values in _equally_long(values_by_seed)])
    mean = values.mean()
    # Users with many rows weigh more: a user's value is the mean, plus what the user's rows add to the mean of all
    sums, counts = zip(*(_by_group(row_values - mean, groups) for row_values in values), strict=True)
    by_user = mean + np.stack(sums) * len(counts[0]) / values.shape[1]
    seeds, users = by_user.shape
    if seeds < 2 or users < 2:
        return {"mean": float(mean), "interval": None}

    seed_means, user_means = by_user.mean(1, keepdims=True), by_user.mean(0, keepdims=True)
    rest = by_user - seed_means - user_means + mean
    squares = np.array([users * seed_means.var(ddof=1), seeds * user_means.var(ddof=1), 0.0])
    squares[2] = (rest**2).sum() / ((seeds - 1) * (users - 1))
    degrees = np.array([seeds - 1, users - 1, (seeds - 1) * (users - 1)])
    # Not less than seeds alone, or users alone, would give
    total = max(squares[0] + squares[1] - squares[2], squares[0], squares[1])
    half = 0.0
    if total > 0:
        # With few seeds and users the approximation can fall below the freedom of the smallest square, and t to infinity
        freedom = max(total**2 / (squares**2 / degrees).sum(), degrees.min())
        half = stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(total / (seeds * users))
    return {"mean": float(mean), "interval": (float(mean - half), float(mean + half))}


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
    from scipy.special import stdtrit

    number = len(parts)
    if number < 2:
        return None
    ratio, freedom = parts.sum() / wholes.sum(), number - 1
    error = np.sqrt(number / freedom * ((parts - ratio * wholes) ** 2).sum()) / abs(wholes.sum())
    half = float(stdtrit(freedom, 0.975) * error)
    return [float(ratio) - half, float(ratio) + half]


def _checked(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1:
        raise ValueError(f"Expected a value for each row, got an array of shape {array.shape}.")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"Row {row}: the value is {array[row]}. Leave out rows without a value.")
    return array


def _equally_long(values_by_seed: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
    lengths = sorted({len(values) for values in values_by_seed})
    if len(lengths) != 1 or lengths == [0]:
        raise ValueError(f"Each seed needs values of the same rows, at least one; got {lengths or 'no'} rows.")
    return values_by_seed


def _by_group(values: np.ndarray, groups: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values and number of the rows of each group."""
    if groups is None:
        return values, np.ones(len(values))
    if len(groups) != len(values):
        raise ValueError(f"There are {len(values)} values and {len(groups)} groups: one each is needed.")
    for row, group in enumerate(groups):
        if group is None:
            raise ValueError(f"Row {row} has no group. Give each row its user, or no groups at all.")
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    of_row = np.array([numbers[group] for group in groups], dtype=int)
    return np.bincount(of_row, values, len(numbers)), np.bincount(of_row, minlength=len(numbers)).astype(float)
