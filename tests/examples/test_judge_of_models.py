"""examples/judge_of_models.py: the ranks of a grid's runs by accuracy and by what could stand in for it."""

import json

import yaml
from scipy.stats import spearmanr

import judge_of_models
from trl_perce.cli.reproduce import make_steps
from trl_perce.reproduce.settings import load_settings


ACCURACIES = {"untrained": [0.3], "ce": [0.32, 0.35, 0.31], "perce": [0.4, 0.34, 0.36]}
MARGINS = {"untrained": [0.1], "ce": [0.5, 0.4, 0.2], "perce": [0.9, 0.3, 0.7]}


def test_the_correlation_is_over_the_runs_on_their_own_task(tmp_path, capsys, monkeypatch):
    settings = {
        "output_dir": str(tmp_path / "out"),
        "models": {"tiny": {"model_name_or_path": str(tmp_path)}},
        "tasks": {
            "asked": {"benchmark": "prefeval", "path": str(tmp_path), "train_rows": 4, "test_rows": 4},
            "asked_seen": {"benchmark": "seen", "of": "asked"},
        },
        "methods": ["ce", "perce"],
        "seeds": [0, 1, 2],
        "learning_rates": [1.0e-3],
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(settings))
    steps = make_steps(load_settings(path))

    def write(step, accuracy, margin):
        step.folder.mkdir(parents=True)
        metrics = {"options/likelihood": {"mean": accuracy}, "options/pir_margin": {"mean": margin}}
        step.path.write_text(json.dumps({"result": {"metrics": metrics}}))

    for (_, task), parts in steps.untrained.items():
        own = task == "asked"
        write(parts[0], ACCURACIES["untrained"][0] if own else 0.9, MARGINS["untrained"][0] if own else -9.0)
    for (cell, task), parts in steps.evaluate.items():
        own = task == "asked"
        write(
            parts[0],
            ACCURACIES[cell.method][cell.seed] if own else 0.9,
            MARGINS[cell.method][cell.seed] if own else -9.0,
        )
    monkeypatch.setattr("sys.argv", ["judge_of_models.py", str(path), str(path)])
    judge_of_models.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| tiny | untrained | 1 | 0.300 | 0.100 |" in lines and "| tiny | ce | 3 | 0.327 | 0.367 |" in lines
    accuracies, margins = (sum(values.values(), []) for values in (ACCURACIES, MARGINS))
    assert lines[-1] == f"| tiny | 7 | {spearmanr(accuracies, margins).statistic:+.2f} |"
