"""The one parser of ratings: known replies, and properties over many."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_perce.evaluation.ratings import mean_of_known, parse_rating, to_percent


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("4", 4),
        (" 4.\n", 4),
        ("4.0", 4),
        ("**5**", 5),
        ("4/5", 4),
        ("3 out of 5", 3),
        ("Score: 4", 4),
        ("score = 2", 2),
        ("- Coherence: 4", 4),
        ("**Coherence:** 4", 4),
        ("coherence: <4>", 4),
        ("Coherence (1-5): 3", 3),
        ("Coherence score: 3/5", 3),
        ("Final rating: 1", 1),
        ('{"score": 4}', 4),
        ('```json\n{\n  "coherence": 2\n}\n```', 2),
        ("It goes from point to point.\n\nScore: 4\n", 4),
        ("Score: 4\nBecause 3 of its 5 sentences are good.", 4),
        ("Score: 4\nCoherence: 4", 4),
        ("Fluency: 2\nCoherence: 4", 4),
        ("<think>3 or 4?\nScore: 3\n</think>\n\n4", 4),
        # Nothing is guessed
        ("", None),
        ("I cannot say.", None),
        ("0", None),
        ("6", None),
        ("-4", None),
        ("45", None),
        ("Score: 7", None),
        ("Score: 80", None),
        ("4.5", None),
        ("4/10", None),
        ("Score: 8/10", None),
        ("4-5", None),
        ("4 or 5", None),
        ("Score: 4-5", None),
        ("Score: 4, or rather 3", None),
        ("I would give it a 4.", None),
        ("four", None),
        ("Fluency: 4", None),
        ("incoherence: 4", None),
        ("Score: 4\nScore: 5", None),
        ("Score: 4\nScore: 9", None),
        ("1\n2\n3\n4\n5", None),
        ("<think>The score is\n4", None),
        ("Coherence: <a whole number from 1 to 5>", None),
    ],
)
def test_known_replies(reply, rating):
    assert parse_rating(reply, "coherence") == rating


numbers = st.integers(-20, 120)
forms = st.sampled_from(
    ["{}", "Score: {}", "rating: {}", "**Fluency**: {}", "Overall score = {}", "Fluency (1-5): {}", "- {}"]
)
prose = st.text(st.characters(exclude_categories=["N", "Cs"]), max_size=40).filter(lambda text: "<" not in text)


@given(numbers, forms, prose, prose)
def test_one_form_among_prose(number, form, before, after):
    reply = f"{before}\n{form.format(number)}\n{after}"
    assert parse_rating(reply, "fluency") == (number if 1 <= number <= 5 else None)


@given(st.lists(st.tuples(st.integers(1, 5), forms), min_size=1, max_size=4))
def test_forms_must_agree(lines):
    found = {number for number, _ in lines}
    reply = "\n".join(form.format(number) for number, form in lines)
    assert parse_rating(reply, "fluency") == (found.pop() if len(found) == 1 else None)


@given(prose)
def test_without_a_number_there_is_no_rating(reply):
    assert parse_rating(reply, "fluency") is None


@given(st.one_of(st.text(), st.text("0123456789 Score:/.-\n")), st.text(max_size=8))
def test_any_reply_gives_a_rating_or_none(reply, name):
    rating = parse_rating(reply, name)
    assert rating is None or (type(rating) is int and 1 <= rating <= 5 and any(c.isdigit() for c in reply))


def test_percent_is_linear():
    assert to_percent(np.array([1, 2, 3, 4.5, 5])).tolist() == [0, 25, 50, 87.5, 100]
    assert np.isnan(to_percent(np.nan))


def test_mean_of_known():
    values = np.array([[1, np.nan], [2, np.nan], [np.nan, np.nan]])
    assert np.array_equal(mean_of_known(values, 0), [1.5, np.nan], equal_nan=True)
    assert mean_of_known(values) == 1.5
