# SPDX-License-Identifier: Apache-2.0

"""Models of published shapes with random weights: what a step costs depends on the shapes alone, so nothing is downloaded."""

import copy

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.integrations import replace_with_bnb_linear


LORA_RANK = 16


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        rms_norm_eps=1e-6,
    )


# From the models' config.json on the Hub
CONFIGS: dict[str, PreTrainedConfig] = {
    "tiny": Qwen3Config(  # for rehearsals
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=1024,
        tie_word_embeddings=True,
    ),
    "smollm2-135m": LlamaConfig(  # HuggingFaceTB/SmolLM2-135M-Instruct
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
    ),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),  # Qwen/Qwen3-0.6B
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),  # Qwen/Qwen3-4B
    "llama-3.1-8b": LlamaConfig(  # meta-llama/Llama-3.1-8B-Instruct
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        rms_norm_eps=1e-5,
    ),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, tied=False),  # Qwen/Qwen3-14B
}

QUANTIZATIONS = ("bf16", "nf4", "nf4-fp16")
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
NF4_FP16 = BitsAndBytesConfig(**{**NF4.to_dict(), "bnb_4bit_compute_dtype": torch.float16})


def build_model(config: PreTrainedConfig, quantization: str, device: str, seed: int = 0) -> PeftModel:
    """
    A model with random weights in bfloat16 and LoRA adapters (rank 16) on all linear layers but the head.

    Args:
        config ([`~transformers.PreTrainedConfig`]): One of `CONFIGS`, or another Llama or Qwen3.
        quantization (`str`): `"bf16"`; `"nf4"` for base weights in NF4 with double quantization, computed in bfloat16;
            `"nf4-fp16"` for the same computed in float16, as on a card without bfloat16.
        device (`str`): Where the weights are drawn, and stay.
        seed (`int`, *optional*, defaults to `0`): Of the weights.

    Returns:
        [`~peft.PeftModel`]: The model as `SFTTrainer` makes it of a checkpoint, a `quantization_config` and a
            `peft_config`.
    """
    torch.manual_seed(seed)
    if quantization != "bf16":
        model = _random_nf4_model(config, device, NF4 if quantization == "nf4" else NF4_FP16)
    else:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    # No dropout, as in the recipes: each pass would draw a mask of its own
    lora = LoraConfig(r=LORA_RANK, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def _random_nf4_model(config: PreTrainedConfig, device: str, quantization: BitsAndBytesConfig) -> PreTrainedModel:
    """Draws and quantizes layer by layer, so that the card need not hold the whole model in 16 bit."""
    first_layer, dtype = copy.deepcopy(config), quantization.bnb_4bit_compute_dtype
    first_layer.num_hidden_layers = 1
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(first_layer, dtype=dtype)
    layers = model.base_model.layers
    layer_class = type(layers[0])
    _quantize(layers[0], quantization)
    for index in range(1, config.num_hidden_layers):
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        with torch.device(device):
            layer = layer_class(model.config, index)
        torch.set_default_dtype(default_dtype)
        layer.apply(model._init_weights)
        _quantize(layer, quantization)
        layers.append(layer)
    model.config.num_hidden_layers = config.num_hidden_layers
    model.is_loaded_in_4bit = True  # by which TRL and PEFT know
    return model


def _quantize(layer: nn.Module, quantization: BitsAndBytesConfig) -> None:
    """Put the weights of all linear layers into NF4, in place, on the device where they are."""
    weights = {name: module.weight.data for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    replace_with_bnb_linear(layer, quantization_config=quantization)
    for name, weight in weights.items():
        linear: Linear4bit = layer.get_submodule(name)
        linear.weight = type(linear.weight)(weight, requires_grad=False, **_weight_settings(linear)).to(weight.device)


def _weight_settings(linear: Linear4bit) -> dict:
    return {
        "compress_statistics": linear.weight.compress_statistics,
        "quant_type": linear.weight.quant_type,
        "quant_storage": linear.weight.quant_storage,
        "module": linear,
    }
