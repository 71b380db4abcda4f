"""Quotes of the paper: what is in them, the look-up, and a user's file."""

import json
from dataclasses import replace

import pytest

from conftest import ROOT
from trl_perce.reproduce.paper import QUOTES, Quote, load_quotes, quoted


TASKS = {None, "abstract_generation", "product_review", "topic_writing", "aloe", "average", "hotpotqa", "drop"}
TASKS |= {"headlines", "titles", "tweets"}  # of recipes/reproduce/lamp.yaml
MODELS = {None, "Qwen3-4B", "Qwen3-14B", "Llama-3.1-8B-Instruct", "Qwen3-30B-A3B-Instruct-2507"}
ROW = {
    "table": 11,
    "metric": "f1",
    "value": 70.5,
    "source": "Table 11",
    "task": "drop",
    "model": "Qwen3-4B",
    "method": "ce",
}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "quotes.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def test_quotes_name_known_things_and_no_cell_twice():
    cells = [quote.cell for quote in QUOTES if quote.table is not None]
    assert len(set(cells)) == len(cells)
    assert len(set(QUOTES)) == len(QUOTES)
    for quote in QUOTES:
        assert "https://" in quote.source
        assert {quote.task, quote.train_task} <= TASKS and quote.model in MODELS
        assert quote.method in (None, "ce", "lossce", "entce", "perce")
        assert quote.table is not None or quote.note  # what is of no known cell says what it is


def test_the_whole_paper_is_there():
    """Counts of its cells by hand: Table 1 has 2 metrics of 3 models, 3 tasks and an average, and 4 methods."""
    numbers = {
        table: sum(quote.table == table and "_gain" not in quote.metric for quote in QUOTES) for table in range(1, 13)
    }
    assert numbers[1] == 2 * 3 * 4 * 4 and numbers[4] == numbers[9] == 6 * 6 and numbers[12] == 27
    assert min(numbers.values()) > 0
    # Read in the text of the paper
    qwen = {"model": "Qwen3-4B", "train_task": "abstract_generation", "task": "abstract_generation"}
    assert quoted(1, "rougeL", method="ce", **qwen) == 37.27
    assert quoted(2, "rougeL_variance", method="perce", **qwen) == 1.8
    assert quoted(12, "rougeL", method="perce", clip=(0.2, 2), **qwen) == 32.47
    assert quoted(5, "rougeL", "Qwen3-4B", "headlines", "headlines", "perce") == 16.1
    assert quoted(7, "adam_beta2") == 0.999 and quoted(7, "learning_rate_max") == 5e-5


def test_recipes_are_as_quoted():
    text = (ROOT / "recipes/Qwen3-4B/product_review/config_lora.yaml").read_text(encoding="utf-8")
    for name in ("max_length", "num_train_epochs"):
        assert f"\n{name}: {quoted(7, name):g}" in text


@pytest.mark.parametrize("name", ["Qwen3-4B", "Qwen/Qwen3-4B", "/models/Qwen3-4B/"])
def test_the_last_part_of_the_models_name_counts(name):
    assert quoted(1, "meteor_gain", name, "product_review", "product_review", "perce") == 68.04


def test_a_cell_is_found_by_all_of_its_fields():
    assert quoted(6, "prompt_tokens_without_persona", task="product_review") == 168.9
    assert quoted(6, "prompt_tokens_without_persona", task="product_review", method="ce") is None
    assert quoted(1, "meteor_gain", "Qwen3-4B", "product_review", "product_review", "ce") is None
    assert quoted(7, "batch_size", "Qwen/Qwen3-14B") == 32
    assert quoted(7, "batch_size") is None
    swept = Quote(12, "rougeL", 30.0, "here", task="topic_writing", clip=(0.2, 5.0))
    assert quoted(12, "rougeL", task="topic_writing", clip=[0.2, 5], quotes=[swept]) == 30.0
    assert quoted(12, "rougeL", task="topic_writing", clip=(0.8, 5.0), quotes=[swept]) is None


def test_figures_of_another_scale_stand_beside_no_result():
    assert quoted(10, "judge/personalization", "Qwen3-14B", "product_review", "product_review", "ce") is None
    loose = next(quote for quote in QUOTES if quote.metric == "word_matching_f1")
    assert loose.table is None and loose.value == 41
    for table in range(1, 13):
        assert quoted(table, "word_matching_f1", loose.model) is None
        assert quoted(table, "word_matching_f1", loose.model, quotes=[replace(loose, table=table)]) == 41


def test_a_users_file_goes_first(write):
    rows = [ROW, {**ROW, "learning_rate": 2e-5, "value": 1}, {**ROW, "clip": [0.5, 2.0], "value": 2, "note": "?"}]
    further = load_quotes(write(rows))
    assert [quote.clip for quote in further] == [None, None, (0.5, 2.0)]
    assert quoted(11, "f1", "Qwen3-4B", task="drop", method="ce", quotes=QUOTES + further) == 70.5
    other = load_quotes(write([{"table": 7, "metric": "max_length", "value": 4000, "source": "me"}]))
    assert quoted(7, "max_length", quotes=QUOTES + other) == 4000


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"table": 1, ', "not JSON"),
        ({"table": 1}, "holds a JSON dict. Write a list"),
        ([ROW, "0.3"], "quote 1: it is '0.3'"),
        ([{**ROW, "dataset": "drop"}], "quote 0: there is no field 'dataset'. The fields are table, metric"),
        ([{key: ROW[key] for key in ROW if key != "source"}], "quote 0: the field 'source' is missing"),
        ([{**ROW, "table": 13}], "`table` is 13. Write 1 to 12"),
        ([{**ROW, "table": True}], "`table` is True"),
        ([{**ROW, "value": "70.5"}], "`value` is '70.5'. Write a finite number"),
        ('[{"table": 1, "metric": "f1", "source": "x", "value": NaN}]', "`value` is nan"),
        ([{**ROW, "metric": " "}], "`metric` is ' '. Write a text"),
        ([{**ROW, "method": 1}], "`method` is 1. Write a text or null"),
        ([{**ROW, "clip": [0.8]}], r"`clip` is \(0.8,\). Write two numbers"),
        ([{**ROW, "learning_rate": "2e-5"}], "`learning_rate` is '2e-5'. Write a number or null"),
        ([{**ROW, "note": None}], "`note` is None"),
        ([ROW, {**ROW, "value": 3}], "quote 1: quote 0 is of the same cell"),
    ],
)
def test_a_file_that_is_wrong_is_refused(write, content, message):
    with pytest.raises(ValueError, match=message):
        load_quotes(write(content))
