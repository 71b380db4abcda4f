"""Intervals and tests: against scipy, against enumeration, and by how often they are right on simulated data."""

import itertools

import numpy as np
import pytest
from scipy import stats

from trl_perce.utils.statistics import bootstrap_interval, mean_over_seeds, paired_test


def users_rows(random, users: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Values with mean 0 of users with 1 to 7 rows each, and whose they are."""
    groups = np.repeat(np.arange(users), random.integers(1, 8, size=users))
    return spread * random.normal(size=users)[groups] + random.normal(size=len(groups)), groups


# ── bootstrap ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bootstrap_of_rows():
    values = np.random.default_rng(0).exponential(size=400)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    assert bootstrap_interval(values) == pytest.approx(expected, abs=0.006)
    half = 1.645 * values.std() / 20
    assert bootstrap_interval(values, level=0.9) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.02
    )
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(list(values), seed=3) != bootstrap_interval(values)


def test_bootstrap_of_users():
    random = np.random.default_rng(0)
    values, groups = users_rows(random, 40)
    means = []
    for _ in range(4000):
        drawn = [values[groups == user] for user in random.integers(40, size=40)]
        means.append(np.concatenate(drawn).mean())
    interval = bootstrap_interval(values, [f"user {user}" for user in groups])
    assert interval == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)
    assert bootstrap_interval(values, range(len(values))) == bootstrap_interval(values)


def test_bootstrap_holds_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = {"users": 0, "rows": 0}
    for _ in range(800):
        values, groups = users_rows(random, 100)
        for unit, of_row in (("users", groups), ("rows", None)):
            low, high = bootstrap_interval(values, of_row, samples=400)
            held[unit] += low <= 0 <= high
    assert 0.915 <= held["users"] / 800 <= 0.965
    assert held["rows"] / 800 < 0.85  # what is wrong with taking rows of a user for independent


def test_too_little_for_an_interval():
    assert bootstrap_interval([]) is bootstrap_interval([1.0]) is bootstrap_interval([1, 2, 3], ["a"] * 3) is None
    assert bootstrap_interval([0.5] * 4) == (0.5, 0.5)


# ── paired test ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_paired_test_is_the_share_of_sign_flips():
    random = np.random.default_rng(1)
    b, groups = users_rows(random, 9)
    a = b + 0.3 + random.normal(size=len(b))
    result = paired_test(a, b, groups)
    by_user = [(a - b)[groups == user].sum() for user in range(9)]
    flipped = [abs(np.dot(signs, by_user)) for signs in itertools.product((-1, 1), repeat=9)]
    assert result["p_value"] == pytest.approx(np.mean(np.array(flipped) >= abs(sum(by_user)) - 1e-9))
    assert result["difference"] == pytest.approx(a.mean() - b.mean())
    assert result["interval"] == bootstrap_interval(a - b, groups)
    swapped = paired_test(b, a, groups)
    assert (swapped["difference"], swapped["p_value"]) == pytest.approx((-result["difference"], result["p_value"]))


def test_paired_test_of_rows_is_near_students():
    random = np.random.default_rng(2)
    b = random.normal(size=200)
    a = b + random.normal(0.12, 1, size=200)
    assert paired_test(a, b)["p_value"] == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)
    assert paired_test(a + 1, b)["p_value"] < 0.001


def test_paired_test_finds_a_difference_where_there_is_none_as_seldom_as_it_says():
    random = np.random.default_rng(3)
    found = {"users": 0, "rows": 0}
    for _ in range(300):
        values, groups = users_rows(random, 10)
        for unit, of_row in (("users", groups), ("rows", None)):
            found[unit] += paired_test(values, np.zeros(len(values)), of_row, samples=400)["p_value"] <= 0.05
    assert 0.02 <= found["users"] / 300 <= 0.08
    assert found["rows"] / 300 > 0.12


def test_paired_test_of_equal_runs_and_of_one_user():
    assert paired_test([1, 2, 3], [1, 2, 3]) == {"difference": 0, "interval": (0, 0), "p_value": 1}
    assert paired_test([1, 2], [0, 0], ["a", "a"]) == {"difference": 1.5, "interval": None, "p_value": 1}


# ── several seeds ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("of_seeds", [True, False])
def test_seeds_alone_and_users_alone_are_students_interval(of_seeds):
    units = np.random.default_rng(0).normal(size=5 if of_seeds else 30)
    values = np.tile(units[:, None], 30) if of_seeds else np.tile(units, (5, 1))
    expected = stats.ttest_1samp(units, 0).confidence_interval(0.95)
    result = mean_over_seeds(values)
    assert result["mean"] == pytest.approx(units.mean())
    assert result["interval"] == pytest.approx(tuple(expected))


def test_variance_of_seeds_and_users():
    """The formula of the docstring, the mean squares from a least squares fit."""
    values = np.random.default_rng(1).normal(size=(4, 12)) + 2 * np.arange(4)[:, None] + np.arange(12)

    def residual(*factors):
        columns = [np.ones(48)] + [factor == level for factor in factors for level in np.unique(factor)]
        design = np.stack(columns, axis=1).astype(float)
        return ((values.ravel() - design @ np.linalg.lstsq(design, values.ravel(), rcond=None)[0]) ** 2).sum()

    seeds, users = np.repeat(np.arange(4), 12), np.tile(np.arange(12), 4)
    rest = residual(seeds, users)
    squares = np.array([residual(users) - rest, residual(seeds) - rest, rest])
    degrees = np.array([3, 11, 33])
    parts = squares / degrees * (1, 1, -1)
    half = stats.t.ppf(0.975, parts.sum() ** 2 / (parts**2 / degrees).sum()) * np.sqrt(parts.sum() / 48)
    assert mean_over_seeds(values)["interval"] == pytest.approx((values.mean() - half, values.mean() + half))


def test_users_of_seeds():
    random = np.random.default_rng(2)
    values = random.normal(size=(3, 20))
    by_user = values.reshape(3, 5, 4).mean(2)
    grouped, alone = mean_over_seeds(values, np.repeat(np.arange(5), 4)), mean_over_seeds(by_user)
    assert grouped["mean"] == pytest.approx(alone["mean"])
    assert grouped["interval"] == pytest.approx(alone["interval"])
    uneven = mean_over_seeds(values, ["a"] * 16 + ["b", "c", "d", "e"])
    assert uneven["mean"] == pytest.approx(values.mean())  # of the rows, not of the users


@pytest.mark.parametrize(("of_seed", "of_user", "rest"), [(0, 1, 0.3), (0.2, 1, 1), (1, 1, 1)])
def test_interval_over_seeds_holds_the_mean_as_often_as_it_says(of_seed, of_user, rest):
    random, held = np.random.default_rng(0), 0
    for _ in range(400):
        _, groups = users_rows(random, 40)
        values = rest * random.normal(size=(3, len(groups))) + of_seed * random.normal(size=(3, 1))
        low, high = mean_over_seeds(values + of_user * random.normal(size=40)[groups], groups)["interval"]
        held += low <= 0 <= high
    assert 0.91 <= held / 400 <= 0.985


def test_too_little_for_an_interval_over_seeds():
    assert mean_over_seeds([[1, 2, 3]]) == {"mean": 2, "interval": None}
    assert mean_over_seeds([[1, 2], [3, 4]], ["a", "a"]) == {"mean": 2.5, "interval": None}
    assert mean_over_seeds([[2, 2], [2, 2]]) == {"mean": 2, "interval": (2, 2)}


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([1, float("nan")]), "Row 1: the value is nan"),
        (lambda: bootstrap_interval([[1, 2]]), "a value for each row"),
        (lambda: bootstrap_interval([1, 2], ["a"]), "2 values and 1 groups"),
        (lambda: bootstrap_interval([1, 2], ["a", None]), "Row 1 has no group"),
        (lambda: paired_test([1, 2], [1]), "One run has 2 rows, the other 1"),
        (lambda: paired_test([], []), "no rows"),
        (lambda: mean_over_seeds([[1, 2], [1]]), r"got \[1, 2\] rows"),
        (lambda: mean_over_seeds([]), "got no rows"),
        (lambda: mean_over_seeds([[], []]), "at least one"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
