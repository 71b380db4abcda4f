"""Models that `device_map` has split or offloaded, as far as a CPU shows it (tests/test_gpu.py has a head on another device)."""

import copy
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from conftest import make_tiny_model
from reference import FLOAT32, make_rows, reference
from trl_perce import PerCETrainer, PerContrast
from trl_perce.training.placement import input_device


WHOLE = dict.fromkeys(
    ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
)


@pytest.fixture
def offload(tmp_path):
    make_tiny_model("llama").save_pretrained(tmp_path / "model")

    def load(*modules):
        device_map = {**WHOLE, **dict.fromkeys(modules, "disk")}
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
        )
        assert {weight.device.type for weight in model.get_submodule(modules[0]).parameters()} == {"meta"}
        return model

    return load


@pytest.mark.parametrize(
    "modules",
    [["model.layers.1"], ["model.embed_tokens"], [*WHOLE][:-1]],
    ids=["a layer", "embedding", "all but the head"],
)
def test_offloaded_models_score_as_whole_ones(offload, tokenizer, modules):
    model, rows = offload(*modules), make_rows(seed=31, count=4)
    assert input_device(model).type == "cpu"
    expected = reference(copy.deepcopy(make_tiny_model("llama")), rows).pir
    scores = PerContrast(model, tokenizer).score([row.tokenized() for row in rows])
    for row, own in zip([row for row in zip(rows, scores, strict=True) if row[0].persona], expected, strict=True):
        assert torch.allclose(torch.tensor(row[1].pir), torch.tensor(own, dtype=torch.float32), atol=10 * FLOAT32)


def test_an_offloaded_head_is_refused(offload, tokenizer):
    scorer = PerContrast(offload("lm_head"), tokenizer)
    with pytest.raises(ValueError, match="`device_map` has offloaded the head .* Name a device for it"):
        scorer.score([make_rows(seed=31, count=1)[0].tokenized()])


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_offloaded_weights_are_not_trained(offload, make_args, tokenizer, lora):
    data = Dataset.from_list([row.tokenized() for row in make_rows(seed=31, count=2)])
    peft_config = LoraConfig(r=2, target_modules="all-linear") if lora else None
    name = ".*layers.0.self_attn.q_proj" if lora else re.escape("'model.layers.0.self_attn.q_proj.weight'")
    with pytest.raises(ValueError, match=f"has offloaded [0-9]+ weights to CPU memory or the disk, such as {name}"):
        PerCETrainer(
            offload("model.layers.0"), make_args(), None, data, processing_class=tokenizer, peft_config=peft_config
        )
