import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_perce.training.weighting import (
    entropy_weights,
    loss_weights,
    normalize_weights,
    perce_weights,
    personal_influence_ratio,
)


def test_the_numbers_of_the_formulas():
    # P(y|p,x) = 0.5, 0.9, 0.2, 0.99 against P(y|x) = 0.05, 0.9, 0.4, 0.001
    log_probs = torch.tensor([0.5, 0.9, 0.2, 0.99], dtype=torch.float64).log()
    counterfactual = torch.tensor([0.05, 0.9, 0.4, 0.001], dtype=torch.float64).log()
    pir = personal_influence_ratio(log_probs, counterfactual)
    assert pir.tolist() == pytest.approx([math.log(10), 0.0, -math.log(2), math.log(990)])
    assert perce_weights(pir).tolist() == pytest.approx([math.log(10), 0.8, 0.8, 5.0])
    assert perce_weights(pir, 0.0, 2.0).tolist() == pytest.approx([2.0, 0.0, 0.0, 2.0])
    assert loss_weights(log_probs).tolist() == pytest.approx([0.8, 0.8, math.log(5), 0.8])
    assert loss_weights(counterfactual).tolist() == pytest.approx([math.log(20), 0.8, math.log(2.5), 5.0])
    assert entropy_weights(torch.tensor([0.1, 2.5, 7.0])).tolist() == pytest.approx([0.8, 2.5, 5.0])


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.1, 5.0)), min_size=1, max_size=40))
def test_normalized_weights_have_mean_one_in_each_row_and_keep_their_order(pairs):
    rows, weights = (list(column) for column in zip(*pairs, strict=True))
    normalized = normalize_weights(torch.tensor(weights, dtype=torch.float64), torch.tensor(rows), 5).tolist()
    for row in set(rows):
        mine = [w for r, w in zip(rows, weights, strict=True) if r == row]
        got = [w for r, w in zip(rows, normalized, strict=True) if r == row]
        assert sum(got) / len(got) == pytest.approx(1.0)
        assert got == pytest.approx([w * len(mine) / sum(mine) for w in mine])


def test_a_row_whose_weights_are_all_zero_keeps_them():
    weights = normalize_weights(torch.tensor([0.0, 0.0, 2.0, 4.0]), torch.tensor([0, 0, 1, 1]), 2)
    assert weights.tolist() == pytest.approx([0.0, 0.0, 2 / 3, 4 / 3])


def test_passes_that_do_not_match_are_an_error_and_not_broadcast():
    with pytest.raises(ValueError, match="scored 3 tokens and the counterfactual pass 1"):
        personal_influence_ratio(torch.zeros(3), torch.zeros(1))


def test_no_tokens_are_no_weights():
    empty = torch.zeros(0)
    assert normalize_weights(perce_weights(empty), empty.long(), 3).shape == (0,)
