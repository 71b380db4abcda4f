import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from trl_perce import PerCEConfig
from trl_perce.cli import score
from trl_perce.cli.common import check_config_keys
from trl_perce.cli.train import make_parser
from trl_perce.persona.marks import mark_persona


ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
NAMES = sorted(
    path.relative_to(RECIPES).as_posix()
    for path in RECIPES.rglob("*.y*ml")
    if not {"accelerate_configs", "reproduce"} & {*path.parts}
)
FIELDS = {
    field.name
    for config in (ScriptArguments, PerCEConfig, ModelConfig, DatasetMixtureConfig)
    for field in dataclasses.fields(config)
}
TASKS = ("abstract_generation", "product_review", "topic_writing")
# Model → its name on the Hub and the paper's effective batch
GPU_MODELS = {
    "Qwen3-4B": ("Qwen/Qwen3-4B", 96),
    "Qwen3-14B": ("Qwen/Qwen3-14B", 32),
    "Llama-3.1-8B-Instruct": ("meta-llama/Llama-3.1-8B-Instruct", 64),
}


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def parsed(name):
    """Script arguments, training arguments and model arguments. The parser is new, since a file changes its defaults."""
    path, parser = str(RECIPES / name), make_parser()
    check_config_keys(parser, ["--config", path])
    *configs, of_config, of_command_line = parser.parse_args_and_config(
        ["--config", path, "--use_cpu", "true"], return_remaining_strings=True, separate_remaining_strings=True
    )
    assert of_config == of_command_line == []
    return configs[:3]


def test_scoring_takes_a_recipe_as_it_is(name, parsed):
    path, (_, training_args, model_args) = str(RECIPES / name), parsed
    _, args, own_model_args, _, rest = score.make_parser().parse_args_and_config(
        ["--config", path], return_remaining_strings=True
    )
    assert rest == [] and own_model_args == model_args
    for field in ("max_length", "counterfactual", "weight_clip_min", "weight_clip_max", "bf16", "truncate_persona"):
        assert getattr(args, field) == getattr(training_args, field)


def load(name: str) -> dict:
    return yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))


def test_there_is_a_recipe_for_each_model_task_and_adapter():
    folders = [f"{model}/{task}" for model in GPU_MODELS for task in TASKS] + ["SmolLM2-135M-Instruct/persona_qa"]
    expected = {f"{folder}/config_{adapter}.yaml" for folder in folders for adapter in ("lora", "qlora")}
    assert expected <= set(NAMES)


def test_values(name, parsed):
    script_args, training_args, model_args = parsed
    model, task, file = name.split("/")
    adapter = file.removeprefix("config_").removesuffix(".yaml")
    assert load(name).keys() <= FIELDS  # no key of `accelerate launch`
    assert training_args.token_weighting == "perce"
    assert (training_args.weight_clip_min, training_args.weight_clip_max) == (0.8, 5.0)
    assert training_args.counterfactual == "drop"
    assert training_args.output_dir == f"outputs/{model}-{task}-{adapter}"
    assert training_args.warmup_steps == 0.04
    # YAML reads `1e-4` as a string
    assert not [value for value in load(name).values() if isinstance(value, str) and re.match(r"[-+.]*\d", value)]
    if model not in GPU_MODELS:
        assert training_args.use_cpu and (ROOT / script_args.dataset_name / "train.jsonl").is_file()
        return
    hub_name, batch = GPU_MODELS[model]
    assert model_args.model_name_or_path == hub_name
    assert script_args.dataset_name == f"./data/{task}"
    assert training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps == batch
    assert (training_args.adam_beta1, training_args.adam_beta2, training_args.optim) == (0.9, 0.999, "adamw_torch")
    assert (training_args.max_length, training_args.learning_rate) == (5000, 1e-4)
    assert training_args.num_train_epochs == 3
    assert training_args.gradient_checkpointing and "use_cpu" not in load(name)
    assert (training_args.bf16, training_args.fp16) == ((False, True) if "fp16" in name else (True, False))


def test_adapter_and_quantization(name, parsed):
    model_args = parsed[2]
    peft_config = get_peft_config(model_args)
    assert isinstance(peft_config, LoraConfig)
    assert (peft_config.r, peft_config.lora_alpha, peft_config.lora_dropout) == (16, 32, 0.0)
    assert peft_config.target_modules == "all-linear"
    quantization_config = get_quantization_config(model_args)
    if "_qlora" not in name:
        assert quantization_config is None
        return
    assert quantization_config.load_in_4bit
    assert quantization_config.bnb_4bit_quant_type == "nf4"
    assert quantization_config.bnb_4bit_use_double_quant
    assert str(quantization_config.bnb_4bit_compute_dtype) == f"torch.{'float16' if 'fp16' in name else 'bfloat16'}"


def test_a_qlora_recipe_is_its_lora_recipe_quantized():
    quantized = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
    for name in NAMES:
        if name.endswith("_qlora.yaml"):
            lora, qlora = load(name.replace("_qlora", "_lora")), load(name)
            output_dir = lora["output_dir"].removesuffix("-lora") + "-qlora"
            assert qlora == {**lora, **quantized, "output_dir": output_dir}, name


def test_the_fp16_recipe_is_its_qlora_recipe_in_float16():
    (name,) = (name for name in NAMES if "fp16" in name)
    qlora, fp16 = load(name.replace("_fp16", "")), load(name)
    assert {**qlora, "dtype": "float16", "fp16": True, "output_dir": fp16["output_dir"]} == {**fp16, "bf16": True}


def test_output_dirs_are_unique():
    output_dirs = [load(name)["output_dir"] for name in NAMES]
    assert len(set(output_dirs)) == len(output_dirs)


def test_each_recipe_says_how_to_run_it_and_the_readme_lists_it(name):
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert f"]({name})" in readme
    commands = re.findall(r"--config recipes/(\S+)", (RECIPES / name).read_text(encoding="utf-8"))
    assert set(commands) <= {name}
    assert commands or name == "SmolLM2-135M-Instruct/persona_qa/config_lora.yaml"


def test_the_readme_is_right():
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    configs = {f"accelerate_configs/{path.name}" for path in (RECIPES / "accelerate_configs").glob("*.yaml")}
    named = set(re.findall(r"recipes/(\S+\.yaml)", readme) + re.findall(r"\]\((\S+\.yaml)\)", readme))
    grids = {f"reproduce/{path.name}" for path in (RECIPES / "reproduce").glob("*.yaml")}
    assert configs | grids < named <= configs | grids | set(NAMES)
    rows = [json.loads(row) for row in re.findall(r"```json\n(.+?)```", readme, flags=re.DOTALL)]
    assert len(rows) == 3
    for row in rows:
        row, (span,) = mark_persona(row)
        text = row["prompt"] if span.message is None else row["prompt"][span.message]["content"]
        assert text[span.start : span.end] == "I sew my own dresses and ride a bicycle to work."
