import json

import numpy as np
import pytest
import yaml
from peft import LoraConfig, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM

from conftest import make_tiny_model
from rows import write_lines, write_splits
from servers import needs_openai
from trl_perce import PerContrast, PerContrastConfig, TokenScores
from trl_perce.cli.main import main
from trl_perce.evaluation.arguments import EvaluationArguments, GenerationArguments
from trl_perce.evaluation.evaluate import evaluate as evaluate_rows
from trl_perce.evaluation.generate import TransformersGenerator
from trl_perce.evaluation.likelihood import likelihood_values, ratio_values, score_swapped, token_likelihoods
from trl_perce.evaluation.predictions import other_rows
from trl_perce.evaluation.uptake import persona_uptake
from trl_perce.hub.run_settings import write_run_settings
from trl_perce.utils.statistics import bootstrap_interval, paired_test


pytest_plugins = ["servers"]
FILES = {"predictions.jsonl", "settings.json", "metrics.jsonl", "metrics.json", "report.md", "scores"}
QUICK = ["--max_new_tokens", "8", "--max_length", "600", "--metrics", "rouge", "--temperature", "0"]


def make_row(index):
    return {
        "id": f"r{index}",
        "user": f"u{index // 2}",
        "persona": f"I sew dress number {index} and love linen." * (1 + index % 3),
        "prompt": [{"role": "user", "content": "About me: {persona}\nWhat should I buy?"}],
        "completion": [{"role": "assistant", "content": f"A new set of {index} needles."}],
    }


ROWS = [make_row(index) for index in range(6)]


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def evaluate(tiny_model, data, tmp_path):
    def run(*argv, output="out", config=()):
        arguments = [
            "--model_name_or_path",
            tiny_model,
            "--dataset_name",
            data,
            "--use_cpu",
            "--bf16",
            "False",
            *QUICK,
        ]
        return main(["evaluate", *config, *arguments, "--output_dir", str(tmp_path / output), *argv])

    return run


@pytest.fixture
def arguments(make_args):
    return make_args(GenerationArguments, max_new_tokens=8, max_length=600, temperature=0, personal_threshold=0.05)


@pytest.fixture
def adapted(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return get_peft_model(
        model, LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def result_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_writes_everything_and_says_it(evaluate, tiny_model, tmp_path, capsys, make_args):
    assert evaluate() == 0
    folder, out = tmp_path / "out", capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == FILES
    predictions, rows, result = (
        lines_of(folder / "predictions.jsonl"),
        lines_of(folder / "metrics.jsonl"),
        result_of(folder),
    )
    args = make_args(GenerationArguments, max_new_tokens=8, max_length=600, temperature=0)
    expected = sorted(TransformersGenerator(tiny_model, args=args).generate(ROWS), key=lambda line: line["row"])
    assert predictions == expected and [line["user"] for line in predictions] == [row["user"] for row in ROWS]

    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(line["reference"], line["prediction"])["rougeL"].fmeasure for line in predictions]
    assert [row["rougeL"] for row in rows] == pytest.approx(rouge)
    uptake = [persona_uptake(line["prediction"], line["persona"], line["query"]) for line in predictions]
    assert [row["uptake/own"] for row in rows] == uptake
    lengths = [line["num_tokens"] for line in predictions]
    groups = [row["user"] for row in ROWS]
    assert result["metrics"]["num_tokens"] == {
        "mean": pytest.approx(np.mean(lengths)),
        "interval": list(bootstrap_interval(lengths, groups)),
        "rows": 6,
    }
    assert (result["rows"], result["predicted"], result["trimmed"]["rows"]) == (6, 6, 0)
    assert "Generated 6 predictions" in out and "rougeL" in out and "log_likelihood/other" in out
    assert all(len(line) <= 80 for line in out.replace(str(tmp_path), "").splitlines())
    assert f"with --baseline {folder}" in " ".join(out.split())
    assert "the evaluated model itself" in " ".join(out.split()) and "\x1b[" not in out  # plain when piped
    report = (folder / "report.md").read_text()
    assert "| `num_tokens` | " in report and "needles" in report and "| `precision` | `float32` |" in report


def test_a_second_call_loads_no_model(evaluate, tmp_path, capsys, monkeypatch):
    evaluate("--swap_persona")
    folder = tmp_path / "out"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "report.md").unlink()
    monkeypatch.setattr("trl_perce.evaluation.evaluate.load_model", None)
    capsys.readouterr()
    assert evaluate("--swap_persona") == 0
    out = capsys.readouterr().out
    assert "Generated" not in out and "Scored" not in out and "6 predictions are there already." in out
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_settings_are_another_evaluation(evaluate, data, tmp_path, capsys):
    evaluate()
    for argv, message in (
        (["--temperature", "0.5"], "`temperature` was 0.0 and is 0.5"),
        (["--max_rows", "5"], "`rows` was 6 and is 5"),
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate(*argv)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert evaluate("--temperature", "0.5", "--overwrite") == 0
    assert result_of(tmp_path / "out")["settings"]["temperature"] == 0.5
    with open(data, "a") as file:  # the rows themselves
        file.write(json.dumps(make_row(7)) + "\n")
    with pytest.raises(SystemExit):
        evaluate("--temperature", "0.5")
    assert "`fingerprint` was" in capsys.readouterr().err


def test_a_killed_step_goes_on(evaluate, tmp_path, capsys):
    evaluate()
    evaluate(output="again")
    folder = tmp_path / "again"
    lines = (folder / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "predictions.jsonl").unlink()
    (folder / "predictions.jsonl.part").write_bytes(lines[4] + lines[1] + lines[2][:-9])
    for name in ("metrics.json", "metrics.jsonl"):
        (folder / name).unlink()
    capsys.readouterr()
    evaluate(output="again")
    out = capsys.readouterr().out
    assert "2 predictions are there already." in out and "Generated 4 predictions" in out and "Scored" not in out
    for name in ("predictions.jsonl", "metrics.jsonl", "metrics.json", "report.md"):
        assert (folder / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_training_recipe_is_evaluated_on_its_test_split(evaluate, tmp_path, tiny_model):
    recipe = {"learning_rate": 1e-4, "use_peft": True, "assistant_only_loss": False, "seed": 3}
    recipe |= {
        "model_name_or_path": tiny_model,
        "dataset_name": write_splits(tmp_path / "data", train=ROWS[:3], test=ROWS[3:]),
        "bf16": False,
        "use_cpu": True,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": str(tmp_path / "trained")}))
    assert main(["evaluate", "--config", str(tmp_path / "c.yaml"), *QUICK, "--likelihood", "False"]) == 0
    result = result_of(tmp_path / "trained-evaluation")
    assert result["settings"]["seed"] == 3 and result["settings"]["split"] == "test" and result["rows"] == 3
    assert "pir/other" not in result["metrics"] and not (tmp_path / "trained-evaluation" / "scores").exists()


# ── likelihoods ──────────────────────────────────────────────────────────────────────────────────────────────────────


def make_scores(row, log_probs, pir, counterfactual=None):
    pir = np.array(pir, np.float32)
    log_probs = np.array(log_probs, np.float32)
    counterfactual = log_probs - pir if counterfactual is None else np.array(counterfactual, np.float32)
    scores = TokenScores.left_out(row, "")
    vars(scores).update(
        skipped=None, tokens=["x"] * len(pir), log_probs=log_probs, pir=pir, counterfactual_log_probs=counterfactual
    )
    scores.is_personal = pir > 1
    return scores


def test_likelihoods_by_hand():
    nan = np.nan
    reference = [make_scores(0, [-9] * 3, [2, 0, 0]), make_scores(1, [-9] * 2, [3, 3]), make_scores(2, [-9], [nan])]
    own = [make_scores(0, [-1, -2, -3], [5, 0.5, 2]), make_scores(1, [-4, -6], [1, 2]), make_scores(2, [-7], [nan])]
    swapped = [make_scores(0, [nan] * 3, [nan] * 3, [-2, -3, -4]), make_scores(1, [nan] * 2, [nan] * 2, [-8, -8])]
    swapped.append(make_scores(2, [nan], [nan], [-7]))
    likelihoods = token_likelihoods(own, reference, swapped)
    means = {name: values.mean() for name, values in likelihood_values(likelihoods).items()}
    assert means == pytest.approx(
        {
            "log_likelihood/personal": -(1 + 4 + 6) / 3,
            "log_likelihood/other": -(2 + 3 + 7) / 3,
            "log_likelihood/personal_swapped": -(2 + 8 + 8) / 3,
            "log_likelihood/other_swapped": -(3 + 4 + 7) / 3,
            "pir/personal": 8 / 3,
            "pir/other": 2.5 / 2,
            "log_likelihood/personal_without": ((-1 - 5) + (-4 - 1) + (-6 - 2)) / 3,
            "log_likelihood/other_without": ((-2 - 0.5) + (-3 - 2)) / 2,
            "personal_fraction": 3 / 6,
            "own_personal_fraction": 3 / 6,
        }
    )
    assert likelihoods.counts["log_likelihood/personal"].tolist() == [1, 2, 0]
    assert likelihoods.sums["log_likelihood/personal"].tolist() == [-1, -10, 0]
    skipped = token_likelihoods(own, [TokenScores.left_out(0, "why"), *reference[1:]])
    assert skipped.counts["log_likelihood/other"].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="row 1: its response has other tokens in `reference`"):
        token_likelihoods(own, [reference[0], make_scores(1, [-1], [2]), reference[2]])
    with pytest.raises(ValueError, match="3 rows of scores and 2 in `reference`"):
        token_likelihoods(own, reference[:2])


def test_ratios_spread_as_their_bootstrap():
    random = np.random.default_rng(0)
    counts = random.integers(0, 9, 200)
    sums = -random.gamma(2, 1, 200) * counts
    values = ratio_values(sums, counts)
    assert values.mean() == pytest.approx(sums.sum() / counts.sum())
    draws = random.integers(0, 200, (4000, 200))
    ratios = sums[draws].sum(1) / counts[draws].sum(1)
    assert bootstrap_interval(values) == pytest.approx(np.quantile(ratios, [0.025, 0.975]), rel=0.02)
    assert np.isnan(ratio_values(sums, np.zeros(200))).all()


def test_another_users_persona_is_scored_as_if_it_were_in_the_row(tiny_model, make_args):
    rows = [*ROWS, {**make_row(6), "persona": ""}]
    scorer = PerContrast(tiny_model, args=make_args(PerContrastConfig, max_length=600))
    found = sorted(score_swapped(scorer, scorer.prepare(rows), [row["user"] for row in rows]), key=lambda own: own.row)
    others = other_rows([row["user"] for row in rows], [row["persona"] for row in rows])
    assert all(ROWS[other]["user"] != row["user"] for other, row in zip(others, rows, strict=True))
    swapped = [
        {**row, "persona": rows[other]["persona"] if row["persona"] else ""}
        for row, other in zip(rows, others, strict=True)
    ]
    for own, expected in zip(found, scorer.score(swapped), strict=True):
        assert own.counterfactual_log_probs == pytest.approx(expected.log_probs, abs=1e-4)
        assert own.persona == expected.persona and np.isnan(own.log_probs).all()


def test_the_length_of_the_training_is_taken(adapted, tiny_model, data, tmp_path, capsys, make_args):
    adapted.save_pretrained(tmp_path / "adapter")
    argv = ["evaluate", "--model_name_or_path", tiny_model, "--adapter", str(tmp_path / "adapter"), "--use_cpu"]
    argv += ["--dataset_name", data, "--max_rows", "1", "--metrics", "rouge", "--likelihood", "false"]
    for length, line in (
        (80, "As in the training: max_length 80 ("),
        (8, "`max_length` is 1024: the training's 8 has no"),
    ):
        write_run_settings(make_args(max_length=length), tmp_path / "adapter")
        assert main([*argv, "--max_new_tokens", "8", "--output_dir", str(tmp_path / f"of-{length}")]) == 0
        assert " ".join(capsys.readouterr().out.split()).startswith(line)
        assert result_of(tmp_path / f"of-{length}")["settings"]["max_length"] == (80 if length == 80 else 1024)


def test_an_adapters_base_decides_what_is_personal(adapted, tiny_model, arguments, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": tiny_model}))
    options = EvaluationArguments(metrics=["rouge"], swap_persona=True)
    tokenizer = TransformersGenerator(tiny_model, args=arguments).tokenizer
    result = evaluate_rows(adapted, tokenizer, ROWS, tmp_path / "loaded", arguments, options, {"model": "adapted"})
    base, tuned = (PerContrast(model, tokenizer, args=arguments).score(ROWS) for model in (tiny_model, adapted))
    personal = np.concatenate([scores.pir > 0.05 for scores in base])
    log_probs = np.concatenate([scores.log_probs for scores in tuned])
    metrics = result["metrics"]
    assert 0 < personal.sum() < len(personal) and result["personal_by"] == "the base model, without its adapter"
    assert metrics["log_likelihood/personal"]["mean"] == pytest.approx(log_probs[personal].mean(), abs=1e-4)
    assert metrics["log_likelihood/other"]["mean"] == pytest.approx(log_probs[~personal].mean(), abs=1e-4)
    assert metrics["personal_fraction"]["mean"] == pytest.approx(personal.mean())
    assert metrics["log_likelihood/personal_swapped"]["rows"] == 6 and "swapped/uptake/other" in metrics
    swapped = lines_of(tmp_path / "loaded" / "swapped" / "predictions.jsonl")
    assert all(line["persona"] != row["persona"] for line, row in zip(swapped, ROWS, strict=True))

    with pytest.raises(ValueError, match="`settings` is missing"):
        evaluate_rows(adapted, tokenizer, ROWS, tmp_path / "nameless", arguments, options)

    # By name, and with the untrained model's own scores as the reference
    evaluate_rows(tiny_model, None, ROWS, tmp_path / "base", arguments, EvaluationArguments(metrics=["rouge"]))
    for name, given in (("named", None), ("given", str(tmp_path / "base" / "scores"))):
        options = EvaluationArguments(metrics=["rouge"], reference_scores=given)
        again = evaluate_rows(str(tmp_path / "adapter"), None, ROWS, tmp_path / name, arguments, options)
        for metric in ("log_likelihood/personal", "pir/personal", "uptake/own"):
            assert again["metrics"][metric]["mean"] == pytest.approx(metrics[metric]["mean"], abs=1e-4)


# ── baseline and judge ───────────────────────────────────────────────────────────────────────────────────────────────


def test_compared_with_another_evaluation(evaluate, tmp_path, tokenizer, capsys):
    make_tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    evaluate(output="base")
    capsys.readouterr()
    base = str(tmp_path / "base")
    assert evaluate("--model_name_or_path", str(tmp_path / "other"), "--baseline", base) == 0
    ours, theirs = (lines_of(tmp_path / name / "metrics.jsonl") for name in ("out", "base"))
    found = result_of(tmp_path / "out")["baseline"]["tests"]["log_likelihood/other"]
    values = [[line["log_likelihood/other"] for line in lines] for lines in (ours, theirs)]
    expected = paired_test(*values, [row["user"] for row in ROWS])
    assert found == {**expected, "interval": list(expected["interval"]), "rows": 6} and found["difference"] != 0
    assert f"{found['difference']:+.3f}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate("--max_rows", "4", "--baseline", base, output="few")
    assert "is of other rows; 2 differ, first row 4" in capsys.readouterr().err


@needs_openai
def test_a_judge_rates(evaluate, echo, tmp_path, capsys):
    def rate(body):
        text = body["messages"][-1]["content"]
        name = text.rsplit("\n", 1)[-1].split(":")[0]
        return f"{name}: {2 if name == 'fluency' else 4}" if "3 needles" not in text else "none"

    echo.reply = rate
    argv = ["--judge_base_url", echo.url, "--judge_model", "judge", "--likelihood", "False"]
    assert evaluate(*argv) == 0
    count = len(echo.texts)
    assert evaluate(*argv) == 0
    assert len(echo.texts) == count  # all answers are known
    metrics, rows = result_of(tmp_path / "out")["metrics"], lines_of(tmp_path / "out" / "metrics.jsonl")
    assert metrics["judge/fluency"]["mean"] == 2 and metrics["judge/personalization"] == {
        **{"mean": 4.0, "interval": [4.0, 4.0], "rows": 5},
    }
    assert [row["judge/personalization"] for row in rows] == [4, 4, 4, None, 4, 4]
    assert "replies could not be read" in capsys.readouterr().out
    assert {body["max_tokens"] for body in echo.bodies} == {512} and "think" not in echo.bodies[0]
    assert evaluate(*argv, "--judge_max_tokens", "9", "--judge_extra_body", '{"think": false}') == 0
    assert (echo.bodies[-1]["max_tokens"], echo.bodies[-1]["think"]) == (9, False)
    assert result_of(tmp_path / "out")["judge"]["cut"] == 0


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--dataset_split", "train2"], "no split 'train2'; it has 'train'"),
        (["--max_rows", "0"], "`max_rows` is 0"),
        (["--temperature", "-1"], "`temperature` is -1"),
        (["--max_new_tokens", "600"], "leaves no room for a prompt"),
        (["--temprature", "1"], "Did you mean `temperature`"),
        (["--metrics", "rouge", "bert"], "`metrics` must name"),
        (["--judge_model", "x"], "`judge_base_url` and `judge_model` belong together"),
        (["--judge_max_tokens", "0"], "`judge_max_tokens` is 0"),
        (["--judge_extra_body", "{think"], "`judge_extra_body` is '{think'. Write a JSON object"),
        (["--reference_scores", "nowhere"], "there is no 'scores.jsonl' in 'nowhere'"),
        (["--baseline", "nowhere"], "there is no 'predictions.jsonl' in 'nowhere'"),
        (["--counterfactual", "swap"], "Set `swap_persona`"),
        (["--use_vllm"], "pip install vllm"),
        (["--use_vllm", "--num_processes", "2"], "`use_vllm` generates in one process, and there are 2"),
        (["--use_vllm", "--guidance_scale", "2"], "does not go with `guidance_scale`"),
        (["--adapter", "/tmp"], "no 'adapter_config.json' in '/tmp'"),
        (["--model_name_or_path", "./nowhere"], "there is no folder './nowhere'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_arguments_stop_it_before_the_model_loads(evaluate, tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.setattr("trl_perce.evaluation.evaluate.load_model", None)
    with pytest.raises(SystemExit) as stopped:
        evaluate(*argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_rows_stop_it_before_the_model_loads(evaluate, data, capsys, monkeypatch):
    monkeypatch.setattr("trl_perce.evaluation.evaluate.load_model", None)
    with open(data, "a") as file:
        file.write(json.dumps({**make_row(0), "completion": []}) + "\n")
    with pytest.raises(SystemExit) as stopped:
        evaluate()
    assert stopped.value.code == 2 and "row 6: the response in 'completion' is empty" in capsys.readouterr().err


# ── a real model ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_smollm2(smollm2, data, tmp_path, capsys):
    argv = ["--model_name_or_path", smollm2, "--dataset_name", data, "--use_cpu", "--bf16", "False", *QUICK]
    argv += ["--dtype", "float32", "--max_new_tokens", "20", "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", *argv]) == 0
    result, predictions = result_of(tmp_path / "out"), lines_of(tmp_path / "out" / "predictions.jsonl")
    metrics = result["metrics"]
    assert len(predictions) == 6 and all(len(line["prediction"]) > 20 for line in predictions)
    assert metrics["pir/personal"]["mean"] > 1 > metrics["pir/other"]["mean"]
    assert metrics["uptake/own"]["mean"] >= metrics["uptake/other"]["mean"]
    assert "<|im_end|>" not in "".join(line["prediction"] for line in predictions)
