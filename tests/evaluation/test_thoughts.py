"""Thoughts told from answers, in the formats of those who write them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_perce.evaluation.report import _remarks
from trl_perce.evaluation.thoughts import Reply, opens_thought, split_thought


HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}"
FORMATS = ["<think>\n{}\n</think>\n\n{}", "<|channel>{}\n<channel|>{}", HARMONY, f"<|start|>assistant{HARMONY}"]
plain = st.text().filter(lambda text: "<" not in text).map(str.strip)


@given(plain, plain, st.sampled_from(FORMATS), st.sampled_from(["", " ", "\n"]))
def test_thought_and_answer_come_apart(thought, answer, form, space):
    assert split_thought(space + form.format(thought, answer) + space) == Reply(thought, answer, False)


@given(plain, plain)
def test_the_template_opens_it(thought, answer):
    for closing in ("</think>", "<channel|>"):
        for is_open in (True, False):  # the mark says it
            assert split_thought(f"{thought}{closing}\n{answer}", is_open) == Reply(thought, answer, False)
    assert split_thought(thought, True) == Reply(thought, "", True)
    assert split_thought(answer) == Reply(None, answer, False)


@given(plain, plain.filter(bool), st.sampled_from(FORMATS[:3]), st.data())
def test_nothing_of_a_cut_thought_is_an_answer(thought, answer, form, data):
    """Cut anywhere: what is left is a beginning of the answer, or nothing."""
    text = form.format(thought, answer)
    marks_end = text.rfind(">", 0, len(text) - len(answer)) + 1
    for cut in {*range(text.index(">") + 1, marks_end), data.draw(st.integers(marks_end, len(text)))}:
        reply = split_thought(text[:cut])
        if cut < marks_end:
            assert reply.answer == "" and reply.is_cut, text[:cut]
        else:
            assert answer.startswith(reply.answer) and not reply.is_cut


@given(st.text(), st.booleans())
def test_any_text_has_parts(text, is_open):
    reply = split_thought(text, is_open)
    assert reply.answer in text and (reply.thought is not None or reply.answer == text.strip())
    assert split_thought(reply.answer).answer == reply.answer


@pytest.mark.parametrize(
    "text, thought, answer",
    [
        ("Buy <think>x</think> linen.", None, "Buy <think>x</think> linen."),
        (" a <think> tag ", None, "a <think> tag"),
        ("<think>\n\n</think>\n\nBuy.", "", "Buy."),
        ("<think>a</think><think>b</think>c", "a\nb", "c"),
        ("<think>a</think>b</think>c", "a\nb", "c"),
        ("<|channel|>final<|message|>Buy.<|return|>", None, "Buy."),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant to=f<|channel|>commentary json<|message|>{}<|call|>", "a\n{}", ""),
        ("<|channel|>anal", "anal", ""),
    ],
)  # fmt: skip
def test_examples(text, thought, answer):
    assert split_thought(text)[:2] == (thought, answer)


def test_prompts_that_end_in_a_thought():
    opened = ["x<think>\n", "x<think>", "<|turn>model\n<|channel>thought\n", "<|channel|>analysis<|message|>"]
    closed = ["", "<think>\n\n</think>\n\n", "<|channel>thought\n<channel|>", "<|im_start|>assistant\n", "<think> no"]
    assert [opens_thought(prompt) for prompt in opened + closed] == [True] * 4 + [False] * 5


def test_empty_predictions_are_told():
    result = {
        "rows": 3,
        "too_long": 0,
        "predicted": 3,
        "unanswered": 2,
        "trimmed": {"rows": 0},
        "personal_by": None,
        "metrics": {},
    }
    (remark,) = _remarks(json.loads(json.dumps(result | {"judge": None, "baseline": None})))
    assert remark.startswith("2 of 3 predictions are empty: the model thought until")
