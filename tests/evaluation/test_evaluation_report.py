"""What `trl-perce evaluate` prints fits into a pipe, which Rich takes to have 80 columns."""

import io

from rich.console import Console

from trl_perce.evaluation.report import print_result


def test_a_comparison_fits_into_80_columns():
    names = ("rougeL", "pir/personal", "uptake/own", "swapped/uptake/other", "judge/personalization")
    metrics = {name: {"mean": 0.3, "interval": [0.2, 0.4], "rows": 12345} for name in names}
    tests = {name: {"difference": 0.125, "interval": [-0.1, 0.25], "p_value": 0.031} for name in names}
    result = {
        "metrics": metrics,
        "baseline": {"folder": "outputs/base", "tests": tests},
        **{"rows": 210, "predicted": 200, "unanswered": 3, "trimmed": {"rows": 3, "tokens": 20}},
        **{"personal_by": "the model itself", "judge": None},
    }
    console = Console(file=io.StringIO(), width=80, highlight=False)
    print_result(result, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for name in names:  # whole, and the comparison in a table of its own
        first, second = (line.split() for line in lines if line.startswith(name))
        assert first[:5] == [name, "0.300", "[0.200,", "0.400]", "12345"]
        assert second == [name, "0.175", "+0.125", "[-0.100,", "0.250]", "0.031"]
