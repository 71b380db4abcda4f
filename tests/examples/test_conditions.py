"""examples/conditions.py: what copying the persona would get, beside the answers."""

import json

import nltk
import pytest

import conditions
from nltk_data import ensure_nltk_data


def test_overlap_of_answers_and_of_a_copied_persona(tmp_path, capsys, monkeypatch):
    try:
        monkeypatch.setattr(nltk.data, "path", [ensure_nltk_data()])
    except FileNotFoundError as error:
        pytest.skip(str(error))

    def write(folder, prediction, persona="red blue x y"):
        folder.mkdir(parents=True)
        line = {"persona": persona, "prediction": prediction, "reference": "red green blue black"}
        (folder / "predictions.jsonl").write_text(json.dumps(line) + "\n")

    write(tmp_path / "untrained", "white")
    write(tmp_path / "untrained" / "swapped", "white", persona="black red blue x")
    write(tmp_path / "a" / "colours", "red green")  # two words, so that two of the persona stand beside them
    write(tmp_path / "b" / "colours", "black blue")
    runs = {"ce": {0: tmp_path / "a", 1: tmp_path / "b"}, "lossce": {}}
    conditions.overlap("colours", tmp_path / "untrained", runs)
    *_, head, rule, untrained, ce, own, other = capsys.readouterr().out.splitlines()
    # ROUGE-L: two of two and four words in order are 2 · 1 · ½ / 1½; one of them, 2 · ½ · ¼ / ¾
    assert untrained.startswith("| untrained | 0.000 |") and ce.startswith("| ce | 0.500 |")  # of 0.667 and 0.333
    assert own.startswith("| the persona, its first 2 words | 0.667 |")
    assert other.startswith("| another user's persona, its first 2 words | 0.333 |")
    # METEOR: mean of recall and precision for α 0.9, less half of (chunks / matches)³
    mean = 1 * 0.5 / (0.9 * 1 + 0.1 * 0.5)
    assert own.endswith(f" {mean * (1 - 0.5):.3f} |") and ce.endswith(f" {mean * (1 - 0.5 * (0.5**3 + 1) / 2):.3f} |")


def test_nothing_is_said_without_answers(tmp_path, capsys):
    conditions.overlap("colours", tmp_path, {"ce": {0: tmp_path}})
    assert not capsys.readouterr().out
