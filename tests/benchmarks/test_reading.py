"""Benchmark files: what is read, what is refused with file and line, and which rows a seed draws."""

import json
import logging
from collections import Counter
from dataclasses import dataclass
from datetime import date

import pytest

from trl_perce.benchmarks.reading import (
    Skips,
    check_unique,
    draw_rows,
    find_file,
    ids_hash,
    random_order,
    read_object,
    read_records,
    sample,
    take,
    to_days,
)


RECORDS = [{"a": "é\u2028 [ 1", "n": None}, {"a": "two\nlines", "n": [1]}, {"a": ""}]


@pytest.fixture
def logger():
    return logging.getLogger("trl_perce.benchmarks.test")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_list_and_lines_are_read_alike(tmp_path, indent, bom):
    as_list, as_lines = tmp_path / "list.json", tmp_path / "lines.jsonl"
    as_list.write_text(bom + json.dumps(RECORDS, indent=indent, ensure_ascii=False), encoding="utf-8")
    lines = "\r\n\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
    as_lines.write_bytes((bom + lines).encode())
    assert read_records(as_list) == read_records(str(as_lines)) == RECORDS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"[]", "empty list"),
        (b'{"a": 1}\n{"a": 2}\n{"a": ', r"line 3: this is not JSON .*its end may be missing"),
        (b'[\n{"a": 1},\n{"a": "tw', r"line 3: this is not JSON .*its end may be missing"),
        (b'{"a": 1}\n\n[2]\n', r"line 3: holds list \[2\]\. Every record"),
        (b'[{"a": 1}, "b"]', "item 1: holds str 'b'"),
        (b"<!DOCTYPE html>\n<html>", "line 1: this is not JSON"),
        (b"\x1f\x8b\x08\x00\xff", "not text in UTF-8"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_records(path)
    assert str(path) in str(caught.value)


def test_one_object(tmp_path):
    path = tmp_path / "one.json"
    path.write_text('{\n "task": "x"\n}')
    assert read_object(path) == {"task": "x"}
    path.write_text('{\n "task": \n')
    with pytest.raises(ValueError, match="line 3"):
        read_object(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        read_object(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"holds list \[1\] and not"):
        read_object(path)


def test_files_of_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*absent"):
        read_records(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds none of a.json, b/a.json"):
        find_file(tmp_path, ["a.json", "b/a.json"])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.json").touch()
    assert find_file(tmp_path, ["a.json", "b/a.json"]) == tmp_path / "b" / "a.json"
    assert find_file(tmp_path / "b" / "a.json", ["other"]) == tmp_path / "b" / "a.json"


def test_values_are_checked():
    record = {"text": "x", "flag": True, "none": None}
    assert take(record, "text", str, "f, row 0") == "x"
    with pytest.raises(ValueError, match="f, row 0: there is no 'input'; there are 'text', 'flag', 'none'"):
        take(record, "input", str, "f, row 0")
    with pytest.raises(ValueError, match="'flag' is bool True. It must be a str or int"):
        take(record, "flag", (str, int), "f")
    with pytest.raises(ValueError, match="'none' is NoneType None. It must be a list"):
        take(record, "none", list, "f")
    check_unique(["a", "b"], "f")
    with pytest.raises(ValueError, match="f: 6 ids occur more than once: 'a', 'b', 'c', 'd', 'e', …"):
        check_unique(list("abcdef" * 2), "f")


def test_dates():
    day = date(2012, 5, 3).toordinal()
    assert to_days("2012-05-03", "f") == to_days("2012-5-3", "f") == day
    assert to_days("2012-05", "f") == day - 2
    assert to_days(2012, "f") == to_days(2012.0, "f") == to_days("2012", "f") == date(2012, 1, 1).toordinal()
    assert to_days("2012-05-03T18:00:00", "f") == to_days("2012-05-03 18:00:00+00:00", "f") == day + 0.75
    assert to_days("2012-05-04T01:00:00+07:00", "f") == day + 0.75
    # 1336068000 is 2012-05-03 18:00 UTC
    assert to_days(1336068000, "f") == to_days(1336068000.0, "f") == day + 0.75
    for wrong in ("yesterday", "2012-13", 12, float("nan"), ""):
        with pytest.raises(ValueError, match="f: .* is no date"):
            to_days(wrong, "f")


def test_sample_keeps_the_order_and_is_fair():
    items = [f"item {index}" for index in range(10)]
    drawn = Counter()
    for seed in range(3000):
        some = sample(items, 3, seed)
        assert some == sorted(some) and len(set(some)) == 3 and some == sample(items, 3, seed)
        drawn.update(some)
    # Each item is in 3 of 10 samples: 900 of 3000, with a standard deviation of 25
    assert all(abs(drawn[item] - 900) < 125 for item in items)
    assert sample(items, None, 0) == sample(items, 10, 1) == sample(items, 99, 2) == items
    assert set(sample(items, 3, 5)) < set(sample(items, 6, 5))
    for num in (0, -1, 1.5, "ten"):
        with pytest.raises(ValueError, match=f"draw is {num!r}"):
            sample(items, num, 0)


def test_the_sequence_of_a_seed_is_fixed():
    # Of `random.Random(7).random()`: 0.3238, 0.1508, 0.6509, 0.0724, 0.5358
    assert random_order(5, 7) == [3, 1, 0, 4, 2]


@dataclass
class Row:
    id: str


def test_rows_are_made_only_once_drawn(logger, caplog):
    made = []

    def make(index):
        made.append(index)
        return None if index % 2 else Row(str(index))

    with caplog.at_level(logging.INFO, logger.name):
        rows = draw_rows(1000, make, 5, 0, "rows of f", logger)
    assert len(rows) == 5 and len(made) < 40
    assert [row.id for row in rows] == sorted((str(i) for i in made if i % 2 == 0), key=int)
    assert f"5 of 1000 rows of f, seed 0, ids {ids_hash(row.id for row in rows)}" in caplog.text
    assert ids_hash(["a", "b"]) != ids_hash(["ab"]) != ids_hash(["b", "a"])


def test_too_few_rows(logger, caplog):
    assert len(draw_rows(4, lambda index: Row(str(index)), 9, 0, "rows of f", logger)) == 4
    assert "There are 4 usable rows of f and not 9: all are taken." in caplog.text
    with pytest.raises(ValueError, match="None of the 4 rows of f can be used"):
        draw_rows(4, lambda index: None, 2, 0, "rows of f", logger)


def test_skips(logger, caplog):
    skips = Skips()
    skips.log(logger, "rows of f")
    assert not caplog.text
    skips.add("no output")
    skips.add("no history", 2)
    skips.add("nothing", 0)
    skips.log(logger, "rows of f")
    assert caplog.messages == ["3 rows of f were left out: no history (2), no output (1)."]
