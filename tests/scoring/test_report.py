"""The report on scored data, against sums in plain Python."""

import json
import math
import statistics
from collections import defaultdict

import numpy as np
import pytest
from test_heatmap import SETTINGS, make_scores

from trl_perce.scoring import report as report_module
from trl_perce.scoring.report import make_report, write_report
from trl_perce.scoring.scores import TokenScores


WORDS = ["The", " linen", " and", " the", " yarn", ",", " Linen", " needle", "s", ".", "<|im_end|>"]
NAN = float("nan")


def random_rows(number=60, personas=20, shift=0.5, seed=0):
    """Rows of 3 to 11 tokens, some of them skipped, some without a persona, some with a token without PIR."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(number):
        tokens = WORDS[: int(rng.integers(3, 12))]
        pir = rng.normal(shift, 1.5, len(tokens))
        persona = f"Person {row % personas}"
        if row % 11 == 3:
            rows.append(make_scores(row, [], [], persona=persona, skipped=("too long", "no response")[row % 2]))
        elif row % 7 == 2:
            rows.append(make_scores(row, tokens, [NAN] * len(tokens), persona=""))
        else:
            if row % 5 == 0:
                pir[0] = NAN
            if row % 13 == 0:
                pir[1:] = -abs(pir[1:])
            rows.append(make_scores(row, tokens, pir, persona=persona))
        rows[-1].num_tokens, rows[-1].num_persona_tokens = 50 + row, 20 + row % 9
    return rows


def scored_pir(rows):
    return {
        row.row: [value for value in row.pir.tolist() if not math.isnan(value)]
        for row in rows
        if row.skipped is None and any(not math.isnan(value) for value in row.pir.tolist())
    }


@pytest.fixture(scope="module")
def rows():
    return random_rows()


@pytest.fixture(scope="module")
def report(rows):
    return make_report(iter(rows), SETTINGS)  # an iterator: one pass


def test_rows_and_tokens(rows, report):
    scored = [row for row in rows if row.skipped is None]
    with_pir = scored_pir(rows)
    assert report["rows"]["total"] == 60 and report["rows"]["scored"] == len(scored)
    reasons = [row.skipped for row in rows if row.skipped is not None]
    assert report["rows"]["skipped"] == {reason: reasons.count(reason) for reason in set(reasons)}
    assert report["rows"]["with_pir"] == len(with_pir)
    assert report["rows"]["without_persona"] == len(scored) - len(with_pir) > 0
    assert report["rows"]["without_personal_token"] == [row for row, pir in with_pir.items() if max(pir) <= 1]
    assert report["rows"]["negative_mean_pir"] == [row for row, pir in with_pir.items() if statistics.fmean(pir) < 0]
    assert report["rows"]["without_personal_token"] and report["rows"]["negative_mean_pir"]
    assert report["tokens"] == {
        "total": sum(len(row.tokens) for row in scored),
        "with_pir": sum(len(pir) for pir in with_pir.values()),
    }


def test_pir(rows, report):
    pir = sorted(value for values in scored_pir(rows).values() for value in values)
    assert report["pir"]["mean"] == pytest.approx(math.fsum(pir) / len(pir), abs=1e-9)
    for percent, value in report["pir"]["quantiles"].items():
        at = int(percent) / 100 * (len(pir) - 1)
        low, part = math.floor(at), at - math.floor(at)
        expected = pir[low] + part * (pir[min(low + 1, len(pir) - 1)] - pir[low])
        assert value == pytest.approx(expected, abs=1e-5)
    for entry in report["pir"]["histogram"]:
        low = -math.inf if entry["over"] is None else entry["over"]
        high = math.inf if entry["up_to"] is None else entry["up_to"]
        assert entry["tokens"] == sum(low < value <= high for value in pir)
        assert entry["share"] == pytest.approx(entry["tokens"] / len(pir))
    assert sum(entry["tokens"] for entry in report["pir"]["histogram"]) == len(pir)


def test_a_value_on_an_edge_is_in_the_bin_below():
    histogram = make_report([make_scores(0, ["a", "b", "c"], [1.0, -5.0, 5.0])], SETTINGS)["pir"]["histogram"]
    assert {entry["up_to"] for entry in histogram if entry["tokens"]} == {1.0, -5.0, 5.0}


def test_personal_share_and_its_interval_over_personas(rows, report):
    groups = defaultdict(lambda: [0, 0, 0])
    shares = []
    for row in rows:
        pir = scored_pir([row]).get(row.row)
        if pir:
            personal = sum(value > 1 for value in pir)
            shares.append(personal / len(pir))
            for index, count in enumerate((len(pir), personal, sum(value < -1 for value in pir))):
                groups[row.persona][index] += count
    tokens, personal, mirror = (sum(group[index] for group in groups.values()) for index in range(3))
    found = report["personal"]
    assert found["threshold"] == 1 and found["tokens"] == personal and found["personas"] == len(groups)
    assert found["share"] == pytest.approx(personal / tokens)
    assert found["mirror_share"] == pytest.approx(mirror / tokens)
    assert found["excess"] == pytest.approx((personal - mirror) / tokens)
    assert found["row_share"]["mean"] == pytest.approx(statistics.fmean(shares))
    assert found["row_share"]["quantiles"]["50"] == pytest.approx(statistics.median(shares))
    assert found["row_share"]["quantiles"]["0"] == min(shares) and found["row_share"]["quantiles"]["100"] == max(
        shares
    )

    # Another way to the same error: draw the personas with replacement
    rng, counts = np.random.default_rng(0), np.array(list(groups.values()))
    draws = counts[rng.integers(0, len(counts), (20_000, len(counts)))].sum(1)
    for name, parts in (("share_interval", draws[:, 1]), ("excess_interval", draws[:, 1] - draws[:, 2])):
        low, high = found[name]
        bootstrap = (parts / draws[:, 0]).std() * math.sqrt(len(counts) / (len(counts) - 1))
        assert (high - low) / 2 == pytest.approx(2.093 * bootstrap, rel=0.05)  # t of 19 degrees of freedom
    assert sum(found["share_interval"]) / 2 == pytest.approx(personal / tokens)


@pytest.mark.parametrize("freedom, student", [(9, 2.262), (16, 2.120), (30, 2.042), (1000, 1.962)])
def test_students_t(freedom, student):
    parts = np.array([0.0, 1.0] * ((freedom + 1) // 2) + [0.5] * ((freedom + 1) % 2))
    low, high = report_module._interval(parts, np.ones(freedom + 1))
    error = statistics.stdev(parts.tolist()) / math.sqrt(freedom + 1)
    assert (high - low) / 2 == pytest.approx(student * error, rel=0.01)


def test_weights_are_counted_as_the_trainer_does(rows, report):
    weights = [weight for row in rows if row.skipped is None for weight in row.weights.tolist()]
    low, high = float(np.float32(0.8)), 5.0
    found = report["weights"]
    assert found["mean"] == pytest.approx(math.fsum(weights) / len(weights))
    assert (
        found["at_min"] == pytest.approx(sum(weight <= low for weight in weights) / len(weights))
        and found["at_min"] > 0
    )
    assert found["at_max"] == pytest.approx(sum(weight >= high for weight in weights) / len(weights))
    personal = [
        weight
        for row in rows
        for weight, pir in zip(row.weights.tolist(), row.pir.tolist(), strict=True)
        if not math.isnan(pir) and pir > 1
    ]
    assert found["of_personal"] == pytest.approx(math.fsum(personal) / math.fsum(weights))
    # After a round trip through a file the lower bound is still the lower bound
    lines = [TokenScores.from_dict(json.loads(json.dumps(row.to_dict()))) for row in rows]
    assert make_report(lines, SETTINGS)["weights"]["at_min"] == found["at_min"]


def test_words():
    rows = [
        make_scores(0, ["Linen", " the", " Yarn", " the"], [2.0, 0.1, 9.0, 0.2]),
        make_scores(1, ["linen", " the", " need", "les", " linen"], [3.0, 0.1, 0.7, 0.6, NAN]),
        make_scores(2, ["LINEN", " cotton", " cotton", " cotton"], [7.0, 1.5, 1.1, 1.0]),
    ]
    words = make_report(rows, SETTINGS)["words"]
    assert words["number"] == 5
    linen, cotton = (12 / 3, 3, 3), (3.6 / 3, 3, 1)
    found = [(entry["word"], entry["mean"], entry["count"], entry["rows"]) for entry in words["by_mean"]]
    assert [entry[0] for entry in found] == ["linen", "cotton"]  # three times or more
    for entry, expected in zip(found, (linen, cotton), strict=True):
        assert entry[1:] == pytest.approx(expected, abs=1e-6)
    assert [entry["word"] for entry in words["by_sum"]] == ["linen", "yarn", "cotton", "needles"]  # and not "the"
    assert [entry["sum"] for entry in words["by_sum"]] == pytest.approx([12, 9, 3.6, 1.3], abs=1e-6)


def test_personas_and_cost(rows, report):
    lengths = [row.num_persona_tokens for row in rows if scored_pir([row])]
    assert report["persona_tokens"]["mean"] == pytest.approx(statistics.fmean(lengths))
    assert report["persona_tokens"]["quantiles"]["50"] == statistics.median(lengths)
    scored = [row for row in rows if row.skipped is None]
    tokens = sum(row.num_tokens for row in scored)
    counterfactual = sum(row.num_counterfactual_tokens for row in scored)
    cost = report["cost"]
    assert (cost["tokens"], cost["counterfactual_tokens"]) == (tokens, counterfactual)
    ratio = counterfactual / tokens
    assert cost["forward_ratio"] == pytest.approx(ratio)
    expected = {"full": ratio / 3, "full_checkpointing": ratio / 4, "lora": ratio / 2, "lora_checkpointing": ratio / 3}
    assert cost["step_ratio"] == pytest.approx(expected)


def verdict(rows):
    report = make_report(rows, SETTINGS)
    return report["verdict"]["answer"], report["verdict"]["text"], report


def rows_with(personal, mirror, number=40, personas=40):
    """Rows of 100 tokens, of which so many are personal and so many as far below zero."""
    pir = [2.0] * personal + [-2.0] * mirror + [0.0] * (100 - personal - mirror)
    return [make_scores(row, ["a "] * 100, pir, persona=f"Person {row % personas}") for row in range(number)]


def test_the_verdict_counts_what_chance_does_not_explain():
    answer, text, _ = verdict(rows_with(10, 4))
    assert answer == "yes"
    assert "10.0 % of the 4,000 tokens" in text and "4.0 %" in text and "the difference, 6.0 %" in text
    # 10 tokens of weight 2 and 90 of 0.8
    assert "21.7 % of the weight, in plain SFT they have 10.0 %" in text
    assert verdict(rows_with(10, 9))[0] == "hardly"  # as many above as below
    assert verdict(rows_with(1, 0))[0] == "hardly"
    assert verdict(rows_with(2, 0))[0] == "yes"
    assert verdict(rows_with(2, 10))[0] == "hardly"
    mixed = rows_with(10, 0, number=12, personas=12) + rows_with(0, 6, number=12, personas=12)
    for index, row in enumerate(mixed):
        row.persona = f"Person {index}"
    answer, text, report = verdict(mixed)
    assert answer == "unclear" and "score more rows" in text
    low, high = report["personal"]["excess_interval"]
    assert low < report_module.MIN_EXCESS < high


def test_the_verdict_needs_personas_and_not_rows():
    answer, text, _ = verdict(rows_with(30, 0, number=400, personas=3))
    assert answer == "cannot say" and text.startswith("3 personas are too few to tell")
    answer, text, report = verdict(rows_with(30, 0, number=1))
    assert answer == "cannot say" and text.startswith("1 persona is too few") and "30.0 % of the 100 tokens" in text
    assert report["personal"]["share_interval"] is None


def test_chance_alone_is_not_worth_it():
    rng = np.random.default_rng(1)
    rows = [make_scores(row, ["a "] * 50, rng.normal(0, 1.2, 50), persona=f"Person {row}") for row in range(300)]
    answer, _, report = verdict(rows)
    assert answer == "hardly" and report["personal"]["share"] > 0.15


@pytest.mark.parametrize(
    "rows, answer, text",
    [
        ([], "cannot say", "There are no rows."),
        ([make_scores(0, [], [], skipped="x")], "cannot say", "All 1 rows are skipped."),
        ([make_scores(0, ["a"], [NAN], persona="")] * 3, "hardly", "None of the 3 scored rows has a persona"),
    ],
)
def test_nothing_to_sum_up(rows, answer, text, tmp_path):
    found = verdict(rows)
    assert found[0] == answer and found[1].startswith(text)
    assert found[2]["pir"]["mean"] is None and found[2]["personal"]["share"] is None
    write_report(found[2], tmp_path)
    assert text in (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()[0]
    assert json.loads((tmp_path / "report.json").read_text()) == found[2]


def test_huge_and_endless_values(tmp_path):
    rows = [make_scores(0, ["a ", "b ", "c ", "d "], [3e38, 3e38, -1.0, math.inf])]
    report = make_report(rows, SETTINGS)
    assert report["tokens"] == {"total": 4, "with_pir": 3}
    assert report["pir"]["mean"] == pytest.approx(2e38, rel=1e-6)  # float32 itself ends at 3.4e38
    assert report["personal"]["tokens"] == 2
    write_report(report, tmp_path)
    assert "+2e+38" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_files(rows, report, tmp_path):
    settings = {**SETTINGS, "adapter": "out|puts/my_`adapter`"}
    report = make_report(rows + random_rows(2000, 500, shift=-0.5, seed=1), settings)
    write_report(report, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["report.json", "report.md"]
    assert json.loads((tmp_path / "new" / "folder" / "report.json").read_text()) == report
    text = (tmp_path / "new" / "folder" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("**Is this data worth PerCE? Hardly.** The persona makes ")
    assert "`out\\|puts/my_'adapter'`" in text
    negative = report["rows"]["negative_mean_pir"]
    assert len(negative) > 30
    assert f"**{len(negative):,} rows**: {', '.join(map(str, negative[:30]))} and {len(negative) - 30:,} more" in text
    for table in (block for block in text.split("\n\n") if block.startswith("|")):
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1
    assert "None" not in text.replace("None.", "") and "nan" not in text


def test_a_report_holds_few_bytes_a_token():
    import tracemalloc

    pir = np.zeros(100_000, dtype=np.float32)
    offsets = [(0, 0)] * len(pir)

    tracemalloc.start()
    make_report((make_scores(row, [""], pir, offsets=offsets) for row in range(40)), SETTINGS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000 * 12 + 20e6  # of which two rows themselves are 7e6
