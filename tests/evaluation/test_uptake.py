"""Words of the persona in a reply: on examples counted by hand, and on real conversations."""

import json
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT
from trl_perce.evaluation.uptake import content_stems, other_personas, persona_uptake, persona_uptakes


PERSONA = "I'm 34 and I love knitting. I have two old cats, and I don't eat meat."


def test_content_stems():
    assert content_stems(PERSONA) == {"love", "knit", "old", "cat", "eat", "meat"}
    assert content_stems("Cats; CATS cat's") == {"cat"}
    assert content_stems("I do not have 3 of them, and you?") == content_stems("") == set()


@pytest.mark.parametrize(
    ("prediction", "query", "count"),
    [
        ("Knit a coat for your cat, and knit one for the other cat.", "", 2),
        ("Knit a coat for your cat, and knit one for the other cat.", "What to do with my CATS?", 1),
        ("You have 34 and don't.", "", 0),
        ("I love old meat. I eat cats while knitting.", "", 6),
        ("", "", 0),
    ],
)
def test_persona_uptake(prediction, query, count):
    assert persona_uptake(prediction, PERSONA, query) == count
    assert persona_uptake(prediction, "", query) == 0


def test_persona_uptakes():
    counts = persona_uptakes(["cat meat", "cat", "x"], [PERSONA, "cat", ""], ["", "cats", ""])
    assert counts.dtype == float and list(counts) == [2, 0, 0]
    assert persona_uptakes([], [], []).shape == (0,)
    with pytest.raises(ValueError, match="2 predictions, 1 personas, 2 queries"):
        persona_uptakes(["a", "b"], ["c"], ["d", "e"])


def test_other_personas():
    users = [f"user {row % 10}" for row in range(40)]
    personas = [f"persona {row % 10} {row % 2}" if row % 7 else " " for row in range(40)]
    others = other_personas(personas, users)
    owners = dict(zip(personas, users, strict=True))
    assert all(other.strip() and owners[other] != user for other, user in zip(others, users, strict=True))
    assert others == other_personas(personas, users) != other_personas(personas, users, seed=1)
    assert max(map(others.count, others)) <= 8 and len(set(others)) == 10
    # Without users, equal personas are one user
    assert set(zip(["a", "b", "a"], other_personas(["a", "b", "a"]), strict=True)) == {("a", "b"), ("b", "a")}


@pytest.mark.parametrize(
    ("personas", "users", "message"),
    [
        (["a", "b"], ["u", "u"], r"Row \d: there is no other user \('u' here\)"),
        (["a", " "], ["u", "v"], "Row 0"),
        (["a"], None, "Row 0"),
        (["a", "b"], ["u"], "2 personas, 1 users"),
    ],
)
def test_no_other_user(personas, users, message):
    with pytest.raises(ValueError, match=message):
        other_personas(personas, users)


def test_real_replies_use_the_right_persona():
    file = ROOT.parent / "shared" / "data" / "persona_chat" / "test.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    replies, personas, queries = [], [], []
    for line in file.read_text(encoding="utf-8").splitlines()[:60]:
        row = json.loads(line)
        for turn, said in enumerate(row["conversation"]):
            replies.append(said["text"])
            personas.append(" ".join(row[f"user_{said['user']}_persona"]))
            queries.append("\n".join(earlier["text"] for earlier in row["conversation"][:turn]))
    right = persona_uptakes(replies, personas, queries)
    other = persona_uptakes(replies, other_personas(personas), queries)
    assert right.mean() > 3 * other.mean() > 0


def test_the_same_without_nltks_data_and_in_every_process(tmp_path):
    """Sets of words have another order in each process."""
    command = "import sys; from trl_perce.evaluation.uptake import *; print(sorted(content_stems(sys.argv[1])))"
    command += "; print(other_personas(list('abcdefgh')), 'torch' in sys.modules)"
    environment = {"NLTK_DATA": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", command, PERSONA], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        str(sorted(content_stems(PERSONA))),
        f"{other_personas(list('abcdefgh'))} False",
    ]
    assert np.unique(other_personas(list("abcdefgh"))).size == 8
