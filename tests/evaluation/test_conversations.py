"""Conversations (`messages`) are evaluated as they are trained, against plain forward passes over text that is written by hand."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_perce.evaluation.arguments import EvaluationArguments, GenerationArguments
from trl_perce.evaluation.evaluate import evaluate


def make_row(user, persona, *turns, roles=("user", "assistant"), **columns):
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]
    return {"id": f"of {user}", "user": user, "persona": persona, "messages": messages, **columns}


OPTIONS = ["Two needles.", "A red bicycle for the road.", "Bread."]
FIRST = make_row("a", "I sew.", "Hello!", "Good morning.", "What should I buy?", "A set of needles.")
FIRST["messages"].insert(0, {"role": "system", "content": "About me:\n{persona}\n"})
ROWS = [
    FIRST | {"options": OPTIONS, "answer": 0},
    # The persona comes late (on lines of its own, as in the others: no token crosses its border), and roles have other names
    make_row("b", "I love linen.", "Hi", "Linen?", "\n{persona}\nAnd now?", "A dress.", roles=("human", "gpt")),
    make_row("c", "I ride.", "I say:\n{persona}\nWhat now?", "A bicycle.", options=OPTIONS, answer=1),
]
for row in ROWS:
    row.setdefault("options", None), row.setdefault("answer", None)


def written(row, persona):
    """A row as text, and where each reply is in it (with its end, as in ChatML)."""
    text, spans = "", []
    for message in row["messages"]:
        role = {"human": "user", "gpt": "assistant"}.get(message["role"], message["role"])
        text += f"<|im_start|>{role}\n"
        start = len(text)
        text += message["content"].replace("{persona}", persona) + "<|im_end|>\n"
        if role == "assistant":
            spans.append((start, len(text)))
    return text, spans


def log_probs(model, tokenizer, row, persona, only_last=False):
    """Of the tokens of the assistant's replies, in float64."""
    text, spans = written(row, persona)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    spans = spans[-1:] if only_last else spans
    places = [
        place
        for place, (low, high) in enumerate(encoded["offset_mapping"])
        if any(start <= low and high <= end for start, end in spans)
    ]
    with torch.no_grad():
        scores = model(torch.tensor([encoded["input_ids"]])).logits[0].double().log_softmax(-1)
    return np.array([scores[place - 1, encoded["input_ids"][place]].item() for place in places])


def greedy(model, tokenizer, text, steps):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    made = []
    while len(made) < steps and tokenizer.eos_token_id not in made:
        with torch.no_grad():
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return tokenizer.decode(made, skip_special_tokens=True).strip()


def test_evaluated_as_they_are_trained(tmp_path, tiny_model, tokenizer):
    args = GenerationArguments(temperature=0.0, max_new_tokens=8, bf16=False, personal_threshold=0.05, use_cpu=True)
    options, given = EvaluationArguments(metrics=["rouge"], swap_persona=True), copy.deepcopy(ROWS)
    result = evaluate(tiny_model, tokenizer, given, tmp_path, args, options, {"name": "tiny"})
    assert given == ROWS  # which are the caller's
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()

    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    swapped = [json.loads(line) for line in (tmp_path / "swapped" / "predictions.jsonl").read_text().splitlines()]
    for own, other, row in zip(lines, swapped, ROWS, strict=True):
        assert (own["id"], own["reference"]) == (row["id"], row["messages"][-1]["content"])
        assert own["persona"] == row["persona"] != other["persona"]
        for line in (own, other):
            text, spans = written(row, line["persona"])
            assert line["prediction"] == greedy(model, tokenizer, text[: spans[-1][0]], 8)
    assert lines[1]["query"] == "…\nAnd now?"

    with_own = [log_probs(model, tokenizer, row, row["persona"]) for row in ROWS]
    with_other = [log_probs(model, tokenizer, row, line["persona"]) for row, line in zip(ROWS, swapped, strict=True)]
    own, other = np.concatenate(with_own), np.concatenate(with_other)
    pir = own - np.concatenate([log_probs(model, tokenizer, row, "") for row in ROWS])
    assert np.abs(np.abs(pir) - 0.05).min() > 1e-4  # no token is on the threshold
    is_personal = pir > 0.05
    expected = {"log_likelihood/personal": own[is_personal].mean(), "log_likelihood/other": own[~is_personal].mean()}
    expected |= {"pir/personal": pir[is_personal].mean(), "personal_fraction": is_personal.mean()}
    expected["log_likelihood/personal_swapped"] = other[is_personal].mean()
    metrics = result["metrics"]
    assert {name: metrics[name]["mean"] for name in expected} == pytest.approx(expected, abs=1e-4)

    # An option takes the place of the last reply, and is compared by that alone
    likeliest, gains = [], []
    for row in ROWS:
        if row["options"] is None:
            continue
        chosen = []
        for option in row["options"]:
            asked = {**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": option}]}
            chosen.append([log_probs(model, tokenizer, asked, persona, True) for persona in (row["persona"], "")])
        likeliest.append(np.argmax([with_it.mean() for with_it, _ in chosen]) == row["answer"])
        sums = [(with_it - without).sum() for with_it, without in chosen]
        gains.append(sums[row["answer"]] - np.mean(sums))
    assert metrics["options/likelihood"]["mean"] == pytest.approx(np.mean(likeliest))
    assert metrics["options/pir_margin"]["mean"] == pytest.approx(np.mean(gains), abs=1e-4)

    assert (result["rows"], result["predicted"], result["earlier_replies"]) == (3, 3, 2)
    # Words of earlier turns are not the persona's doing: of "I love linen.", "love" alone is
    said = ["I love linen, and sew.", "Love and linen!", "I ride a bicycle."]
    lines = [{**line, "prediction": text} for line, text in zip(lines, said, strict=True)]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate(tiny_model, tokenizer, given, tmp_path, args, options, {"name": "tiny"})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["uptake/own"] for row in rows] == [1, 1, 1]
    report = (tmp_path / "report.md").read_text()
    assert "Predictions are of the last reply of each conversation; the 2 replies before them stand in" in report


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            make_row("d", "I ride.", "{persona} Hi", "Yes?", "Thanks."),
            "row 1: the conversation ends with a message of 'user'",
        ),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "row 1: the conversation has one message"),
        ({"messages": []}, "row 1: evaluation needs the columns 'prompt' and 'completion'"),
        ({"text": "Hi"}, "it has 'text'"),
        ({"prompt": "Hi", "completion": "Yes?"}, "row 1: it has 'prompt' and 'completion', and row 0 has 'messages'"),
    ],
)
def test_what_is_no_conversation_with_a_reply(tiny_model, tokenizer, tmp_path, row, message, monkeypatch):
    monkeypatch.setattr("trl_perce.evaluation.evaluate.load_model", None)
    args = GenerationArguments(temperature=0.0, max_new_tokens=8, bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(tiny_model, tokenizer, [ROWS[2], row], tmp_path, args, EvaluationArguments(metrics=["rouge"]))
