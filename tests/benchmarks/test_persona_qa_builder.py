"""What the builder of persona questions accepts, what it rejects and why."""

import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import ROOT
from trl_perce.benchmarks.persona_qa import PROMPT, answer_of, load_rows, question_of
from trl_perce.benchmarks.persona_qa_builder import (
    EXAMPLE,
    RejectedItem,
    check_item,
    check_replies,
    read_item,
    read_personas,
    write_rows,
)
from trl_perce.persona.marks import mark_persona


GOOD = {
    "question": "What should I buy?",
    "answer": "Take thin needles, and Linen in blue.",
    "keywords": ["linen", "needles", "needles"],
}


def test_accepted_row():
    built = check_replies([("p001-1", "I sew.")], [f"Here it is:\n```json\n{json.dumps(GOOD)}\n```"])
    assert built.rejected == []
    assert built.rows == [
        {
            "id": "p001-1",
            "persona": "I sew.",
            "prompt": [{"role": "user", "content": "About me: {persona}\n\nWhat should I buy?"}],
            "completion": [{"role": "assistant", "content": "Take thin needles, and Linen in blue."}],
            "personal_words": ["needles", "Linen"],
        }
    ]
    example, [span] = mark_persona(dict(built.rows[0]))  # the trainer takes it
    assert example["prompt"][0]["content"][span.start : span.end] == "I sew."


def test_shipped_rows_are_accepted():
    rows = load_rows()
    items = [
        {"question": question_of(row), "answer": answer_of(row), "keywords": row["personal_words"]} for row in rows
    ]
    built = check_replies([(row["id"], row["persona"]) for row in rows], [json.dumps(item) for item in items])
    assert built.rejected == [] and built.rows == rows


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": None}, "question, answer or keywords missing"),
        ({"answer": 7}, "question, answer or keywords missing"),
        ({"keywords": "needles"}, "question, answer or keywords missing"),
        ({"question": " \n"}, "question, answer or keywords empty"),
        ({"keywords": []}, "question, answer or keywords empty"),
        ({"question": "Buy {persona}?"}, "mark of a persona in the text"),
        ({"answer": "Take thin <persona>needles</persona>, and linen."}, "mark of a persona in the text"),
        ({"answer": "Take needles and linen."}, "answer not of 5 to 20 words"),
        ({"answer": "needles linen" + " and" * 19}, "answer not of 5 to 20 words"),
        ({"keywords": ["thin needles"]}, "keyword is no single word"),
        ({"keywords": [""]}, "keyword is no single word"),
        ({"keywords": [["needles"]]}, "keyword is no single word"),
        ({"keywords": ["needle"]}, "keyword not in the answer"),
        ({"keywords": ["wool"]}, "keyword not in the answer"),
        ({"answer": "Take needles, thin Needles, and linen."}, "keyword more than once in the answer"),
        ({"answer": "Take the cat's needles and linen.", "keywords": ["cat's", "cat"]}, "keyword inside of another"),
        ({"question": "Which Needles should I buy?"}, "keyword in the question"),
    ],
)
def test_reasons(change, reason):
    built = check_replies([("p1", "I sew."), ("p2", "I sew.")], [json.dumps(GOOD | change), json.dumps(GOOD)])
    assert [row["id"] for row in built.rows] == ["p2"]
    assert built.reasons == {reason: 1}
    assert built.rejected[0]["id"] == "p1" and json.loads(built.rejected[0]["reply"]) == GOOD | change


def test_limits_of_the_length():
    for count in (5, 20):
        answer = "needles linen" + " and" * (count - 2)
        assert check_item(GOOD | {"answer": answer})[1] == answer


@pytest.mark.parametrize("reply", ["", "I cannot.", '{"question": "What', "<think>{}</think> no", '["a"]'])
def test_replies_without_an_item(reply):
    built = check_replies([("p1", "I sew.")], [reply])
    assert built.rows == [] and built.reasons == {"no JSON object": 1}


def test_repetitions():
    replies = [json.dumps(GOOD), json.dumps(GOOD | {"question": "And what else?"}), json.dumps(EXAMPLE)]
    built = check_replies([("p1", "a"), ("p2", "b"), ("p3", "c")], replies)
    assert [row["id"] for row in built.rows] == ["p1"]
    assert built.reasons == {"answer is there already": 1, "copy of the prompt's example": 1}


def test_last_object_of_a_reply():
    assert read_item('{"a": 1} and {b} then <think>{"c": 2}') == {"c": 2}
    assert read_item('<think>{"a": 1}</think> {"b": {"c": 2}} {') == {"b": {"c": 2}}


TEXT = st.lists(st.sampled_from(["Sun", "sun", "sunny", "cat's", "T-rex", "tea,", "a", "é"]), max_size=22).map(
    " ".join
)


@given(
    TEXT, TEXT, st.lists(st.sampled_from(["sun", "Sunny", "cat's", "cat", "T-rex", "rex", "tea", "é", "two words"]))
)
@example("Sun?", "It is all about my cat's", ["cat's", "cat"])
def test_accepted_items_hold_what_the_data_promises(question, answer, keywords):
    try:
        question, answer, words = check_item({"question": question, "answer": answer, "keywords": keywords})
    except RejectedItem:
        return
    # The same checks as of the rows that are shipped
    assert 5 <= len(answer.split()) <= 20 and words
    position = 0
    for word in words:
        found = [match.start() for match in re.finditer(rf"\b{re.escape(word)}\b", answer)]
        assert len(found) == 1 and found[0] >= position
        position = found[0] + 1
        assert not re.search(rf"\b{re.escape(word)}\b", question, re.IGNORECASE)
    assert {word.lower() for word in words} == {keyword.lower() for keyword in keywords}


def test_personas_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("I sew.\n\n I  knit. \nI sew.\n", encoding="utf-8")
    assert read_personas(tmp_path / "a.txt") == ["I sew.", "I knit."]
    rows = [
        {"user_1_persona": ["I sew.", "I knit."], "user_2_persona": [], "conversation": [{"text": "Hi"}]},
        {"user 2 personas": "I box.\nI weld.", "id": 3},
        {"persona": "I sew. I knit."},
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_personas(str(tmp_path / "b.jsonl")) == ["I sew. I knit.", "I box. I weld."]
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="c.jsonl: no persona found.*'persona'"):
        read_personas(tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl").write_text('{"persona": "a"}\n{"pers\n', encoding="utf-8")
    with pytest.raises(ValueError, match="d.jsonl, line 2 is no JSON object"):
        read_personas(tmp_path / "d.jsonl")
    (tmp_path / "e.csv").write_text("persona\n", encoding="utf-8")
    with pytest.raises(ValueError, match="e.csv: personas come from"):
        read_personas(tmp_path / "e.csv")


def test_personas_of_real_conversations():
    path = ROOT.parent / "shared" / "data" / "persona_chat" / "test.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    personas = read_personas(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert set(personas) == {
        " ".join(" ".join(row[f"user_{user}_persona"]).split()) for row in rows for user in (1, 2)
    }
    assert len(set(personas)) == len(personas)


def test_rows_are_written_whole(tmp_path):
    path = tmp_path / "folder" / "rows.jsonl"
    rows = [{"persona": "ü 🧵", "prompt": PROMPT}, {"persona": "b"}]
    write_rows(path, rows)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]
    with pytest.raises(TypeError):
        write_rows(path, [{"persona": object()}])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
