"""Who finds the personal tokens: spans and tokens, the three methods, the metrics, and the example."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runs import FAST_DTYPE
from trl_perce.benchmarks import persona_qa
from trl_perce.benchmarks.persona_qa import (
    JUDGE_EXAMPLE,
    AnswerTokens,
    ContentWords,
    accuracy_by_pir,
    answer_of,
    answer_tokens,
    f1_interval,
    find_word,
    in_spans,
    judge_messages,
    load_rows,
    match_words,
    parse_words,
    precision_recall_curve,
    precision_recall_f1,
    question_of,
    read_judgement,
)
from trl_perce.scoring.scores import TokenScores


def make_row(answer, personal_words, persona="I sew."):
    return {
        "id": "r1",
        "persona": persona,
        "prompt": [{"role": "user", "content": "About me: {persona}\n\nWhat should I buy?"}],
        "completion": [{"role": "assistant", "content": answer}],
        "personal_words": personal_words,
    }


def make_scores(tokens, special=(), pir=None, skipped=None) -> TokenScores:
    """Scores of a response that is cut into these tokens."""
    offsets = [(len("".join(tokens[:index])), len("".join(tokens[: index + 1]))) for index in range(len(tokens))]
    pir = np.zeros(len(tokens), dtype=np.float32) if pir is None else np.array(pir, dtype=np.float32)
    is_special = np.array([token in special for token in tokens], dtype=bool)
    arrays = (np.zeros_like(pir), np.zeros_like(pir), pir, np.ones_like(pir), pir > 1)
    return TokenScores(
        0, "", "", "".join(tokens), tokens, offsets, is_special, *arrays, 1.0, len(tokens), 0, 0, skipped
    )


# ── tokens and words ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_tokens_of_an_answer():
    tokens = [
        "<think>",
        "\n\n",
        "</think>",
        "\n\n",
        "A",
        " need",
        "les",
        ",",
        " sun",
        "ny",
        " ",
        "sun.",
        "<|im_end|>",
        "\n",
    ]
    scores = make_scores(tokens, special={"<think>", "</think>", "<|im_end|>"}, pir=range(len(tokens)))
    counted = answer_tokens(make_row("A needles, sunny sun.", ["needles", "sun"]), scores)
    assert counted.pir.tolist() == [4, 5, 6, 7, 8, 9, 11]
    answer = "A needles, sunny sun."
    assert [answer[start:end] for start, end in counted.offsets] == ["A", " need", "les", ",", " sun", "ny", "sun."]
    assert counted.is_personal.tolist() == [False, True, True, False, False, False, True]


WORDS = ["sun", "sunny", "T-rex", "café", "🧵", "needle", "needles", ",", "naïve", "x"]


@given(st.data())
def test_personal_tokens_are_those_with_a_character_of_a_word(data):
    answer = "".join(word + space for word, space in data.draw(st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(["", " ", "  ", "\n"])), min_size=1)))  # fmt: skip
    answer = answer.strip()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(answer) - 1, 1)))))
    tokens = [answer[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    words = [word for word in data.draw(st.lists(st.sampled_from(WORDS))) if word != "," and find_word(word, answer)]
    before, behind = "<think>\n", "<|im_end|>\n"
    scores = make_scores([before[:7], "\n", *tokens, behind[:-1], "\n"], special={"<think>", "<|im_end|>"})
    row = make_row(answer, words)

    inside = set()  # characters, by a walk over the answer
    for word in words:
        for start in range(len(answer)):
            left, right = answer[:start][-1:], answer[start + len(word) :][:1]
            borders = not any(character and re.match(r"\w", character) for character in (left, right))
            if answer.startswith(word, start) and borders:
                inside |= {*range(start, start + len(word))}
    expected, position = [], 0
    for token in tokens:
        if token.strip():
            expected.append(any(position <= character < position + len(token) for character in inside))
        position += len(token)
    assert answer_tokens(row, scores).is_personal.tolist() == expected


def test_what_cannot_be_evaluated_is_an_error():
    tokens = ["A", " needle", "."]
    row = make_row("A needle.", ["needle"])
    for message, bad_row, scores in (
        ("'r1' was not scored: too long", row, make_scores([], skipped="too long")),
        ("is not in the scored response", make_row("A pin.", ["pin"]), make_scores(tokens)),
        (r"\['need'\] are not in the answer", make_row("A needle.", ["need"]), make_scores(tokens)),
        ("needs a persona", row, make_scores(tokens, pir=[0, math.nan, 0])),
    ):
        with pytest.raises(ValueError, match=message):
            answer_tokens(bad_row, scores)


# ── word matching ────────────────────────────────────────────────────────────────────────────────────────────────────

PERSONA = "I'm 34, I knit daily. I have two old cats and don't like loud Places."


def matched(answer, content_words):
    return [answer[start:end] for start, end in match_words(PERSONA, answer, content_words)]


def test_word_matching_by_function_words(monkeypatch, caplog):
    monkeypatch.setattr(persona_qa, "_why_no_nltk", lambda: "none here")
    content_words = ContentWords()
    assert content_words.method == "function words" and "none here" in caplog.text
    answer = "I'm sure you don't have 34 OLD places for the two cats, cat's toys and knitting."
    assert matched(answer, content_words) == ["OLD", "places", "cats"]
    assert not matched("I have two and I don't.", content_words)


@pytest.fixture
def nltk_data(tmp_path, monkeypatch):
    """NLTK's own tagger and sentence splitter, trained on a few sentences, where its data would lie."""
    nltk = pytest.importorskip("nltk")
    from nltk.tag.perceptron import PerceptronTagger
    from nltk.tokenize.punkt import PunktParameters, save_punkt_params

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    nltk.tag._get_tagger.cache_clear()
    tagger = PerceptronTagger(load=False)
    lines = [
        "I/PRP 'm/VBP 34/CD ,/, I/PRP knit/VBP daily/RB ./.",
        "I/PRP have/VBP two/CD old/JJ cats/NNS and/CC do/VBP n't/RB like/VB loud/JJ Places/NNS ./.",
        "Knit/VB for/IN the/DT old/JJ cats/NNS ./.",
    ]
    tagger.train([[tuple(word.rsplit("/", 1)) for word in line.split()] for line in lines] * 10, nr_iter=10)
    (tmp_path / "taggers").mkdir()
    tagger.save_to_json(lang="eng", loc=str(tmp_path / "taggers" / "averaged_perceptron_tagger_eng"))
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    save_punkt_params(PunktParameters(), dir=str(folder))
    yield
    nltk.tag._get_tagger.cache_clear()


def test_word_matching_by_tags(nltk_data, caplog):
    caplog.set_level("INFO")
    content_words = ContentWords()
    assert content_words.method == "NLTK" and "NLTK tags" in caplog.text
    tagged = [PERSONA[start:end] for start, end in content_words(PERSONA)]
    # By its part of speech an auxiliary is a verb; numerals and pronouns are none of the four
    assert tagged == ["'m", "knit", "daily", "have", "old", "cats", "do", "n't", "like", "loud", "Places"]
    assert matched("Knit for the two old Cats.", content_words) == ["Knit", "old", "Cats"]


# ── judge ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ('["cats", "nap"]', ["cats", "nap"]),
        ('```json\n["cats",\n "nap"]\n```', ["cats", "nap"]),
        ('{"words": ["cats"]}', ["cats"]),
        ('The words are ["cats"], since the user has cats [1].', ["cats"]),
        ("['cats', \"cat's\"]", ["cats", "cat's"]),
        ('Not ["feet"]. My reply: ["cats"]', ["cats"]),
        ('<think>Maybe ["feet"]?</think>\n[]', []),
        ('None depends on it: []', []),
        ('Here they are:\n- "cats": the persona has two\n- **nap** (after a shift)\n* ward - work', ["cats", "nap", "ward"]),
        ("1. cats\n2) nap,", ["cats", "nap"]),
        ("The words cats and nap.", None),
        ('["cats", "na', None),
        ("[1, 2]", None),
        ("<think>I wonder", None),
        ("", None),
    ],
)  # fmt: skip
def test_words_of_a_reply(reply, words):
    assert parse_words(reply) == words


def test_judgement_counts_what_it_leaves_out(caplog):
    caplog.set_level("INFO")
    rows = [make_row("Nap with both cats, the Cats' ward.", ["Nap"])] * 4
    replies = ['["cats", "cat", "", "both cats", "dog"]', "cats!", '["Nap", "nap"]', "[]"]
    judgement = read_judgement(rows, replies)
    assert judgement.spans == [[(9, 18), (14, 18), (24, 28)], [], [(0, 3)], []]
    assert (judgement.words, judgement.rejected, judgement.unparseable) == (7, 3, 1)
    assert "7 words named, 3 of them not in the answer; 1 of 4 replies" in caplog.text


def test_the_judge_sees_the_row_but_not_the_annotation():
    row = make_row("Buy {needles}.", ["secret"], persona="I {sew}.")
    *_, message = judge_messages(row)
    for text in ("I {sew}.", "What should I buy?", "Buy {needles}."):
        assert message["content"].count(text) == 1
    assert "{persona}" not in message["content"] and "secret" not in str(judge_messages(row))
    example = make_row(*[re.search(r"user:\n(.*)\n\nSome", JUDGE_EXAMPLE[0]["content"]).group(1), []])
    judgement = read_judgement([example], [JUDGE_EXAMPLE[1]["content"]])
    assert (judgement.words, judgement.rejected) == (5, 0)


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def bools(text):
    return np.array([character == "1" for character in text])


def test_precision_recall_f1_by_hand():
    assert precision_recall_f1(bools("11010"), bools("10110")) == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
    )
    assert precision_recall_f1(bools("1000"), bools("1111")) == {"precision": 1.0, "recall": 0.25, "f1": 0.4}
    assert precision_recall_f1(bools("00"), bools("01")) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert precision_recall_f1(bools("00"), bools("00")) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_curve_by_hand():
    thresholds, precision, recall, average = precision_recall_curve(np.array([2.0, 3.0, 1.0, 2.0]), bools("1110"))
    assert thresholds.tolist() == [3, 2, 1]
    assert precision == pytest.approx([1, 2 / 3, 3 / 4]) and recall == pytest.approx([1 / 3, 2 / 3, 1])
    assert average == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


LABELLED = st.lists(st.tuples(st.integers(-4, 12).map(lambda number: number / 2), st.booleans()), min_size=1)


@given(LABELLED.filter(lambda tokens: any(personal for _, personal in tokens)))
def test_curve_is_the_decision_at_each_threshold(tokens):
    pir, actual = np.array([value for value, _ in tokens]), np.array([personal for _, personal in tokens])
    thresholds, precision, recall, average = precision_recall_curve(pir, actual)
    assert thresholds.tolist() == sorted({*pir.tolist()}, reverse=True)
    expected, before = 0.0, 0.0
    for index, threshold in enumerate(thresholds):
        shares = precision_recall_f1(pir >= threshold, actual)
        assert (precision[index], recall[index]) == pytest.approx((shares["precision"], shares["recall"]))
        expected, before = expected + (shares["recall"] - before) * shares["precision"], shares["recall"]
    assert average == pytest.approx(expected)


def test_right_decisions_by_hand():
    pir, actual = np.array([-3.0, 0.5, 1.0, 1.0, 1.01, 2.0, 9.0]), bools("0010111")
    low, at_one, above, high = accuracy_by_pir(pir, actual, edges=(0.0, 1.0, 2.0))
    assert low == {"low": None, "high": 0.0, "tokens": 1, "right": 1.0}
    assert at_one == {"low": 0.0, "high": 1.0, "tokens": 3, "right": pytest.approx(2 / 3)}  # a PIR of 1 is not over 1
    assert above == {"low": 1.0, "high": 2.0, "tokens": 2, "right": 1.0}
    assert high == {"low": 2.0, "high": None, "tokens": 1, "right": 1.0}
    assert accuracy_by_pir(pir[:1], actual[:1], edges=(0.0,))[1] == {
        "low": 0.0,
        "high": None,
        "tokens": 0,
        "right": None,
    }


@given(LABELLED)
def test_every_token_is_in_one_range(tokens):
    pir, actual = np.array([value for value, _ in tokens]), np.array([personal for _, personal in tokens])
    ranges = accuracy_by_pir(pir, actual)
    assert sum(part["tokens"] for part in ranges) == len(pir)
    right = sum(part["tokens"] * part["right"] for part in ranges if part["tokens"])
    assert right == pytest.approx(((pir > 1) == actual).sum())


def test_interval_is_over_people():
    def row(person, actual):
        return AnswerTokens(person, [], [], np.zeros(len(actual)), bools(actual))

    # Of one person no sample differs, however many rows there are
    one = [row("a", "10"), row("a", "01")]
    assert f1_interval([bools("11"), bools("00")], one) == (0.5, 0.5)
    two = [row("a", "11"), row("b", "11")]
    assert f1_interval([bools("11"), bools("00")], two) == (0.0, 1.0)
    # 100 people, of whom each is right or wrong in whole: recall and precision are a mean of 100 coins, ± 1.96 * 0.05
    people = [row(str(index), "1") for index in range(100)]
    low, high = f1_interval([bools("1") if index % 2 else bools("0") for index in range(100)], people)
    share = np.random.default_rng(1).binomial(100, 0.5, 100_000) / 100
    expected = np.quantile(2 * share / (1 + share), (0.025, 0.975))
    assert (low, high) == pytest.approx(expected, abs=0.015)


# ── the data and the example ─────────────────────────────────────────────────────────────────────────────────────────


def test_shipped_rows():
    rows = load_rows()
    assert len(rows) == 210 and len(load_rows(("test",))) == 51
    assert all("{" not in question_of(row) and question_of(row).endswith("?") for row in rows)
    for row in rows:
        answer = answer_of(row)
        assert [len(find_word(word, answer)) for word in row["personal_words"]] == [1] * len(row["personal_words"])
        spans = [find_word(word, answer)[0] for word in row["personal_words"]]
        assert in_spans([(0, len(answer))], spans).tolist() == [bool(spans)]


def test_example(smollm2, tmp_path, capsys):
    from identification import main

    options = ["--dtype", FAST_DTYPE, "--output_dir", str(tmp_path)]
    results = main(["--model_name_or_path", smollm2, "--split", "test", *options])
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (results["rows"], results["people"]) == (51, 17)
    methods = {line["method"]: line for line in results["methods"]}
    assert list(methods) == ["PerContrast", "PerContrast, by word", "Word matching", "Every token"]
    assert methods["Every token"]["precision"] == pytest.approx(results["personal_share"])
    by_chance = results["personal_share"]
    assert methods["PerContrast"]["precision"] > 1.8 * by_chance and results["average_precision"] > 1.8 * by_chance
    assert methods["PerContrast"]["f1"] > methods["Word matching"]["f1"]
    at_one = next(line for line in results["thresholds"] if line["threshold"] == 1)
    assert at_one["f1"] == methods["PerContrast"]["f1"]
    assert sum(part["tokens"] for part in results["ranges"]) == results["tokens"]
    for name in ("precision_recall.png", "right_by_pir.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "26.5 / 41" in capsys.readouterr().out


def test_example_wants_the_whole_judge(capsys):
    from identification import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(["--judge_model", "x"])
    assert "--judge_base_url and --judge_model" in capsys.readouterr().err
