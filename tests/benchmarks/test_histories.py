import logging

import pytest

from conftest import ROOT
from rows import write_lines
from trl_perce import PerCEConfig
from trl_perce.benchmarks.histories import load
from trl_perce.history.entries import HistoryEntry, HistoryRow, to_example, to_examples
from trl_perce.persona.marks import mark_persona


SHARED = ROOT.parent / "shared" / "data"
REAL = {"chats": "persona_chat", "reviews": "product_reviews", "posts": "forum_posts", "preferences": "prefeval"}
OWN = {
    "user": "ann",
    "history": ["I sew.", {"text": "I love linen.", "time": 2}],
    "query": "What now?",
    "response": "Sew a dress.",
}
REVIEW = {"overall": 5.0, "summary": "Great", "description": "a needle", "reviewText": "It is sharp."}


@pytest.fixture
def folder(tmp_path):
    def write(train, test=None, validation=None):
        for name, records in (("train", train), ("test", test or train), ("validation", validation)):
            if records:
                write_lines(tmp_path / f"{name}.jsonl", records)
        return tmp_path

    return write


def test_own_rows(folder):
    (row,) = load("test", folder([OWN]))
    assert row == HistoryRow(
        id="0",
        user="ann",
        prompt=({"role": "user", "content": "What this user wrote before:\n\n{persona}\n\nWhat now?"},),
        response="Sew a dress.",
        history=(
            HistoryEntry("I sew.", "I sew.", response="I sew."),
            HistoryEntry("I love linen.", "I love linen.", response="I love linen.", time=2),
        ),
        search="What now?",
    )
    example = to_example(row, [row.history[1], row.history[0]])
    assert example == {
        "id": "0",
        "user": "ann",
        "persona": "I love linen.\n\nI sew.",
        "prompt": [{"role": "user", "content": "What this user wrote before:\n\n{persona}\n\nWhat now?"}],
        "completion": [{"role": "assistant", "content": "Sew a dress."}],
    }
    assert to_examples([row], [[1, 0]]) == [example]
    marked, spans = mark_persona(example)
    text = marked["prompt"][0]["content"]
    assert [text[span.start : span.end] for span in spans] == ["I love linen.\n\nI sew."]


def test_own_rows_with_a_dialogue(folder):
    query = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "What now?"},
    ]
    (row,) = load("train", folder([OWN | {"query": query}]))
    assert [message["role"] for message in row.prompt] == ["user", "assistant", "user"]
    assert row.prompt[0]["content"].endswith("{persona}\n\nHi")
    assert row.search == "What now?"
    with pytest.raises(ValueError, match="record 1.*in turns"):
        load("train", folder([OWN | {"query": query[:2]}]))


def test_one_review_is_left_out(folder, caplog):
    reviews = [REVIEW | {"summary": str(index), "reviewText": f"Text {index}."} for index in range(4)]
    rows = load("train", folder([{"reviewer": 7, "reviews": reviews}]), "reviews", rows_per_user=None)
    assert [row.response for row in rows] == ["Text 0.", "Text 1.", "Text 2.", "Text 3."]
    assert [entry.response for entry in rows[1].history] == ["Text 0.", "Text 2.", "Text 3."]
    assert {row.user for row in rows} == {"7"} and len({row.id for row in rows}) == 4
    assert "5 of 5 stars" in rows[0].history[0].text
    assert len(load("train", folder([{"reviews": reviews}]), "reviews", num_rows=3, rows_per_user=2)) == 2
    assert "more than 2 of a record (`rows_per_user`) (2)" in caplog.text
    assert "There are 2 usable rows of" in caplog.text and "not 3: all are taken" in caplog.text


def test_a_post_that_stands_there_twice_is_no_history(folder):
    posts = [{"forum": "pets", "post": " ".join(f"word{index}" for index in range(12))}] * 2
    posts.append({"forum": "pets", "post": "My cat is old. " * 4})
    rows = load("train", folder([{"posts": posts}]), "posts", rows_per_user=None)
    assert rows[0].response == "word10 word11"
    assert [entry.text for entry in rows[0].history] == ["In pets: " + posts[2]["post"]]
    assert "word9" in rows[0].prompt[0]["content"] and "word10" not in rows[0].prompt[0]["content"]


def test_chat_prompts_take_turns(folder, caplog):
    said = [{"user": user, "text": f"{user}-{index}"} for index, user in enumerate([1, 2, 1, 2, 2, 1, 2])]
    chat = {"user_2_persona": ["I sew.", "I run."], "conversation": said}
    rows = load("train", folder([chat]), "chats", rows_per_user=None, turns=3)
    # The fifth reply follows another reply; before the last one, a conversation begins anew
    assert [row.response for row in rows] == ["2-1", "2-3", "2-6"]
    assert "1 rows of" in caplog.text and "nobody speaks before the reply (1)" in caplog.text
    assert [[message["role"] for message in row.prompt] for row in rows] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert rows[1].prompt[0]["content"].endswith("{persona}\n\n1-0") and rows[1].search == "1-2"


def test_what_is_left_out_is_counted(folder, caplog):
    records = [
        OWN,
        OWN | {"history": []},
        OWN | {"response": " "},
        OWN | {"response": "a long one " * 5},
        OWN | {"query": "{persona}?"},
        OWN | {"query": "Is <persona> a tag?"},  # training takes these for the persona's borders
        OWN | {"response": "It is, like </persona>."},
    ]
    with caplog.at_level(logging.WARNING):
        assert len(load("train", folder(records, validation=[OWN]), max_words=10)) == 1
    assert "6 rows of" in caplog.text
    for reason in (
        "no other history",
        "is empty",
        "longer than 10 words",
        "'{persona}'",
        "'<persona>'",
        "'</persona>'",
    ):
        assert reason in caplog.text


def test_train_is_all_of_its_file_unless_validation_is_asked_for(folder, caplog):
    records = [
        OWN | {"user": f"user {index % 20}", "id": index} for index in range(60)
    ]  # each stands there three times
    path = folder(records, test=[OWN])
    assert len(load("train", path)) == 60 and not caplog.records
    with pytest.raises(FileNotFoundError, match=r"no file .*validation.jsonl. .* `validation_size: 0.1`"):
        load("validation", path)

    train, validation = (load(split, path, validation_size=0.1) for split in ("train", "validation"))
    assert [row.id for row in validation] == ["18", "19", "38", "39", "58", "59"] and len(train) == 54
    assert not {row.user for row in train} & {row.user for row in validation}
    for told in caplog.messages:
        assert (
            "2 of 20 users, the last ones, are held out as 'validation'" in told and "'train' has the other 18" in told
        )
    assert len(caplog.messages) == 2
    assert len(load("test", path, validation_size=0.1)) == 1

    write_lines(path / "validation.jsonl", [OWN | {"id": "own"}])
    assert len(load("train", path)) == 60
    assert [row.id for row in load("validation", path)] == ["own"]
    with pytest.raises(ValueError, match="`validation_size` is given, and there is .*validation.jsonl"):
        load("train", path, validation_size=0.1)


def test_a_share_that_is_none_is_told(folder):
    path = folder([OWN])
    for share in (0, 1, 1.5, True, "0.1"):
        with pytest.raises(ValueError, match=f"`validation_size` is {share!r}. Write a share"):
            load("train", path, validation_size=share)
    with pytest.raises(ValueError, match="leaves none of 1 users to train on"):
        load("train", path, validation_size=0.5)


def test_the_same_persona_is_the_same_user(folder, caplog):
    said = [{"user": 1, "text": "Hi"}, {"user": 2, "text": "Hello there."}]
    chats = [
        {"user_2_persona": persona.split("/"), "conversation": said}
        for persona in ("I sew./I run.", "I run.", "I run./I sew.", "I row.")
    ]
    path = folder(chats, test=[chats[0], {"user_2_persona": ["I fly."], "conversation": said}])
    train, validation = (load(split, path, "chats", validation_size=0.6) for split in ("train", "validation"))
    assert [(row.id, row.user) for row in train] == [("0/1", "train/0"), ("2/1", "train/0")]
    assert [(row.id, row.user) for row in validation] == [("1/1", "train/1"), ("3/1", "train/3")]
    assert len(load("test", path, "chats")) == 2
    assert f"1 of 2 users of {path / 'test.jsonl'} are users of {path / 'train.jsonl'}, too." in caplog.text
    # Without a name nobody can be told to be the same
    caplog.clear()
    load("test", folder([{"reviews": [REVIEW, REVIEW | {"reviewText": "Dull."}]}]), "reviews")
    assert not caplog.records


def test_preferences(folder):
    record = {"topic": "pets", "preference": "I dislike cats.", "question": "Which pet?", "response": "A dog."}
    row, other, again = load("train", folder([record, record | {"preference": "I like cats."}, record]), "preferences")
    assert row.prompt == ({"role": "user", "content": "About me:\n\n{persona}\n\nWhich pet?"},)
    assert row.history == (HistoryEntry("I dislike cats.", "I dislike cats."),) and row.response == "A dog."
    assert (row.user, other.user, again.user) == ("train/0", "train/1", "train/0") and again.id == "2"


def test_samples_depend_on_the_seed_alone(folder):
    path = folder([OWN | {"id": index} for index in range(50)], validation=[OWN])
    ids = [row.id for row in load("train", path, num_rows=10, seed=1)]
    assert ids == [row.id for row in load("train", path, num_rows=10, seed=1)]
    assert ids != [row.id for row in load("train", path, num_rows=10, seed=2)]
    assert len(ids) == 10 and ids == sorted(ids, key=int)


def test_errors_name_what_is_wrong(folder, tmp_path):
    with pytest.raises(ValueError, match="`format` is 'tweets'. Write one of 'rows'"):
        load("train", tmp_path, "tweets")
    with pytest.raises(ValueError, match="`split` is 'dev'"):
        load("dev", tmp_path)
    with pytest.raises(FileNotFoundError, match="train.jsonl"):
        load("train", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"record 2: the key 'response' is missing. A record of `rows` is \{\"user\""):
        load("test", folder([OWN, {key: OWN[key] for key in ("user", "history", "query")}]))
    with pytest.raises(ValueError, match="no row is left of 1 records"):
        load("test", folder([OWN | {"history": []}]))
    with pytest.raises(ValueError, match="record 1: the response of row 0 is None"):
        load("test", folder([OWN | {"response": None}]))


def test_a_row_checks_itself():
    row = {"id": "7", "user": "ann", "response": "Yes.", "history": (), "search": ""}
    with pytest.raises(ValueError, match="Row '7'.*2 times"):
        HistoryRow(prompt=({"role": "user", "content": "{persona} {persona}"},), **row)
    with pytest.raises(ValueError, match="Row '7'.*response is empty"):
        HistoryRow(prompt=({"role": "user", "content": "{persona}"},), **row | {"response": " "})


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder ../shared/data is not there")
@pytest.mark.parametrize("format", REAL)
def test_real_histories(format, caplog):
    splits = ("train", "validation", "test")
    rows = {split: load(split, SHARED / REAL[format], format, validation_size=0.1) for split in splits}
    users = {split: {row.user for row in own} for split, own in rows.items()}
    assert all(len(own) >= 8 for own in rows.values())
    assert not users["train"] & users["validation"]
    assert len({row.id for row in rows["train"]}) == len(rows["train"])
    for row in rows["train"]:
        assert row.history and row.prompt[-1]["role"] == "user"
        assert all(entry.response != row.response for entry in row.history if len(row.response) > 40)
    assert PerCEConfig.__dataclass_fields__["persona_start_marker"].default not in str(rows["train"][0].prompt)
