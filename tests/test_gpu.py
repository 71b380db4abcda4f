"""
The method on an accelerator: `pytest -m gpu`, which `examples/benchmarks/gpu.py` runs first. Without one it runs on the CPU, as the
rehearsal does, less the tests of what a CPU does not have.

Bounds: float32 ones are those of the tests on CPU. In 16 bit a logit of size `s` is rounded to `s * 2**-8` (bf16) or `s * 2**-11` (fp16),
and a log-probability is made of two of them.
"""

import copy
import importlib.util

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config
from trl import SFTConfig, SFTTrainer

import trl_perce.trainer
from conftest import TINY_CONFIGS, make_tiny_model
from reference import make_rows, reference, response_log_probs
from runs import LAYOUTS, assert_close, one_sgd_step, pir_by_row, record_pir, to_dataset
from trl_perce import PerCEConfig, PerCETrainer, PerContrast
from trl_perce.evaluation.generate import GenerationArguments, TransformersGenerator
from trl_perce.evaluation.predictions import make_prompts


pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="a CPU has no such thing")
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
needs_flash = pytest.mark.skipif(not importlib.util.find_spec("flash_attn"), reason="flash_attn is not installed")


@pytest.fixture
def make_args(make_args):
    """As the tests' own, on the GPU if there is one."""
    return lambda cls=PerCEConfig, **kwargs: make_args(cls, **{"use_cpu": not HAS_GPU, **kwargs})


def make_trainer(make_args, tokenizer, model, rows, cls=PerCETrainer, lora=None, **kwargs):
    dataset = to_dataset(rows)
    return cls(
        model,
        make_args(**{"max_length": None, "train_sampling_strategy": "sequential", **kwargs}),
        train_dataset=dataset if cls is PerCETrainer else dataset.remove_columns("persona_mask"),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if lora else None,
    )


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def adapters(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma"])
def test_float32_is_the_formula(make_args, tokenizer, monkeypatch, kind):
    rows = make_rows(seed=71, count=8)
    expected = reference(make_tiny_model(kind), rows, clip_max=1.5)
    recorded = record_pir(monkeypatch)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "weight_clip_max": 1.5}
    options |= {"train_sampling_strategy": "sequential"}
    logs, gradients = one_sgd_step(make_args, tokenizer, kind, rows, **options)
    assert logs["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert_close({name: gradient.cpu() for name, gradient in gradients.items()}, expected.gradients)
    pir = torch.cat(recorded).double().cpu()
    assert torch.allclose(pir, torch.tensor([v for row in expected.pir for v in row]).double(), atol=2e-5)
    weights = [v for row in expected.weights for v in row]
    assert logs["weight/mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=needs_gpu)])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma"])
def test_16_bits_are_the_formula_up_to_their_rounding(make_args, tokenizer, monkeypatch, kind, precision):
    rows = make_rows(seed=72, count=8)
    model = make_tiny_model(kind)
    recorded = record_pir(monkeypatch)
    options = {"bf16": precision == "bf16", "fp16": precision == "fp16", "per_device_train_batch_size": 8}
    trainer = make_trainer(make_args, tokenizer, model, rows, max_steps=1, learning_rate=0.0, **options)
    trainer.train()
    (pir,) = (own.double().cpu() for own in recorded)
    expected = reference(make_tiny_model(kind), rows)
    exact = torch.tensor([v for row in expected.pir for v in row]).double()
    double = make_tiny_model(kind).double().eval()
    with torch.no_grad():
        logits = torch.cat([double(input_ids=torch.tensor([r.tokenized()["input_ids"]])).logits[0] for r in rows])
    # Two layers of some six matrix products each, every one rounded; log-probabilities of two passes
    rounding = float(logits.abs().max()) * 2.0 ** (-8 if precision == "bf16" else -11)
    error = (pir - exact).abs()
    assert error.mean() < 2 * rounding and error.max() < 8 * rounding
    assert losses(trainer)[0] == pytest.approx(expected.loss, rel=0.02 if precision == "bf16" else 0.004)


@needs_gpu
def test_fp16_trains_as_float32_does(make_args, tokenizer):
    rows = make_rows(seed=73, count=16)
    options = {"per_device_train_batch_size": 8, "max_steps": 30, "learning_rate": 1e-2, "lora": True}
    runs = {}
    for fp16 in (False, True):
        trainer = make_trainer(make_args, tokenizer, make_tiny_model("llama"), rows, fp16=fp16, **options)
        trainer.train()
        runs[fp16] = [log["nll"] for log in trainer.state.log_history if "nll" in log]
    # The scaler may leave out its first steps, until its scale fits
    assert runs[False][-1] < 0.7 * runs[False][0] and runs[True][-1] < 0.75 * runs[True][0]
    assert runs[True][0] == pytest.approx(runs[False][0], rel=0.004)


@pytest.mark.parametrize("lora", [False, True])
def test_uniform_is_sft_bit_for_bit(make_args, tokenizer, lora):
    rows = make_rows(seed=74, count=24)
    options = {"max_steps": 5, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    runs = []
    for cls, config in ((SFTTrainer, SFTConfig), (SFTTrainer, SFTConfig), (PerCETrainer, PerCEConfig)):
        torch.manual_seed(0)
        weighting = {"token_weighting": "uniform"} if cls is PerCETrainer else {}
        options |= {"cls": cls, "learning_rate": 1e-2, "lora": lora}
        trainer = make_trainer(
            lambda config=config, **kwargs: make_args(config, **kwargs),
            tokenizer, make_tiny_model("qwen3"), rows, **options, **weighting,
        )  # fmt: skip
        trainer.train()
        runs.append((losses(trainer), adapters(trainer)))
    (one, own), (two, again), (ours, mine) = runs
    assert len(one) == 5 and one == two and all(torch.equal(own[name], again[name]) for name in own), (
        "TRL's own SFT differs from run to run here"
    )
    assert ours == one and all(torch.equal(mine[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("attention", "counterfactual"),
    [
        ("sdpa", "drop"),
        ("sdpa", "mask"),
        pytest.param("flash_attention_2", "drop", marks=[needs_gpu, needs_flash]),
        pytest.param("flex_attention", "drop", marks=needs_gpu),
    ],
)
def test_pir_is_the_same_in_every_layout(make_args, tokenizer, monkeypatch, attention, counterfactual):
    rows = make_rows(seed=41, count=9)
    precision = {"bf16": attention.startswith("flash")}  # which has no float32
    # Heads of 16, the least that flex attention takes, none shared by queries: before PyTorch's #185349 flex attention has no kernel
    # for 65 to 127 tokens then (seen with torch 2.11 on an H100). A configuration of its own, since the models of a kind share theirs.
    config = Qwen3Config(**{**TINY_CONFIGS["qwen3"].to_dict(), "head_dim": 16, "num_key_value_heads": 4})

    def make_model(dtype, attention):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)

    found = {}
    for name, layout in LAYOUTS.items():
        recorded = record_pir(monkeypatch)
        model = make_model(torch.float32, attention)
        options = {"per_device_train_batch_size": 9, "num_train_epochs": 1, "learning_rate": 0.0, **layout}
        trainer = make_trainer(
            make_args, tokenizer, model, rows, counterfactual=counterfactual, **precision, **options
        )
        trainer.train()
        found[name] = pir_by_row([pir.float().cpu() for pir in recorded], trainer, rows)
        monkeypatch.undo()
    double = make_model(torch.float32, "sdpa").double().eval()
    atol = 0.5 if precision["bf16"] else 2e-5  # logits up to 16: 8 roundings of 2**-4 in bf16
    for name, pirs in found.items():
        assert sum(len(pir) for pir in pirs.values()) > 20
        for row in rows:
            if row.persona and counterfactual == "drop":
                with torch.no_grad():
                    factual, _ = response_log_probs(double, row.before + row.persona + row.after, row.response)
                    without, _ = response_log_probs(double, row.before + row.after, row.response)
                assert torch.allclose(pirs[tuple(row.response)].double(), factual - without, atol=atol), name
        for response, pir in pirs.items():
            assert torch.allclose(pir, found["single"][response], atol=atol), name


def test_nf4_is_its_dequantized_copy(make_args, tokenizer, monkeypatch, tmp_path):
    torch.manual_seed(0)
    config = Qwen3Config(
        **{"vocab_size": 400, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 32},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 3, "initializer_range": 0.1},
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    rows = make_rows(seed=75, count=6)
    recorded = record_pir(monkeypatch)
    trainer = PerCETrainer(
        str(tmp_path / "model"),
        make_args(
            max_length=None, max_steps=1, learning_rate=0.0, per_device_train_batch_size=6,
            train_sampling_strategy="sequential", model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=to_dataset(rows),
        processing_class=tokenizer,
        quantization_config=nf4,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    quantized = {name: module for name, module in trainer.model.named_modules() if isinstance(module, Linear4bit)}
    assert len(quantized) == 14 and all(module.weight.quant_state.nested for module in quantized.values())
    copy_in_float64 = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    with torch.no_grad():
        for name, module in quantized.items():
            plain = copy_in_float64.get_submodule(name.removeprefix("base_model.model.").removesuffix(".base_layer"))
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert 0.01 < (plain.weight - weight.cpu()).norm() / plain.weight.norm() < 0.2  # it was quantized
            plain.weight.copy_(weight)
    expected = reference(copy_in_float64, rows)
    pir = torch.cat(recorded).double().cpu()
    exact = torch.tensor([v for row in expected.pir for v in row]).double()
    assert exact.abs().max() > 0.1 and torch.allclose(pir, exact, atol=1e-4)
    assert losses(trainer)[0] == pytest.approx(expected.loss, rel=1e-5)


def test_counterfactual_batch_tokens_change_rounding_alone(make_args, tokenizer):
    rows = make_rows(seed=76, count=12)
    found = {}
    for tokens in ("auto", None, 1):
        trainer = make_trainer(
            make_args, tokenizer, make_tiny_model("qwen3"), rows,
            counterfactual_batch_tokens=tokens, per_device_train_batch_size=3, gradient_accumulation_steps=4, max_steps=1,
        )  # fmt: skip
        trainer.train()
        found[tokens] = losses(trainer)[0]
    assert found["auto"] == pytest.approx(found[1], rel=1e-6) == pytest.approx(found[None], rel=1e-6)


@needs_gpu
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_optimizers_train(make_args, tokenizer, optim):
    # bitsandbytes keeps tensors under 4,096 values in 32 bit: the embedding's 400 × 32 are more
    rows = make_rows(seed=77, count=16)
    runs = {}
    for name in ("adamw_torch", optim):
        options = {"per_device_train_batch_size": 8, "max_steps": 20, "learning_rate": 1e-2}
        trainer = make_trainer(make_args, tokenizer, make_tiny_model("llama"), rows, optim=name, **options)
        trainer.train()
        runs[name] = losses(trainer)
    states = [state["state1"] for state in trainer.optimizer.optimizer.state.values()]
    assert any(state.dtype == torch.uint8 for state in states)
    assert runs[optim][-1] < 0.8 * runs[optim][0]
    assert np.allclose(runs[optim], runs["adamw_torch"], rtol=0.1)


def test_a_resumed_run_is_the_undisturbed_one(make_args, tokenizer, tmp_path):
    rows = make_rows(seed=78, count=18)
    options = {"per_device_train_batch_size": 3, "max_steps": 6, "learning_rate": 1e-2, "lora": True}
    options |= {"save_strategy": "steps", "save_steps": 3}

    def trainer_in(folder):
        torch.manual_seed(0)
        return make_trainer(make_args, tokenizer, make_tiny_model("qwen3"), rows, output_dir=str(folder), **options)

    trainer_in(tmp_path / "one").train()
    resumed = trainer_in(tmp_path / "two")
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    one, two = (load_file(tmp_path / name / "checkpoint-6" / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"padding_free": True}, {"weight_normalization": "sequence"}], ids=str)
def test_the_head_may_lie_on_another_device(make_args, tokenizer, options):
    """As with a `device_map` over several devices, here the GPU and the CPU."""
    rows = make_rows(seed=79, count=8)
    expected = reference(make_tiny_model("llama"), rows, normalization=options.get("weight_normalization", "none"))
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1, **options}
    trainer = make_trainer(make_args, tokenizer, make_tiny_model("llama"), rows, learning_rate=0.0, **options)
    # It has its input brought there, as by Accelerate's dispatch_model
    add_hook_to_module(trainer.model.lm_head.to("cpu"), AlignDevicesHook("cpu"))
    trainer.model.hf_device_map = {"model": 0, "lm_head": "cpu"}  # Accelerate moves nothing then
    gradients = {}

    class Noting(trl_perce.trainer.FiniteCheck):
        def is_good(self, step, grad_norm):
            gradients.update({name: p.grad.double().cpu() for name, p in trainer.model.named_parameters()})
            return super().is_good(step, grad_norm)

    trainer._finite_check = Noting(trainer.accelerator, "stop", trainer.train_dataset)
    trainer.train()
    assert next(trainer.model.lm_head.parameters()).device.type == "cpu"
    assert next(trainer.model.model.parameters()).device.type == "cuda"
    assert losses(trainer)[0] == pytest.approx(expected.loss, rel=1e-5)
    scale = min(1.0, 1.0 / torch.stack([g.norm() for g in expected.gradients.values()]).norm())  # max_grad_norm
    assert_close(gradients, {name: gradient * scale for name, gradient in expected.gradients.items()})
    with torch.no_grad():
        trainer.model.lm_head.weight[7] = torch.nan
    with pytest.raises(FloatingPointError, match="are NaN or infinite in row"):
        trainer.train()


def test_scores_are_those_of_raw_logits(tokenizer):
    rows = make_rows(seed=80, count=6, with_persona=1.0)
    model = make_tiny_model("qwen3")
    double = copy.deepcopy(model).double().eval()
    scorer = PerContrast(
        model.to("cuda" if HAS_GPU else "cpu"), tokenizer, bf16=False, use_cpu=not HAS_GPU, disable_tqdm=True
    )
    for row, scores in zip(rows, scorer.score(to_dataset(rows)), strict=True):
        with torch.no_grad():
            factual, _ = response_log_probs(double, row.before + row.persona + row.after, row.response)
            without, _ = response_log_probs(double, row.before + row.after, row.response)
        assert np.allclose(scores.log_probs, factual, atol=1e-5)
        assert np.allclose(scores.pir, factual - without, atol=2e-5)


def test_predictions_are_those_of_raw_logits(make_args, tokenizer, caplog):
    """In bfloat16, with two key-value heads and padding: what cuDNN's attention gets wrong on some cards."""
    rows = [{"prompt": "I sew. " * count + "What?", "completion": "Needles."} for count in (1, 30, 7, 12)]
    args = make_args(GenerationArguments, max_new_tokens=40, temperature=0, max_length=None)
    model = make_tiny_model("llama", torch.bfloat16).to("cuda" if HAS_GPU else "cpu")
    generator = TransformersGenerator(model, tokenizer, args)
    prompts, double = make_prompts(rows, tokenizer, args), copy.deepcopy(model).to("cpu").double().eval()
    assert len([*generator.iterate(prompts)]) == 4
    assert not [record for record in caplog.records if record.name == "trl_perce.evaluation.generate"]
    for batch in generator._batches(prompts):
        for prompt, tokens in zip(batch, generator._generate(batch), strict=True):
            with torch.no_grad():
                logits = double(torch.tensor([prompt.input_ids + tokens[:-1]])).logits[0, -len(tokens) :]
            size = next((index + 1 for index, token in enumerate(tokens) if token in generator.stop), len(tokens))
            chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            rounding = float(logits.abs().max()) * 2.0**-8  # as above
            assert (logits.max(-1).values - chosen)[:size].max() < 8 * rounding


@needs_gpu
def test_qlora_in_fp16_trains(make_args, tokenizer, tmp_path):
    """As on a card without bfloat16: TRL casts a quantized model's adapters to it, which no gradient scaler takes."""
    make_tiny_model("llama").save_pretrained(tmp_path / "model")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)
    rows = make_rows(seed=81, count=16)
    trainer = PerCETrainer(
        str(tmp_path / "model"),
        make_args(
            max_length=None, max_steps=30, learning_rate=1e-2, per_device_train_batch_size=8, fp16=True,
            gradient_checkpointing=True, model_init_kwargs={"dtype": "float16"},
        ),
        train_dataset=to_dataset(rows),
        processing_class=tokenizer,
        quantization_config=nf4,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
