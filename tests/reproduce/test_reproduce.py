import contextlib
import json
import math
import os
import pty
import signal
import subprocess
import sys

import nltk
import pytest
import yaml

from rows import write_lines
from trl_perce.cli.main import main
from trl_perce.reproduce.steps import prompt_lengths, read_log, run_command


TRAINING = {
    **{"max_length": 96, "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"},
    **{
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "use_peft": True,
        "lora_target_modules": "all-linear",
    },
}
EVALUATION = {"max_new_tokens": 8, "temperature": 0.0, "metrics": ["rouge"], "swap_persona": True}


def write_histories(folder, words, rows=6):
    folder.mkdir()
    for split in ("train", "test"):
        lines = [
            {
                "id": f"{split}{index}",
                "user": f"{split} user {index}",
                "history": [f"I like {words[index % len(words)]}.", "I ride a bicycle."],
                "query": "What do I like?",
                "response": f"You like {words[index % len(words)]}.",
            }
            for index in range(rows)
        ]
        write_lines(folder / f"{split}.jsonl", lines)
    return {
        "benchmark": "histories",
        "path": str(folder),
        "train_rows": rows,
        "test_rows": 4,
        "retrieval": {"method": "bm25", "k": 1},
    }


def write_questions(path):
    records = [
        {
            "_id": str(index),
            "question": "Which city is older?",
            "answer": "Rome",
            "context": [["Rome", ["Rome is old."]], ["Bonn", ["Bonn is younger."]]],
            "supporting_facts": [["Rome", 0]],
        }
        for index in range(3)
    ]
    path.write_text(json.dumps(records))
    return {
        "benchmark": "general_qa",
        "name": "hotpotqa",
        "path": str(path),
        "test_split": "validation",
        "test_rows": 2,
    }


@pytest.fixture(scope="module")
def grid(tiny_model, tmp_path_factory):
    """A grid of two tasks and two methods, run once. Gives a function that runs it again with changes, and its folder."""
    folder = tmp_path_factory.mktemp("grid")
    settings = {
        "output_dir": str(folder / "out"),
        "models": {"tiny": {"model_name_or_path": tiny_model}},
        "tasks": {
            "crafts": write_histories(folder / "crafts", ["linen", "needles", "dresses"]) | {"validation_rows": 0},
            "food": write_histories(folder / "food", ["bread", "soup", "rice"]),
            "food_seen": {"benchmark": "seen", "of": "food", "test_rows": 2, "evaluation": {"prediction_rows": 0}},
            "food_irrelevant": {
                **{"benchmark": "irrelevant", "of": "food", "test_rows": 3},
                "evaluation": {"max_new_tokens": 4, "max_length": 200},
            },
            "hotpotqa": write_questions(folder / "hotpot.json")
            | {"evaluation": {"max_new_tokens": 4, "max_length": 200}},
        },
        "methods": ["ce", "perce"],
        "seeds": [0],
        "learning_rates": [1.0e-3],
        "transfer": True,
        "training": TRAINING,
        "evaluation": EVALUATION,
    }

    def run(*arguments, **changes):
        path = folder / "grid.yaml"
        path.write_text(yaml.safe_dump(settings | changes, sort_keys=False))
        return main(["reproduce", "--config", str(path), *arguments])

    assert run() == 0
    return run, folder / "out"


def read_records(out):
    return json.loads((out / "records.json").read_text())


def done(out):
    """Time of each finished step."""
    names = ("data", "train", "evaluate", "judge")
    return {path: path.stat().st_mtime_ns for name in names for path in out.rglob(f"{name}.json")}


def test_everything_is_trained_and_evaluated(grid):
    _, out = grid
    # 5 data, 5 untrained evaluations, 4 runs, each with 3 evaluations, those of food with 2 more
    assert len(done(out)) == 5 + 5 + 4 + 12 + 4
    records = read_records(out)
    conditions = {
        (record["method"], record["train_task"], record["task"]) for record in records if record["metric"] == "rougeL"
    }
    tasks = ("crafts", "food")
    assert conditions == {("untrained", None, task) for task in tasks} | {
        (method, trained, task) for method in ("ce", "perce") for trained in tasks for task in tasks
    }
    questions = [record for record in records if record["task"] == "hotpotqa"]
    assert {record["metric"] for record in questions} == {"em", "f1"} and len(questions) == 2 * 5
    assert all(record["rows"] == 2 for record in questions)
    for record in records:
        assert set(record) == {
            *("model", "train_task", "task", "method", "learning_rate", "clip", "seed"),
            *("metric", "value", "interval", "rows"),
        }


def test_a_record_is_what_the_evaluation_found(grid):
    _, out = grid
    folder = out / "runs/tiny/crafts/perce-lr0.001-clip0.8-5-seed0"
    found = json.loads((folder / "food" / "metrics.json").read_text())["metrics"]
    lines = [json.loads(line) for line in (folder / "food" / "metrics.jsonl").read_text().splitlines()]
    names = {"rougeL": "rougeL", "uptake/own": "uptake", "swapped/uptake/other": "uptake_of_swapped"}
    names["log_likelihood/personal_swapped"] = "log_likelihood/personal_swapped"
    for name, metric in names.items():
        (record,) = (
            record
            for record in read_records(out)
            if (record["method"], record["train_task"], record["task"], record["metric"])
            == ("perce", "crafts", "food", metric)
        )
        assert record["value"] == found[name]["mean"] and record["rows"] == len(lines) == 4
        assert record["value"] == pytest.approx(sum(line[name] for line in lines) / 4)


def test_the_untrained_model_decides_which_tokens_are_personal(grid):
    _, out = grid
    reference = out / "untrained/tiny/food/scores/scores.jsonl"
    personal = sum(sum(json.loads(line)["is_personal"]) for line in reference.read_text().splitlines())
    tokens = sum(len(json.loads(line)["tokens"]) for line in reference.read_text().splitlines())
    shares = {
        record["value"]
        for record in read_records(out)
        if record["task"] == "food" and record["metric"] == "personal_fraction"
    }
    assert 0 < personal < tokens
    assert len({round(share, 6) for share in shares}) == 1 and shares.pop() == pytest.approx(personal / tokens)


def test_methods_train_as_their_recipes_say(grid):
    _, out = grid
    recipes = {
        method: yaml.safe_load((out / f"runs/tiny/food/{method}-lr0.001-clip0.8-5-seed0/train.yaml").read_text())
        for method in ("ce", "perce")
    }
    assert [recipes[method]["token_weighting"] for method in recipes] == ["uniform", "perce"]
    differing = {key for key in recipes["ce"] if recipes["ce"][key] != recipes["perce"][key]}
    assert differing == {"token_weighting", "output_dir"}
    log = read_log(out / "runs/tiny/food/perce-lr0.001-clip0.8-5-seed0")
    assert 0.8 <= log["weight/mean"] <= 5


def test_prompt_lengths_are_those_of_the_prompts(grid, tokenizer):
    _, out = grid
    lengths = prompt_lengths(out / "untrained/tiny/food")["prompt_lengths"]
    rows = [json.loads(line) for line in (out / "data/food/test.jsonl").read_text().splitlines()]
    with_persona = []
    for row in rows:
        row["prompt"][0]["content"] = row["prompt"][0]["content"].replace("{persona}", row["persona"])
        with_persona.append(len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]))
    assert lengths["rows"] == 4
    assert lengths["with_persona"] == pytest.approx(sum(with_persona) / 4)
    persona = [len(tokenizer(row["persona"])["input_ids"]) for row in rows]
    # A token may reach over the persona's border
    assert lengths["with_persona"] - lengths["without_persona"] == pytest.approx(sum(persona) / 4, abs=2)


def test_the_tables_have_the_figures(grid):
    _, out = grid
    text = (out / "tables.md").read_text()
    assert "Table 1" in text and "PerCE" in text and "not run" in text
    tables = json.loads((out / "tables.json").read_text())
    assert tables and not any(math.isnan(value) for value in _numbers(tables))
    assert any(path.stat().st_size > 5000 for path in out.glob("*.png"))


def test_comparisons_are_paired_by_row_and_seed(grid, capsys):
    run, out = grid
    (compared,) = (
        own
        for own in json.loads((out / "comparisons.json").read_text())
        if (own["method"], own["train_task"], own["task"], own["metric"])
        == ("perce", "food", "crafts", "log_likelihood/other")
    )
    lines = {
        method: [
            json.loads(line)["log_likelihood/other"]
            for line in (out / f"runs/tiny/food/{method}-lr0.001-clip0.8-5-seed0/crafts/metrics.jsonl")
            .read_text()
            .splitlines()
        ]
        for method in ("ce", "perce")
    }
    differences = [own - base for own, base in zip(lines["perce"], lines["ce"], strict=True)]
    assert compared["difference"] == pytest.approx(sum(differences) / 4) != 0
    assert compared["baseline"] == pytest.approx(sum(lines["ce"]) / 4) and compared["seeds"] == [0]
    low, high = compared["interval"]
    assert min(differences) <= low <= compared["difference"] <= high <= max(differences)
    assert "trained on food, tested on crafts (4 rows)" in (out / "comparisons.md").read_text()
    capsys.readouterr()
    assert run("--tables_only") == 0
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 80
    start = printed.index("tiny, food, tested on crafts (4 rows)")
    (line,) = [line.split() for line in printed[start : start + 8] if line.strip().startswith("perce ")]
    figures = [f"{compared['difference']:+.3f}", f"[{low:+.3f},", f"{high:+.3f}]"]
    assert [figure.replace("-", "−") for figure in figures] == line[-3:]
    assert run("--tables_only", "--baseline", "perce") == 0
    (turned,) = (
        own
        for own in json.loads((out / "comparisons-perce.json").read_text())
        if (own["method"], own["train_task"], own["task"], own["metric"])
        == ("ce", "food", "crafts", "log_likelihood/other")
    )
    assert turned["difference"] == pytest.approx(-compared["difference"])
    assert "# Against perce" in (out / "comparisons-perce.md").read_text()
    assert "# Against ce" in (out / "comparisons.md").read_text()
    with pytest.raises(SystemExit):
        run("--tables_only", "--baseline", "perec")
    assert "has no method 'perec'. It has ce, perce." in capsys.readouterr().err


def test_rows_made_of_another_tasks(grid):
    _, out = grid
    rows = {
        name: [json.loads(line) for line in (out / f"data/{name}.jsonl").read_text().splitlines()]
        for name in ("food/train", "food/test", "food_seen/test", "food_irrelevant/test")
    }
    assert len(rows["food_seen/test"]) == 2 and all(row in rows["food/train"] for row in rows["food_seen/test"])
    personas = {row["persona"] for row in rows["food/test"]}
    asked = rows["food_irrelevant/test"]
    assert len(asked) == 3 and {row["persona"] for row in asked} <= personas and all("topic" in row for row in asked)
    runs = out / "runs/tiny"
    assert not (runs / "crafts/ce-lr0.001-clip0.8-5-seed0/food_seen").exists()
    compared = [own for own in json.loads((out / "comparisons.json").read_text()) if own["task"].startswith("food_")]
    assert {(own["method"], own["train_task"]) for own in compared} == {
        (method, "food") for method in ("untrained", "ce", "perce")
    }
    shares = {own["method"]: own["mean"] for own in compared if own["metric"] == "irrelevant/share"}
    for method, share in shares.items():
        folder = out / "untrained/tiny" if method == "untrained" else runs / f"food/{method}-lr0.001-clip0.8-5-seed0"
        lines = [json.loads(line) for line in (folder / "food_irrelevant/metrics.jsonl").read_text().splitlines()]
        assert share == pytest.approx(sum((own["uptake/own"] > 0) - (own["uptake/other"] > 0) for own in lines) / 3)
    (leak,) = (own for own in compared if (own["metric"], own["method"]) == ("leak", "perce"))
    lines = [
        json.loads(line)
        for line in (runs / "food/perce-lr0.001-clip0.8-5-seed0/food_seen/metrics.jsonl").read_text().splitlines()
    ]
    assert leak["mean"] == pytest.approx(sum(own["log_likelihood/personal_without"] for own in lines) / 2)
    assert not any(record["task"].startswith("food_") for record in read_records(out))


def _numbers(value):
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        for own in value:
            yield from _numbers(own)
    elif isinstance(value, float):
        yield value


def test_what_is_done_stays_done_and_a_grid_grows(grid, capsys):
    run, out = grid
    before = done(out)
    assert run() == 0
    assert done(out) == before
    assert run("--dry_run", methods=["ce", "perce"], seeds=[0, 1]) == 0
    printed = capsys.readouterr().out
    assert "30 of 50 steps are done" in printed and "crafts, perce, seed=1" in printed
    assert (
        run(
            methods=["perce"],
            seeds=[0, 1],
            tasks={"crafts": yaml.safe_load((out.parent / "grid.yaml").read_text())["tasks"]["crafts"]},
        )
        == 0
    )
    after = done(out)
    assert {path: time for path, time in after.items() if path in before} == before
    assert sorted(path.parent.name for path in after.keys() - before.keys()) == [
        "crafts",
        "perce-lr0.001-clip0.8-5-seed1",
    ]


def test_errors_come_before_anything_runs(grid, capsys):
    run, out = grid
    before = done(out)
    for changes, message in (
        (
            {"training": TRAINING | {"learning_rat": 1}},
            "unknown key or argument `learning_rat`. Did you mean `learning_rate`?",
        ),
        (
            {"evaluation": EVALUATION | {"temprature": 1}},
            "unknown key or argument `temprature`. Did you mean `temperature`?",
        ),
        ({"training": TRAINING | {"max_steps": 3}}, "`recipe.max_steps` was 2 and is 3. Choose another `output_dir`"),
        ({"evaluation": EVALUATION | {"max_new_tokens": 9}}, "`config.max_new_tokens` was 8 and is 9"),
    ):
        with pytest.raises(SystemExit) as exited:
            run(**changes)
        assert exited.value.code == 2
        assert message in capsys.readouterr().err
    assert done(out) == before


def test_a_metric_without_its_data_stops_before_anything_runs(grid, tmp_path, monkeypatch, capsys):
    run, _ = grid
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    changes = {"evaluation": EVALUATION | {"metrics": ["meteor"]}}
    with pytest.raises(SystemExit) as stopped:
        run("--output_dir", str(tmp_path / "out"), **changes)
    assert stopped.value.code == 2 and not (tmp_path / "out" / "data").exists()
    assert "error: METEOR needs NLTK's data `wordnet`" in capsys.readouterr().err


def test_what_would_hit_each_run_alike_stops_before_anything_runs(grid, tmp_path, capsys):
    run, _ = grid
    task = write_histories(tmp_path / "crafts", ["linen", "needles"])
    nowhere = task | {"path": str(tmp_path / "nowhere")}
    bad = write_histories(tmp_path / "bad", ["linen"])
    with open(tmp_path / "bad" / "test.jsonl", "a") as file:
        file.write('{"user": "ann", "history": ["I sew."], "query": "What?"}\n')
    for changes, message in (
        ({"tasks": {"a": nowhere, "b": task}}, f"`tasks`, a: There is no file {tmp_path}/nowhere/train.jsonl."),
        ({"tasks": {"a": bad}}, f"`tasks`, a: {tmp_path}/bad/test.jsonl, record 7: the key 'response' is missing"),
        ({"tasks": {"a": task | {"validation_rows": 2}}}, "`tasks`, a: There is no file "),
        ({"tasks": {"a": task | {"formt": "rows"}}}, "`tasks`, a: unknown key `formt`. Did you mean `format`?"),
        ({"tasks": {"a": {"benchmark": "histories"}}}, "`tasks`, a: `path` is missing."),
        (
            {"tasks": {"a": task | {"retrieval": {"methd": "bm25"}}}},
            "`tasks`, a: unknown key `methd`. Did you mean `method`?",
        ),
        ({"tasks": {"a": task | {"retrieval": {"k": 0}}}}, "`tasks`, a: `k` is 0"),
        ({"models": {"tiny": {"model_name_or_path": "./none"}}}, "`models`, tiny: there is no folder './none' (seen"),
        ({"training": TRAINING | {"lora_r": "many"}}, "`trl-perce train` of tiny, ce: argument --lora_r"),
        (
            {"methods": {"mine": {"token_weighting": "perc"}}},
            "of tiny, mine: `token_weighting` is 'perc'. Write one of",
        ),
        (
            {"evaluation": EVALUATION | {"max_new_tokens": "few"}},
            "`trl-perce evaluate` of tiny, crafts: argument --max_new_tokens",
        ),
        ({"launch": {"num_proceses": 2}}, "unknown key or argument `num_proceses`. Did you mean `num_processes`?"),
        ({"quotes": str(tmp_path / "none.json")}, "No such file or directory"),
        ({"data_dir": "data", "tasks": {"a": {"benchmark": "longlamp"}}}, "no task has a `path`"),
    ):
        for arguments in (("--dry_run",), ()):
            with pytest.raises(SystemExit) as stopped:
                run("--output_dir", str(tmp_path / "out"), *arguments, **changes)
            error = capsys.readouterr().err
            assert stopped.value.code == 2 and error.startswith("trl-perce reproduce: error: ") and message in error
            assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        run("--output_dir", str(tmp_path / "out"), "--tables", "1", "99")
    assert "`tables`: there is no table 99. Write numbers from 1 to 12." in capsys.readouterr().err
    # Each task that is concerned has its line
    with pytest.raises(SystemExit):
        run("--output_dir", str(tmp_path / "out"), "--dry_run", tasks={"a": nowhere, "b": nowhere})
    assert [line[:11] for line in capsys.readouterr().err.splitlines()] == ["trl-perce r", "`tasks`, b:"]


def test_a_model_that_cannot_load_stops_the_grid_with_its_own_message(grid, tmp_path, capsys):
    run, _ = grid
    (tmp_path / "empty").mkdir()
    models = {"empty": {"model_name_or_path": str(tmp_path / "empty")}}
    with pytest.raises(SystemExit) as stopped:
        run("--output_dir", str(tmp_path / "out"), models=models)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and "Failed:" not in captured.out
    assert f"error: {tmp_path}/out/untrained/empty/crafts: " in captured.err and "Traceback" not in captured.err
    assert not [*tmp_path.rglob("*.error")] and not (tmp_path / "out" / "runs").exists()


def test_a_run_that_breaks_is_one_failed_run(grid, tmp_path, capsys):
    run, out = grid
    tasks = {"crafts": yaml.safe_load((out.parent / "grid.yaml").read_text())["tasks"]["crafts"]}
    changes = {"tasks": tasks, "methods": ["ce"], "learning_rates": [1e30, 1e-3]}
    assert run("--output_dir", str(tmp_path), **changes) == 1  # no weight is finite after a step
    text = capsys.readouterr().out
    broken, whole = (tmp_path / f"runs/tiny/crafts/ce-lr{rate}-clip0.8-5-seed0" for rate in ("1e+30", "0.001"))
    (failed,) = (line for line in text.splitlines() if line.startswith("Failed:"))
    assert failed == f"Failed: {broken}: train.error has" and (broken / "train.error").is_file()
    assert "Not run, since they need what has failed: 1 steps." in text
    assert (whole / "crafts" / "evaluate.json").is_file() and not (broken / "crafts" / "evaluate.json").exists()


@pytest.mark.parametrize(("code", "number"), [(130, signal.SIGINT), (143, signal.SIGTERM)])
def test_a_stop_of_a_command_is_one_of_the_grid(tmp_path, code, number):
    """`train` ends by itself on Ctrl-C; the grid must not take this for a run that failed, and go on."""

    def stop(argv):
        raise SystemExit(code)

    def interrupt(signum, frame):
        raise KeyboardInterrupt(signum)

    before = signal.signal(number, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt, match=str(int(number))):
            run_command(stop, {}, tmp_path / "train")
    finally:
        signal.signal(number, before)


def test_the_data_of_a_grid_may_lie_elsewhere(grid, tmp_path, capsys):
    run, _ = grid
    tasks = {"a": write_histories(tmp_path / "crafts", ["linen"]) | {"path": "crafts"}}
    arguments = ("--output_dir", str(tmp_path / "out"), "--dry_run")
    assert run(*arguments, "--data_dir", str(tmp_path), tasks=tasks, data_dir="data") == 0
    assert "0 of 6 steps are done" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(*arguments, tasks=tasks, data_dir="data")
    assert "There is no file data/crafts/train.jsonl" in capsys.readouterr().err


def test_on_a_terminal_the_table_stays_there_and_the_output_goes_to_logs(tiny_model, tmp_path):
    """In a real terminal: the steps' output, that of loggers and of child processes too, is in the logs alone."""
    settings = {
        "output_dir": str(tmp_path / "out"),
        "models": {"tiny": {"model_name_or_path": tiny_model}},
        "tasks": {"crafts": write_histories(tmp_path / "crafts", ["linen", "needles", "dresses"])},
        "methods": ["perce"],
        "seeds": [0],
        "learning_rates": [1.0e-3],
        "training": TRAINING,
        "evaluation": EVALUATION,
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    command = [sys.executable, "-m", "trl_perce", "reproduce", "--config", str(path)]
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(command, stdout=its_end, stderr=its_end, stdin=subprocess.DEVNULL)
    os.close(its_end)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while chunk := os.read(terminal, 65536):
            shown += chunk
    assert process.wait(timeout=100) == 0
    text = shown.decode()
    assert "tiny, untrained" in text and "▶ train" in text and "log P personal" in text and "comparisons.md" in text
    (log,) = tmp_path.rglob("train.log")
    assert "Training completed" in log.read_text() and "Training completed" not in text
    (log,) = tmp_path.glob("out/runs/**/evaluate.log")
    assert "Generated 4 predictions" in log.read_text() and "Generated 4 predictions" not in text


def test_a_line_separator_in_a_text_parts_no_row(tmp_path):
    rows = [
        {
            "skipped": None,
            "num_tokens": 9,
            "num_counterfactual_tokens": 5,
            "tokens": ["a", "\u2028"],
            "response": "a\u2028",
        },
        {"skipped": "too long", "num_tokens": 0, "num_counterfactual_tokens": 0, "tokens": []},
    ]
    (tmp_path / "scores").mkdir()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "scores" / "scores.jsonl").write_text(text, encoding="utf-8")
    lengths = prompt_lengths(tmp_path)["prompt_lengths"]
    assert lengths == {"with_persona": 7, "without_persona": 3, "rows": 1}
