"""Models and adapters that are loaded for scoring: what does not fit is an error, and cards name the class that was trained."""

import re

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from conftest import make_tiny_model
from rows import make_chat_rows, write_lines
from trl_perce import PerCEConfig, PerCETrainer
from trl_perce.cli.main import main
from trl_perce.scoring.loading import AdapterError, load_model


TEXT = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["full_attention"], "pad_token_id": 3}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 0, 0]}}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
IDS = torch.tensor([[5, 60, 17, 200, 31]])


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory, tokenizer) -> str:
    """A folder with a tiny Qwen 3.5 around a vision tower, for which `AutoModelForCausalLM` has another class."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wrapper")
    config = Qwen3_5Config(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_adapter(model, folder, seed: int | None = 0) -> str:
    """An adapter on a model, trained as it were, or with `None` not at all; its folder."""
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name and seed is not None:
            torch.nn.init.normal_(weight.data, generator=torch.Generator().manual_seed(seed))
    adapted.save_pretrained(folder)
    return str(folder)


def test_a_card_names_the_class_that_was_trained(wrapper, make_args, tokenizer, tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear")
    args = make_args(output_dir=str(tmp_path / "run"), max_length=None, max_steps=1, learning_rate=0.1)
    data = Dataset.from_list(make_chat_rows(4))
    trainer = PerCETrainer(wrapper, args, None, data, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "run" / "README.md").text
    snippet = re.search(r"```python\n(.*?)\ntokenizer", card, re.DOTALL)[1]
    assert "Qwen3_5ForConditionalGeneration.from_pretrained" in snippet and "AutoModel" not in snippet
    found = {}
    exec(snippet.replace('"run"', repr(str(tmp_path / "run"))).replace('device_map="auto"', 'device_map="cpu"'), found)
    with torch.no_grad():
        trained = trainer.model.eval()(IDS).logits
        assert torch.allclose(found["model"](IDS).logits, trained, atol=1e-5)
        assert torch.allclose(
            load_model(wrapper, str(tmp_path / "run"), PerCEConfig()).eval()(IDS).logits, trained, atol=1e-5
        )
        with trainer.model.disable_adapter():
            assert not torch.allclose(trainer.model(IDS).logits, trained, atol=1e-3)


def test_an_adapter_of_another_class_is_refused(tiny_model, tokenizer, tmp_path, capsys):
    model = make_tiny_model("llama")
    model.model.language_model = model.model.layers  # as the wrappers call them
    del model.model.layers
    adapter = save_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="8 of the 8 weights of the adapter .* have no place in") as error:
        load_model(tiny_model, adapter, PerCEConfig())
    assert "(LlamaForCausalLM), such as 'base_model.model.model.language_model.0." in str(error.value)
    assert "the model has 'base_model.model.model.layers.0." in str(error.value)
    rows = write_lines(tmp_path / "rows.jsonl", make_chat_rows(2))
    argv = ["score", "--model_name_or_path", tiny_model, "--adapter", adapter, "--dataset_name", rows, "--use_cpu"]
    with pytest.raises(SystemExit, match="2"):
        main([*argv, "--output_dir", str(tmp_path / "scores")])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("trl-perce score: error: ") and "have no place in the model" in last


def test_an_adapter_of_another_size_is_refused(tiny_model, tmp_path):
    other = make_tiny_model("gpt2")
    adapter = get_peft_model(other, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    adapter.save_pretrained(tmp_path / "modules")
    with pytest.raises(AdapterError, match="does not fit the model .* Target modules .* not found"):
        load_model(tiny_model, str(tmp_path / "modules"), PerCEConfig())
    adapter = save_adapter(make_tiny_model("qwen3"), tmp_path / "sizes")
    model = make_tiny_model("llama")
    model.config.save_pretrained(tmp_path / "wide")
    config = type(model.config)(**{**model.config.to_dict(), "hidden_size": 64, "num_attention_heads": 8})
    type(model)(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(AdapterError, match="does not fit the model .* size mismatch"):
        load_model(str(tmp_path / "wide"), adapter, PerCEConfig())


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True, task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4], task_type="CAUSAL_LM"),
    ],
    ids=["prompt", "ia3", "dora and head", "tokens"],
)
def test_adapters_of_other_kinds_load(tiny_model, tmp_path, caplog, config):
    adapted = get_peft_model(make_tiny_model("llama"), config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        loaded = load_model(tiny_model, str(tmp_path / "adapter"), PerCEConfig())(IDS).logits
        assert torch.equal(loaded, adapted.eval()(IDS).logits) and caplog.text == ""


def test_an_adapter_that_changes_nothing_is_told(tiny_model, tmp_path, caplog):
    adapter = save_adapter(make_tiny_model("llama"), tmp_path / "untrained", seed=None)
    assert isinstance(load_model(tiny_model, adapter, PerCEConfig()), PeftModel)
    assert f"The adapter {adapter!r} changes nothing" in caplog.text
    caplog.clear()
    trained = save_adapter(make_tiny_model("llama"), tmp_path / "trained")
    load_model(tiny_model, trained, PerCEConfig())
    assert caplog.text == ""
