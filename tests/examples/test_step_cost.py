"""What examples/benchmarks counts, builds and writes."""

import json
import sys

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from conftest import ROOT, TINY_CONFIGS, make_tiny_model


sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
import step_cost  # noqa: E402
from cost_report import summarize  # noqa: E402
from flops import Row, scoring_pass, step_ratio_floor, training_pass  # noqa: E402
from measure import Run, train  # noqa: E402
from shapes import CONFIGS, LORA_RANK, NF4, build_model  # noqa: E402
from step_cost import main, parse_arguments, seconds_per_step  # noqa: E402


def _sdpa(query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query, key, value)


def _sdpa_backward(grad, query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_backward_flop_count(grad, query, key, value)


def _addmm(total, a, b, *args, out_shape=None, **kwargs):
    return 2 * a[0] * a[1] * b[1]


# What torch's counter leaves out: SDPA on CPU, and the in-place product of the head's backward
UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
    torch.ops.aten.addmm_: _addmm,
}


def counted(model, length: int, backward: bool) -> int:
    """Operations of a pass over one row, by torch's counter."""
    add_fused_lm_head(model.get_base_model())
    input_ids = torch.arange(length)[None] + 4
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, torch.set_grad_enabled(backward):
        outputs = model(input_ids=input_ids, labels=input_ids, fused_lm_head=True)
        if backward:
            outputs.loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_counts_are_those_of_torch(kind, checkpointing):
    # Equal: the shapes leave nothing to approximate, and torch counts attention without causality
    config, length = TINY_CONFIGS[kind], 24
    model = build_model(config, "bf16", "cpu").train()
    rotary = {
        0,
        length * 8,
    }  # Transformers 5.17 multiplies positions by frequencies (half of the 8 of a head) as matrices
    expected = scoring_pass(config, length, length - 1, LORA_RANK, causal=False)
    assert counted(model, length, backward=False) - expected in rotary
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    expected = training_pass(config, length, length - 1, LORA_RANK, checkpointing, causal=False)
    assert counted(model, length, backward=True) - expected in rotary


def test_floor_of_the_step_ratio():
    config = CONFIGS["qwen3-4b"]
    row = Row(persona=1894, question=169, response=250)
    drop, mask, refresh3 = (
        step_ratio_floor(config, row, LORA_RANK, True, counterfactual, epochs)
        for counterfactual, epochs in (("drop", 1), ("mask", 1), ("drop", 3))
    )
    assert step_ratio_floor(config, row, LORA_RANK, True, None) == 1
    # Of 2313 tokens' forward, backward and recomputation, the extra pass is the forward of 419
    assert drop == pytest.approx(1 + 419 / 2313 / 3, abs=0.01)
    assert mask == pytest.approx(1 + 1 / 3, abs=0.02)
    assert refresh3 - 1 == pytest.approx((drop - 1) / 3)
    # Where TRL scores every position, it does more than PerCE's factual pass, here even more than both
    assert step_ratio_floor(CONFIGS["smollm2-135m"], row, LORA_RANK, True, "drop", sft_scores_all=True) < 1


def test_shape_of_smollm2_is_the_published_one(smollm2):
    published, ours = AutoConfig.from_pretrained(smollm2).to_dict(), CONFIGS["smollm2-135m"].to_dict()
    ours["rms_norm_eps"] = pytest.approx(ours["rms_norm_eps"])  # through float32
    given = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    given += (
        "head_dim",
        "vocab_size",
        "tie_word_embeddings",
        "max_position_embeddings",
        "rope_parameters",
        "rms_norm_eps",
    )
    assert {name: published[name] for name in given} == {name: ours[name] for name in given}


def test_model_in_nf4_is_as_from_a_checkpoint(tmp_path):
    ours = build_model(TINY_CONFIGS["qwen3"], "nf4", "cpu")
    make_tiny_model("qwen3", torch.bfloat16).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4, dtype=torch.bfloat16)
    loaded = get_peft_model(loaded, ours.peft_config["default"])

    def described(model):
        weights = {name: (type(w), w.dtype, w.shape, w.requires_grad) for name, w in model.named_parameters()}
        modules = {name: type(module) for name, module in model.named_modules()}
        states = {name: vars(m.quant_state) for name, m in model.named_modules() if isinstance(m, Linear4bit)}
        settings = ("blocksize", "quant_type", "nested", "dtype", "shape")
        return weights, modules, {name: [state[key] for key in settings] for name, state in states.items()}

    assert described(ours) == described(loaded)
    assert ours.config.num_hidden_layers == len(ours.get_base_model().model.layers) == 2
    assert ours.is_loaded_in_4bit and loaded.is_loaded_in_4bit


@pytest.mark.parametrize("variant", ["sft", "drop"])
def test_training_leaves_the_model_as_it_was(variant):
    model = build_model(TINY_CONFIGS["llama"], "bf16", "cpu")
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    run = Run(Row(6, 4, 5), batch_size=2, accumulation=2, checkpointing=True, steps_per_epoch=2, epochs=3)
    epochs, peak = train(model, variant, run, "cpu")
    assert [len(steps) for steps in epochs] == [2, 2, 2] and min(map(min, epochs)) > 0
    assert peak > sum(weight.nbytes for weight in weights.values())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name]) and weight.grad is None
    base = model.get_base_model()
    assert "forward" not in vars(model) | vars(base)
    assert not base.is_gradient_checkpointing and not base.get_input_embeddings()._forward_hooks


def test_seconds_of_a_step_are_told_by_whole_periods():
    # Two rounds of three epochs, the first of which pays for the counterfactual pass; one step was disturbed
    rounds = [[[4.0], [1.0, 1.0], [1.0, 1.0]], [[4.0], [1.0, 9.0], [1.0, 1.0]]]
    assert seconds_per_step(rounds) == 2.0


def test_from_the_command_line_to_table_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(step_cost, "be_quiet", lambda: None)  # the other tests of this process want to hear us
    monkeypatch.setitem(CONFIGS, "qwen3-0.6b", TINY_CONFIGS["qwen3"])
    arguments = ["--models", "qwen3-0.6b", "--persona_lengths", "16", "--rounds", "1", "--device", "cpu"]
    arguments += ["--variants", "sft", "drop", "refresh3", "--output_dir", str(tmp_path)]
    main([*arguments, "--profiles", "topics", "--accumulation", "1"])
    first = json.loads((tmp_path / "step_cost.json").read_text())["cells"]
    assert [cell["settings"]["persona"] for cell in first] == [16, 1000]
    for cell in first:
        assert list(cell["results"]) == ["sft", "drop", "refresh3"]
        assert [len(steps) for steps in cell["results"]["refresh3"]["step_seconds"][0]] == [1, 2, 2]
    sft, drop, refresh3 = summarize(first[1])
    assert sft["ratio"] == sft["floor"] == sft["peak_ratio"] == 1
    assert drop["ratio_over_floor"] == pytest.approx(drop["seconds"] / sft["seconds"] / drop["floor"])
    assert refresh3["tokens_per_second"] == pytest.approx((1055 + 250) / refresh3["seconds"])
    assert (tmp_path / "step_cost.md").read_text().count("PerCE drop, refresh 3") == 2
    assert (tmp_path / "step_cost_qwen3-0.6b_bf16.png").read_bytes().startswith(b"\x89PNG")

    # What was measured is not measured again
    main([*arguments, "--profiles", "--accumulation", "1", "2"])
    second = json.loads((tmp_path / "step_cost.json").read_text())["cells"]
    assert second[:2] == first and [cell["settings"]["accumulation"] for cell in second[2:]] == [2]
    assert not list(tmp_path.glob("*unfinished*"))


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--steps_per_epoch", "1", "--device", "cpu"])
    assert "--steps_per_epoch" in capsys.readouterr().err
