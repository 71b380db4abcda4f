"""Where adapters sit, and what of a multimodal model is trained on text: no weight without a gradient, on two processes either."""

import copy
import json
import shutil
import warnings

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    FalconH1Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    LlamaConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from conftest import make_tiny_model
from processes import recipe
from reference import make_rows, reference
from rows import make_chat_rows, write_splits
from test_processes import train_on_two
from trl_perce import PerCETrainer
from trl_perce.training.adapters import experts, fit_adapter, unused_by_text
from trl_perce.utils.noise import keep_noise_off


SIZES = {"vocab_size": 410, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
SIZES |= {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
MAMBA = {"vocab_size": 410, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "pad_token_id": 3}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory, tokenizer) -> str:
    """A folder with a tiny Gemma 3 that has a vision tower, and its processor."""
    torch.manual_seed(0)
    vision = {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **TOWER}
    config = Gemma3Config(
        text_config={**SIZES, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=400,
        eoi_token_index=401,
        image_token_index=402,
    )
    folder = tmp_path_factory.mktemp("gemma3")
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    own = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer),
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=tokenizer.chat_template,
        extra_special_tokens={"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"},
    )
    Gemma3Processor(Gemma3ImageProcessorPil(), own).save_pretrained(folder)
    return str(folder)


def train(model, make_args, tokenizer, peft_config=None, rows=None, **options):
    data = Dataset.from_list(rows or [row.tokenized() for row in make_rows(seed=3, count=4)])
    options = {"max_steps": 1, "max_length": None, "per_device_train_batch_size": 4, **options}
    trainer = PerCETrainer(
        model, make_args(**options), None, data, processing_class=tokenizer, peft_config=peft_config
    )
    without = []

    class Noting(type(trainer._finite_check)):
        def is_good(self, step, grad_norm):
            named = trainer.model.named_parameters()
            without.extend(name for name, weight in named if weight.requires_grad and weight.grad is None)
            return super().is_good(step, grad_norm)

    trainer._finite_check = Noting(trainer.accelerator, "stop", trainer.train_dataset)
    trainer.train()
    return trainer, without


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_text_trains_the_text_part_of_a_multimodal_model(gemma3, make_args, tmp_path, caplog, lora):
    peft_config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=["down_proj"]) if lora else None
    trainer, without = train(gemma3, make_args, None, peft_config, make_chat_rows(4), output_dir=str(tmp_path / "run"))
    assert without == []
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert trained and not any("vision" in name or "multi_modal" in name for name in trained)
    optimized = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    assert len(optimized) == len(trained)
    said = "the adapter leaves out" if lora else "these stay frozen"
    assert f"{said}:\n  - model.vision_tower\n  - model.multi_modal_projector" in caplog.text
    if lora:
        assert not any("vision" in name for name, _ in trainer.model.named_parameters() if "lora" in name)
        assert any("up_proj" in name for name in trained) and not any("down_proj" in name for name in trained)
        assert peft_config.exclude_modules == {"down_proj"} and peft_config.target_modules == "all-linear"
    # The processor's files lie beside the tokenizer, in what it was trained with
    trainer.save_model()
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    assert isinstance(processor, Gemma3Processor)
    assert processor.tokenizer.chat_template == trainer.processing_class.chat_template


def test_text_needs_no_processor(gemma3, make_args, tmp_path, caplog):
    folder = shutil.copytree(gemma3, tmp_path / "without", ignore=shutil.ignore_patterns("processor_config.json"))
    train(str(folder), make_args, None, LoraConfig(r=2, target_modules="all-linear"), make_chat_rows(4))
    assert "The tokenizer alone is used, and saved, without the processor:\nCan't load" in caplog.text


def test_two_processes_train_a_multimodal_model_on_text(gemma3, tmp_path):
    write_splits(tmp_path / "rows", train=make_chat_rows(4))
    # With checkpointing DDP does not look for parameters that got no gradient
    config = recipe(
        tmp_path / "config.yaml",
        **{"model_name_or_path": gemma3, "dataset_name": str(tmp_path / "rows"), "use_peft": False, "max_steps": 2},
        gradient_checkpointing=True,
    )
    done = train_on_two(config, tmp_path / "run")
    assert done.stderr.count("these stay frozen") == 1, done.stderr
    assert (tmp_path / "run" / "processor_config.json").is_file()
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert sum("loss" in line for line in log) == 2


@pytest.mark.parametrize(
    "config, left_out",
    [(FalconH1Config(**SIZES, **FALCON_H1), ["out_proj"]), (MambaConfig(**MAMBA), ["dt_proj", "out_proj", "x_proj"])],
    ids=["falcon_h1", "mamba"],
)
def test_all_linear_leaves_out_what_kernels_of_mamba_read(make_args, tokenizer, caplog, config, left_out):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    trainer, without = train(model, make_args, tokenizer, LoraConfig(r=2, target_modules="all-linear"))
    assert without == []
    adapted = {
        name.split(".lora_A")[0].split(".")[-1] for name, _ in trainer.model.named_parameters() if "lora_A" in name
    }
    assert "in_proj" in adapted and not adapted & {*left_out}
    assert f"The adapter leaves out {', '.join(left_out)} of the Mamba layers" in caplog.text


def make_mixture():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES, **EXPERTS))


def test_experts_that_no_adapter_sits_on_are_told(make_args, tokenizer, caplog):
    model, args = make_mixture(), make_args()
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert experts(model) == {names[0]: 2 * 4 * 32 * 32, names[1]: 2 * 4 * 16 * 32}
    lora = LoraConfig(target_modules="all-linear")
    assert fit_adapter(lora, model, args) is lora
    share = 2 * 4 * 3 * 16 * 32 / model.num_parameters()
    assert f"The experts ({share:.0%} of the weights) are no linear layers: not trained." in caplog.text
    assert (
        "(`lora_target_parameters`), beside\n`all-linear` for the target modules, to\n  - " + "\n  - ".join(names)
        in caplog.text
    )
    caplog.clear()
    fit_adapter(lora, model, args, quantization_config=object())
    assert "neither trained nor quantized" in caplog.text
    caplog.clear()
    # The remedy works, beside `all-linear`
    lora = LoraConfig(r=2, target_modules="all-linear", target_parameters=names)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        keep_noise_off()  # PEFT's on patterns that it sets by itself
        train(make_mixture(), make_args, tokenizer, LoraConfig(r=2, target_modules="all-linear"))
        caplog.clear()
        trainer, without = train(model, make_args, tokenizer, lora)
    assert without == [] and "The experts" not in caplog.text
    assert any("experts" in name and "lora_B" in name for name, _ in trainer.model.named_parameters())


def test_the_auxiliary_loss_of_a_mixture_is_that_of_the_factual_pass(make_args, tokenizer):
    model, rows = make_mixture(), make_rows(seed=5, count=4)
    model.set_experts_implementation("eager")  # the others take no float64
    expected = reference(model, rows)
    with torch.no_grad():  # of the padded batch, as the trainer has it
        batch = [row.tokenized()["input_ids"] for row in rows]
        width = max(map(len, batch))
        ids = torch.tensor([row + [3] * (width - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        aux = float(model(ids, attention_mask=mask, output_router_logits=True).aux_loss)
    assert aux > 0.5
    options = {"max_steps": 1, "learning_rate": 0.0, "router_aux_loss_coef": 0.1}
    trainer, _ = train(model, make_args, tokenizer, rows=[row.tokenized() for row in rows], **options)
    log = trainer.state.log_history[0]
    assert float(log["aux_loss"]) == pytest.approx(aux, rel=1e-5)
    assert float(log["loss"]) == pytest.approx(expected.loss + 0.1 * aux, rel=1e-5)


def test_text_models_have_no_unused_part():
    assert unused_by_text(make_tiny_model("llama")) == []
    assert fit_adapter(None, make_tiny_model("llama"), None) is None


def test_a_model_that_transformers_has_not_is_left_to_the_loader(make_args, tmp_path):
    LlamaConfig(architectures=["OwnForCausalLM"]).save_pretrained(tmp_path)
    lora = LoraConfig(target_modules="all-linear")
    assert fit_adapter(lora, str(tmp_path), make_args()) is lora
    assert fit_adapter(lora, str(tmp_path / "none"), make_args()) is lora
    assert not hasattr(transformers, "OwnForCausalLM")
