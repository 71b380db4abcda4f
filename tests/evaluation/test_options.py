"""Which of several continuations a model chooses, against plain forward passes."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rows import write_splits
from trl_perce import PersonaError
from trl_perce.benchmarks import histories
from trl_perce.evaluation.arguments import EvaluationArguments, GenerationArguments
from trl_perce.evaluation.evaluate import evaluate
from trl_perce.evaluation.options import option_rows
from trl_perce.evaluation.predictions import choose_rows, other_rows
from trl_perce.history.entries import to_example


def make_rows():
    rows = []
    for index, answer in enumerate((2, 0, 1)):
        options = [f"Buy {thing}." for thing in (f"{index} needles", "a red bicycle for the road", "bread")]
        rows.append(
            {
                "id": f"r{index}",
                "user": f"u{index}",
                "persona": f"I sew, {index}.",
                "prompt": "About me: {persona}\nWhat now?\n",
                "completion": options[answer],
                "options": options,
                "answer": answer,
            }
        )
    return rows


def log_probs(model, tokenizer, row, option, with_persona=True, persona=None):
    """Of the response's tokens and the end token, in float64. A token that crosses the persona's border leaves with it."""
    persona = persona or row["persona"]
    start = row["prompt"].index("{persona}")
    end = start + len(persona)
    prompt = row["prompt"].replace("{persona}", persona)
    encoded = tokenizer(prompt + option, return_offsets_mapping=True)
    is_kept = [with_persona or high <= start or low >= end for low, high in encoded["offset_mapping"]]
    ids = [token for token, kept in zip(encoded["input_ids"], is_kept, strict=True) if kept]
    number = sum(low >= len(prompt) for low, _ in encoded["offset_mapping"]) + 1
    ids.append(tokenizer.eos_token_id)
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return np.array([scores[i - 1, ids[i]].item() for i in range(len(ids) - number, len(ids))])


def test_the_option_that_is_chosen(tmp_path, tiny_model, tokenizer):
    rows = make_rows()
    plain = {**copy.deepcopy(rows[0]), "id": "plain"}
    del plain["options"], plain["answer"]
    rows.insert(1, {**plain, "options": None, "answer": None})
    args = GenerationArguments(temperature=0.0, max_new_tokens=1, bf16=False)
    options = EvaluationArguments(metrics=["rouge"], swap_persona=True, prediction_rows=2)
    result = evaluate(tiny_model, tokenizer, rows, tmp_path / "eval", args, options, {"name": "tiny"})
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    asked = [row for row in rows if row["options"] is not None]
    others = other_rows([row["user"] for row in asked], [row["persona"] for row in asked])
    swapped = [
        int(
            np.argmax(
                [
                    log_probs(model, tokenizer, row, option, persona=asked[other]["persona"]).mean()
                    for option in row["options"]
                ]
            )
        )
        == row["answer"]
        for row, other in zip(asked, others, strict=True)
    ]
    chosen, gains, margins, without_any = [], [], [], []
    for row in rows:
        if row["options"] is None:
            continue
        own, without = (
            [log_probs(model, tokenizer, row, option, with_persona) for option in row["options"]]
            for with_persona in (True, False)
        )
        pir = [(a - b).sum() for a, b in zip(own, without, strict=True)]
        chosen.append(int(np.argmax([values.mean() for values in own])) == row["answer"])
        gains.append(int(np.argmax(pir)) == row["answer"])
        without_any.append(int(np.argmax([values.mean() for values in without])) == row["answer"])
        margins.append(pir[row["answer"]] - np.mean(pir))
    metrics = result["metrics"]
    assert {metrics[f"options/{name}"]["rows"] for name in ("likelihood", "pir", "pir_margin")} == {3}
    assert metrics["options/likelihood"]["mean"] == pytest.approx(np.mean(chosen))
    assert metrics["options/without"]["mean"] == pytest.approx(np.mean(without_any))
    assert metrics["options/swapped"]["mean"] == pytest.approx(np.mean(swapped))
    assert metrics["options/pir"]["mean"] == pytest.approx(np.mean(gains))
    assert metrics["options/pir_margin"]["mean"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert (tmp_path / "eval" / "scores_options" / "scores.jsonl").is_file()
    # Two rows are predicted, of two users; all are scored
    predicted = [json.loads(line)["user"] for line in (tmp_path / "eval" / "predictions.jsonl").open()]
    assert len({*predicted}) == 2 == result["predicted"] and metrics["rougeL"]["rows"] == 2
    assert metrics["log_likelihood/other"]["rows"] == 4


def test_preferences_keep_their_options(tmp_path):
    record = {
        "preference": "I sew.",
        "question": "What now?",
        "response": "Sew.",
        "options": ["Sew.", "Run."],
        "answer": 0,
    }
    write_splits(tmp_path, train=[record])
    (row,) = histories.load("train", tmp_path, format="preferences")
    example = to_example(row, row.history)
    assert (example["options"], example["answer"]) == (["Sew.", "Run."], 0)
    write_splits(tmp_path, train=[{**record, "options": "Sew."}])
    with pytest.raises(ValueError, match="`options` is 'Sew.' and no list of texts"):
        histories.load("train", tmp_path, format="preferences")


def test_options_of_messages_are_answers():
    row = {**make_rows()[0], "completion": [{"role": "assistant", "content": "Buy bread."}]}
    assert [scored["completion"][0]["content"] for scored in option_rows([row])] == row["options"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": "Buy bread."}, "row 1: 'options' is 'Buy bread.'"),
        ({"options": ["Buy bread."]}, "Write a list of two or more texts"),
        ({"options": ["Buy bread.", " "]}, "row 1: 'options' holds ' '"),
        ({"answer": 3}, "row 1: 'answer' is 3. Write the index of the right option, 0 to 2."),
        ({"answer": "2"}, "row 1: 'answer' is '2'"),
    ],
)
def test_options_that_cannot_be_scored(change, message):
    rows = make_rows()
    rows[1] |= change
    with pytest.raises(PersonaError, match=re.escape(message)):
        option_rows(rows)


def test_rows_are_chosen_over_users():
    users = ["a"] * 6 + ["b"] * 2 + ["c", "", ""]
    assert choose_rows(users, None) == choose_rows(users, 20) == [*range(11)]
    five = choose_rows(users, 5)
    assert sorted(users[row] for row in five) == ["", "", "a", "b", "c"] and five == sorted(five)
    seven = choose_rows(users, 7)
    assert {*five} < {*seven} and sorted(users[row] for row in seven) == ["", "", "a", "a", "b", "b", "c"]
    assert choose_rows(users, 0) == []
