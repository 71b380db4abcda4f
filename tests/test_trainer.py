import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig, SFTTrainer

from conftest import TINY_CONFIGS, make_tiny_model
from reference import FLOAT32, make_rows, masked_context_log_probs, reference, response_log_probs
from runs import assert_close, one_sgd_step, record_pir, to_dataset, train
from trl_perce import DataCollatorForPerCE, PerCEConfig, PerCETrainer


# ── 1. loss and gradients against float64 ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_loss_and_gradients_are_those_of_the_formula(make_args, tokenizer, kind, accumulation):
    rows = make_rows(seed=1, count=8)
    expected = reference(make_tiny_model(kind), rows, clip_max=1.5)
    logs, gradients = one_sgd_step(
        make_args,
        tokenizer,
        kind,
        rows,
        weight_clip_max=1.5,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    assert logs["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert_close(gradients, expected.gradients)

    pir = [value for row in expected.pir for value in row]
    weights = [value for row in expected.weights for value in row]
    assert min(pir) < 0.8 and max(pir) > 1.5 and any(0.8 < value < 1.5 for value in pir)  # both bounds are at work
    assert logs["pir/mean"] == pytest.approx(sum(pir) / len(pir), rel=1e-4)
    assert logs["pir/personal_fraction"] == pytest.approx(sum(v > 1 for v in pir) / len(pir))
    assert logs["weight/mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)
    assert logs["weight/at_min"] == pytest.approx(sum(v <= 0.8 for v in weights) / len(weights))
    assert logs["weight/at_max"] == pytest.approx(sum(v >= 1.5 for v in weights) / len(weights))
    ours = sum(len(r.before + r.after + r.response) for r in rows if r.persona)
    theirs = sum(len(r.tokenized()["input_ids"]) for r in rows)
    assert logs["counterfactual/token_ratio"] == pytest.approx(ours / theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "loss"},
        {"weighting": "entropy"},
        {"counterfactual": "mask"},
        {"normalization": "sequence"},
        {"normalization": "sequence", "weighting": "loss"},
        {"clip_min": 0.0, "clip_max": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_other_weightings(make_args, tokenizer, kind, options):
    rows = make_rows(seed=2, count=6)
    expected = reference(make_tiny_model(kind), rows, **options)
    names = {"weighting": "token_weighting", "normalization": "weight_normalization"}
    names |= {"clip_min": "weight_clip_min", "clip_max": "weight_clip_max"}
    logs, gradients = one_sgd_step(
        make_args,
        tokenizer,
        kind,
        rows,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        **{names.get(name, name): value for name, value in options.items()},
    )
    assert logs["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert_close(gradients, expected.gradients)


@pytest.mark.parametrize("weighting", ["perce", "loss", "uniform"])
def test_dft_weights_by_the_probability_too(make_args, tokenizer, weighting):
    rows = make_rows(seed=13, count=6)
    expected = reference(make_tiny_model("llama"), rows, weighting, dft=True)
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "token_weighting": weighting}
    # In float64: the gradients are small beside the weights that they are read off
    logs, gradients = one_sgd_step(make_args, tokenizer, "llama", rows, torch.float64, loss_type="dft", **options)
    assert logs["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert_close(gradients, expected.gradients)
    if weighting == "perce":  # those of the log are PerCE's own
        weights = [value for row in expected.weights for value in row]
        assert logs["weight/mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)


def test_training_arguments_become_a_configuration(tokenizer, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=3e-4, report_to="none", hub_token="secret")
    rows = to_dataset(make_rows(seed=14, count=2))
    trainer = PerCETrainer(make_tiny_model("llama"), args, train_dataset=rows, processing_class=tokenizer)
    assert type(trainer.args) is PerCEConfig and trainer.args.learning_rate == 3e-4
    assert trainer.args.hub_token == "secret" and trainer.args.token_weighting == "perce"
    assert trainer.model.model_tags == ["trl", "sft", "perce"]


def test_weights_carry_no_gradient(make_args, tokenizer):
    # With all weights at a bound the weighted gradient is the bound times the plain one, if nothing flows through them
    rows = make_rows(seed=3, count=4, with_persona=1.0)
    options = {"per_device_train_batch_size": 4, "dtype": torch.float64}
    _, plain = one_sgd_step(make_args, tokenizer, "llama", rows, token_weighting="uniform", **options)
    bounds = {"weight_clip_min": 3.0, "weight_clip_max": 3.0}
    _, tripled = one_sgd_step(make_args, tokenizer, "llama", rows, **bounds, **options)
    assert_close(
        tripled, {name: 3 * value for name, value in plain.items()}, relative=1e-5
    )  # the norms are in float32


# ── 2. uniform is SFT ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lora", [False, True])
def test_uniform_is_sft_bit_for_bit_over_20_steps(make_args, tokenizer, tmp_path, lora):
    from peft import LoraConfig

    rows = make_rows(seed=4, count=24)
    common = {
        "max_steps": 20,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
    }
    peft = {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)} if lora else {}
    ours = PerCETrainer(
        make_tiny_model("qwen3"),
        make_args(token_weighting="uniform", **common),
        train_dataset=to_dataset(rows),
        processing_class=tokenizer,
        **peft,
    )
    ours.train()
    theirs = SFTTrainer(
        make_tiny_model("qwen3"),
        make_args(cls=SFTConfig, **common),
        train_dataset=to_dataset(rows).remove_columns("persona_mask"),
        processing_class=tokenizer,
        **peft,
    )
    theirs.train()
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (ours, theirs)]
    assert len(losses[0]) == 20 and losses[0] == losses[1]
    ours, theirs = ours.model.state_dict(), theirs.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_perce_with_all_weights_one_is_sft_too(make_args, tokenizer):
    rows = make_rows(seed=4, count=8)
    ones = {"weight_clip_min": 1.0, "weight_clip_max": 1.0}
    logs, gradients = one_sgd_step(make_args, tokenizer, "qwen3", rows, per_device_train_batch_size=8, **ones)
    same, plain = one_sgd_step(
        make_args, tokenizer, "qwen3", rows, per_device_train_batch_size=8, token_weighting="uniform"
    )
    assert logs["loss"] == same["loss"] and logs["nll"] == pytest.approx(same["loss"])
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)


# ── 3. drop and mask ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma", "mistral"])
def test_drop_equals_mask_with_compacted_positions(kind, tokenizer):
    rows = make_rows(seed=5, count=6, with_persona=1.0)
    model = make_tiny_model(kind).eval()
    log_probs = {}
    for mode in ("drop", "mask"):
        collator = DataCollatorForPerCE(pad_token_id=3, counterfactual=mode)
        batch = collator([row.tokenized() for row in rows])
        batch = collator.counterfactual_batch(batch["counterfactual_rows"])
        labels = batch.pop("labels")
        if mode == "mask":
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            scores = model(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
        trained = labels[:, 1:] != -100
        log_probs[mode] = scores[trained].gather(1, labels[:, 1:][trained][:, None])
    assert log_probs["drop"].shape == (sum(len(row.response) for row in rows), 1)
    assert torch.allclose(log_probs["drop"], log_probs["mask"], atol=1e-5)


@pytest.mark.parametrize("counterfactual", ["drop", "mask"])
@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_pir_of_each_token_against_raw_logits(make_args, tokenizer, monkeypatch, kind, counterfactual):
    rows = make_rows(seed=6, count=5, with_persona=1.0)
    recorded = record_pir(monkeypatch)
    args = {"max_steps": 1, "per_device_train_batch_size": 5, "learning_rate": 0.0, "counterfactual": counterfactual}
    model = make_tiny_model(kind).double()
    train(make_args, tokenizer, model, rows, **args, train_sampling_strategy="sequential")
    double = model.eval()  # the learning rate was 0
    expected = []
    with torch.no_grad():
        for row in rows:
            factual, _ = response_log_probs(double, row.before + row.persona + row.after, row.response)
            if counterfactual == "drop":
                without, _ = response_log_probs(double, row.before + row.after, row.response)
            else:
                without = masked_context_log_probs(double, row)
            expected.append(factual - without)
    (pir,) = recorded
    torch.testing.assert_close(pir.double(), torch.cat(expected), atol=FLOAT32, rtol=0)


# ── 4. alone and in a batch ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("counterfactual", ["drop", "mask"])
def test_a_row_has_the_same_pir_alone_and_padded_beside_others(make_args, tokenizer, monkeypatch, counterfactual):
    rows = make_rows(seed=7, count=6)
    recorded = record_pir(monkeypatch)
    for size in (1, 6):
        args = {"per_device_train_batch_size": size, "num_train_epochs": 1, "learning_rate": 0.0}
        args |= {"counterfactual": counterfactual, "train_sampling_strategy": "sequential"}
        train(make_args, tokenizer, make_tiny_model("llama").double(), rows, **args)
    alone, together = torch.cat(recorded[:-1]), recorded[-1]
    assert len(recorded) == 6 + 1 and alone.numel() == sum(len(row.response) for row in rows if row.persona)
    torch.testing.assert_close(alone, together, atol=FLOAT32, rtol=0)


def test_rows_without_personas_pay_no_counterfactual_pass(make_args, tokenizer, monkeypatch):
    rows = make_rows(seed=8, count=4, with_persona=0.0)
    model = make_tiny_model("llama")
    forwards = []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    options = {"per_device_train_batch_size": 1, "num_train_epochs": 1, "check_model": False}
    trainer = train(make_args, tokenizer, model, rows, **options)
    assert len(forwards) == 4 + 1  # four micro-batches; one of them (row 0) has a persona
    weights = [log["weight/mean"] for log in trainer.state.log_history if "weight/mean" in log]
    assert sum(weight == 1.0 for weight in weights) == 3


def test_trained_tokens_of_the_persona_itself_have_weight_one(make_args, tokenizer):
    # Full-sequence loss: the persona's own tokens are trained, have no counterfactual, and count in n
    (row,) = make_rows(seed=9, count=1)
    tokenized = row.tokenized()
    dataset = Dataset.from_list([{**tokenized, "labels": tokenized["input_ids"]}])
    model = make_tiny_model("llama")
    trainer = PerCETrainer(
        model,
        make_args(max_length=None, max_steps=1, learning_rate=0.0),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    double, ids = make_tiny_model("llama").double().eval(), tokenized["input_ids"]
    kept = row.before + row.after + row.response
    with torch.no_grad():
        factual, _ = response_log_probs(double, ids[:1], ids[1:])
        without, _ = response_log_probs(double, kept[:1], kept[1:])
    start, end = len(row.before) - 1, len(row.before) - 1 + len(row.persona)
    weights = torch.ones_like(factual)
    outside = torch.ones_like(factual, dtype=torch.bool)
    outside[start:end] = False
    weights[outside] = (factual[outside] - without).clamp(0.8, 5.0)
    expected = -(weights * factual).mean().item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_evaluation_gives_the_weighted_loss_and_the_metrics(make_args, tokenizer):
    rows = make_rows(seed=10, count=4)
    model = make_tiny_model("qwen3")
    trainer = PerCETrainer(
        model,
        make_args(max_length=None, per_device_eval_batch_size=4),
        train_dataset=to_dataset(make_rows(seed=11, count=4)),
        eval_dataset={"one": to_dataset(rows), "two": to_dataset(make_rows(seed=12, count=4))},
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    expected, plain = reference(model, rows), reference(model, rows, weighting="uniform")
    assert metrics["eval_one_loss"] == pytest.approx(expected.loss, rel=1e-5)
    first = next(log for log in trainer.state.log_history if "eval_one_loss" in log)
    assert first["eval_nll"] == pytest.approx(plain.loss, rel=1e-5)
    pir = [value for row in expected.pir for value in row]
    assert first["eval_pir/mean"] == pytest.approx(sum(pir) / len(pir), rel=1e-4)


# ── what makes PIR noisy ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kind, of_model, of_adapter, neftune, expected",
    [
        ("llama", {}, 0.0, None, []),
        ("llama", {"attention_dropout": 0.1}, None, None, ["the model's `attention_dropout` 0.1"]),
        ("llama", {}, 0.05, 5, ["the adapter's `lora_dropout` 0.05", "`neftune_noise_alpha` 5"]),
        (
            "gpt2",
            {"resid_pdrop": 0.2},
            None,
            None,
            ["`resid_dropout` 0.2 (config: `resid_pdrop`)", "`dropout` 0.2 (config:"],
        ),
        ("gpt2", {"embd_pdrop": 0.3, "summary_first_dropout": 0.3}, None, None, ["`drop` 0.3 (config: `embd_pdrop`)"]),
    ],
)
def test_active_dropout_is_warned_of_by_its_source(
    make_args, tokenizer, caplog, kind, of_model, of_adapter, neftune, expected
):
    config = copy.deepcopy(TINY_CONFIGS[kind])
    config.update(of_model)
    PerCETrainer(
        AutoModelForCausalLM.from_config(config),
        make_args(neftune_noise_alpha=neftune),
        train_dataset=to_dataset(make_rows(seed=1, count=2)),
        processing_class=tokenizer,
        peft_config=None if of_adapter is None else LoraConfig(target_modules="all-linear", lora_dropout=of_adapter),
    )
    warned = [line for line in caplog.text.splitlines() if line.startswith("  - ")]
    assert len(warned) == len(expected) and all(text in line for text, line in zip(expected, warned, strict=True))


def test_dropout_is_no_matter_of_the_other_weightings(make_args, tokenizer, caplog):
    PerCETrainer(
        make_tiny_model("llama"),
        make_args(token_weighting="loss", neftune_noise_alpha=5),
        train_dataset=to_dataset(make_rows(seed=1, count=2)),
        processing_class=tokenizer,
    )
    assert "noisy" not in caplog.text
