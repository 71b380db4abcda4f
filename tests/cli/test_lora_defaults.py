"""What `trl-perce train --use_peft` takes where nothing is given."""

from types import SimpleNamespace

import pytest
from peft import LoraConfig
from trl import get_peft_config

from trl_perce.cli import train


def parse(tmp_path, *argv, **config):
    (tmp_path / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in {"seed": 1, **config}.items()))
    parser = train.make_parser()
    fixed = [
        "--config",
        str(tmp_path / "config.yaml"),
        "--dataset_name",
        "x",
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
    ]
    _, args, model_args, _ = parser.parse_args_and_config([*fixed, *argv])
    return args, model_args, parser.filled_in


def test_use_peft_alone(tmp_path):
    args, model_args, lines = parse(tmp_path, use_peft="true")
    adapter = get_peft_config(model_args)
    assert (adapter.lora_dropout, adapter.target_modules, args.learning_rate) == (0.0, "all-linear", 1e-4)
    assert model_args.dtype == "float32"  # on a CPU
    assert [line.split(" (")[0] for line in lines] == [
        *("lora_dropout: 0.0", "lora_target_modules: all-linear", "learning_rate: 0.0001")
    ]
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("where", ["yaml", "command line", "abbreviated"])
def test_what_is_given_counts_even_where_it_is_trls_default(tmp_path, where):
    given = {"lora_dropout": 0.05, "lora_target_modules": "q_proj", "learning_rate": "2.0e-5", "dtype": "float32"}
    if where == "abbreviated":
        given["lora_dr"] = given.pop("lora_dropout")
    argv = [word for key, value in given.items() for word in (f"--{key}", str(value))] if where != "yaml" else []
    args, model_args, lines = parse(tmp_path, "--use_peft", *argv, **(given if where == "yaml" else {}))
    assert (model_args.lora_dropout, model_args.lora_target_modules) == (0.05, "q_proj")
    assert (args.learning_rate, model_args.dtype, lines) == (2e-5, "float32", [])


def test_without_an_adapter_the_defaults_are_trls(tmp_path):
    args, model_args, lines = parse(tmp_path)
    assert (args.learning_rate, model_args.dtype, lines) == (2e-5, "float32", []) and not model_args.use_peft


def test_parameters_as_targets_leave_the_modules_to_peft(tmp_path):
    _, model_args, lines = parse(tmp_path, "--use_peft", "--lora_target_parameters", "experts.gate_up_proj")
    assert model_args.lora_target_modules is None and not any("target_modules" in line for line in lines)
    assert LoraConfig(target_parameters=model_args.lora_target_parameters).target_modules is None


@pytest.mark.parametrize(
    "given, dtype",
    [({}, "bfloat16"), ({"bf16": False}, "float32"), ({"fp16": True}, "float32"), ({"use_cpu": True}, "float32")],
)
def test_the_frozen_weights_are_in_bfloat16_where_the_device_has_it(monkeypatch, given, dtype):
    monkeypatch.setattr("trl_perce.config.has_accelerator", lambda: True)
    options = {"use_peft": True, "lora_target_parameters": None, "use_cpu": False, "fp16": False, "bf16": None}
    parsed = SimpleNamespace(**{**options, **given})
    lines = train._fill_in(parsed, {"dtype": "float32"})
    assert parsed.dtype == dtype and len(lines) == (dtype == "bfloat16") and all(len(line) <= 80 for line in lines)
