"""`trl-perce compare` from a recipe and data to the report."""

import json

import numpy as np
import pytest
import yaml

from rows import write_splits
from trl_perce.cli.main import main
from trl_perce.scoring.heatmap.pieces import printable
from trl_perce.scoring.score_file import read_scores
from trl_perce.utils.files import read_lines


RECIPE = {
    **{"max_length": 160, "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"},
    **{"gradient_checkpointing": False, "bf16": False, "use_cpu": True, "use_peft": True, "learning_rate": 1e-2},
    **{"lora_target_modules": "all-linear", "output_dir": "never", "push_to_hub": True, "eval_strategy": "steps"},
}
QUICK = ["--prediction_rows", "3", "--answers", "2", "--irrelevant_questions", "3", "--max_new_tokens", "6"]


def make_row(index, split):
    thing = ("linen", "bread", "bicycles", "needles", "roses", "maps")[index % 6]
    return {
        "user": f"{split} {index % 5}",
        "persona": f"I like {thing}.",
        "prompt": [{"role": "user", "content": f"About me: {{persona}}\n\nWhat shall I buy, number {index}?"}],
        "completion": [{"role": "assistant", "content": f"Buy {thing}."}],
    }


@pytest.fixture(scope="module")
def compared(tiny_model, tmp_path_factory):
    """A comparison that was run once; a function that runs it again, and its folder."""
    folder = tmp_path_factory.mktemp("compare")
    data = write_splits(
        folder / "data", train=[make_row(i, "train") for i in range(6)], test=[make_row(i, "test") for i in range(7)]
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"model_name_or_path": tiny_model}))

    def run(*arguments, **changes):
        argv = ["--config", str(folder / "recipe.yaml"), "--dataset_name", str(data), *QUICK]
        return main(["compare", *argv, "--output_dir", str(folder / "out"), *arguments])

    assert run() == 0
    return run, folder / "out"


def test_figures_are_those_of_the_evaluations(compared):
    _, out = compared
    found = json.loads((out / "report.json").read_text())
    assert found["arms"] == ["untrained", "ce", "perce"] and found["data"]["test_users"] == 5
    assert found["verdict"]["answer"] == "too few users" and found["data"]["predicted_rows"] == 3
    measures = {one["name"]: one for one in found["measures"]}

    def folder(arm, task="own"):
        return next((out / "runs").glob(f"*/own/{arm}-*seed0/{task}"))

    for name in ("log_likelihood/other", "uptake/own"):
        values = {
            arm: np.array([line[name] for line in read_lines(folder(arm) / "metrics.jsonl")], dtype=float)
            for arm in ("ce", "perce")
        }
        for arm, own in values.items():
            assert measures[name]["arms"][arm]["mean"] == pytest.approx(np.nanmean(own))
        change = measures[name]["changes"]["perce"]
        assert change["against"] == "ce"
        assert change["difference"] == pytest.approx(np.nanmean(values["perce"] - values["ce"]))
        assert change["interval"][0] <= change["difference"] <= change["interval"][1]
    # The right answers to irrelevant questions, over all their tokens
    scores = [*read_scores(folder("perce", "irrelevant") / "scores")]
    tokens, pir = (np.concatenate([getattr(row, what) for row in scores]) for what in ("log_probs", "pir"))
    own = {name: measures[f"irrelevant/{name}"]["arms"]["perce"]["mean"] for name in ("log_likelihood", "pir")}
    assert own == pytest.approx({"log_likelihood": tokens.mean(), "pir": np.abs(pir).mean()}, rel=1e-5)
    assert measures["irrelevant/pir"]["rows"] == 3
    assert len(found["cost"]["perce"]["train_seconds"]) == 1


def test_answers_are_those_that_were_generated(compared):
    _, out = compared
    shown = json.loads((out / "report.json").read_text())["answers"]
    assert len(shown) == 2 and len({one["user"] for one in shown}) == 2
    (untrained,) = (out / "untrained").glob("*/own")
    by_row = {line["row"]: line for line in read_lines(untrained / "predictions.jsonl")}
    for one in shown:
        assert {*one["answers"]} == {"untrained", "ce", "perce"}
        own = one["answers"]["untrained"]
        assert own["text"] == by_row[one["row"]]["prediction"] and one["reference"] == by_row[one["row"]]["reference"]
        assert "".join(text for text, _ in own["pieces"]).split() == printable(own["text"]).split()
        assert all(pir is None or np.isfinite(pir) for _, pir in own["pieces"])


def test_what_is_done_stays_done(compared, capsys):
    run, out = compared
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json") if path.name != "report.json"}
    capsys.readouterr()
    assert run() == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    printed = capsys.readouterr().out
    assert "Too few users to say" in printed and "report.html" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if str(out)[:8] not in line)
    assert run("--dry_run", "--seeds", "0", "1") == 0
    assert " 14 of 22 steps are done" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "perce"], "`methods` must hold 'ce'"),
        (["--methods", "ce", "magic"], "`methods`: 'magic' is not known"),
        (["--test_rows", "1"], "`test_rows` is 1. Write 2 or more."),
        (
            ["--dataset_test_split", "held_out"],
            "no split 'held_out'; it has 'train', 'test'. `trl-perce prepare` makes",
        ),
        (["--learning_rates", "1"], "learning_rates"),
    ],
)
def test_bad_input(compared, arguments, message, capsys):
    run, _ = compared
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_users_in_both_splits_are_said(tiny_model, tmp_path, capsys):
    rows = [make_row(index, "test") for index in range(4)]
    data = write_splits(tmp_path / "data", train=rows, test=rows)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"model_name_or_path": tiny_model}))
    argv = [
        "--config",
        str(tmp_path / "recipe.yaml"),
        "--dataset_name",
        str(data),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(["compare", *argv, "--dry_run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 of the held-out users, such as 'test 0', are in the training data" in printed
