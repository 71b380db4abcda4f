import json
import shlex
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from conftest import make_tiny_model
from processes import start
from reference import BF16, make_rows, put_4bit_weights, reference, root_mean_square
from rows import write_lines
from runs import assert_close, one_sgd_step
from trl_perce import PerContrast, PerContrastConfig, TokenScores
from trl_perce.cli.common import take_run_settings
from trl_perce.cli.main import main
from trl_perce.hub.run_settings import write_run_settings
from trl_perce.scoring import report
from trl_perce.scoring.score_file import ScoreFile, remove_scores


FILES = {"scores.jsonl", "settings.json", "heatmap.html", "heatmap.png", "report.md", "report.json"}


def make_row(index):
    return {
        "persona": f"I sew dress number {index} and love linen." * (1 + index % 3),
        "prompt": [{"role": "user", "content": "About me: {persona}\nWhat should I buy?"}],
        "completion": [{"role": "assistant", "content": f"A new set of {index} needles."}],
    }


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "rows.jsonl", map(make_row, range(6)))


@pytest.fixture
def score(tiny_model, data, tmp_path):
    def run(*argv, output="scores", config=()):
        arguments = ["--model_name_or_path", tiny_model, "--dataset_name", data, "--use_cpu"]
        return main(["score", *config, *arguments, "--output_dir", str(tmp_path / output), *argv])

    return run


def rows_of(folder):
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()]


def test_writes_everything_and_says_it(score, tiny_model, tmp_path, capsys):
    assert score() == 0
    folder = tmp_path / "scores"
    assert {path.name for path in folder.iterdir()} == FILES
    rows = rows_of(folder)
    assert [row["row"] for row in rows] == [*range(6)]
    expected = PerContrast(tiny_model, use_cpu=True, bf16=False).score([make_row(index) for index in range(6)])
    for row, scores in zip(rows, expected, strict=True):
        assert TokenScores.from_dict(row).pir == pytest.approx(scores.pir, abs=2e-5)
        assert row["persona"] == scores.persona and row["words"][-1]["text"] == "needles"
    report = json.loads((folder / "report.json").read_text())
    out = capsys.readouterr().out
    assert "Scored 6 rows" in out and report["verdict"]["text"] in " ".join(out.split()) and "needles" in out
    assert "\x1b[" not in out  # plain when piped
    assert all(len(line) <= 80 for line in out.replace(str(tmp_path), "").splitlines()) and "trl-perce" not in out
    assert json.loads((folder / "settings.json").read_text())["counterfactual"] == "drop"


def test_a_second_call_scores_nothing(score, tmp_path, capsys):
    score()
    before = (tmp_path / "scores" / "scores.jsonl").read_bytes()
    (tmp_path / "scores" / "heatmap.html").unlink()
    capsys.readouterr()
    assert score("--png_rows", "1") == 0
    assert "Scored" not in capsys.readouterr().out
    assert (tmp_path / "scores" / "scores.jsonl").read_bytes() == before
    assert {path.name for path in (tmp_path / "scores").iterdir()} == FILES


def test_other_settings_are_another_run(score, tmp_path, capsys):
    score()
    with pytest.raises(SystemExit) as stopped:
        score("--counterfactual", "mask", "--max_length", "64")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "`counterfactual` was 'drop' and is 'mask'" in message and "`max_length` was 1024 and is 64" in message
    assert rows_of(tmp_path / "scores")[0]["num_counterfactual_tokens"] < rows_of(tmp_path / "scores")[0]["num_tokens"]
    assert score("--counterfactual", "mask", "--max_length", "64", "--overwrite") == 0
    row = rows_of(tmp_path / "scores")[0]
    assert row["num_counterfactual_tokens"] == row["num_tokens"] <= 64


def test_a_training_recipe_scores_its_data(score, tmp_path, capsys):
    recipe = {"learning_rate": 1e-4, "use_peft": True, "counterfactual": "mask", "max_length": 100, "bf16": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": str(tmp_path / "trained")}))
    config = ["--config", str(tmp_path / "config.yaml")]
    assert score("--max_rows", "2", config=config) == 0
    settings = json.loads((tmp_path / "scores" / "settings.json").read_text())
    assert (settings["counterfactual"], settings["max_length"], settings["rows"]) == ("mask", 100, 2)
    assert len(rows_of(tmp_path / "scores")) == 2
    assert "precision `float32, under bfloat16 autocast`" in (tmp_path / "scores" / "report.md").read_text()

    from trl_perce.cli import score as command

    arguments = ["--model_name_or_path", settings["model"], "--dataset_name", settings["dataset"], "--use_cpu"]
    assert command.run([*config, *arguments]) == 0
    assert (tmp_path / "trained-scores" / "report.md").is_file() and not (tmp_path / "trained").exists()


def test_data_that_are_worth_it_are_trained_on_next(score, tiny_model, data, tmp_path, capsys, monkeypatch):
    original = report.make_report
    answer = {"verdict": {"answer": "yes", "text": ""}}
    monkeypatch.setattr(report, "make_report", lambda *args: original(*args) | answer)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_name_or_path": tiny_model, "use_peft": True}))
    monkeypatch.chdir(tmp_path)
    assert score() == 0
    assert "trl-perce train" not in capsys.readouterr().out  # with which settings?
    assert score(config=["--config", "config.yaml"]) == 0
    said = capsys.readouterr().out.rpartition("Next: ")[2].replace("\\\n", "")
    assert shlex.split(said) == ["trl-perce", "train", "--config", "config.yaml", "--dataset_name", data]


def test_rows_with_their_weights_train_as_perce_does_at_its_first_step(
    score, make_args, tokenizer, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    original = report.make_report
    monkeypatch.setattr(
        report, "make_report", lambda *args: original(*args) | {"verdict": {"answer": "yes", "text": ""}}
    )
    Path("config.yaml").write_text(yaml.safe_dump({"eval_strategy": "epoch", "output_dir": "trained"}))
    rows = make_rows(seed=61, count=7)
    untrained = rows[3].tokenized() | {"labels": [-100] * len(rows[3].tokenized()["labels"])}
    lines = [row.tokenized() for row in rows]
    file = write_lines(tmp_path / "tokens.jsonl", [*lines[:3], untrained, *lines[3:], untrained])
    bounds = ["--weight_clip_min", "0.5", "--weight_clip_max", "2"]
    options = ["--dataset_name", file, *bounds, "--token_weights", "--max_length", "64"]
    assert score(*options, config=["--config", "config.yaml"]) == 0

    said = " ".join(capsys.readouterr().out.replace("\\\n", "").split())
    assert "train.parquet: 7 rows with their weights; 2 left out (no token of it is trained)" in said
    folder = tmp_path / "scores" / "token_weights"
    command = shlex.split(said.rpartition("Next: ")[2])
    assert command[:4] == ["trl-perce", "train", "--config", "config.yaml"]
    given = dict(zip(command[4::2], command[5::2], strict=True))
    assert given["--dataset_name"] == str(folder) and given["--token_weighting"] == "given"
    assert given["--eval_strategy"] == "no" and given["--output_dir"] == "trained-given"

    written = load_dataset(str(folder), split="train")
    expected = reference(make_tiny_model("llama"), rows, clip_min=0.5, clip_max=2.0)
    columns = ["input_ids", "labels", "persona_mask"]
    assert written.select_columns(columns).to_list() == lines
    for row, weights in zip(written, expected.weights, strict=True):
        found = [w for w, label in zip(row["token_weights"], row["labels"], strict=True) if label != -100]
        assert found == pytest.approx(weights, abs=2e-5)
    ready = [SimpleNamespace(tokenized=lambda row=row: row) for row in written]
    for step_rows, options in (
        (ready, {"token_weighting": "given"}),
        (rows, {"weight_clip_min": 0.5, "weight_clip_max": 2.0}),
    ):
        options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        logs, gradients = one_sgd_step(make_args, tokenizer, "llama", step_rows, torch.float64, **options)
        assert logs["loss"] == pytest.approx(expected.loss, rel=1e-5)
        assert_close(gradients, expected.gradients, relative=1e-5)


def test_streaming_gives_the_same(score, tmp_path):
    score()
    score("--dataset_streaming", output="streamed")
    assert rows_of(tmp_path / "scores") == rows_of(tmp_path / "streamed")


def test_with_an_adapter(score, tiny_model, tmp_path):
    torch.manual_seed(0)  # some adapters make more of float32's rounding than others
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "adapter")
    score()
    assert score("--adapter", str(tmp_path / "adapter"), output="adapted") == 0
    base, adapted = (rows_of(tmp_path / name)[0]["log_probs"] for name in ("scores", "adapted"))
    expected = PerContrast(model, use_cpu=True, bf16=False).score(make_row(0)).log_probs
    # Alone and among five others, in float32: some 30 products' rounding, 2^-24 of values near 10 each, and five decimals
    assert adapted == pytest.approx(expected, abs=5e-5) and base != pytest.approx(expected, abs=1e-2)


def test_the_length_of_the_training_is_taken(score, tiny_model, tmp_path, capsys, make_args):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules="all-linear"))
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    own = {"max_length": 64, "truncate_persona": False, "persona_end_marker": "</p>", "chat_template_kwargs": {"a": 1}}
    write_run_settings(make_args(**own), adapter)
    where = f"({adapter}/trl_perce.json)"
    taken = (
        "As in the training: max_length 64, truncate_persona False, persona_end_marker </p>, "
        f"chat_template_kwargs {{'a': 1}} {where}"
    )
    assert score("--adapter", str(adapter), "--max_rows", "1", "--png_rows", "1") == 0
    settings = json.loads((tmp_path / "scores" / "settings.json").read_text())
    assert {name: settings[name] for name in own} == own and taken in " ".join(capsys.readouterr().out.split())
    names = ("max_length", "truncate_persona", "persona_end_marker")

    def values(*argv):
        take_run_settings(args := make_args(PerContrastConfig), argv, str(adapter))
        return [getattr(args, name) for name in names], " ".join(capsys.readouterr().out.split())

    (tmp_path / "config.yaml").write_text("max_length: 1024\ntruncate_persona: true\n")  # the defaults, but given
    said = f"As in the training: persona_end_marker </p>, chat_template_kwargs {{'a': 1}} {where}"
    assert values("--config", str(tmp_path / "config.yaml")) == ([1024, True, "</p>"], said)
    given = [
        "--max_length=1024",
        "--truncate_persona",
        "--persona-end-marker",
        "</persona>",
        "--chat_template_kwargs",
        "{}",
    ]
    assert values(*given) == ([1024, True, "</persona>"], "")
    (adapter / "trl_perce.json").write_text('{"max_length": "64", "truncate_persona": false}')
    assert values()[0] == [1024, False, "</persona>"]
    for broken in ("[1]", "{"):
        (adapter / "trl_perce.json").write_text(broken)
        assert values() == ([1024, True, "</persona>"], "")


def test_in_4_bits(smollm2, data, tmp_path):
    """Against a copy that holds the values of the 4-bit weights: what quantization itself costs is not ours."""
    arguments = ["--model_name_or_path", smollm2, "--dataset_name", data, "--use_cpu", "--dtype", "bfloat16"]
    assert main(["score", *arguments, "--load_in_4bit", "--max_rows", "2", "--output_dir", str(tmp_path / "nf4")]) == 0
    found = np.concatenate([row["log_probs"] for row in rows_of(tmp_path / "nf4")])

    def score(model):
        scores = PerContrast(model, use_cpu=True).score([make_row(0), make_row(1)])
        return np.concatenate([one.log_probs for one in scores])

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    plain = score(model)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    put_4bit_weights(
        model, AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16, quantization_config=nf4)
    )
    # The same products of the same numbers, on any machine; the file has five decimals
    assert found == pytest.approx(score(model), abs=1e-5)
    exact = score(model.float())
    assert root_mean_square(found - exact) < BF16 < 0.5 * root_mean_square(plain - exact)


# ── killed runs ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_killed_run_goes_on_where_it_stopped(tiny_model, tmp_path, one_thread, capsys):
    write_lines(tmp_path / "rows.jsonl", map(make_row, range(200)))

    def argv(output):
        arguments = ["--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / "rows.jsonl"), "--use_cpu"]
        arguments += ["--score_batch_tokens", "150", "--bf16", "False", "--output_dir", str(tmp_path / output)]
        return ["score", *arguments]

    killed, part = start(argv("killed")), tmp_path / "killed" / "scores.jsonl.part"
    while not part.is_file() or part.read_bytes().count(b"\n") < 20:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    *lines, torn = part.read_text(encoding="utf-8").split("\n")
    assert 20 <= len(lines) < 200 and not (tmp_path / "killed" / "scores.jsonl").exists()
    lines = lines[:-1]  # as if it had been killed within a batch, too
    # A finished row that is told by its persona, and a line that was torn
    first = json.loads(lines[0])
    mark = {"persona": "from the first run"}
    lines[0] = json.dumps(first | mark, ensure_ascii=False)
    part.write_text("\n".join(lines) + "\n" + (torn or '{"row": 199, "per'), encoding="utf-8")

    assert main(argv("killed")) == 0
    said = capsys.readouterr().out
    assert f"{len(lines)} rows are scored already." in said and f"Scored {200 - len(lines)} rows" in said
    assert main(argv("whole")) == 0
    resumed, whole = rows_of(tmp_path / "killed"), rows_of(tmp_path / "whole")
    whole[first["row"]] |= mark
    assert resumed == whole and [row["row"] for row in whole] == [*range(200)] and not part.exists()


def test_rows_are_whole_or_not_there(tmp_path):
    file = ScoreFile(tmp_path, {"a": 1})
    file.append(iter([TokenScores.left_out(2, "why"), TokenScores.left_out(0, "why")]))
    torn = '{"row": 1, "persona": "ä'.encode()[:-1]
    with open(file.part, "ab") as part:
        part.write(torn)
    again = ScoreFile(tmp_path, {"a": 1})
    assert again.done == {0, 2} and torn not in file.part.read_bytes()
    again.append(iter([TokenScores.left_out(1, "why")]))
    again.finish()
    assert [scores.row for scores in again] == [0, 1, 2] and not file.part.exists()
    file.part.write_text("")  # a run that was killed at its very end
    assert ScoreFile(tmp_path, {"a": 1}).done == {0, 1, 2}
    assert not file.part.exists()
    with pytest.raises(ValueError, match="`a` was 1 and is 2"):
        ScoreFile(tmp_path, {"a": 2})


def test_what_several_processes_have_left_one_goes_on_with(tmp_path):
    first = ScoreFile(tmp_path, {"a": 1})
    first.append(iter([TokenScores.left_out(4, "why")]))
    second = tmp_path / "scores.jsonl.part-1"  # as another process would
    second.write_text(json.dumps(TokenScores.left_out(1, "why").to_dict()) + "\n")
    again = ScoreFile(tmp_path, {"a": 1})
    assert again.done == {1, 4} and again.share().index == 0 and again.share().count == 1
    with open(second, "a") as part:
        part.writelines(json.dumps(TokenScores.left_out(row, "why").to_dict()) + "\n" for row in (3, 0))
    again.append(iter([TokenScores.left_out(2, "why")]))
    assert [again.share().elsewhere() for _ in range(2)] == [
        2,
        0,
    ]  # what the progress bar moves by, beside its own row
    again.finish()
    assert [scores.row for scores in again] == [*range(5)]
    assert {path.name for path in tmp_path.iterdir()} == {"scores.jsonl", "settings.json"}
    remove_scores(tmp_path)
    assert not [*tmp_path.iterdir()]


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--dataset_split", "test"], "no split 'test'; it has 'train'"),
        (["--max_rows", "0"], "`max_rows` is 0"),
        (["--png_rows", "0"], "`png_rows` is 0"),
        (["--adaptr", "x"], "Did you mean `adapter`"),
        (["--num_proceses", "2"], "Did you mean `num_processes`"),
        (["--accelerate_config", "nowhere"], "Accelerate config nowhere is neither a file nor"),
        (["--adapter", "/tmp"], "no 'adapter_config.json' in '/tmp'"),
        (["--model_name_or_path", "./nowhere"], "there is no folder './nowhere'"),
        (["--model_name_or_path", "nobody/nothing"], "nobody/nothing"),
        (["--dataset_name", "nowhere.jsonl"], "there is no file or folder 'nowhere.jsonl'"),
        (["--personal_threshold", "nan"], "`personal_threshold` is nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_arguments_stop_it_before_the_model_loads(score, tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.setattr("trl_perce.scoring.loading.load_model", None)
    with pytest.raises(SystemExit) as stopped:
        score(*argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    "row, message",
    [
        ({**make_row(0), "prompt": [{"role": "user", "content": "Hi"}]}, "row 6: there is a column 'persona'"),
        ({**make_row(0), "persona": "", "completion": None}, "row 6: column 'completion' is missing or empty"),
    ],
)
def test_bad_rows_stop_it_before_the_model_loads(score, data, capsys, monkeypatch, row, message):
    monkeypatch.setattr("trl_perce.scoring.loading.load_model", None)
    with open(data, "a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as stopped:
        score()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_without_any_persona_there_is_nothing_to_score(score, data, capsys):
    rows = [{"prompt": "What?", "completion": "That."}, {"prompt": "Where?", "completion": "There."}]
    with open(data, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(SystemExit) as stopped:
        score()
    assert stopped.value.code == 2 and "no row has a persona" in capsys.readouterr().err


def test_swap_among_rows_of_one_user(score, data, tmp_path, capsys):
    with open(data, "w") as file:
        file.writelines(json.dumps(make_row(0)) + "\n" for _ in range(3))
    with pytest.raises(SystemExit) as stopped:
        score("--counterfactual", "swap")
    assert stopped.value.code == 2 and "finds no other persona for row 0" in capsys.readouterr().err
