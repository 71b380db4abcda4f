"""The card that is written beside a model, for every kind of run."""

import json
import re
import shutil

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from conftest import make_tiny_model
from rows import make_chat_rows, write_lines
from trl_perce import PerCETrainer
from trl_perce.cli.main import main
from trl_perce.hub.model_card import _adapted, folder_as_seen, prompt_format


@pytest.fixture
def make_card(make_args, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(data=None, peft_config=None, train=True, dataset_name=None, **kwargs):
        args = make_args(output_dir="my-run", max_length=None, **{"max_steps": 2, **kwargs})
        data = Dataset.from_list(make_chat_rows()) if data is None else data
        evaluates = {"eval_dataset": Dataset.from_list(make_chat_rows(3))} if kwargs.get("eval_strategy") else {}
        model = make_tiny_model("llama")
        trainer = PerCETrainer(
            model, args, None, data, processing_class=tokenizer, peft_config=peft_config, **evaluates
        )
        if train:
            trainer.train()
        (tmp_path / "my-run").mkdir(exist_ok=True)
        trainer.create_model_card(dataset_name=dataset_name)
        card = ModelCard.load(tmp_path / "my-run" / "README.md")
        assert "Zarquon" not in card.content and "Quibbles" not in card.content and str(tmp_path) not in card.content
        assert not re.search(r"\bNone\b|\n{3,}", card.content), card.content
        return card, trainer

    return make


def test_lora_with_an_evaluation(make_card):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    card, trainer = make_card(peft_config=lora, eval_strategy="steps", eval_steps=2, dataset_name="somebody/rows")
    data, text = card.data, card.text
    assert (
        data.library_name == "peft"
        and {"lora", "perce", "trl-perce", "trl"} <= {*data.tags}
        and data.model_name == "my-run"
    )
    assert (
        data.datasets == ["somebody/rows"] and "[somebody/rows](https://huggingface.co/datasets/somebody/rows)" in text
    )
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for name in ("pir/mean", "weight/mean", "nll"):
        first, last = (f"{log[name]:.3f}".replace("-", "−") for log in (logs[0], logs[-1]))
        assert f"| {first} | {last} |" in text
    evaluated = next(log for log in trainer.state.log_history if "eval_nll" in log)
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        name: round(evaluated[f"eval_{name}"], 4) for name in ("nll", "loss", "pir/mean", "pir/personal_fraction")
    }
    assert "r 4, alpha 8, dropout 0, on q_proj, v_proj" in text and "steps: 2" in text
    assert "About me: {persona}\nWhat should I buy, number …<|im_end|>\n<|im_start|>assistant" in text


@pytest.mark.parametrize("kind", ["full", "prompt tuning", "loss", "uniform", "sequence", "stream", "given"])
def test_other_runs(make_card, kind, tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear")
    weighted = [row | {"completion": [row["completion"][0] | {"weight": 0.5}]} for row in make_chat_rows()]
    kwargs = {
        "given": {"peft_config": lora, "token_weighting": "given", "data": Dataset.from_list(weighted)},
        "full": {"peft_config": None},
        "prompt tuning": {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)},
        "loss": {"peft_config": lora, "token_weighting": "loss", "weight_clip_min": 0.5},
        "uniform": {"peft_config": lora, "token_weighting": "uniform"},
        "sequence": {"peft_config": lora, "weight_normalization": "sequence", "weight_clip_max": 8.0},
        "stream": {"peft_config": lora, "data": Dataset.from_list(make_chat_rows()).to_iterable_dataset()},
    }[kind]
    card, trainer = make_card(**kwargs)
    text = card.text
    assert (
        (card.data.library_name == "transformers")
        == (kind == "full")
        == (" AutoModelForCausalLM.from_pretrained" in text)
    )
    assert {"full": [], "prompt tuning": ["prompt_tuning"]}.get(kind, ["lora"]) == [
        tag for tag in card.data.tags if tag in ("lora", "prompt_tuning")
    ]
    expected = {
        "loss": "weighted by their own loss, clipped to 0.5 … 5: LossCE, a baseline of [Rethinking",
        "uniform": "Plain cross-entropy",
        "sequence": "divided by their mean over the row",
        "stream": "as in the training data",
        "given": "| mean weight | 0.500 | 0.500 |\n| loss without weights",
    }
    assert expected.get(kind, r"\mathcal{L}") in text
    assert card.data.eval_results is None


def test_the_experts_of_a_mixture(make_args, tokenizer, tmp_path, caplog):
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    config = Qwen3MoeConfig(**sizes, **heads, **experts, pad_token_id=3, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lora = LoraConfig(r=4, target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"])
    kwargs = {"output_dir": str(tmp_path / "moe"), "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = make_args(max_length=None, **kwargs)
    data = Dataset.from_list(make_chat_rows(2))
    trainer = PerCETrainer(model, args, None, data, processing_class=tokenizer, peft_config=lora)
    assert not trainer.model.peft_config["default"].target_modules
    trainer.train()
    assert (tmp_path / "moe" / "checkpoint-1" / "adapter_model.safetensors").is_file()
    saved = json.loads((tmp_path / "moe" / "checkpoint-1" / "trl_perce.json").read_text())
    markers = {"persona_start_marker": "<persona>", "persona_end_marker": "</persona>"}
    assert (
        saved
        == {
            "max_length": None,
            "truncate_persona": True,
            "chat_template_kwargs": None,
            "answer_only_loss": False,
        }
        | markers
    )
    card = ModelCard.load(tmp_path / "moe" / "README.md").text
    assert "dropout 0, on mlp.experts.down_proj, mlp.experts.gate_up_proj" in card
    assert _adapted(LoraConfig(target_parameters=["experts.up"])) == "experts.up"  # `target_modules` is `None` here
    # Whatever else fails: the reason is told, and what is saved stays
    card_file = tmp_path / "moe" / "README.md"
    trainer.state.log_history = [{"loss": 1.0, "nll": "high"}]
    trainer.create_model_card()
    assert re.search("model card .*README.md could not be written: ValueError: .*format code", caplog.text)
    assert card_file.is_file()


def test_a_card_before_training_and_a_local_dataset(make_card, tmp_path):
    card, _ = make_card(
        peft_config=LoraConfig(r=4, target_modules="all-linear"), train=False, dataset_name=str(tmp_path)
    )
    assert card.data.datasets is None and "| in training |" not in card.text


def plain(prompt: str, count: int = 12) -> list[dict]:
    return [
        {
            "persona": f"I am Zarquon the {i}th.",
            "prompt": prompt.replace("#", f"number {i}"),
            "completion": " Quibbles.",
        }
        for i in range(count)
    ]


CHAT = "<|im_start|>user\nAbout me: {persona}\n"
TURN = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "data, expected",
    [
        (make_chat_rows(12), (CHAT + "What should I buy, number …" + TURN, "")),
        (make_chat_rows(12, "What now?"), (CHAT + "…" + TURN, "What now?")),  # one question, many personas
        (make_chat_rows(12, "What is {}? Keep it short."), (CHAT + "What is …" + TURN, "? Keep it short.")),
        (make_chat_rows(12, "What is {}?\nOne word."), (CHAT + "What is …\nOne word." + TURN, "")),  # a whole line
        (plain("Me: {persona}\nQ: # fits?\nA:"), ("Me: {persona}\nQ: number …\nA:", "fits?")),
        (plain("Q: # fits? Me: {persona}\nA:"), ("Q: number … fits? Me: {persona}\nA:", "")),  # the persona's label
        (plain("Me: {persona}\nWhat fits?\n"), ("Me: {persona}\n…\n", "What fits?")),
        (make_chat_rows(4), None),  # too few to tell what is shared from what is somebody's
        ([row | {"persona": None} for row in make_chat_rows(12)], None),
    ],
    ids=[
        *("questions", "one question", "an ending", "a line", "plain", "a question ahead", "one plain question"),
        *("few", "no personas"),
    ],
)
def test_the_prompt_format_shows_what_is_shared(make_args, tokenizer, data, expected):
    from trl_perce.scoring.preparation import Preparation

    prepared = Preparation(tokenizer, make_args(max_length=None))(Dataset.from_list(data), "rows").dataset
    assert prompt_format(prepared, tokenizer) == expected


def test_what_is_saved_has_a_card_that_loads_it(make_args, tokenizer, tiny_model, tmp_path, monkeypatch, caplog):
    """Without checkpoints, in a checkpoint and in another folder, with what the card says, from where training began."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "bases/tiny-base")
    model = AutoModelForCausalLM.from_pretrained("bases/tiny-base")
    lora = LoraConfig(r=4, target_modules="all-linear")
    args = make_args(output_dir="outputs/my-run", max_length=None, max_steps=1, save_strategy="steps", save_steps=1)
    data = Dataset.from_list(make_chat_rows())
    trainer = PerCETrainer(model, args, None, data, processing_class=tokenizer, peft_config=lora)
    trainer.card_dataset = "recipes/README.md"  # a file, though a name on the Hub could look so
    trainer.train()
    trainer.save_model("elsewhere")
    (tmp_path / "outputs" / "my-run" / "README.md").unlink()  # as with `save_strategy="no"`
    trainer.save_model()
    for folder, name in (("outputs/my-run", "my-run"), ("outputs/my-run/checkpoint-1", "my-run"), ("elsewhere",) * 2):
        card = ModelCard.load(f"{folder}/README.md")
        assert (
            f'ForCausalLM.from_pretrained("{folder}", ' in card.text
            and f"score --model_name_or_path {folder} " in card.text
        )
        assert card.data.model_name == name and card.data.base_model is None and card.data.datasets is None
        assert "An adapter for `tiny-base`, a model in a local folder. It answers" in card.text
        assert "trl-perce" in card.data.tags and "More Information Needed" not in card.content
        assert str(tmp_path) not in card.content and "Zarquon" not in card.content
        snippet = re.search(r"```python\n(.*?)```", card.text, flags=re.DOTALL)[1]
        exec(snippet.replace("max_new_tokens=128", "max_new_tokens=1"), {})  # as a reader would
    assert trainer.args.output_dir == "outputs/my-run"
    # A card of the user's own is not written over
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    trainer.save_model("mine")
    assert "# Mine" in (tmp_path / "mine" / "README.md").read_text()
    # A card that fails costs nothing but a warning
    trainer.state.log_history = [{"loss": 1.0, "nll": "high"}]
    trainer.save_model("late")
    assert (tmp_path / "late" / "adapter_model.safetensors").is_file()
    assert "late/README.md could not be written: ValueError" in caplog.text


def test_a_folder_as_it_is_seen(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in ("a/b", "./a/b", tmp_path / "here" / "a" / "b"):
        assert folder_as_seen(folder) == "a/b"
    assert folder_as_seen(tmp_path / "there") == (tmp_path / "there").as_posix()
    assert folder_as_seen(".") == (tmp_path / "here").as_posix()  # "." is no name of a model


def test_results_of_evaluate_go_into_the_card(make_card, tiny_model, tmp_path, capsys):
    lora = LoraConfig(r=4, target_modules="all-linear")
    card, trainer = make_card(peft_config=lora, eval_strategy="steps", eval_steps=2)
    trainer.model.peft_config["default"].base_model_name_or_path = tiny_model
    trainer.save_model()
    trainer.create_model_card()
    rows = write_lines(tmp_path / "rows.jsonl", make_chat_rows(3))
    argv = ["evaluate", "--model_name_or_path", str(tmp_path / "my-run"), "--dataset_name", rows, "--metrics", "rouge"]
    argv += ["--max_new_tokens", "4", "--output_dir", str(tmp_path / "evaluation"), "--update_model_card"]
    for rows in ("2", "3"):
        assert main([*argv, "--max_rows", rows, "--overwrite"]) == 0
        metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["metrics"]
        card = ModelCard.load(tmp_path / "my-run" / "README.md")
        of_training, new = {}, {}
        for result in card.data.eval_results:
            (of_training if result.dataset_split is None else new)[result.metric_type] = result.metric_value
        assert {*of_training} == {"nll", "loss", "pir/mean", "pir/personal_fraction"}
        assert new == {name: round(entry["mean"], 4) for name, entry in metrics.items() if entry["mean"] is not None}
        assert f"on {rows} rows of the split train (temperature 0.4" in card.text  # the only split of a file
        assert card.text.count("## Evaluation of predictions") == card.text.count("`rougeL`") == 1
        assert card.text.index("`rougeL`") < card.text.index("## Privacy")
        assert not any(text in card.content for text in ("Zarquon", "Quibbles", str(tmp_path)))
        assert card.data.model_name == "my-run" and card.data.library_name == "peft"
    assert f"Model card: {tmp_path / 'my-run' / 'README.md'}" in capsys.readouterr().out
    (tmp_path / "my-run" / "README.md").unlink()
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--overwrite"])
    assert stopped.value.code == 2 and "`update_model_card`: there is no model card" in capsys.readouterr().err
