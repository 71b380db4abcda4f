"""PrefEval: its two sources, topics that are held out, responses that are cut."""

import json

import pytest

from rows import write_splits
from trl_perce.benchmarks.prefeval import TEST_TOPICS, load


RECORD = {"question": "What now?", "options": ["Sew.", "Run.", "Eat."], "answer": 1}


@pytest.fixture
def folder(tmp_path):
    topics = ["pets", "pets", "shops", "cars"]
    train = [
        {**RECORD, "topic": topic, "preference": f"I like {index}.", "response": f"Do {index}. Or not."}
        for index, topic in enumerate(topics)
    ]
    test = [{**RECORD, "topic": "books", "preference": "I read.", "response": "Read on."}]
    write_splits(tmp_path / "data", train=train, test=test)
    return tmp_path / "data"


def test_topics_are_held_out(folder):
    def topics_of(split, **kwargs):
        return [row.id for row in load(split, folder, **kwargs)]

    assert len(topics_of("train")) == 4 and len(topics_of("test")) == 1
    train, validation = (load(split, folder, validation_topics=["pets"]) for split in ("train", "validation"))
    assert [row.history[0].text for row in train] == ["I like 2.", "I like 3."]
    assert [row.history[0].text for row in validation] == ["I like 0.", "I like 1."]
    assert len(load("test", folder, validation_topics=["pets"])) == 1
    assert (train[0].options, train[0].answer) == (("Sew.", "Run.", "Eat."), 1)
    for topics, message in (
        (["bets"], "has no topic 'bets'; there are cars, pets, shops"),
        (["pets", "shops", "cars"], "leaves no topic of"),
    ):
        with pytest.raises(ValueError, match=message):
            load("train", folder, validation_topics=topics)
    with pytest.raises(ValueError, match="`validation_topics` is missing"):
        load("validation", folder)


@pytest.mark.parametrize(
    ("words", "cut"),
    [
        (99, "Try 1. Sewing. It is fun. Or run"),
        (6, "Try 1. Sewing. It is fun."),
        (4, "Try 1. Sewing."),
        (2, "Try 1."),  # the number of a list ends no sentence: cut behind the word
        (1, "Try"),
    ],
)
def test_responses_are_cut_behind_a_sentence(folder, words, cut):
    lines = [json.loads(line) for line in (folder / "test.jsonl").open()]
    write_splits(folder, test=[lines[0] | {"response": "Try 1. Sewing. It is fun. Or run"}])
    (row,) = load("test", folder, response_words=words)
    assert row.response == cut


def test_a_checkout_is_read_as_it_is(tmp_path, folder, caplog):
    for topic in (*TEST_TOPICS, "pets"):
        asked = [{"preference": f"I like {topic} {index}.", "question": "What now?"} for index in range(3)]
        options = [one | {"classification_task_options": ["Right.", "Wrong.", "Bad."]} for one in asked[:2]]
        answers = [one | {"response_to_q": "Fine. Cut off in the"} for one in asked]
        for path, content in (
            (f"benchmark_dataset/mcq_options/{topic}.json", options),
            (f"SFT/single_pref_remind/{topic}/mistral8x7b_{topic}_2turn.json", answers),
        ):
            file = tmp_path / "checkout" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content))
    train, test = (load(split, tmp_path / "checkout") for split in ("train", "test"))
    assert len(train) == 2 and len(test) == 10 and train[0].response == "Fine."
    assert all(row.options[row.answer] == "Right." for row in train + test)
    assert "left out 1 questions without options" in caplog.text
    with pytest.raises(FileNotFoundError, match="get_data.py prefeval"):
        load("train", tmp_path)
