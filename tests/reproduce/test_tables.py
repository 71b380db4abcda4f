"""The tables of a grid, against arithmetic by hand."""

import json
import math
import random
import re
import warnings

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.text import Text

from trl_perce.reproduce.frontier import draw_frontiers, write_frontiers
from trl_perce.reproduce.layout import make_tables
from trl_perce.reproduce.number import make_number, rate_text
from trl_perce.reproduce.plots import draw_plots
from trl_perce.reproduce.results import Condition, Results, baseline_of
from trl_perce.reproduce.tables import NEEDS, TITLES, write_tables
from trl_perce.utils.markdown import code, escape
from trl_perce.utils.statistics import ratio_interval


SETTINGS = {
    "models": {"small": {"model_name_or_path": "org/small"}, "big|model": {"model_name_or_path": "org/big"}},
    "tasks": {
        "reviews": {"benchmark": "histories"},
        "posts": {"benchmark": "longlamp"},
        "headlines": {"benchmark": "lamp"},
        "aloe": {"benchmark": "aloe"},
        "hotpotqa": {"benchmark": "general_qa"},
    },
    "methods": ["ce", "perce"],
    "seeds": [0, 1],
    "training": {"num_train_epochs": 2, "warmup_steps": 0.04},
}
CE = Condition("small", "reviews", "ce", 1e-3, None)
PERCE = Condition("small", "reviews", "perce", 1e-3, (0.8, 5.0))


def record(metric, value, **changes):
    own = {"model": "small", "train_task": "reviews", "task": "reviews", "method": "ce", "learning_rate": 1e-3}
    own |= {"clip": None, "seed": 0, "metric": metric, "value": value, "interval": None, "rows": 40}
    if changes.get("method", "ce").startswith("perce"):
        own["clip"] = [0.8, 5.0]
    if changes.get("method") == "untrained":
        own |= {"train_task": None, "learning_rate": None, "seed": None}
    return own | changes


def records_of(metric, values, **changes):
    return [record(metric, value, seed=seed, **changes) for seed, value in enumerate(values)]


def parts_of(records, number, settings=SETTINGS, quoted=None):
    return make_tables(Results(records, settings), settings, quoted)[number]


def find(part, **names):
    """The line of a part with these cells."""
    names = {name.replace("_", " "): value for name, value in names.items()}
    (line,) = (line for line in part.lines if all(line[name] == value for name, value in names.items()))
    return line


def small_grid(seeds=(0, 1), rates=(1e-4, 1e-3), model="big|model"):
    """Some of everything: every table of one model is run."""
    random.seed(0)
    records = []
    runs = [dict(train_task=None, method="untrained", learning_rate=None, clip=None, seed=None)]
    for train_task in ("reviews", "posts", "headlines"):
        for seed in seeds:
            for rate in rates:
                runs.append(dict(train_task=train_task, method="ce", learning_rate=rate, clip=None, seed=seed))
                for clip in ((0.8, 5.0), (0.5, 5.0)):
                    own = dict(method="perce", learning_rate=rate, clip=list(clip), seed=seed)
                    runs.append(dict(train_task=train_task) | own)
    for run in runs:
        tests = {
            "reviews": ["rougeL", "meteor", "judge/personalization", "judge/fluency", "uptake", "uptake_swapped"],
            "posts": ["rougeL", "meteor", "log_likelihood/personal", "log_likelihood/other"],
            "headlines": ["rouge1", "rougeL"],
            "aloe": [*(f"alignment@{k}" for k in range(1, 11)), "alignment@6-10", "n_ir"],
            "hotpotqa": ["em", "f1"],
        }
        if run["train_task"] is None:
            tests["reviews"] += ["tokens/with_persona", "tokens/without_persona"]
        for task, metrics in tests.items():
            for metric in metrics:
                value = random.random() * (-1 if metric.startswith("log") else 1)
                interval = [value - 0.1, value + 0.1]
                run_of = {"model": model, "task": task, "interval": interval}
                records.append(record(metric, value, **run_of | run))
    return records


# Numbers


def test_interval_of_a_ratio():
    assert ratio_interval(np.array([1.0]), np.array([2.0])) is None
    # Ratio 0.32; residuals ±0.036; error √(2/1 · 2 · 0.036²) / 0.5 = 0.144
    low, high = ratio_interval(np.array([0.10, 0.06]), np.array([0.2, 0.3]))
    assert (low + high) / 2 == pytest.approx(0.32) and (high - low) / 2 == pytest.approx(12.7062 * 0.144, rel=1e-5)


def test_a_figure_over_seeds():
    intervals = [[0.10, 0.30], [0.13, 0.33], [0.16, 0.36]]
    values = [0.20, 0.23, 0.26]
    records = [
        record("rougeL", value, seed=seed, interval=interval, rows=40 + seed)
        for seed, (value, interval) in enumerate(zip(values, intervals, strict=True))
    ]
    number = Results(records, {}).number(CE, "reviews", "rougeL")
    assert number.mean == pytest.approx(0.23) and number.sd == pytest.approx(0.03)
    half = 4.30265273 * 0.03 / math.sqrt(3)
    assert number.seed_interval == pytest.approx([0.23 - half, 0.23 + half])
    assert number.row_interval == pytest.approx([0.13, 0.33])
    assert (number.seeds, number.rows, number.without_value) == (3, [40, 42], 0)
    assert number.text == f"23.00 [13.00, 33.00] ± {100 * half:.2f}" == "23.00 [13.00, 33.00] ± 7.45"
    assert Results(records, {}).number(CE, "posts", "rougeL") is None


def test_a_figure_of_one_seed_says_nothing_of_seeds():
    number = Results([record("log_likelihood/personal", -2.9)], {}).number(CE, "reviews", "log_likelihood/personal")
    assert (number.sd, number.seed_interval, number.row_interval) == (None, None, None)
    assert number.text == "−2.900"


def test_a_run_without_an_interval_leaves_none():
    records = [record("rougeL", 0.2, interval=[0.1, 0.3]), record("rougeL", 0.3, seed=1)]
    assert Results(records, {}).number(CE, "reviews", "rougeL").row_interval is None


def test_runs_without_a_value_are_counted_and_left_out():
    nan = float("nan")
    records = [record("judge/fluency", nan, rows=0), record("judge/fluency", 4.0, seed=1, interval=[3.0, 5.0])]
    records += [record("judge/coherence", nan), record("judge/coherence", nan, seed=1)]
    results = Results(records, {})
    number = results.number(CE, "reviews", "judge/fluency")
    assert (number.mean, number.seeds, number.rows, number.without_value) == (4.0, 1, [40, 40], 1)
    assert number.text == "4.00 [3.00, 5.00] (1 of 2 runs)"
    number = results.number(CE, "reviews", "judge/coherence")
    assert (number.mean, number.seeds, number.rows, number.without_value) == (None, 0, [], 2)
    assert number.text == "no value"


def test_gain_is_a_ratio_of_means_over_shared_seeds():
    records = records_of("rougeL", [0.2, 0.3, 0.9]) + records_of("rougeL", [0.30, 0.36], method="perce")
    gain = Results(records, {}).gain(PERCE, CE, "reviews", "rougeL")
    assert gain.mean == pytest.approx(0.66 / 0.50 - 1) and gain.seeds == 2  # the third seed of CE has no pair
    assert gain.seed_interval == pytest.approx([0.32 - 12.7062 * 0.144, 0.32 + 12.7062 * 0.144], rel=1e-5)
    assert gain.text == "+32.0 % ± 183.0"


def test_gain_of_nats_is_a_difference():
    name = "log_likelihood/personal"
    records = records_of(name, [-2.0, -2.2]) + records_of(name, [-1.5, -1.9], method="perce")
    gain = Results(records, {}).gain(PERCE, CE, "reviews", name)
    assert gain.mean == pytest.approx(0.4)
    half = 12.7062 * np.std([0.5, 0.3], ddof=1) / math.sqrt(2)
    assert gain.seed_interval == pytest.approx([0.4 - half, 0.4 + half]) and gain.text.startswith("+0.400 ± ")


def test_the_untrained_model_has_no_seed_and_pairs_with_all():
    untrained = Condition("small", None, "untrained", None, None)
    results = Results(records_of("rougeL", [0.2, 0.3]) + [record("rougeL", 0.2, method="untrained")], {})
    gain = results.gain(untrained, CE, "reviews", "rougeL")
    assert gain.mean == pytest.approx(0.4 / 0.5 - 1) and gain.seeds == 2


def test_no_gain_without_a_pair_or_over_nothing():
    records = [record("rougeL", 0.2, seed=5), record("rougeL", 0.3, method="perce")]
    records += [record("meteor", 0.0), record("meteor", 0.3, method="perce")]
    results = Results(records, {})
    assert results.gain(PERCE, CE, "reviews", "rougeL") is None
    assert results.gain(PERCE, CE, "reviews", "meteor") is None
    assert results.gain(PERCE, None, "reviews", "rougeL") is None


def test_a_seed_whose_baseline_is_zero_does_not_break_a_gain():
    gain = make_number("rougeL", "gain", [0.1, 0.1], [0.0, 0.2])
    assert gain.mean == pytest.approx(1.0) and math.isfinite(gain.sd) and np.isfinite(gain.seed_interval).all()


@pytest.mark.parametrize("rate, text", [(2e-4, "2e-4"), (1.5e-5, "1.5e-5"), (1e-3, "1e-3"), (0.1, "1e-1")])
def test_rates_are_written_as_in_papers(rate, text):
    assert rate_text(rate) == text


# The learning rate


def validation(metric, by_rate, **changes):
    task = changes.pop("task", "reviews")
    return [
        record(metric, value, learning_rate=rate, seed=seed, task=f"{task}:validation", **changes)
        for rate, values in by_rate.items()
        for seed, value in enumerate(values)
    ]


def results_by_rate(by_rate, **changes):
    return [record("rougeL", value, learning_rate=rate, **changes) for rate, value in by_rate.items()]


def test_learning_rate_is_chosen_on_validation_rows_and_not_on_test_rows():
    records = results_by_rate({1e-4: 0.9, 1e-3: 0.1}) + validation("rougeL", {1e-4: [0.2, 0.4], 1e-3: [0.35, 0.35]})
    # The lower loss would be the other one: overlap goes first
    records += validation("nll", {1e-4: [1.0], 1e-3: [2.0]})
    (part,) = parts_of(records, 1)
    assert [line["learning rate"] for line in part.lines] == ["1e-3"]
    assert part.lines[0]["ROUGE-L"].mean == pytest.approx(0.1)
    note = "Of 1e-4, 1e-3 the one with the highest mean ROUGE-L over 2 seeds on validation rows: CE 1e-3."
    assert part.notes == [note]


def test_without_overlap_the_lowest_loss_chooses():
    records = results_by_rate({1e-4: 0.9, 1e-3: 0.1}) + validation("nll", {1e-4: [2.0], 1e-3: [1.5]})
    assert [line["learning rate"] for line in parts_of(records, 1)[0].lines] == ["1e-3"]


def test_only_seeds_that_all_rates_have_choose():
    values = {1e-4: [0.3, 0.9], 1e-3: [0.4]}  # over all seeds 1e-4 would be ahead
    records = results_by_rate({1e-4: 0.9, 1e-3: 0.1}) + validation("rougeL", values)
    (choice,) = Results(records, {}).choices["small", "reviews"].values()
    assert (choice.rate, choice.seeds, choice.rates) == (1e-3, 1, [1e-4, 1e-3])


def test_without_validation_of_all_rates_each_has_its_own_line():
    records = results_by_rate({1e-4: 0.9, 1e-3: 0.1}) + results_by_rate({1e-4: 0.5, 1e-3: 0.6}, method="perce")
    records += validation("rougeL", {1e-3: [0.5]}) + validation("rougeL", {1e-4: [0.5], 1e-3: [0.4]}, method="perce")
    (part,) = parts_of(records, 1)
    assert [(line["method"], line["learning rate"]) for line in part.lines] == [
        ("CE", "1e-4"),
        ("CE", "1e-3"),
        ("PerCE", "1e-4"),
    ]
    assert find(part, method="PerCE")["ROUGE-L over CE"].mean == pytest.approx(0.5 / 0.9 - 1)  # CE of the same rate
    assert "CE: each learning rate in its own line" in part.notes[1] and "`reviews:validation`" in part.notes[1]


def test_the_baseline_is_ces_only_line_or_the_one_with_the_same_rate():
    other = Condition("small", "reviews", "ce", 1e-4, None)
    untrained = Condition("small", None, "untrained", None, None)
    assert baseline_of(PERCE, [other, PERCE]) is other
    assert baseline_of(PERCE, [other, CE, PERCE]) is CE
    assert baseline_of(untrained, [untrained, CE, other]) is None
    assert baseline_of(untrained, [untrained, CE]) is CE
    assert baseline_of(CE, [CE]) is None


# Tables


def test_table_1_has_overlap_and_use_beside_each_other():
    records = records_of("rougeL", [0.10, 0.12]) + records_of("rougeL", [0.11, 0.13], method="perce")
    records += records_of("uptake", [0.6, 0.7]) + records_of("uptake", [1.1, 1.2], method="perce")
    records += records_of("log_likelihood/personal", [-1.7, -1.7], method="perce")
    (part,) = parts_of(records, 1)
    line = find(part, method="PerCE")
    assert part.title == "`small` on `reviews`"
    assert line["ROUGE-L"].mean == pytest.approx(0.12) and line["uptake"].mean == pytest.approx(1.15)
    assert line["ROUGE-L over CE"].mean == pytest.approx(0.24 / 0.22 - 1)
    assert line["uptake over CE"].mean == pytest.approx(0.5)
    assert line["log P personal over CE"] is None and line["METEOR"] is None
    assert "METEOR" not in part.columns and (line["seeds"], line["rows"]) == (2, 40)
    assert find(part, method="CE")["log P personal"] is None


def test_table_1_has_the_controls_with_another_persona_and_what_training_logged():
    records = [record("uptake", 0.6), record("uptake_swapped", 0.2), record("uptake_of_swapped", 0.5)]
    records += [record("train/weight/mean", 1.25, rows=0)]
    _, swapped, training = parts_of(records, 1)
    assert swapped.lines[0]["uptake of the right persona, swapped"].mean == 0.2
    assert swapped.lines[0]["uptake of the other persona, swapped"].mean == 0.5
    assert training.lines[0]["train/weight/mean"].text == "1.2500" and training.lines[0]["rows"] is None


def test_table_2_mean_and_variance_over_shared_rates():
    ce = {1e-4: [0.10, 0.14], 5e-4: [0.12, 0.16], 1e-3: [0.20, 0.21]}
    perce = {1e-4: [0.20, 0.20], 1e-3: [0.22, 0.26], 5e-3: [0.1, 0.1]}
    records = [
        record("rougeL", value, learning_rate=rate, seed=seed, method=method)
        for method, by_rate in (("ce", ce), ("perce", perce))
        for rate, values in by_rate.items()
        for seed, value in enumerate(values)
    ]
    (part,) = parts_of(records, 2)
    line = find(part, method="CE")
    assert line["5e-4"].mean == pytest.approx(0.14) and line["5e-3"] is None
    # Shared are 1e-4 and 1e-3. Seed 0: 0.10 and 0.20, seed 1: 0.14 and 0.21
    assert line["mean"].mean == pytest.approx((0.15 + 0.175) / 2)
    assert line["variance"].mean == pytest.approx((0.1**2 / 2 + 0.07**2 / 2) / 2)
    assert line["variance"].text.startswith(f"{(0.1**2 / 2 + 0.07**2 / 2) / 2 * 1e4:.2f} ± ")  # in points squared
    assert find(part, method="PerCE")["variance"].mean == pytest.approx((0.02**2 / 2 + 0.06**2 / 2) / 2)
    assert "2 learning rates that all methods have (1e-4, 1e-3)" in part.notes[0]


def test_table_2_without_two_shared_rates_has_no_mean():
    records = results_by_rate({1e-4: 0.1, 1e-3: 0.2}) + results_by_rate({1e-3: 0.3}, method="perce")
    (part,) = parts_of(records, 2)
    assert find(part, method="CE")["mean"] is None and "fewer than two" in part.notes[0]


def test_transfer_of_the_main_model_and_of_others():
    records = []
    for model, shift in (("small", 0.0), ("big|model", 0.3)):
        for train_task, own in (("reviews", 0.2), ("posts", 0.1)):
            for task, value in (("reviews", own), ("posts", own + 0.05)):
                change = {"model": model, "train_task": train_task, "task": task}
                records.append(record("rougeL", value + shift, **change))
    (part,) = parts_of(records, 3)
    assert part.title == "ROUGE-L: `small`"
    assert find(part, trained_on="`reviews`")["`posts`"].mean == pytest.approx(0.25)
    assert find(part, trained_on="`posts`")["`reviews`"].mean == pytest.approx(0.1)
    (part,) = parts_of(records, 8)
    assert part.title == "ROUGE-L: `big\\|model`"
    assert find(part, trained_on="`posts`")["`posts`"].mean == pytest.approx(0.45)
    same = [found for found in records if found["train_task"] == found["task"]]
    assert parts_of(same, 3) == []


def test_aloe_lamp_and_question_answering_go_to_their_tables():
    records = [record("rouge1", 0.3, train_task="headlines", task="headlines")]
    records += [record(f"alignment@{k}", 2 + k / 10, task="aloe") for k in range(1, 11)]
    records += [record("alignment@6-10", 2.8, task="aloe"), record("n_ir", 0.0123, task="aloe")]
    records += [record("f1", 0.4, task="hotpotqa"), record("judge/personalization", 3.5)]
    tables = make_tables(Results(records, SETTINGS), SETTINGS)
    assert tables[5][0].lines[0]["ROUGE-1"].text == "30.00"
    aloe = tables[4][0]
    assert aloe.columns == [
        *("method", "trained on", "learning rate", "k = 6", "k = 7", "k = 8", "k = 9", "k = 10"),
        *("mean of 6 to 10", "N-IR", "seeds", "rows"),
    ]
    assert (aloe.lines[0]["k = 7"].text, aloe.lines[0]["N-IR"].text) == ("2.70", "0.012")
    assert tables[11][0].lines[0]["F1"].text == "40.00" and tables[11][0].lines[0]["trained on"] == "`reviews`"
    assert tables[10][0].lines[0]["judge/personalization"].text == "3.50"
    assert all(not tables[number] for number in (1, 2, 3, 6, 8, 9, 12))


def test_table_6_and_7():
    records = [
        record("tokens/with_persona", 975.12, method="untrained"),
        record("tokens/without_persona", 64.5, method="untrained"),
    ]
    quoted = {(6, "prompt_tokens_with_persona"): 975.1, (7, "num_train_epochs"): 3}
    tables = make_tables(
        Results(records, SETTINGS), SETTINGS, lambda table, metric, **cell: quoted.get((table, metric))
    )
    line = tables[6][0].lines[0]
    assert (line["task"], line["with persona"].text, line["rows"]) == ("`reviews`", "975.1", 40)
    assert (line["with persona, paper"].text, line["without persona, paper"]) == ("paper: 975.1 (quoted)", None)
    settings = {line["setting"]: line for line in tables[7][0].lines}
    assert settings["`training.num_train_epochs`"]["ours"] == "`2`"
    assert settings["`training.num_train_epochs`"]["paper"].text == "paper: 3 (quoted)"
    assert settings["`models.big\\|model.model_name_or_path`"]["ours"] == '`"org/big"`'
    assert settings["`methods`"]["paper"] is None


def test_table_12_has_all_clip_ranges_and_the_others_the_papers():
    records = [record("rougeL", 0.2)]
    records += [record("rougeL", 0.2 + m / 10, method="perce", clip=[m, 5.0]) for m in (0.5, 0.8)]
    records += [record("train/weight/mean", m + 0.2, method="perce", clip=[m, 5.0], rows=0) for m in (0.5, 0.8)]
    tables = make_tables(Results(records, SETTINGS), SETTINGS)
    assert [(line["method"], line["clip"]) for line in tables[1][0].lines] == [("CE", None), ("PerCE", "0.8 to 5")]
    (part,) = tables[12]
    assert [line["clip"] for line in part.lines] == [None, "0.5 to 5", "0.8 to 5"]
    assert find(part, clip="0.5 to 5")["ROUGE-L over CE"].mean == pytest.approx(0.25)
    assert find(part, clip="0.5 to 5")["train/weight/mean"].mean == pytest.approx(0.7)


def test_the_papers_figures_are_asked_for_by_cell_and_marked():
    asked = []

    def quoted(**cell):
        asked.append(cell)
        return 68.04 if cell["metric"] == "meteor_gain" and cell["method"] == "perce" else None

    records = [record("meteor", 0.2), record("meteor", 0.3, method="perce")]
    records += [record("meteor", 0.2, learning_rate=1e-4), record("meteor", 0.2, method="perce", clip=[0.5, 5.0])]
    (part,) = parts_of(records, 1, quoted=quoted)
    assert find(part, method="PerCE")["METEOR over CE, paper"].text == "paper: 68.0 (quoted)"
    assert "METEOR, paper" not in part.columns  # none is quoted
    own = {"model": "small", "train_task": "reviews", "task": "reviews", "method": "perce"}
    assert {"table": 1, "metric": "meteor", **own} in asked
    assert {"table": 2, "metric": "meteor", **own, "method": "ce", "learning_rate": 1e-4} in asked
    assert {"table": 12, "metric": "meteor", **own, "clip": (0.5, 5.0)} in asked


def test_methods_tasks_and_models_stand_in_the_order_of_the_settings():
    records = [
        record("rougeL", 0.1, method=method, task=task, train_task=task, model=model)
        for model in ("big|model", "small")
        for task in ("posts", "reviews")
        for method in ("own_method", "perce", "ce")
    ]
    parts = parts_of(records, 1)
    titles = [f"`{model}` on `{task}`" for model in ("small", "big\\|model") for task in ("reviews", "posts")]
    assert [part.title for part in parts] == titles
    assert [line["method"] for line in parts[0].lines] == ["CE", "PerCE", "`own_method`"]


# Files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    return folder, write_tables(small_grid(), SETTINGS, folder)


def test_markdown_has_every_table_and_as_many_cells_in_each_line(written):
    folder, _ = written
    text = (folder / "tables.md").read_text(encoding="utf-8")
    assert [int(number) for number in re.findall(r"^## Table (\d+)\.", text, re.M)] == list(TITLES)
    assert re.findall(r"^## Table (\d+).*\n\nNot run", text, re.M) == ["8", "9"]  # those of further models
    assert "nan" not in text and "None" not in text
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(blocks) > 20
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
        assert re.fullmatch(r"\| --- (\| ---: )+\|", block.splitlines()[1])
    for name in re.findall(r"^!\[.*\]\((.*)\)$", text, re.M):
        assert (folder / name).is_file()


def test_json_is_valid_and_has_the_numbers_of_the_markdown(written):
    folder, _ = written
    text = (folder / "tables.json").read_text(encoding="utf-8")
    loaded = json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert json.loads(json.dumps(loaded)) == loaded and loaded["settings"] == SETTINGS
    assert list(loaded["tables"]) == [str(number) for number in TITLES]
    records = small_grid()
    line = loaded["tables"]["1"]["parts"][0]["lines"][1]
    assert (line["method"], line["learning rate"]) == ("CE", "1e-4")
    own = [
        found["value"] for found in records
        if (found["train_task"], found["task"], found["method"]) == ("reviews", "reviews", "ce")
        and (found["learning_rate"], found["metric"]) == (1e-4, "rougeL")
    ]  # fmt: skip
    assert len(own) == 2 and line["ROUGE-L"]["mean"] == pytest.approx(sum(own) / 2)
    assert line["ROUGE-L"]["sd"] == pytest.approx(abs(own[0] - own[1]) / math.sqrt(2))
    markdown = (folder / "tables.md").read_text(encoding="utf-8")
    assert f"| CE | 1e-4 | – | {100 * sum(own) / 2:.2f} [" in markdown


def test_each_table_with_something_to_draw_has_a_picture(written):
    folder, paths = written
    names = {path.name for path in paths}
    assert {path.name for path in folder.iterdir()} == names
    expected = {f"table{table}-1-big-model.png" for table in (1, 2, 3, 4, 5, 12)}
    assert names == expected | {"tables.md", "tables.json"}
    for name in expected:
        assert imread(folder / name)[..., :3].std() > 0.02


def test_nothing_was_run(tmp_path):
    paths = write_tables([], {}, tmp_path)
    assert (
        [path.name for path in paths]
        == ["tables.md", "tables.json"]
        == sorted((path.name for path in tmp_path.iterdir()), reverse=True)
    )
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    for number, needs in NEEDS.items():
        assert f"## Table {number}. {TITLES[number]}\n\nNot run. The grid's YAML needs {needs}.\n" in text
    loaded = json.loads((tmp_path / "tables.json").read_text())
    assert not any(table["run"] or table["plots"] for table in loaded["tables"].values())


def test_only_the_tables_that_were_asked_for(tmp_path):
    records = [record("rougeL", 0.2), record("tokens/with_persona", 100.0)]
    paths = write_tables(records, SETTINGS, tmp_path, tables=[6, 12])
    assert [path.name for path in paths] == ["tables.md", "tables.json"]
    assert list(json.loads((tmp_path / "tables.json").read_text())["tables"]) == ["6", "12"]


def test_a_judge_without_any_value_is_told(tmp_path):
    records = [record("judge/fluency", float("nan"), rows=0), record("judge/coherence", 4.0)]
    write_tables(records, SETTINGS, tmp_path, tables=[10])
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "| CE | 1e-3 | 4.00 | no value | 0 to 1 | 40 |" in text
    assert "Runs without a value (NaN) are left out of means" in text and "One seed:" in text
    (line,) = json.loads((tmp_path / "tables.json").read_text())["tables"]["10"]["parts"][0]["lines"]
    assert line["judge/fluency"]["mean"] is None and line["judge/fluency"]["without_value"] == 1


def test_names_are_escaped():
    assert code("a|b`c") == "`a\\|b'c`"
    assert escape("a|b_c*\n<d>") == "a\\|b\\_c\\* \\<d\\>"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"value": None}, "Record 1: `value` is None"),
        ({"value": math.inf}, "Record 1: `value` is inf"),
        ({"interval": [0.3]}, r"Record 1: `interval` is \[0.3\]. Write \[low, high\]"),
        ({"clip": [5.0, 0.8]}, "Record 1: `clip` is"),
        ({"seed": 0}, "Record 1: there is another one of 'rougeL' on 'reviews' with the same seed"),
    ],
)
def test_wrong_records_are_told(change, message, tmp_path):
    (tmp_path / "tables.md").write_text("earlier")
    with pytest.raises(ValueError, match=message):
        write_tables([record("rougeL", 0.2), record("rougeL", 0.2, seed=1) | change], SETTINGS, tmp_path)
    assert (tmp_path / "tables.md").read_text() == "earlier"


def test_missing_keys_and_unknown_tables_are_told(tmp_path):
    with pytest.raises(ValueError, match="Record 0 has no 'interval', 'rows'. A record has model"):
        broken = {key: value for key, value in record("rougeL", 0.2).items() if key not in ("interval", "rows")}
        write_tables([broken], SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="there is no table 13. Write numbers from 1 to 12"):
        write_tables([], SETTINGS, tmp_path, tables=[13])


# Pictures


def text_boxes(figure):
    """Text → its box, of what is drawn: the labels of ticks outside of an axis are not."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    hidden = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        hidden |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    return [(text, text.get_window_extent(renderer).extents) for text in texts if text not in hidden]


@pytest.mark.parametrize("rates", [(1e-4,), (2e-6, 5e-6, 1e-5, 2e-5, 5e-5)], ids=["one rate", "five rates"])
def test_pictures_have_no_clipped_and_no_overlapping_text(rates):
    records = small_grid(seeds=(0,), rates=rates, model="organisation/model $with$ a_name")
    long = {"posts": "abstract_generation_temporal", "headlines": "lamp"}
    for found in records:
        found["task"] = long.get(found["task"], found["task"])
        found["train_task"] = long.get(found["train_task"], found["train_task"])
    tables = [3, 4] if len(rates) > 1 else [1, 3, 12]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = list(draw_plots(Results(records, {}), [*tables, 2]))
    assert [table for table, _, _ in drawn] == ([*tables, 2] if len(rates) > 1 else tables)
    for table, _, figure in drawn:
        width, height = figure.canvas.get_width_height()
        boxes = text_boxes(figure)
        assert len(boxes) > 8
        for index, (text, (left, bottom, right, top)) in enumerate(boxes):
            assert left >= 0 and bottom >= 0 and right <= width and top <= height, (table, text)
            assert text.get_fontsize() >= 7
            for other, (left2, bottom2, right2, top2) in boxes[:index]:
                across, along = min(right, right2) - max(left, left2), min(top, top2) - max(bottom, bottom2)
                # The box of a text that is turned by 35 degrees is larger than what is written
                turned = {text.get_rotation(), other.get_rotation()} - {0, 90}
                assert turned or across <= 1 or along <= 1, (table, text, other)


def test_methods_of_the_transfer_share_their_lines():
    records = [
        record("rougeL", value, method=method, train_task=train_task, task=task)
        for method, train_task, task, value in (
            ("ce", "posts", "posts", 0.1),
            ("ce", "posts", "reviews", 0.2),
            ("perce", "reviews", "reviews", 0.3),
        )
    ]
    ((_, _, figure),) = draw_plots(Results(records, SETTINGS), [3])
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["reviews", "posts"]
    cells = {
        name: {(round(text.get_position()[0]), round(text.get_position()[1])): text.get_text() for text in panel.texts}
        for name, panel in (("CE", left), ("PerCE", right))
    }
    assert cells["CE"] == {(0, 0): "–", (1, 0): "–", (0, 1): "20.00", (1, 1): "10.00"}
    assert cells["PerCE"] == {(0, 0): "30.00", (1, 0): "–", (0, 1): "–", (1, 1): "–"}


def test_the_frontier_has_each_method_where_it_is(tmp_path):
    places = {("perce", 1e-3): (-0.05, 0.2), ("ce_faster", 2e-3): (0.01, 0.04), ("ce_longer", 1e-3): (-0.02, 0.03)}

    def compared(task, trained="chats", **changes):
        return [
            {
                **{"model": "org/small", "train_task": trained, "task": task, "method": method, "learning_rate": rate},
                **{
                    "clip": [0.8, 5.0],
                    "metric": metric,
                    "difference": value,
                    "interval": [value - 0.01, value + 0.02],
                },
                **changes,
            }
            for (method, rate), place in places.items()
            for metric, value in zip(("log_likelihood/other", "log_likelihood/personal"), place, strict=True)
        ]

    own = compared("chats") + compared("posts") + compared("chats", difference=None, interval=None, method="ce")
    ((name, figure),) = draw_frontiers(own, ["ce", "ce_faster", "ce_longer"])
    (panel,) = figure.axes  # the other task is not what was trained on
    marks = {line.get_label(): line.get_xydata().tolist() for line in panel.lines if line.get_marker() != "None"}
    assert marks == {
        "CE": [[0, 0]],
        "PerCE": [[-0.05, 0.2]],
        "ce_faster": [[0.01, 0.04]],
        "ce_longer": [[-0.02, 0.03]],
    }
    hollow = {line.get_label() for line in panel.lines if line.get_markerfacecolor() == "white"}
    assert hollow == {"CE", "ce_faster", "ce_longer"}
    assert [*draw_frontiers(own[:2], [])] == []  # one method alone
    narrow = compared("chats", clip=[0.8, 3.0])[:2]
    ((_, figure),) = draw_frontiers(own + narrow, [])
    labels = {line.get_label() for line in figure.axes[0].lines}
    assert {"PerCE 1e-3 [0.8, 5]", "PerCE 1e-3 [0.8, 3]"} <= labels
    assert write_frontiers(own, tmp_path, []) == [tmp_path / name] and imread(tmp_path / name).shape[2] == 4
