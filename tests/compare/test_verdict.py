"""The rules of the verdict, one by one."""

import pytest

from trl_perce.compare.verdict import MIN_USERS, SAME, decide


LABELS = {"untrained": "untrained", "ce": "CE", "perce": "PerCE", "lossce": "LossCE"}
COST = {"ce": {"train_seconds": [60, 80]}, "perce": {"train_seconds": [100, 110]}}


def measure(name, **changes):
    """A measure whose changes have the intervals that are given."""
    return {
        "name": name,
        "changes": {
            arm: {"difference": 0.0 if own is None else sum(own) / 2, "interval": None if own is None else [*own]}
            for arm, own in changes.items()
        },
    }


def verdict(personal, gain=(0.1, 0.3), other=(-0.01, 0.01), share=(-0.1, 0.1), leak=(-0.1, 0.1), users=40, seeds=2):
    measures = [
        measure("log_likelihood/personal", ce=(0.2, 0.4), perce=personal),
        measure("gain/personal", perce=gain),
        measure("log_likelihood/other", perce=other),
        measure("irrelevant/share", perce=share),
        measure("leak", perce=leak),
    ]
    return decide(measures, LABELS, "ce", users, seeds, COST)


@pytest.mark.parametrize(
    ("personal", "gain", "answer", "said"),
    [
        (
            (0.1, 0.3),
            (0.1, 0.3),
            "yes",
            "uses the persona more than CE: personal tokens are likelier (+0.20 nats a token [+0.10",
        ),
        ((0.1, 0.3), (-0.1, 0.3), "unclear", "not clearly by the persona: the gain over another user's is +0.10 nats"),
        ((0.1, 0.3), (-0.3, -0.1), "unclear", "not clearly by the persona"),
        ((-0.3, -0.1), (0.1, 0.3), "no", "uses the persona less than CE: personal tokens are less likely (−0.20 nats"),
        ((-0.1, 0.3), (0.1, 0.3), "unclear", "cannot be told whether PerCE uses the persona more than CE"),
        (None, (0.1, 0.3), "unclear", "cannot be told"),
    ],
)
def test_more_personal(personal, gain, answer, said):
    found = verdict(personal, gain)
    assert found["answer"] == answer and said in found["sentences"][0]
    assert found["sentences"][0].startswith("On your 40 held-out users ")
    assert "Its training took 1.50 times as long as that with CE." in found["sentences"]
    assert "Fine-tuning at all: with CE personal tokens are likelier" in found["sentences"][-1]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ((-SAME, SAME), "is as likely as before"),
        ((-0.02, -0.01), "is as likely as before"),  # less, but by too little to count
        ((-0.2, -0.01), "is less likely"),
        ((0.01, 0.2), "is likelier"),
        ((-0.2, 0.01), "which cannot be told"),
    ],
)
def test_the_rest_of_the_reply(other, said):
    sentences = verdict((0.1, 0.3), other=other)["sentences"]
    assert any("The rest of the reply" in one and said in one for one in sentences)


def test_what_is_lost():
    harmless = verdict((0.1, 0.3), share=(-0.3, -0.1), leak=(-0.2, 0.1))["sentences"]
    assert (
        "No clear harm: persona words turn up no more often where they have no place, and no more is told from memory of users trained on."
        in harmless
    )
    lost = verdict((0.1, 0.3), share=(0.1, 0.3), leak=(0.1, 0.3))["sentences"]
    said = next(one for one in lost if one.startswith("What was lost with PerCE"))
    assert "persona words in 20 of 100 more answers" in said and "+0.20 nats" in said
    # What was not asked is not said to be harmless
    bare = decide([measure("log_likelihood/personal", perce=(0.1, 0.3))], LABELS, "ce", 40, 2, COST)["sentences"]
    assert not any("harm" in one or "lost" in one for one in bare)
    assert "the gain over another user's is not known" in bare[0]


def test_too_few_users():
    found = verdict((0.1, 0.3), users=MIN_USERS - 1)
    assert found["answer"] == "too few users"
    assert found["sentences"] == [
        "Too few users to say whether PerCE is more personal than CE: 9 are held out, and it takes 10."
    ]
    assert any("hold out 10 or more" in one for one in found["remarks"])
    assert verdict((0.1, 0.3), users=MIN_USERS)["answer"] == "yes"


def test_one_seed_is_said():
    assert any("One seed" in one for one in verdict((0.1, 0.3), seeds=1)["remarks"])
    assert not verdict((0.1, 0.3), seeds=2)["remarks"]


def test_nothing_is_personal():
    found = decide([measure("log_likelihood/other", perce=(-0.1, 0.1))], LABELS, "ce", 40, 2, COST)
    assert found["answer"] == "unclear" and "no token of the held-out replies is personal" in found["sentences"][0]


def test_perce_is_the_question_and_others_follow():
    measures = [
        measure("log_likelihood/personal", lossce=(-0.3, -0.1), perce=(0.1, 0.3)),
        measure("gain/personal", perce=(0.1, 0.2)),
    ]
    cost = {name: {"train_seconds": [60]} for name in ("ce", "lossce", "perce")}
    found = decide(measures, LABELS, "ce", 40, 2, cost)
    assert found["answer"] == "yes" and "PerCE uses the persona more" in found["sentences"][0]
    assert any("LossCE uses the persona less than CE" in one for one in found["sentences"])
