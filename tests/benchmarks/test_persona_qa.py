"""The rows that the project wrote itself: clean, varied and annotated as their README says."""

import json
import re
from collections import Counter

import pytest

from conftest import ROOT


FOLDER = ROOT / "trl_perce" / "benchmarks" / "data" / "persona_qa"


@pytest.fixture(scope="module")
def splits():
    return {
        split: [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "test")
    }


def question_of(row):
    return row["prompt"][0]["content"].removeprefix("About me: {persona}\n\n")


def test_sizes_and_people(splits):
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 159, "test": 51}
    people = {split: {row["persona"] for row in rows} for split, rows in splits.items()}
    assert (len(people["train"]), len(people["test"])) == (53, 17) and not people["train"] & people["test"]
    ids = [row["id"] for rows in splits.values() for row in rows]
    assert len(set(ids)) == 210


def test_rows(splits):
    answers, questions = Counter(), Counter()
    personal = words = rows_without_copy = 0
    for row in (row for rows in splits.values() for row in rows):
        assert list(row) == ["id", "persona", "prompt", "completion", "personal_words"]
        assert [m["role"] for m in row["prompt"] + row["completion"]] == ["user", "assistant"]
        answer, question = row["completion"][0]["content"], question_of(row)
        assert "{" not in question + answer + row["persona"]
        assert 8 <= len(answer.split()) <= 20 and 25 <= len(row["persona"].split()) <= 55, row["id"]
        position = 0
        for word in row["personal_words"]:
            found = [match.start() for match in re.finditer(rf"\b{re.escape(word)}\b", answer)]
            assert len(found) == 1 and found[0] >= position, (row["id"], word)
            position = found[0] + 1
            assert not re.search(rf"\b{re.escape(word)}\b", question, re.IGNORECASE), (row["id"], word)
        persona = re.findall(r"[\w'-]+", row["persona"].lower())
        rows_without_copy += not any(word.lower() in persona for word in row["personal_words"])
        personal += len(row["personal_words"])
        words += len(answer.split())
        answers[answer] += 1
        questions[question] += 1
    assert max(answers.values()) == 1 and max(questions.values()) <= 6 and len(questions) >= 90
    assert personal / words == pytest.approx(0.234, abs=0.001)
    assert rows_without_copy / 210 == pytest.approx(0.75, abs=0.01)
