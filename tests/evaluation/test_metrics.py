"""ROUGE, METEOR and BLEU of rows, against the libraries called by hand and against arithmetic on paper."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import nltk
import numpy as np
import pytest
from nltk.tokenize.punkt import load_punkt_params

from conftest import ROOT
from nltk_data import ensure_nltk_data
from trl_perce.evaluation.metrics import corpus_bleu, text_metrics


DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def nltk_folder() -> str:
    try:
        return ensure_nltk_data()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def nltk_path(nltk_folder, monkeypatch) -> None:
    """NLTK's data lie where only this process looks for them."""
    monkeypatch.setattr(nltk.data, "path", [nltk_folder])
    monkeypatch.delenv("NLTK_DATA", raising=False)


@pytest.fixture
def no_nltk_data(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])


def real_pairs(count: int = 50) -> list[tuple[str, str]]:
    """Each review beside the reviewer's next one."""
    file = DATA / "product_reviews" / "train.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    pairs = []
    for line in file.read_text(encoding="utf-8").splitlines():
        texts = [review["reviewText"] for review in json.loads(line)["reviews"]]
        pairs += zip(texts, texts[1:], strict=False)
    return pairs[:count]


def generated_pairs(count: int = 50) -> list[tuple[str, str]]:
    random = np.random.default_rng(0)
    words = "The dog dogs's ran, running quickly! café 3.5 don't Mr. Smith (big) large \n automobile car 猫 U.S. a I".split(
        " "
    )
    texts = [" ".join(random.choice(words, random.integers(0, 60))) for _ in range(2 * count)]
    return list(zip(texts[:count], texts[count:], strict=True))


@pytest.mark.parametrize("pairs", [real_pairs, generated_pairs])
def test_equal_to_the_libraries_called_by_hand(pairs, nltk_path):
    from nltk import word_tokenize
    from nltk.translate.meteor_score import single_meteor_score
    from rouge_score import rouge_scorer

    pairs = pairs()
    values = text_metrics(*zip(*pairs, strict=True))
    assert list(values) == ["rouge1", "rouge2", "rougeL", "meteor"]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for row, (prediction, reference) in enumerate(pairs):
        for name, score in scorer.score(target=reference, prediction=prediction).items():
            assert values[name][row] == score.fmeasure
        meteor = single_meteor_score(word_tokenize(reference), word_tokenize(prediction), alpha=0.9, beta=3, gamma=0.5)
        assert values["meteor"][row] == meteor
    assert len(set(values["meteor"])) > 25 and values["rouge2"].max() > 0


def test_on_paper(nltk_path):
    predictions = ["a cat sat on the mat", "a car", "dogs ran home today"]
    values = text_metrics(predictions, ["a cat sat on my mat", "an auto", "dog ran"])
    assert text_metrics(["a car"], ["an automobile"], metrics=["meteor"])["meteor"] == 0  # its stem is "automobil"
    # 5 of 6 words, 3 of 5 pairs; without stems "dogs" is not "dog": 1 of 4 and 1 of 2 words
    assert values["rouge1"] == pytest.approx([5 / 6, 0, 2 * (1 / 4) * (1 / 2) / (3 / 4)])
    assert values["rouge2"] == pytest.approx([3 / 5, 0, 0])
    assert values["rougeL"] == pytest.approx([5 / 6, 0, 1 / 3])

    def meteor(matches, chunks, predicted, expected):
        precision, recall = matches / predicted, matches / expected
        f = precision * recall / (0.9 * precision + 0.1 * recall)
        return f * (1 - 0.5 * (chunks / matches) ** 3)

    # "auto" is a synonym of "car" in WordNet, "an" is none of "a"; "dogs" and "dog" have one stem
    assert values["meteor"] == pytest.approx([meteor(5, 2, 6, 6), meteor(1, 1, 2, 2), meteor(2, 1, 4, 2)])


def test_processes_in_a_script_without_a_main_guard(nltk_path, nltk_folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import json, nltk, sys
nltk.data.path = [{nltk_folder!r}]
from trl_perce.evaluation.metrics import text_metrics
predictions, references = json.load(open({str(tmp_path / "texts.json")!r}))
values = text_metrics(predictions, references, num_proc=2, metrics=["rouge"])
values |= text_metrics(predictions[:8], references[:8], num_proc=2, metrics=["meteor"])
print(json.dumps({{name: list(column) for name, column in values.items()}}), "torch" in sys.modules)
"""
    )
    texts = list(zip(*generated_pairs(50), strict=True))
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    values, has_torch = done.stdout.rsplit(maxsplit=1)
    assert has_torch == "False", done.stderr
    alone = text_metrics(*texts, num_proc=1)
    alone["meteor"] = alone["meteor"][:8]
    assert json.loads(values) == {name: list(column) for name, column in alone.items()}


def test_edges(nltk_path):
    long = "word " * 50_000
    values = text_metrics(["", "text", "", "  \n", long], ["text", "", "", "...", "one word"])
    for name in values:
        assert not values[name][:4].any(), name
    assert values["rouge1"][4] == pytest.approx(2 / 50_002) and 0 < values["meteor"][4] < 0.01
    assert {name: list(column) for name, column in text_metrics([], [], metrics=["meteor"]).items()} == {"meteor": []}


def test_rouge_knows_only_a_to_z():
    values = text_metrics(
        ["猫が好き", "Кошка", "café au lait"], ["猫が好き", "Кошка", "caf au lait"], metrics=["rouge"]
    )
    assert list(values["rouge1"]) == [0, 0, 1]


def test_bleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions, references = map(list, zip(*generated_pairs(20), strict=True))
    values = text_metrics(predictions, references, metrics=["bleu"])
    by_hand = [sacrebleu.sentence_bleu(p, [r]).score for p, r in zip(predictions, references, strict=True)]
    assert list(values) == ["bleu"] and list(values["bleu"]) == by_hand
    assert list(text_metrics(["", "a", "a b c d"], ["a", "", "a b c d"], metrics=["bleu"])["bleu"]) == pytest.approx(
        [0, 0, 100]
    )
    # On paper: 5 of 6 words, 3 of 5 pairs, 2 of 4 threes, 1 of 3 fours; equally long
    score = corpus_bleu(["the cat sat", "on the mat now we"], ["the cat sat", "on the mat here we"])
    assert score == pytest.approx(100 * math.exp(np.log([7 / 8, 4 / 6, 2 / 4, 0.5 / 2]).mean()))
    with pytest.raises(ValueError, match="no predictions"):
        corpus_bleu([], [])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a"], ["a", "b"]), ValueError, "1 predictions and 2 references"),
        ((["a", None], ["a", "b"]), TypeError, r"Row 1: the prediction must be a string, got None"),
        ((["a", "b"], ["a", 3]), TypeError, r"Row 1: the reference must be a string, got 3 \(int\)"),
        (("a", "b"), TypeError, "`predictions` must be a list of strings"),
        ((["a"], ["a"], None, []), ValueError, "one or more of 'rouge', 'meteor', 'bleu'"),
        ((["a"], ["a"], None, "rouge"), ValueError, "got 'rouge'"),
        ((["a"], ["a"], None, ["rouge", "ter"]), ValueError, "'ter'"),
    ],
)
def test_bad_input(arguments, error, message, nltk_path):
    with pytest.raises(error, match=message):
        text_metrics(*arguments)


# ── NLTK's data ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_missing_nltk_data(no_nltk_data):
    with pytest.raises(
        FileNotFoundError, match=r"(?s)`wordnet`, `punkt_tab`.*nltk.downloader wordnet punkt_tab.*'rouge'"
    ):
        text_metrics(["a"], ["a"])
    assert list(text_metrics(["a"], ["a"], metrics=["rouge"])["rougeL"]) == [1]


def test_a_failed_download(no_nltk_data, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(nltk.downloader._downloader, "_url", "http://127.0.0.1:9/index.xml")
    with pytest.raises(FileNotFoundError, match="`wordnet`, `punkt_tab`"):
        text_metrics(["a"], ["a"])
    assert "Downloading NLTK's data `wordnet`" in caplog.text


def test_nltk_data_is_what_the_packages_hold(nltk_path, nltk_folder):
    from nltk.corpus import wordnet
    from punkt.data import english

    assert wordnet.get_version() == "3.0"
    assert wordnet.synset("car.n.01").lemma_names() == ["car", "auto", "automobile", "machine", "motorcar"]
    nouns = (Path(nltk_folder) / "corpora" / "wordnet" / "data.noun").read_text(encoding="utf-8").splitlines()
    assert sum(line[0].isdigit() for line in nouns) == 82_115  # as WordNet 3.0's own statistics say
    params = load_punkt_params(nltk.data.find("tokenizers/punkt_tab/english/"))
    assert params.abbrev_types == english.ABBREV_TYPES and params.sent_starters == english.SENT_STARTERS
    assert {*params.collocations} == english.COLLOCATIONS and params.ortho_context == english.ORTHO_CONTEXT
    assert nltk.sent_tokenize("Dr. Smith lives in the U.S. now. He is 3.5 ft. tall.") == [
        "Dr. Smith lives in the U.S. now.",
        "He is 3.5 ft. tall.",
    ]


def test_nltk_data_from_several_processes(nltk_folder, tmp_path):
    folder = tmp_path / "cache" / "nltk_data"
    command = [sys.executable, ROOT / "examples" / "nltk_data.py", folder]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == [f"{folder}\n"] * 2
    assert [path.name for path in folder.parent.iterdir()] == ["nltk_data"]
    assert (folder / "corpora" / "wordnet" / "data.noun").stat().st_size == 15_300_280  # as in Princeton's archive

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(FileExistsError, match="holds other data"):
        ensure_nltk_data(tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "mine"]
