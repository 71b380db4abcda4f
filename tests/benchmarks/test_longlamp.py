"""LongLaMP: rows in the official format (texts ours, and the local data), from files and through `datasets`."""

import json
import logging
from datetime import date

import pytest

from conftest import ROOT
from trl_perce.benchmarks import longlamp
from trl_perce.benchmarks.profiles import NUM_ROWS
from trl_perce.history.entries import to_example
from trl_perce.persona.marks import mark_persona


ABSTRACT = {
    "name": "A. Turner",
    "input": 'Generate an abstract for the title "Bees at Night" using the following items: "hive, lamp, sleep"',
    "output": "We watch a hive under a lamp. Bees sleep less.",
    "profile": [
        {"id": "7", "title": "Moths", "abstract": "Moths like lamps.", "year": 2014},
        {"id": "8", "title": "Wasps", "abstract": "Wasps do not.", "year": 2009},
    ],
}
REVIEW = {
    "reviewerId": "A1",
    "input": 'Generate the review text written by a reviewer who has given an overall rating of "4.0" for a product with '
    'description "A teapot". The summary of the review text is "Good tea".',
    "output": "It pours well.",
    "profile": [
        {"overall": 5.0, "summary": "Sharp", "description": "A knife", "reviewText": "Cuts bread. "},
        {"overall": "2.0", "summary": None, "description": "A cup", "reviewText": "Leaks."},
    ],
}
TOPIC = {
    "author": "u/owl",
    "input": "Generate the content for a reddit post My owl eats cake.",
    "output": "So I had this cake on the table, and then the owl came.",
    "profile": [{"id": "1", "author": "u/owl", "summary": "Owl at home", "content": "We have an owl. It hoots."}],
}
RECORDS = {"abstract_generation": ABSTRACT, "product_review": REVIEW, "topic_writing": TOPIC}


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def load_one(path, record, task="topic_writing", **kwargs):
    [row] = longlamp.load("train", task, path=write(path / "train.jsonl", [record]), **kwargs)
    return row


@pytest.mark.parametrize("task", RECORDS)
def test_official_rows(tmp_path, task):
    row = load_one(tmp_path, RECORDS[task], task)
    user, search, texts = {
        "abstract_generation": (
            "A. Turner",
            '"hive, lamp, sleep"',
            ["Title: Wasps\nAbstract: Wasps do not.", "Title: Moths\nAbstract: Moths like lamps."],
        ),
        "product_review": (
            "A1",
            REVIEW["input"],
            [
                "Rating: 5\nSummary: Sharp\nProduct: A knife\nReview: Cuts bread.",
                "Rating: 2.0\nProduct: A cup\nReview: Leaks.",
            ],
        ),
        "topic_writing": ("u/owl", TOPIC["input"], ["Summary: Owl at home\nPost: We have an owl. It hoots."]),
    }[task]
    assert (row.user, row.search, row.response) == (user, search, RECORDS[task]["output"])
    assert row.id == f"{task}_user/train/0" and row.time is None
    assert [entry.text for entry in row.history] == texts
    if task == "abstract_generation":  # oldest first
        assert [entry.time for entry in row.history] == [date(2009, 1, 1).toordinal(), date(2014, 1, 1).toordinal()]
    assert row.history[-1].response in ("Moths like lamps.", "Leaks.", "We have an owl. It hoots.")
    assert row.history[-1].search in (
        "Moths Moths like lamps.",
        "2.0 A cup Leaks.",
        "Owl at home We have an owl. It hoots.",
    )


@pytest.mark.parametrize("task", RECORDS)
def test_persona_is_the_history_and_the_input_stays_verbatim(tmp_path, task):
    row = load_one(tmp_path, RECORDS[task], task)
    example = to_example(row, row.history)
    [system, message], [completion] = example["prompt"], example["completion"]
    assert [system["role"], message["role"]] == ["system", "user"]
    assert message["content"] == RECORDS[task]["input"] and completion["content"] == RECORDS[task]["output"]
    example, [span] = mark_persona(to_example(row, row.history))
    text = example["prompt"][0]["content"]
    assert text[span.start : span.end] == "\n\n".join(entry.text for entry in row.history)
    counterfactual = text[: span.start] + text[span.end :]
    assert not any(entry.response in counterfactual for entry in row.history)
    assert counterfactual.startswith("You write") and len(counterfactual.split()) <= 30


def test_other_names_of_the_topics_columns(tmp_path):
    renamed = {**TOPIC, "profile": [{"input": "Owl at home", "output": "We have an owl. It hoots."}]}
    assert load_one(tmp_path / "a", renamed).history == load_one(tmp_path / "b", TOPIC).history


def test_folders_and_own_ids(tmp_path):
    write(tmp_path / "topic_writing_temporal" / "val.jsonl", [{**TOPIC, "id": 17}, {**TOPIC, "id": None}])
    rows = longlamp.load("validation", "topic_writing", "temporal", path=tmp_path)
    assert [row.id for row in rows] == ["17", "topic_writing_temporal/validation/1"]
    (tmp_path / "test.json").write_text(json.dumps([TOPIC]))
    assert len(longlamp.load("test", "topic_writing", path=tmp_path)) == 1
    with pytest.raises(FileNotFoundError, match="holds none of topic_writing_user/train.json, .*, train.jsonl"):
        longlamp.load("train", "topic_writing", path=tmp_path)


def test_temporal_rows_have_a_time_and_only_dated_entries(tmp_path, caplog):
    profile = [{**TOPIC["profile"][0], "date": day} for day in ("2020-03-05", "2019-01-02", "2021-01-01", None)]
    record = {**TOPIC, "date": "2020-12-24", "profile": profile}
    row = load_one(tmp_path, record, setting="temporal")
    assert row.time == date(2020, 12, 24).toordinal()
    days = [date(2019, 1, 2), date(2020, 3, 5), date(2021, 1, 1)]
    assert [entry.time for entry in row.history] == [day.toordinal() for day in days]
    assert "were left out: no date, while the row has one (1)" in caplog.text
    # In setting `user` nothing is later: order and dates are the profile's if they are not complete
    row = load_one(tmp_path, record, setting="user")
    assert row.time is None and [entry.time for entry in row.history] == [None] * 4
    same_day = {**profile[0], "date": record["date"]}
    late = {**record, "profile": [*profile[2:], same_day]}
    with pytest.raises(ValueError, match="None of the 1 rows"):
        load_one(tmp_path, late, setting="temporal")
    assert "no earlier history (1)" in caplog.text
    with pytest.raises(ValueError, match="row 0: 'soon' is no date"):
        load_one(tmp_path, {**record, "date": "soon"}, setting="temporal")


def test_unusable_rows_are_counted_and_replaced(tmp_path, caplog):
    topic = TOPIC["profile"][0]
    bad = {
        "no history": {"profile": []},
        "no output": {"output": "  "},
        "no input": {"input": ""},
        "no history but the output itself": {"profile": [{**topic, "content": f" {TOPIC['output'].upper()}\n"}]},
        "input or output hold {persona}": {"input": TOPIC["input"] + " {persona}"},
        "input or output hold </persona>": {"output": "x </persona>"},
    }
    good = [{**TOPIC, "profile": [topic, {**topic, "content": None}, {**topic, "content": "It said {persona}."}]}] * 3
    write(tmp_path / "test.jsonl", [*good, *({**TOPIC, **change} for change in bad.values())])
    rows = longlamp.load("test", "topic_writing", path=tmp_path, num_rows=3)
    assert [row.id[-2:] for row in rows] == ["/0", "/1", "/2"] and all(len(row.history) == 2 for row in rows)
    caplog.clear()
    assert longlamp.load("test", "topic_writing", path=tmp_path, num_rows="all") == rows
    assert f"6 rows of {tmp_path / 'test.jsonl'} were left out: " in caplog.text
    assert all(f"{reason} (1)" in caplog.text for reason in bad)
    assert "3 entries in the profiles of" in caplog.text and "no 'content' (3)" in caplog.text
    # The persona may hold the mark: it stays literal
    assert mark_persona(to_example(rows[0], rows[0].history))[0]["prompt"][0]["content"].count("{persona}") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": None}, "row 0: 'output' is NoneType None. It must be a str"),
        ({"input": ["x"]}, "row 0: 'input' is list"),
        ({"profile": {"summary": ["x"]}}, "row 0: 'profile' is dict"),
        ({"profile": ["x"]}, "row 0, item 0 of 'profile': is a str. It must be an object with 'summary', 'content'"),
        (
            {"profile": [{"summary": "x", "text": "y"}]},
            "item 0 of 'profile': there is no 'content'; there is 'summary', 'text'",
        ),
        ({"profile": [{"summary": "x", "content": ["y"]}]}, "item 0 of 'profile': 'content' is list"),
    ],
)
def test_wrong_columns(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_one(tmp_path, {**TOPIC, **change})
    with pytest.raises(ValueError, match="row 0: there is no 'profile'; there are 'author', 'input', 'output'"):
        load_one(tmp_path, {key: value for key, value in TOPIC.items() if key != "profile"})


def test_rows_that_nobody_asked_to_leave_are_told(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "test.jsonl", [TOPIC] * 5)
    assert len(longlamp.load("test", "topic_writing", path=path)) == 5 and not caplog.records  # fewer than the paper's
    monkeypatch.setitem(NUM_ROWS, "test", 2)
    assert len(longlamp.load("test", "topic_writing", path=path, num_rows=2)) == 2 and not caplog.records
    assert len(longlamp.load("test", "topic_writing", path=path)) == 2
    assert f"2 of 5 rows of {path} are drawn, the paper's number." in caplog.text


@pytest.mark.parametrize(
    "wrong", [{"split": "val"}, {"task": "email"}, {"setting": "time"}, {"num_rows": 0}, {"num_rows": "some"}]
)
def test_wrong_arguments(tmp_path, wrong):
    path = write(tmp_path / "train.jsonl", [TOPIC])
    with pytest.raises(ValueError, match=next(iter(wrong)) if "num_rows" not in wrong else "number of rows"):
        longlamp.load(**{"split": "train", "task": "topic_writing", "path": path, **wrong})


def test_repeated_ids(tmp_path):
    path = write(tmp_path / "train.jsonl", [{**TOPIC, "id": "1"}, {**TOPIC, "id": 1}])
    with pytest.raises(ValueError, match="1 ids occur more than once: '1'"):
        longlamp.load("train", "topic_writing", path=path)


def test_through_datasets(tmp_path, monkeypatch, caplog):
    """A data set with the Hub's configurations and splits, loaded by the real `datasets`."""
    configs = []
    for task, record in RECORDS.items():
        profile = [{**item, "overall": 3.0} if "overall" in item else item for item in record["profile"]]
        records = [{**record, "profile": profile, "output": f"{record['output']} {n}"} for n in range(30)]
        write(tmp_path / f"{task}.jsonl", records)
        splits = "".join(f"\n  - split: {split}\n    path: {task}.jsonl" for split in ("train", "val", "test"))
        configs.append(f"- config_name: {task}_user\n  data_files:{splits}\n")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    monkeypatch.setattr(longlamp, "HUB", str(tmp_path))
    for task in RECORDS:
        with caplog.at_level(logging.INFO, "trl_perce"):
            rows = longlamp.load("validation", task, num_rows=10, seed=3)
        assert rows == longlamp.load("validation", task, num_rows=10, seed=3)
        assert rows != longlamp.load("validation", task, num_rows=10, seed=4)
        whole = longlamp.load("validation", task)
        assert len(whole) == 30 and [row for row in whole if row in rows] == rows and len(rows) == 10
        from_file = longlamp.load("validation", task, path=tmp_path / f"{task}.jsonl")
        assert [row.response for row in whole] == [row.response for row in from_file]
        assert f"10 of 30 rows of {tmp_path}, {task}_user, val, seed 3, ids " in caplog.text


def test_without_network():
    with pytest.raises(OSError, match="abstract_generation_user, test could not be loaded from the Hub: .* as `path`"):
        longlamp.load("test")


def test_local_reviews_in_the_official_form(tmp_path):
    source = ROOT.parent / "shared" / "data" / "product_reviews" / "train.jsonl"
    if not source.is_file():
        pytest.skip(f"There is no {source}")
    reviewers = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    records = []
    for reviewer in reviewers:
        target, *profile = reviewer["reviews"]
        text = (
            f'Generate the review text written by a reviewer who has given an overall rating of "{target["overall"]}" for a '
            f'product with description "{target["description"]}". The summary of the review text is "{target["summary"]}".'
        )
        user = str(reviewer["reviewer"])
        records.append({"reviewerId": user, "input": text, "output": target["reviewText"], "profile": profile})
    rows = longlamp.load("train", "product_review", path=write(tmp_path / "train.jsonl", records))
    assert len(rows) == len([record for record in records if record["profile"]]) == 202
    assert [row.user for row in rows] == [str(reviewer["reviewer"]) for reviewer in reviewers]
    for row, record in zip(rows, records, strict=True):
        assert [entry.response for entry in row.history] == [
            review["reviewText"].strip() for review in record["profile"]
        ]
    assert len(longlamp.load("test", "product_review", path=tmp_path / "train.jsonl", num_rows=50)) == 50
