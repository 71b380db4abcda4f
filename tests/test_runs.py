"""Whole runs: command line, resuming, adapters, NF4 on the real SmolLM2."""

import json
import subprocess
import sys
import tempfile

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TrainerCallback

from conftest import ROOT, make_tiny_model
from processes import adapter_of, assert_same_adapter, recipe, run
from reference import make_rows, reference
from rows import write_lines, write_splits
from runs import FAST_DTYPE
from trl_perce import PerCETrainer


# That a real model, too, finds the personas in the responses
ROWS = [
    {
        "persona": f"I am number {i} and I {verb}.",
        "prompt": [{"role": "user", "content": "Me: {persona}\nWhat should I buy?"}],
        "completion": [{"role": "assistant", "content": f"A new set of {thing}, number {i}."}],
    }
    for i, (verb, thing) in enumerate([("sew dresses", "needles"), ("love linen", "linen"), ("bake", "trays")] * 4)
]


@pytest.fixture
def data_folder(tmp_path) -> str:
    return write_splits(tmp_path / "data", train=ROWS, test=ROWS[:3])


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_line_trains_evaluates_and_saves(tmp_path, tiny_model, data_folder):
    config = recipe(
        tmp_path / "config.yaml",
        model_name_or_path=tiny_model,
        dataset_name=data_folder,
        eval_strategy="epoch",
        num_train_epochs=1,
        output_dir=str(tmp_path / "out"),
    )
    result = run("trl-perce", "train", "--config", config, "--learning_rate", "1e-3")
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    train_log, eval_log = next(log for log in logs if "loss" in log), next(log for log in logs if "eval_loss" in log)
    for metric in (
        *("nll", "pir/mean", "pir/personal_fraction", "weight/mean", "weight/at_min", "weight/at_max"),
        *("counterfactual/token_ratio", "mean_token_accuracy", "entropy"),
    ):
        assert metric in train_log and f"eval_{metric}" in eval_log
    assert train_log["learning_rate"] == 1e-3  # the command line goes before the file
    # What is on the screen fits there, but for long paths
    said = (result.stdout + result.stderr).replace(str(tmp_path), "")
    assert all(len(line) <= 80 for line in said.splitlines()), said
    assert f"   1 {train_log['loss']:8.3f} {train_log['nll']:8.3f}" in result.stdout and "{" not in result.stdout
    assert "100%" not in result.stderr  # no progress bars where there is no terminal
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2603.06595" in card and "perce" in card

    # Plain PEFT loads the adapter, in a process that never imports this package
    script = (
        "import sys, torch\n"
        "from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(model(torch.tensor([[5, 6, 7]])).logits.double().sum().item())\n"
        "assert 'trl_perce' not in sys.modules\n"
    )
    got = float(run(sys.executable, "-c", script).stdout.strip().splitlines()[-1])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "out"))
    assert got == pytest.approx(model(torch.tensor([[5, 6, 7]])).logits.double().sum().item(), rel=1e-4)


def test_a_recipe_of_trls_sft_runs_unchanged_with_uniform(tmp_path, tiny_model):
    # The kinds of keys that TRL's own SFT recipes have: packing, text data, a mixture
    data = tmp_path / "text.jsonl"
    write_lines(data, ({"text": f"I sew dresses, number {i}. " * 3} for i in range(20)))
    values = {
        "model_name_or_path": tiny_model,
        "datasets": [{"path": "json", "data_files": str(data), "columns": ["text"]}],
        "packing": True,
        "packing_strategy": "wrapped",
        "max_steps": 2,
    }
    config = recipe(tmp_path / "config.yaml", **values)
    stdout = {}
    for command in (["trl", "sft"], ["trl-perce", "train", "--token_weighting", "uniform"]):
        result = run(*command, "--config", config, "--output_dir", str(tmp_path / command[0]))
        stdout[command[0]] = result.stdout.splitlines()
    logs = json.loads((tmp_path / "trl-perce" / "trainer_state.json").read_text())["log_history"]
    losses = [line.split("'grad_norm'")[0] for line in stdout["trl"] if line.startswith("{'loss'")]
    assert losses == [f"{{'loss': '{log['loss']:.4g}', " for log in logs if "loss" in log] and len(losses) == 2
    assert "step     loss       lr tokens/s     left" in stdout["trl-perce"]
    assert_same_adapter(adapter_of(tmp_path / "trl"), adapter_of(tmp_path / "trl-perce"))


# ── resuming ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_was_stopped_ends_with_the_same_adapter(tmp_path, make_args, tokenizer):
    rows = Dataset.from_list([row.tokenized() for row in make_rows(seed=22, count=12)])

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    def trainer(name, callbacks=None):
        options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 3, "per_device_train_batch_size": 2}
        return PerCETrainer(
            make_tiny_model("qwen3"),
            make_args(output_dir=str(tmp_path / name), max_length=None, learning_rate=1e-2, **options),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            callbacks=callbacks,
        )

    whole, stopped, resumed = trainer("whole"), trainer("stopped", [Stop()]), trainer("stopped")
    whole.train()
    stopped.train()
    assert stopped.state.global_step == 4 < whole.state.global_step
    resumed.train(resume_from_checkpoint=True)
    for one in (whole, resumed):
        one.save_model()
    assert_same_adapter(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "stopped"))
    logs = [[log for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert [log["loss"] for log in logs[0]] == [log["loss"] for log in logs[1]]


def test_the_command_line_resumes_where_a_killed_run_stopped(tmp_path, tiny_model, data_folder):
    values = {"model_name_or_path": tiny_model, "dataset_name": data_folder, "num_train_epochs": 1}
    values |= {"save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": True}
    config = recipe(tmp_path / "config.yaml", **values)
    run("trl-perce", "train", "--config", config, "--output_dir", str(tmp_path / "whole"))
    # A run of six steps that dies after its fourth
    script = (
        "import os, sys\n"
        "from transformers import Trainer\n"
        "original = Trainer._save_checkpoint\n"
        "def save(self, model, trial):\n"
        "    original(self, model, trial)\n"
        "    if self.state.global_step == 4: os._exit(9)\n"
        "Trainer._save_checkpoint = save\n"
        "from trl_perce.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    argv = ["train", "--config", config, "--output_dir", str(tmp_path / "killed")]
    killed = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, cwd=ROOT)
    assert killed.returncode == 9, killed.stderr
    result = run("trl-perce", *argv)
    assert "Resuming from" in result.stdout and "checkpoint-4" in result.stdout
    assert_same_adapter(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "killed"))


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["full", "dora", "prompt tuning"])
def test_full_fine_tuning_dora_and_virtual_tokens(make_args, tokenizer, kind):
    from peft import PromptTuningConfig

    rows = make_rows(seed=23, count=6)
    peft_config = {
        "full": None,
        "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True),
        "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]
    model = make_tiny_model("llama")
    expected = reference(model, rows) if kind != "prompt tuning" else None  # both adapters start as the base model
    trainer = PerCETrainer(
        model,
        make_args(max_length=None, num_train_epochs=8, per_device_train_batch_size=6, learning_rate=2e-2),
        train_dataset=Dataset.from_list([row.tokenized() for row in rows]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    if expected is not None:
        assert logs[0]["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert logs[-1]["nll"] < logs[0]["nll"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_changes_nothing(make_args, tokenizer, checkpointing):
    rows = make_rows(seed=24, count=6)
    expected = reference(make_tiny_model("qwen3"), rows)
    trainer = PerCETrainer(
        make_tiny_model("qwen3"),
        make_args(max_length=None, max_steps=1, per_device_train_batch_size=6, gradient_checkpointing=checkpointing),
        train_dataset=Dataset.from_list([row.tokenized() for row in rows]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.loss, rel=1e-5)


def nf4(compute_dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def test_qlora_on_the_real_model(make_args, smollm2, tmp_path):
    """NF4 with double quantization: the base weights are in 4 bit, PIR points at the right words, the adapter learns."""
    trainer = PerCETrainer(
        smollm2,
        make_args(
            bf16=FAST_DTYPE == "bfloat16",
            model_init_kwargs={"dtype": FAST_DTYPE},
            num_train_epochs=2,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            output_dir=str(tmp_path / "qlora"),
        ),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:3]),
        quantization_config=nf4(FAST_DTYPE),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    layer = trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == torch.uint8 and layer.weight.quant_state.nested
    frozen = layer.weight.clone()
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert torch.equal(layer.weight, frozen)
    log = next(log for log in trainer.state.log_history if "eval_pir/mean" in log)
    assert log["eval_pir/mean"] > 0.2 and log["eval_pir/personal_fraction"] > 0.1
    assert after["eval_loss"] < 0.8 * before["eval_loss"]
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(smollm2)  # the adapter goes on the base model in full precision too
    model = PeftModel.from_pretrained(base, str(tmp_path / "qlora"))
    ids = trainer.processing_class("Me: I sew dresses.", return_tensors="pt")["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        plain = model(ids).logits
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, plain, atol=1e-2)


def test_evaluation_of_a_4bit_model_does_not_spoil_its_gradients(make_args, smollm2_tokenizer):
    # bitsandbytes 0.50.2 would pack the weights for inference, without a backward pass (CPUs with AVX512-BF16)
    rows = Dataset.from_list([row.tokenized() for row in make_rows(seed=25, count=4)])
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        trainer = PerCETrainer(
            folder,
            make_args(bf16=True, max_length=None, model_init_kwargs={"dtype": "bfloat16"}),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=smollm2_tokenizer,
            quantization_config=nf4("bfloat16"),
            peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        )

    def gradients():
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).backward()
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}

    torch.manual_seed(0)
    before = gradients()
    trainer.evaluate()
    torch.manual_seed(0)
    after = gradients()
    assert len(before) == 28 and all(gradient.norm() > 0 for gradient in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)
