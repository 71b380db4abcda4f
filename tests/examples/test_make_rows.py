import json
import runpy

import pytest
from datasets import load_dataset

from conftest import ROOT
from rows import write_splits
from trl_perce.persona.marks import mark_persona


def run(monkeypatch, tmp_path, script, *arguments):
    monkeypatch.chdir(tmp_path)  # embeddings and the like are kept where it runs
    monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")


def personas(row):
    marked, spans = mark_persona(row)
    return [marked["prompt"][span.message]["content"][span.start : span.end] for span in spans]


def test_own_histories(monkeypatch, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    line = {"user": "ann", "history": ["I sew linen.", "I run."], "query": "Which linen?", "response": "Indigo."}
    for split in ("train", "test"):
        (source / f"{split}.jsonl").write_text(json.dumps(line))
    run(monkeypatch, tmp_path, "make_rows.py", "rows", source, tmp_path / "out", "--k", 1)
    rows = load_dataset(str(tmp_path / "out"))  # as the commands load it
    assert {split: len(own) for split, own in rows.items()} == {"train": 1, "test": 1}
    assert personas(rows["test"][0]) == ["I sew linen."]
    assert "train              1 rows of 1 users" in capsys.readouterr().out


def test_longlamp_and_lamp(monkeypatch, tmp_path):
    profile = [{"title": "Looms", "abstract": "We weave."}, {"title": "Dye", "abstract": "We dye."}]
    row = {
        "input": 'Generate an abstract for the title "Linen" using the following items: looms',
        "output": "We spin.",
    }
    for split in ("train", "test"):
        folder = tmp_path / "longlamp" / "abstract_generation_user"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.json").write_text(json.dumps([row | {"name": "ann", "profile": profile}]))
    out = tmp_path / "abstracts"
    run(
        monkeypatch,
        tmp_path,
        "make_rows.py",
        "longlamp",
        tmp_path / "longlamp",
        out,
        "--task",
        "abstract_generation",
        "--k",
        1,
    )
    (text,) = personas(json.loads((out / "test.jsonl").read_text()))
    assert "We weave." in text and "We dye." not in text

    folder = tmp_path / "LaMP_5"
    folder.mkdir()
    questions = [
        {
            "id": "1",
            "input": "Generate a title for the following abstract of a paper: linen",
            "profile": [{"id": "2", **profile[0]}],
        }
    ]
    outputs = {"task": "LaMP_5", "golds": [{"id": "1", "output": "On linen"}]}
    (folder / "dev_questions.json").write_text(json.dumps(questions))
    (folder / "dev_outputs.json").write_text(json.dumps(outputs))
    arguments = ("--task", "LaMP_5", "--splits", "validation")
    run(monkeypatch, tmp_path, "make_rows.py", "lamp", tmp_path, tmp_path / "titles", *arguments)
    example = json.loads((tmp_path / "titles" / "validation.jsonl").read_text())
    assert "Looms" in personas(example)[0] and example["completion"][0]["content"] == "On linen"


def test_what_is_missing_is_said(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "make_rows.py", "lamp", tmp_path, tmp_path / "out")
    assert "'lamp' needs `task`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "make_rows.py", "rows", tmp_path / "nowhere", tmp_path / "out")
    error = capsys.readouterr().err
    assert "/nowhere'" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        run(
            monkeypatch,
            tmp_path,
            "make_rows.py",
            "rows",
            tmp_path,
            tmp_path / "out",
            "--splits",
            "train",
            "--validation_size",
            0.1,
        )
    assert "no `validation` is among the `splits`" in capsys.readouterr().err


def test_validation_is_split_off_where_it_is_asked_for(monkeypatch, tmp_path, capsys):
    preferences = [
        {"preference": f"I like {pet}s.", "question": "Which pet?", "response": f"A {pet}."} for pet in ("cat", "dog")
    ]
    write_splits(tmp_path / "source", train=preferences, test=preferences)
    splits = ("--splits", "train", "validation", "--validation_size", 0.5)
    run(monkeypatch, tmp_path, "make_rows.py", "preferences", tmp_path / "source", tmp_path / "out", *splits)
    for split, pet in (("train", "cat"), ("validation", "dog")):
        (line,) = (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()
        assert personas(json.loads(line)) == [f"I like {pet}s."]


def test_bring_your_own_data(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, "own_data.py", tmp_path / "own")
    example = json.loads((tmp_path / "own" / "rows" / "train.jsonl").read_text())
    assert personas(example)[0].count("\n\n") == 1  # two of three entries
    assert "1 rows in" in capsys.readouterr().out
