"""HotpotQA and DROP: the official scores by hand, the official files, the Hub's rows, and lm-eval where it is installed."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from trl_perce.benchmarks import general_qa
from trl_perce.benchmarks.general_qa import extract_answer, lm_eval_scores, load, score


BLANK = {"number": "", "spans": [], "date": {"day": "", "month": "", "year": ""}}
HOTPOTQA = [
    {
        "_id": "5a8b57f2",
        "question": "Were A and B of the same nationality?",
        "answer": "yes",
        "type": "comparison",
        "context": [["A (film)", ["A is a film.", " It is old."]], ["B", ["B was American."]]],
        "supporting_facts": [["A (film)", 0]],
    },
    {"_id": "5a8c7595", "question": " Which one? ", "answer": "The Hague", "context": [["C", ["C."]]]},
]
DROP = {
    "nfl_1": {
        "passage": "The Colts beat the Jaguars 21-6.",
        "wiki_url": "",
        "qa_pairs": [
            {
                "question": "How many points did the Colts win by?",
                "query_id": "q1",
                "answer": {**BLANK, "number": "15"},
                "validated_answers": [{**BLANK, "number": "15"}, {**BLANK, "spans": ["15 points"]}],
            },
            {
                "question": "Who played?",
                "query_id": "q2",
                "answer": {**BLANK, "spans": ["Colts", "Jaguars"]},
                "validated_answers": [{**BLANK, "spans": ["the Colts"]}],
            },
            {"question": "Nothing?", "query_id": "q3", "answer": BLANK, "validated_answers": []},
        ],
    },
    "hist_2": {
        "passage": "It began on 5 March 1990.",
        "qa_pairs": [
            {
                "question": "When?",
                "query_id": "q4",
                "answer": {**BLANK, "date": {"day": "5", "month": "March", "year": "1990"}},
            },
            {
                "question": "In which year?",
                "query_id": "q5",
                "answer": {"number": "", "spans": [], "date": {"year": "1990"}},
            },
        ],
    },
}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "questions.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def scores(benchmark, prediction, *answers):
    """Em and F1 of one prediction; several answers, or one of several spans as a list."""
    answers = [answer if isinstance(answer, list) else [answer] for answer in answers]
    found = score([prediction], [{"benchmark": benchmark, "answers": answers}])
    return found["em"].item(), found["f1"].item()


@pytest.mark.parametrize(
    "prediction, answer, em, f1",
    [
        ("The U.S. Army!", "US  army", 1, 1),
        ("an apple a day", "Apple day", 1, 1),
        ("Yes.", "yes", 1, 1),
        ("no", "yes", 0, 0),
        ("yes, they were", "yes", 0, 0),  # of yes and no there is no part
        ("no", "no way out", 0, 0),
        ("noanswer", "noanswer given", 0, 0),
        ("Scott Derrickson and Ed", "Ed Wood", 0, 2 * (1 / 4) * (1 / 2) / (1 / 4 + 1 / 2)),
        ("new new york", "New York", 0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),  # a word counts as often as it stands in both
        ("Paris", "London", 0, 0),
        ("", "London", 0, 0),
        ("the", "London", 0, 0),
        ("1,000", "1000", 1, 1),
        ("a-b", "ab", 1, 1),
    ],
)
def test_hotpotqa_by_hand(prediction, answer, em, f1):
    assert scores("hotpotqa", prediction, answer) == (em, pytest.approx(f1, abs=1e-12))


@pytest.mark.parametrize(
    "prediction, answer, em, f1",
    [
        ("12,000", "12000", 1, 1),
        ("7", "7.0", 1, 1),
        ("seven", "7", 0, 0),
        ("The Colts.", "colts", 1, 1),
        ("touch-down", "touch down", 1, 1),
        ("6", "6 yards", 0, 0.67),  # precision 1, recall 1/2
        ("5 yards", "6 yards", 0, 0),  # the number is wrong
        ("5 yards", "yards", 0, 0.67),  # there is no number to be wrong
        ("March 5, 1990", "5 March 1990", 0, 1),  # the same words, in another order
        ("Colts; Jaguars", ["Jaguars", "Colts"], 1, 1),
        ("Colts and Jaguars", ["Jaguars", "Colts"], 0, 0.25),  # one span of 3 words for two: (1/2 + 0) / 2
        ("Colts", ["Jaguars", "Colts"], 0, 0.5),
        ("the Colts; Bears; Jaguars;", ["Jaguars", "Colts"], 0, 0.67),
        ("Colts; Colts", ["Colts"], 0, 0.5),
        # 0.8 and 0.4 in order, 2/3 and 6/7 the other way round
        ("w x y; w", ["w x", "w x y z"], 0, round((2 / 3 + 6 / 7) / 2, 2)),
        ("", "Colts", 0, 0),
        ("-3", "3", 1, 1),  # the official rules split at hyphens
        ("0.5", ".5", 1, 1),
    ],
)
def test_drop_by_hand(prediction, answer, em, f1):
    assert scores("drop", prediction, answer) == (em, pytest.approx(f1, abs=1e-12))


def test_the_best_answer_counts_and_rows_keep_their_benchmark():
    assert scores("drop", "15 points", "16", "15 points", ["15", "points"]) == (1, 1)
    rows = [{"benchmark": name, "answers": [["5 yards"]]} for name in ("drop", "hotpotqa")]
    found = score(["6 yards"] * 2, rows)
    assert found["f1"].tolist() == [0, 0.5] and found["em"].dtype == np.float64


def test_there_must_be_a_prediction_for_each_row():
    with pytest.raises(ValueError, match="2 predictions for 1 rows"):
        score(["a", "b"], [{"benchmark": "drop", "answers": [["a"]]}])


@pytest.mark.parametrize(
    "reply, answer",
    [
        ("Paris", "Paris"),
        ("Answer: Paris\nBecause it is.", "Paris"),
        ("\n **Answer:** Paris", "Paris"),
        ("**Final answer**: .5", ".5"),
        ("answer:\n\nParis", "Paris"),
        ("The answer is: Paris", "The answer is: Paris"),
        ("Answers differ", "Answers differ"),
        ("<think>\nParis?\n</think>\n\nAnswer: Lyon", "Lyon"),
        ("<think>\nParis? I do not", ""),
        ("", ""),
        ("Answer:", ""),
    ],
)
def test_answer_in_a_reply(reply, answer):
    assert extract_answer(reply) == answer
    assert extract_answer(extract_answer(reply)) == answer


def test_hotpotqa_file(write):
    first, second = load("hotpotqa", path=write(HOTPOTQA))
    assert first["id"] == "5a8b57f2" and first["answers"] == [["yes"]]
    text = first["prompt"][0]["content"]
    assert text.startswith("A (film)\nA is a film. It is old.\n\nB\nB was American.\n\nQuestion: Were A and B of")
    assert "Question: Which one?\n\n" in second["prompt"][0]["content"]
    assert second["completion"] == [{"role": "assistant", "content": "The Hague"}]
    assert score(["yes", "the hague"], [first, second])["em"].tolist() == [1, 1]


def test_drop_file(write, caplog):
    rows = load("drop", path=write(DROP))
    assert [row["id"] for row in rows] == ["q1", "q2", "q4", "q5"]
    assert "1 of 5 questions have no answer" in caplog.text
    answers = [[["15"], ["15 points"]], [["Colts", "Jaguars"], ["the Colts"]], [["5 March 1990"]], [["1990"]]]
    assert [row["answers"] for row in rows] == answers
    assert rows[1]["completion"][0]["content"] == "Colts; Jaguars"
    assert rows[1]["prompt"][0]["content"].startswith("The Colts beat the Jaguars 21-6.\n\nQuestion: Who played?")
    # every row's completion is a right answer to it
    right = score([row["completion"][0]["content"] for row in rows], rows)
    assert right["em"].tolist() == right["f1"].tolist() == [1] * 4
    assert Dataset.from_list(rows)[1]["answers"] == answers[1]


def test_rows_are_drawn_with_a_seed_in_the_files_order(write):
    path = write([{**HOTPOTQA[1], "_id": f"{index:03}"} for index in range(50)])
    ids = [row["id"] for row in load("hotpotqa", path=path, num_rows=10, seed=1)]
    assert len(set(ids)) == 10 and ids == sorted(ids)
    assert ids == [row["id"] for row in load("hotpotqa", path=path, num_rows=10, seed=1)]
    assert ids != [row["id"] for row in load("hotpotqa", path=path, num_rows=10, seed=2)]
    assert len(load("hotpotqa", path=path)) == len(load("hotpotqa", path=path, num_rows=None)) == 50


def columns(items):
    """A list of objects as `datasets` has it: one list a field."""
    return {name: [item[name] for item in items] for name in items[0]} if items else dict.fromkeys(BLANK, [])


def test_rows_as_the_hub_has_them_are_those_of_the_files(write):
    records = []
    for row in HOTPOTQA:
        context = columns([{"title": title, "sentences": sentences} for title, sentences in row["context"]])
        records.append({"id": row["_id"], "question": row["question"], "answer": row["answer"], "context": context})
    questions = [general_qa._hub_question("hotpotqa", row, "") for row in Dataset.from_list(records)]
    assert [general_qa._row("hotpotqa", *question) for question in questions] == load("hotpotqa", path=write(HOTPOTQA))

    records = []
    for section in DROP.values():
        for row in section["qa_pairs"]:
            records.append({name: row[name] for name in ("query_id", "question", "answer")})
            records[-1]["passage"] = section["passage"]
            records[-1]["validated_answers"] = columns(row.get("validated_answers"))
    questions = [general_qa._hub_question("drop", row, "") for row in Dataset.from_list(records)]
    rows = [general_qa._row("drop", *question) for question in questions if question[3]]
    assert rows == load("drop", path=write(DROP))


def test_flattened_answers_of_the_hub_are_refused():
    row = {
        "query_id": "q",
        "passage": "p",
        "question": "?",
        "answers_spans": {"spans": ["a", "b"], "types": ["span"] * 2},
    }
    with pytest.raises(ValueError, match="row 0: there is no 'validated_answers'; it has 'query_id'"):
        general_qa._hub_question("drop", row, "row 0")


def without(record, name):
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("hotpotqa", '[{"_id": "5a8', "cannot be read as JSON; was it downloaded completely"),
        ("hotpotqa", DROP, "holds a JSON dict, not a list of questions"),
        ("drop", HOTPOTQA, "holds a JSON list, not an object of passages"),
        (
            "hotpotqa",
            [HOTPOTQA[0], without(HOTPOTQA[1], "answer")],
            "question 1: there is no 'answer'; it has '_id', 'q",
        ),
        ("hotpotqa", ["a"], "question 0: there is no 'context'; it is 'a'"),
        ("hotpotqa", [{**HOTPOTQA[0], "context": ["A"]}], r"question 0: a paragraph of 'context' is not \[title"),
        ("hotpotqa", [{**HOTPOTQA[0], "question": 3}], "question 0: 'question' is 3, not a str"),
        ("drop", {"p": {"qa_pairs": []}}, "passage 'p': there is no 'passage'"),
        (
            "drop",
            {"p": {"passage": "x", "qa_pairs": [{"question": "?", "query_id": "q"}]}},
            "question 0: there is no 'answer'",
        ),
        (
            "drop",
            {"p": {"passage": "x", "qa_pairs": [{"question": "?", "query_id": "q", "answer": {"text": "x"}}]}},
            "passage 'p', question 0: the answer {'text': 'x'} has none of 'number'",
        ),
        ("hotpotqa", [{**HOTPOTQA[0], "answer": " "}], "no question has an answer"),
        ("drop", {}, "no question has an answer"),
    ],
)
def test_a_file_that_is_wrong_is_refused(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        load(name, path=write(content))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "squad"}, "no benchmark 'squad'"),
        ({"name": "drop", "split": "test"}, "drop has no split 'test'"),
        ({"name": "drop", "num_rows": 0}, "`num_rows` is 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**arguments)


def test_lm_eval_that_is_missing_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'trl_perce\[general_qa\]'"):
        lm_eval_scores("model")


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs pip install 'trl_perce[general_qa]'")
def test_lm_eval_runs_drop_on_a_model_and_an_adapter(tiny_model, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    record = {"query_id": "q", "passage": "Colts", "question": "Who?", "answer": {**BLANK, "spans": ["Colts"]}}
    record["validated_answers"] = columns([record["answer"]])
    data = tmp_path / "drop.jsonl"
    data.write_text(json.dumps(record) + "\n")
    # lm-eval's own task, on a file in place of the Hub
    task = Path(lm_eval.__file__).parent / "tasks" / "drop" / "default.yaml"
    (tmp_path / "tasks").mkdir()
    files = {"train": str(data), "validation": str(data)}
    local = {
        "include": str(task),
        "task": "drop_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
    }
    (tmp_path / "tasks" / "drop_local.yaml").write_text(json.dumps(local))  # JSON is YAML
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    adapter = str(tmp_path / "adapter")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(adapter)
    for name in (tiny_model, adapter):
        found = lm_eval_scores(
            name, tasks=["drop_local"], limit=1, task_manager=manager, device="cpu", gen_kwargs="max_gen_toks=4"
        )
        assert {"em", "f1"} <= set(found["drop_local"])
        assert found["drop_local"]["f1"] in (0, 1)
