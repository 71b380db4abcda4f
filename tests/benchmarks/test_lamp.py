"""LaMP: rows from pairs of files in the official format (texts ours, and the local data), and submissions."""

import json
from datetime import date

import pytest

from conftest import ROOT
from rows import write_lines
from trl_perce.benchmarks import lamp
from trl_perce.benchmarks.reading import read_records
from trl_perce.history.entries import to_example
from trl_perce.persona.marks import mark_persona


PROFILES = {
    "LaMP_4": [
        {"id": "41", "title": "Owls Win", "text": "The owls: they won.", "date": "2016-04-02"},
        {"id": "40", "title": "Owls Lose", "text": "They lost.", "date": "2015-11-30"},
    ],
    "LaMP_5": [{"id": "50", "title": "On Owls", "abstract": "We count owls.", "date": 2011}],
    "LaMP_7": [{"id": "70", "text": "owls again ..", "date": "2009-05"}],
}
INPUTS = {
    "LaMP_4": "Generate a headline for the following article: A storm: the barn is gone.",
    "LaMP_5": "Generate a title for the following abstract of a paper: We count bats: there are nine.",
    "LaMP_7": "Paraphrase the following tweet without any explanation before or after it: I have seen a bat.",
}
SEARCHES = {
    "LaMP_4": "A storm: the barn is gone.",
    "LaMP_5": "We count bats: there are nine.",
    "LaMP_7": "I have seen a bat.",
}


def question(task, id, **change):
    return {"id": id, "input": INPUTS[task], "profile": PROFILES[task], **change}


def write_pair(folder, task, questions, outputs, name="dev"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_questions.json").write_text(json.dumps(questions))
    golds = [{"id": id, "output": output} for id, output in outputs.items()]
    (folder / f"{name}_outputs.json").write_text(json.dumps({"task": task, "golds": golds}))
    return folder


@pytest.mark.parametrize("task", PROFILES)
def test_official_rows(tmp_path, task):
    write_pair(tmp_path, task, [question(task, "110"), question(task, "111")], {"111": "second", "110": "first"})
    rows = lamp.load("validation", task, path=tmp_path)
    assert [(row.id, row.user, row.response) for row in rows] == [("110", "110", "first"), ("111", "111", "second")]
    assert rows[0].search == SEARCHES[task] and rows[0].time is None
    assert [entry.text for entry in rows[0].history] == {
        "LaMP_4": ["Headline: Owls Lose\nArticle: They lost.", "Headline: Owls Win\nArticle: The owls: they won."],
        "LaMP_5": ["Title: On Owls\nAbstract: We count owls."],
        "LaMP_7": ["owls again .."],
    }[task]
    last = rows[0].history[-1]
    assert (last.search, last.response) == {
        "LaMP_4": ("Owls Win The owls: they won.", "Owls Win"),
        "LaMP_5": ("On Owls We count owls.", "On Owls"),
        "LaMP_7": ("owls again ..", "owls again .."),
    }[task]
    example, [span] = mark_persona(to_example(rows[0], rows[0].history))
    text = example["prompt"][0]["content"]
    assert example["prompt"][1] == {"role": "user", "content": INPUTS[task]}
    assert text[span.start : span.end] == "\n\n".join(e.text for e in rows[0].history)


def test_folders(tmp_path):
    for folder in (
        tmp_path / "a" / "LaMP_7" / "dev",
        tmp_path / "b" / "dev",
        tmp_path / "c" / "LaMP-7",
        tmp_path / "d",
    ):
        write_pair(folder, "LaMP_7", [question("LaMP_7", "1")], {"1": "x"})
        [row] = lamp.load("validation", "LaMP_7", path=tmp_path / folder.relative_to(tmp_path).parts[0])
        assert row.response == "x" and [row] == lamp.load("train", "LaMP_7", path=folder / "dev_questions.json")
    with pytest.raises(
        FileNotFoundError, match="holds none of train_questions.json, train/train_questions.json, LaMP_7/"
    ):
        lamp.load("train", "LaMP_7", path=tmp_path / "a")


def test_time_setting(tmp_path):
    questions = [question("LaMP_4", "1", user_id=5), question("LaMP_4", "2", date="2016-01-01")]
    write_pair(tmp_path, "LaMP_4", questions, {"1": "x", "2": "y"})
    undated, dated = lamp.load("validation", setting="time", path=tmp_path)
    days = [date(2015, 11, 30).toordinal(), date(2016, 4, 2).toordinal()]
    assert [entry.time for entry in undated.history] == [entry.time for entry in dated.history] == days
    assert (undated.user, undated.time, dated.time) == ("5", None, date(2016, 1, 1).toordinal())
    without = [{key: value for key, value in item.items() if key != "date"} for item in PROFILES["LaMP_4"]]
    write_pair(tmp_path, "LaMP_4", [question("LaMP_4", "1", profile=without)], {"1": "x"})
    with pytest.raises(ValueError, match="question '1', item 0 of 'profile': there is no 'date'.*setting 'user'"):
        lamp.load("validation", setting="time", path=tmp_path)
    [row] = lamp.load("validation", setting="user", path=tmp_path)
    assert [entry.response for entry in row.history] == ["Owls Win", "Owls Lose"]


def test_questions_and_outputs_without_each_other(tmp_path, caplog):
    questions = [question("LaMP_7", str(id)) for id in range(5)]
    questions[3]["profile"] = []
    write_pair(tmp_path, "LaMP_7", questions, {"0": "a", "2": "c", "3": "d", "77": "?", "78": "?"})
    rows = lamp.load("validation", "LaMP_7", path=tmp_path)
    assert [(row.id, row.response) for row in rows] == [("0", "a"), ("2", "c")]
    outputs, skipped = tmp_path / "dev_outputs.json", tmp_path / "dev_questions.json"
    assert f"2 outputs of {outputs} were left out: no such question (2)." in caplog.messages
    assert f"3 rows of {skipped} were left out: no output (2), no history (1)." in caplog.messages


@pytest.mark.parametrize(
    ("questions", "outputs", "message"),
    [
        (
            ["1", "1"],
            {"task": "LaMP_7", "golds": [{"id": "1", "output": "x"}]},
            "questions.json: 1 ids .* than once: '1'",
        ),
        (
            ["1"],
            {"task": "LaMP_7", "golds": [{"id": "1", "output": "x"}] * 2},
            "outputs.json: 1 ids .* than once: '1'",
        ),
        (["1"], {"task": "LaMP_4", "golds": [{"id": "1", "output": "x"}]}, "is of task 'LaMP_4' and not of 'LaMP_7'"),
        (["1"], {"task": "LaMP_7", "golds": [{"id": "2", "output": "x"}]}, "have no id in common"),
        (["1"], {"golds": []}, "there is no 'task'"),
        (["1"], {"task": "LaMP_7", "golds": ["x"]}, "item 0 of 'golds' is a str"),
        (["1"], {"task": "LaMP_7", "golds": [{"id": "1", "output": 3}]}, "id '1': 'output' is int 3"),
        (["1"], [{"id": "1", "output": "x"}], "holds list .* and not a JSON object"),
        ([None], {"task": "LaMP_7", "golds": []}, "questions.json, item 0: 'id' is NoneType"),
    ],
)
def test_wrong_pairs(tmp_path, questions, outputs, message):
    (tmp_path / "dev_questions.json").write_text(json.dumps([question("LaMP_7", id) for id in questions]))
    (tmp_path / "dev_outputs.json").write_text(json.dumps(outputs))
    with pytest.raises(ValueError, match=message):
        lamp.load("validation", "LaMP_7", path=tmp_path)


def test_half_downloaded_files(tmp_path):
    write_pair(tmp_path, "LaMP_4", [question("LaMP_4", "1")], {"1": "x"})
    for file in (tmp_path / "dev_outputs.json", tmp_path / "dev_questions.json"):
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(ValueError, match=f"{file.name}, line 1: this is not JSON .*download it again"):
            lamp.load("validation", path=tmp_path)
    (tmp_path / "data.json").write_text(json.dumps([question("LaMP_4", "1")]))
    with pytest.raises(ValueError, match="must hold 'questions'"):
        lamp.load("validation", path=tmp_path / "data.json")


def test_wrong_arguments(tmp_path):
    for wrong in ({"split": "dev"}, {"task": "LaMP_3"}, {"setting": "temporal"}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is .* Choose one of"):
            lamp.load(**{"split": "train", "path": tmp_path, **wrong})


def test_submission_of_the_test_split(tmp_path):
    file = tmp_path / "test_questions.json"
    file.write_text(json.dumps([question("LaMP_7", str(id)) for id in (12, 3, 7)]))
    with pytest.raises(
        FileNotFoundError, match="are not public: evaluate on split 'validation'.*`without_outputs=True`"
    ):
        lamp.load("test", "LaMP_7", path=tmp_path)
    rows = lamp.load("test", "LaMP_7", path=tmp_path, num_rows="all", without_outputs=True)
    assert {row.response for row in rows} == {lamp.NO_OUTPUT} and [row.id for row in rows] == ["12", "3", "7"]
    lines = [
        {"row": index, "id": row.id, "prediction": f"“{row.id}”\n"} for index, row in reversed([*enumerate(rows)])
    ]
    predictions = tmp_path / "predictions.jsonl"
    write_lines(predictions, lines)

    path = tmp_path / "out" / "LaMP_7.json"
    lamp.write_submission(read_records(predictions), "LaMP_7", path, questions=file)
    golds = [{"id": id, "output": f"“{id}”\n"} for id in ("12", "3", "7")]
    assert json.loads(path.read_text(encoding="utf-8")) == {"task": "LaMP_7", "golds": golds}
    # What is written is read as a file of outputs
    (tmp_path / "test_outputs.json").write_bytes(path.read_bytes())
    assert [row.response for row in lamp.load("test", "LaMP_7", path=tmp_path)] == [gold["output"] for gold in golds]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no predictions to write"),
        ([{"id": "1", "prediction": "x"}], "1 ids of .* have no prediction: '2'"),
        ([{"id": id, "prediction": "x"} for id in "1234"], "2 ids of .* are predicted and not asked: '3', '4'"),
        ([{"id": "1", "prediction": "x"}] * 2, "prediction 1: the id '1' occurs twice"),
        ([{"id": None, "prediction": "x"}], "prediction 0: 'id' is NoneType"),
        ([{"id": "1"}], "prediction 0: there is no 'prediction'"),
        ([{"id": "1", "prediction": None}], "prediction 0: 'prediction' is NoneType"),
    ],
)
def test_wrong_submissions(tmp_path, lines, message):
    file, path = tmp_path / "test_questions.json", tmp_path / "LaMP_7.json"
    file.write_text(json.dumps([question("LaMP_7", id) for id in "12"]))
    with pytest.raises(ValueError, match=message):
        lamp.write_submission(lines, "LaMP_7", path, questions=file)
    assert not path.exists()


def test_local_posts_in_the_official_form(tmp_path):
    source = ROOT.parent / "shared" / "data" / "forum_posts" / "test.jsonl"
    if not source.is_file():
        pytest.skip(f"There is no {source}")
    authors = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    questions, outputs = [], {}
    for author in authors:
        target, *profile = author["posts"]
        id, text = str(author["author"]), INPUTS["LaMP_7"].partition(":")[0] + ": " + target["post"][:40]
        profile = [{"id": f"{id}{index}", "text": post["post"]} for index, post in enumerate(profile)]
        questions.append({"id": id, "input": text, "profile": profile})
        outputs[id] = target["post"]
    rows = lamp.load("validation", "LaMP_7", path=write_pair(tmp_path, "LaMP_7", questions, outputs))
    assert [row.id for row in rows] == [str(author["author"]) for author in authors] and len(rows) == 9
    for row, author in zip(rows, authors, strict=True):
        assert row.response == author["posts"][0]["post"] and row.search == row.response[:40].strip()
        assert [entry.response for entry in row.history] == [post["post"].strip() for post in author["posts"][1:]]
