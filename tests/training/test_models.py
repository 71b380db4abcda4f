"""
The check on the user's own model (training/model_check.py), and tiny random models of each kind that it must pass, mend or refuse. What
is expected are plain forward passes with logits, row by row, in float64 where the model can.
"""

import copy
from types import SimpleNamespace

import bitsandbytes
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    GptOssConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    PhimoeConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    RwkvConfig,
    SiglipVisionConfig,
    T5Config,
)
from trl.trainer.utils import add_fused_lm_head

from conftest import TINY_CONFIGS, make_tiny_model
from reference import make_rows, masked_context_log_probs, reference, response_log_probs
from rows import write_splits
from runs import assert_close, one_sgd_step, record_pir, to_dataset, train
from trl_perce import PerCETrainer, PerContrast
from trl_perce.cli.main import main
from trl_perce.training.model_check import LENGTHS, ModelCheck, ModelCheckError, rounding_error
from trl_perce.training.model_check import make_rows as make_check_rows


# On log-probabilities of tiny models that compute in float32, where the library's tests elsewhere take float64
IN_FLOAT32 = 1e-4
SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHAPE |= {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {**GROUPED, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "sinks": GptOssConfig(**EXPERTS, layer_types=["full_attention", "full_attention"]),
    "ALiBi": BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4, pad_token_id=3, initializer_range=0.3),
    "ALiBi by index": MptConfig(vocab_size=400, d_model=32, n_layers=2, n_heads=4, max_seq_len=128, pad_token_id=3),
    "absolute positions": OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "recurrent": MambaConfig(vocab_size=400, hidden_size=32, state_size=8, num_hidden_layers=2, pad_token_id=3, initializer_range=0.3),
    "no attention mask": RwkvConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, pad_token_id=3, bos_token_id=1, eos_token_id=2),
    "hybrid": Qwen3NextConfig(
        **EXPERTS, layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=24,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    ),
    "fused experts": Qwen3MoeConfig(**EXPERTS),
    "random experts": PhimoeConfig(**EXPERTS),
    "encoder": BertConfig(**{**SHAPE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
}  # fmt: skip

DECODERS = [kind for kind in CONFIGS if kind not in ("encoder", "random experts")]


def make_model(kind: str):
    torch.manual_seed(0)
    if kind == "Llama 4":
        return Llama4ForCausalLM(Llama4TextConfig(**EXPERTS, intermediate_size_mlp=48, use_cache=False))
    if kind == "logit scale":
        text = Cohere2Config(**GROUPED, logit_scale=0.25)
        config = Cohere2VisionConfig(text_config=text.to_dict(), vision_config=SiglipVisionConfig(**VISION).to_dict())
        return Cohere2VisionForConditionalGeneration(config)
    if kind == "VLM wrapper":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
        vision |= {"deepstack_visual_indexes": [0]}
        return Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config={**GROUPED, "rope_parameters": rope}, vision_config=vision)
        )
    if kind in TINY_CONFIGS:
        return make_tiny_model(kind)
    return AutoModelForCausalLM.from_config(CONFIGS[kind])


def expected_pir(model, rows) -> torch.Tensor:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return torch.cat(
            [
                response_log_probs(model, row.before + row.persona + row.after, row.response)[0]
                - response_log_probs(model, row.before + row.after, row.response)[0]
                for row in rows
                if row.persona
            ]
        )


# ── right, or mended ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [*DECODERS, "VLM wrapper", "logit scale", "Llama 4"])
def test_padded_rows_are_scored_as_alone_or_by_logits(make_args, tokenizer, monkeypatch, caplog, kind):
    model, rows = make_model(kind), make_rows(seed=71, count=5)
    expected = expected_pir(model, rows)
    recorded = record_pir(monkeypatch)
    options = {"per_device_train_batch_size": 5, "max_steps": 1, "learning_rate": 0.0, "router_aux_loss_coef": None}
    if kind == "Llama 4":  # whose own loss has none
        options["router_aux_loss_coef"] = 0.0
    trainer = train(make_args, tokenizer, model, rows, **options, train_sampling_strategy="sequential")
    torch.testing.assert_close(recorded[0], expected, atol=IN_FLOAT32, rtol=0)
    assert ("TRL's fused head" in caplog.text) == (kind in ("logit scale", "Llama 4"))
    rows = [row.tokenized() for row in rows if row.persona]
    scores = PerContrast(trainer.model, tokenizer, use_cpu=True, per_device_train_batch_size=1).score(rows)
    assert np.concatenate([one.pir for one in scores]) == pytest.approx(expected.numpy(), abs=IN_FLOAT32)


@pytest.mark.parametrize("kind", ["fused experts", "VLM wrapper", "logit scale", "Llama 4"])
def test_packed_rows_are_scored_as_alone(make_args, tokenizer, monkeypatch, kind):
    model, rows = make_model(kind), make_rows(seed=72, count=5)
    expected = expected_pir(model, rows)
    recorded = record_pir(monkeypatch)
    options = {"padding_free": True, "per_device_train_batch_size": 5, "max_steps": 1, "learning_rate": 0.0}
    train(make_args, tokenizer, model, rows, **options, router_aux_loss_coef=0.0, train_sampling_strategy="sequential")
    torch.testing.assert_close(recorded[0], expected, atol=IN_FLOAT32, rtol=0)


@pytest.mark.parametrize("weighting", ["perce", "loss", "entropy", "uniform"])
def test_logits_give_the_loss_and_the_gradients_of_the_formula(make_args, tokenizer, weighting):
    rows = make_rows(seed=73, count=6)
    expected = reference(make_model("logit scale"), rows, weighting)
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "token_weighting": weighting}
    logs, gradients = one_sgd_step(make_args, tokenizer, make_model("logit scale"), rows, **options)
    assert logs["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert_close(gradients, expected.gradients)


@pytest.mark.parametrize("weighting", ["perce", "uniform"])
def test_the_loss_does_not_depend_on_how_the_window_is_cut(make_args, tokenizer, weighting):
    kind = "VLM wrapper"
    # `accepts_loss_kwargs` is false on many wrappers, where TRL averages the averages of micro-batches
    assert make_model(kind).accepts_loss_kwargs is False
    rows = make_rows(seed=74, count=4)
    expected = reference(make_model(kind), rows, weighting)
    for size in (4, 2, 1):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        logs, gradients = one_sgd_step(
            make_args, tokenizer, make_model(kind), rows, token_weighting=weighting, **options
        )
        assert logs["loss"] == pytest.approx(expected.loss, rel=1e-5), size
        assert_close(gradients, expected.gradients)


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["sinks", "ALiBi", "ALiBi by index", "absolute positions"])
@pytest.mark.parametrize("layout", [{"packing": True, "max_length": 40}, {"padding_free": True}], ids=str)
def test_documents_that_see_each_other_are_refused(make_args, tokenizer, kind, layout):
    model, rows = make_model(kind), make_rows(seed=75, count=5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"apart: log-probabilities are off by [\d.]+ nats a token. Set `packing: false`"
    ):
        train(make_args, tokenizer, model, rows, **layout)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["recurrent", "no attention mask"])
def test_a_persona_that_a_mask_does_not_hide_is_refused(make_args, tokenizer, kind):
    rows = make_rows(seed=76, count=3)
    with pytest.raises(
        ValueError, match=r"in place: log-probabilities are off by [\d.]+ .* Set `counterfactual: drop`"
    ):
        train(make_args, tokenizer, make_model(kind), rows, counterfactual="mask")
    scorer = PerContrast(make_model(kind), tokenizer, counterfactual="mask", use_cpu=True)
    with pytest.raises(ValueError, match="Set `counterfactual: drop`"):
        scorer.score([row.tokenized() for row in rows])


@pytest.mark.parametrize("kind", ["ALiBi by index", "fused experts"])
def test_a_mask_is_right(make_args, tokenizer, monkeypatch, kind):
    model, rows = make_model(kind).eval(), make_rows(seed=77, count=4, with_persona=1.0)
    with torch.no_grad():
        expected = [
            response_log_probs(model, row.before + row.persona + row.after, row.response)[0]
            - masked_context_log_probs(model, row, torch.float32)
            for row in rows
        ]
    recorded = record_pir(monkeypatch)
    options = {"counterfactual": "mask", "per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0.0}
    train(make_args, tokenizer, model, rows, **options, train_sampling_strategy="sequential")
    torch.testing.assert_close(recorded[0], torch.cat(expected), atol=IN_FLOAT32, rtol=0)


def test_an_encoder_is_refused(make_args, tokenizer):
    with pytest.raises(ValueError, match="BertLMHeadModel sees the tokens that it is to predict"):
        train(make_args, tokenizer, make_model("encoder"), make_rows(seed=78, count=2))


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("hybrid", {"packing": True}, "kernels of causal-conv1d and flash-linear-attention"),
        ("recurrent", {"padding_free": True}, "kernels of causal-conv1d and mamba-ssm .* Set `packing: false`"),
        ("encoder–decoder", {}, "T5ForConditionalGeneration is an encoder–decoder"),
    ],
)
def test_what_cannot_work_is_told_before_the_weights_load(make_args, tokenizer, tmp_path, kind, options, message):
    config = copy.deepcopy(T5Config() if kind == "encoder–decoder" else CONFIGS[kind])
    names = {"hybrid": "Qwen3NextForCausalLM", "recurrent": "MambaForCausalLM"}
    config.architectures = [names.get(kind, "T5ForConditionalGeneration")]
    config.save_pretrained(tmp_path / "model")  # without weights
    dataset = to_dataset(make_rows(seed=79, count=2))
    for model in (str(tmp_path / "model"), SimpleNamespace(config=config)):
        with pytest.raises(ValueError, match=message):
            PerCETrainer(model, make_args(**options), train_dataset=dataset, processing_class=tokenizer)


def test_an_adapter_on_a_router_is_hinted_at(make_args, tokenizer):
    model = get_peft_model(make_model("Llama 4"), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="such as a router"):
        train(make_args, tokenizer, model, make_rows(seed=85, count=2))


def test_the_command_line_says_it_in_a_line(tmp_path, tokenizer, capfd):
    folder = tmp_path / "model"
    make_model("absolute positions").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = write_splits(tmp_path / "rows", train=[row.tokenized() for row in make_rows(seed=83, count=4)])
    argv = ["--model_name_or_path", str(folder), "--dataset_name", rows, "--use_cpu", "--bf16", "False"]
    argv += ["--output_dir", str(tmp_path / "run"), "--report_to", "none", "--max_length", "64"]
    assert main(["train", *argv, "--packing", "true"]) == 2
    said = capfd.readouterr().err
    assert "trl-perce train: error: OPTForCausalLM does not keep documents" in said and "Traceback" not in said


def test_an_auxiliary_loss_that_a_model_does_not_have_is_not_left_out_in_silence(make_args, tokenizer):
    with pytest.raises(ValueError, match="no auxiliary loss, .* `router_aux_loss_coef`. Set it to 0"):
        train(make_args, tokenizer, make_model("Llama 4"), make_rows(seed=84, count=2))


# ── the check itself ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault, message", [("padding", "in a padded batch than alone"), ("text", "Planted")])
def test_what_a_model_does_wrong_is_named(make_args, tokenizer, fault, message):
    def disturb(module, args, kwargs, outputs):
        if fault == "text":
            raise RuntimeError("Planted.")
        if len(kwargs["input_ids"]) > 1:
            outputs.last_hidden_state = outputs.last_hidden_state * 1.2
        return outputs

    model, rows = make_tiny_model("llama"), make_rows(seed=80, count=4)
    model.model.register_forward_hook(disturb, with_kwargs=True)
    with pytest.raises(ValueError, match=message):
        train(make_args, tokenizer, model, rows)
    scorer = PerContrast(model, tokenizer, use_cpu=True)
    with pytest.raises(ValueError, match=message):
        scorer.score(rows[0].tokenized())
    if fault == "padding":  # can be skipped
        train(make_args, tokenizer, model, rows, check_model=False, max_steps=1)
        PerContrast(model, tokenizer, use_cpu=True, check_model=False).score(rows[0].tokenized())


def test_training_is_the_same_bit_for_bit_with_the_check(make_args, tokenizer):
    states = []
    for check_model in (True, False):
        model = make_model("random experts")  # which draw in training mode
        options = {"counterfactual": "mask", "max_steps": 3, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
        train(make_args, tokenizer, model, make_rows(seed=81, count=8), **options, check_model=check_model)
        states.append((model.state_dict(), torch.get_rng_state()))
    (ours, our_state), (theirs, their_state) = states
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(our_state, their_state)


def test_the_noise_of_a_model_is_warned_of(make_args, tokenizer, caplog):
    rows = make_rows(seed=82, count=2)
    train(make_args, tokenizer, make_model("random experts"), rows, max_steps=1)
    assert "PIR\nnoisy: the same row twice" in caplog.text and "`router_jitter_noise` 0.01" in caplog.text
    caplog.clear()
    train(make_args, tokenizer, make_model("fused experts"), rows, max_steps=1)
    assert "noisy" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sinks", "fused experts", "hybrid", "ALiBi by index", "gemma", "gpt2"])
def test_rounding_is_no_reason_to_refuse(kind, dtype):
    model = make_model(kind).to(dtype)
    add_fused_lm_head(model)
    for seed in range(3):
        tokens = torch.randint(4, 400, (30,), generator=torch.Generator().manual_seed(seed)).tolist()
        check = ModelCheck(model, tokens, torch.device("cpu"))
        assert check.run(flattened=False, mask=kind != "hybrid") is None and check.noise() == 0


def test_rows_of_the_check():
    for tokens in ([5], [5, 6], [*range(4, 300)]):
        first, second, third = rows = make_check_rows(tokens)
        assert tuple(map(len, rows)) == LENGTHS and second == third[: len(second)] and rows == make_check_rows(tokens)
        assert first[0] == third[0] == tokens[0] and {*first, *third} <= {*tokens}
    assert len({*first, *third}) == 24 + 17 - 1


def test_the_error_of_one_rounding():
    model = make_tiny_model("llama")
    if hasattr(torch.backends, "fp32_precision"):
        before = torch.backends.fp32_precision
        torch.backends.fp32_precision = "tf32"  # as `tf32: true` does, after which the old name is an error
        assert rounding_error(model) == 2**-12
        torch.backends.fp32_precision = before
    assert rounding_error(model) == 2**-25 and rounding_error(model, torch.bfloat16) == 2**-9
    assert rounding_error(model.to(torch.float16)) == 2**-12
    four_bit = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(8, 8, compute_dtype=torch.bfloat16))
    assert rounding_error(four_bit) == 2**-9


@pytest.mark.parametrize(("disturbed", "is_refused"), [(3, False), (10**6, True)])
def test_what_rounding_does_to_one_draw_of_rows_is_no_fault(disturbed, is_refused):
    """In bfloat16 a trained adapter was off by nats on 6 of 100 draws; a fault shows in all of them."""
    model, calls = make_tiny_model("llama").eval(), []

    def disturb(module, args, output):
        calls.append(output)
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(len(calls)))
        return output + 5 * noise if len(calls) <= disturbed else output

    add_fused_lm_head(model)
    model.lm_head.register_forward_hook(disturb)
    check = ModelCheck(model, [*range(5, 60)], torch.device("cpu"))
    if is_refused:
        with pytest.raises(ModelCheckError, match="sees the tokens that it is to predict"):
            check.run(flattened=False, mask=False)
    else:
        check.run(flattened=False, mask=False)
    assert len(calls) > 3
