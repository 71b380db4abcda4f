"""The judge of predictions: its numbers from known replies, its questions at a small server, and a real one."""

import json
import math

import numpy as np
import pytest

from servers import needs_openai, requests_of
from trl_perce.evaluation.endpoint import Endpoint
from trl_perce.evaluation.judge import CRITERIA, judge_predictions, read_judgements


pytest_plugins = ["servers"]

PREDICTIONS = [
    {"row": 0, "id": "a", "query": "A gift?", "reference": "Some {wool} socks.", "prediction": "Needles."},
    {"row": 3, "id": None, "query": "A gift? 🧵", "reference": "Laces.", "prediction": "Gloves: {} of them."},
]


def test_numbers_of_known_replies(caplog):
    judgements = read_judgements(
        {
            "personalization": [["4"], ["personalization: 1"], ["no idea"]],
            "fluency": [["Score: 5", "4", "x"], ["fluency: 9", "?", ""], ["2", "2", "2"]],
        }
    )
    assert np.array_equal(judgements.scores["personalization"], [4, 1, np.nan], equal_nan=True)
    assert np.array_equal(judgements.scores["fluency"], [4.5, np.nan, 2], equal_nan=True)
    assert judgements.unparsable == {"personalization": 1, "fluency": 4}
    assert judgements.summary() == {
        "personalization": {"mean": 2.5, "percent": 37.5, "rated": 2, "rows": 3, "unparsable": 1},
        "fluency": {"mean": 3.25, "percent": 56.25, "rated": 2, "rows": 3, "unparsable": 4},
    }
    assert "fluency: 4 of 9 replies hold no rating" in caplog.text


def test_without_a_rating_there_is_no_mean():
    summary = read_judgements({"fluency": [["?"], ["6"]]}).summary()
    assert summary == {"fluency": {"mean": None, "percent": None, "rated": 0, "rows": 2, "unparsable": 2}}


@needs_openai
def test_questions_and_replies_belong_together(echo, tmp_path):
    def reply(body):
        """A rating that tells the criterion, the prediction and the sample."""
        text = body["messages"][-1]["content"]
        name = next(name for name in CRITERIA if text.endswith(f"\n\n{name}: <a whole number from 1 to 5>"))
        rating = 1 + list(CRITERIA).index(name) % 3 + ("Gloves" in text) + body["seed"]
        return f"{name}: {rating}"

    echo.reply = reply
    endpoint = Endpoint(echo.url, "m", temperature=1.0, concurrency=8)
    judgements = judge_predictions(PREDICTIONS, endpoint, samples=2)
    assert list(judgements.scores) == ["personalization", "coherence", "consistency", "fluency", "relevance"]
    expected = {name: [1.5 + index % 3, 2.5 + index % 3] for index, name in enumerate(CRITERIA)}
    expected["consistency"] = [3.5, 4.5]
    assert {name: scores.tolist() for name, scores in judgements.scores.items()} == expected
    assert judgements.replies["coherence"][1] == ["coherence: 3", "coherence: 4"]
    assert len(echo.texts) == 5 * 2 * 2
    for text in echo.texts:  # text quality is rated without the user's own response
        compares = text.endswith("personalization: <a whole number from 1 to 5>")
        assert ("{wool} socks" in text or "Laces." in text) == compares
        places = [text.index(part) for part in ("\n1: ", "\n5: ", "\nQuery:\n", "\nResponse to rate:\n")]
        places[3:3] = [text.index("\nThe user's own response:\n")] if compares else []
        assert places == sorted(places)  # the order of Appendix D.1
        assert ("A gift? 🧵" in text and "Gloves: {} of them." in text) != ("Needles." in text)

    judgements.write(tmp_path / "judge.jsonl", PREDICTIONS)
    lines = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert [(line["row"], line["id"]) for line in lines] == [(0, "a"), (3, None)]
    assert lines[1]["scores"] == {name: scores[1] for name, scores in expected.items()}
    assert lines[1]["replies"]["coherence"] == ["coherence: 3", "coherence: 4"]


@needs_openai
def test_unreadable_ratings_are_null_in_the_file(echo, tmp_path):
    echo.reply = lambda body: "no"
    judgements = judge_predictions(PREDICTIONS, Endpoint(echo.url, "m"), ["fluency"])
    judgements.write(tmp_path / "judge.jsonl", PREDICTIONS)
    line = json.loads((tmp_path / "judge.jsonl").read_text().splitlines()[0])
    assert line["scores"] == {"fluency": None} and line["replies"] == {"fluency": ["no"]}
    assert "seed" not in echo.bodies[0]
    empty = judge_predictions([], Endpoint(echo.url, "m"), ["fluency"])
    assert empty.summary()["fluency"]["rows"] == 0 and empty.scores["fluency"].shape == (0,)


@needs_openai
def test_bad_arguments(echo):
    endpoint = Endpoint(echo.url, "m")
    with pytest.raises(ValueError, match=r"\['style'\].*'personalization', 'coherence'"):
        judge_predictions(PREDICTIONS, endpoint, ["style"])
    with pytest.raises(ValueError, match="`samples` is 3.*`temperature` 0.0"):
        judge_predictions(PREDICTIONS, endpoint, samples=3)
    with pytest.raises(ValueError, match="Prediction 1 has no 'reference'; it has 'row'.*predictions.jsonl"):
        judge_predictions([PREDICTIONS[0], {"row": 1, "query": "", "prediction": ""}], endpoint)
    assert not echo.texts


def test_real_judge_of_predictions(server, smollm2, tmp_path):
    url, log = server
    before, criteria = requests_of(log), ["personalization", "fluency"]
    options = {"concurrency": 1, "max_tokens": 6, "cache_path": tmp_path / "answers.jsonl"}
    endpoint = Endpoint(url, smollm2, **options)
    judgements = judge_predictions(PREDICTIONS[:1], endpoint, criteria)
    assert requests_of(log) == before + 2
    assert all(reply for [[reply]] in judgements.replies.values())
    for name, scores in judgements.scores.items():  # it mostly gives none: every one is counted
        assert judgements.unparsable[name] == sum(map(math.isnan, scores))
    again = judge_predictions(PREDICTIONS[:1], Endpoint(url, smollm2, **options), criteria)
    assert again.replies == judgements.replies and requests_of(log) == before + 2 + endpoint.num_cut
