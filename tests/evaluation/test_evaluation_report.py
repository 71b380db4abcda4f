"""What `trl-perce evaluate` prints fits into a pipe, which Rich takes to have 80 columns."""

import io

import pytest
from rich.console import Console

from trl_perce.evaluation.report import print_result


SHOWN = ("rougeL", "uptake/own", "uptake/other", "log_likelihood/personal", "pir/personal", "judge/personalization")


def printed(interval=(0.2, 0.4), baseline=None, users=70, **changes) -> list[str]:
    names = (*SHOWN, "rouge1", "log_likelihood/personal_swapped", "swapped/num_tokens")
    metrics = {name: {"mean": 0.3, "interval": list(interval), "rows": 12345} for name in names}
    metrics["uptake/own"] = {"mean": 2.1, "interval": [1.9, 2.3], "rows": 12345}
    result = {
        "metrics": {**metrics, **changes},
        "baseline": baseline,
        **{
            "rows": 210,
            "users": users,
            "too_long": 10,
            "predicted": 200,
            "unanswered": 3,
            "trimmed": {"rows": 3, "tokens": 20},
        },
        **{"personal_by": "the model itself", "judge": None},
    }
    console = Console(file=io.StringIO(), width=80, highlight=False)
    print_result(result, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    return lines


def table(lines: list[str]) -> dict[str, list[str]]:
    return {
        words[0]: words[1:] for words in (line.split() for line in lines if line.startswith("  ")) if words[0] in SHOWN
    }


def test_the_answer_comes_first_and_the_table_is_short():
    lines = printed()
    assert lines[0] == "Personal? Yes: 2.10 words of its persona in an answer, 0.30 of another's."
    assert lines[1] == "210 rows of 70 users. Means, with 95 % intervals over users."
    cells = {name: ["0.300", "[0.200,", "0.400]"] for name in SHOWN}
    assert table(lines) == {**cells, "uptake/own": ["2.100", "[1.900,", "2.300]"]}
    assert not any("rouge1" in line or "swapped/num_tokens" in line for line in lines)  # in the report


@pytest.mark.parametrize(
    "own, answer",
    [
        ({"mean": 0.5, "interval": [0.39, 0.6]}, "Unclear"),
        ({"mean": 0.3, "interval": [0.2, 0.4]}, "No"),
        ({"mean": 0.5, "interval": None}, "Cannot say"),
    ],
)
def test_what_the_intervals_do_not_tell_apart_is_not_told(own, answer):
    lines = printed(users=0, **{"uptake/own": {**own, "rows": 210}})
    assert lines[0].startswith(f"Personal? {answer}") and lines[1].startswith("210 rows. Means")


def test_a_comparison():
    tests = {name: {"difference": 0.125, "interval": [-0.1, 0.25], "p_value": 0.031} for name in SHOWN}
    tests["pir/personal"] = {"difference": 0.125, "interval": [0.05, 0.25], "p_value": 0.031}
    tests["rougeL"] = {"difference": -100.5, "interval": [-123.456, -100.456], "p_value": 0.031}
    lines = printed(baseline={"folder": "outputs/base", "tests": tests})
    assert lines[0] == "Against the baseline: higher: pir/personal; lower: rougeL; no clear change in 4 "
    assert table(lines)["uptake/other"] == ["0.300", "0.175", "+0.125", "[-0.100,", "0.250]", "0.031"]
