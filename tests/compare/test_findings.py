"""Figures of arms over seeds and users, against sums by hand."""

import numpy as np
import pytest

from trl_perce.compare.findings import _measured
from trl_perce.reproduce.measures import MEASURES


def of(name):
    return next(measure for measure in MEASURES if measure.name == name)


def seeds_of(*values, name="uptake/own"):
    return [{"own": {name: np.array(own, dtype=float)}} for own in values]


def test_means_over_seeds_and_rows_with_a_value_everywhere():
    nan = np.nan
    values = {
        "untrained": seeds_of([1, 2, 3, nan]),
        "ce": seeds_of([2, 2, 4, 9], [4, nan, 4, 9]),
        "perce": seeds_of([5, 9, 6, 9], [6, 9, 8, 9]),
    }
    found = _measured(of("uptake/own"), values, {"own": ["a", "b", "c", "d"]})
    assert (found["rows"], found["users"]) == (2, 2)  # the first and the third row
    means = {arm: own["mean"] for arm, own in found["arms"].items()}
    assert means == {"untrained": 2.0, "ce": (2 + 4 + 4 + 4) / 4, "perce": (5 + 6 + 6 + 8) / 4}
    changes = {arm: (own["against"], own["difference"]) for arm, own in found["changes"].items()}
    assert changes == {"ce": ("untrained", 1.5), "perce": ("ce", 2.75)}
    # Crossed random effects, by hand: differences 3, 2 with the first seed, 2, 4 with the second
    low, high = found["changes"]["perce"]["interval"]
    assert low < 2.75 < high and (low + high) / 2 == pytest.approx(2.75)


def test_what_an_arm_lacks_is_not_shown():
    values = {"untrained": seeds_of([1.0, 2.0]), "ce": seeds_of([1.0, 2.0], name="other")}
    assert _measured(of("uptake/own"), values, {"own": ["a", "b"]}) is None
    nothing = {"untrained": seeds_of([np.nan]), "ce": seeds_of([1.0])}
    assert _measured(of("uptake/own"), nothing, {"own": ["a"]}) is None


def test_shares_count_answers_less_those_by_chance():
    values = {
        arm: [{"irrelevant": {"uptake/own": np.array(own, float), "uptake/other": np.array([0, 2, 0, 0.0])}}]
        for arm, own in {"untrained": [0, 0, 0, 0], "ce": [3, 1, 0, 0], "perce": [2, 1, 1, 1]}.items()
    }
    found = _measured(of("irrelevant/share"), values, {"irrelevant": ["a", "b", "c", "d"]})
    assert {arm: own["mean"] for arm, own in found["arms"].items()} == {"untrained": -0.25, "ce": 0.25, "perce": 0.75}
    assert found["changes"]["perce"]["difference"] == 0.5


def test_the_gain_over_another_persona():
    values = {
        arm: [
            {
                "own": {
                    "log_likelihood/personal": np.array(own, float),
                    "log_likelihood/personal_swapped": np.full(2, -3.0),
                }
            }
        ]
        for arm, own in {"untrained": [-2, -2], "ce": [-1, -2], "perce": [-1, -1]}.items()
    }
    found = _measured(of("gain/personal"), values, {"own": ["a", "b"]})
    assert {arm: own["mean"] for arm, own in found["arms"].items()} == {"untrained": 1.0, "ce": 1.5, "perce": 2.0}
