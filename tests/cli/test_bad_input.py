"""Bad input is told before the model loads: the model named here does not exist, so loading it would be another error."""

import copy
import json
import os
import subprocess
import sys

import pytest
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import PreTrainedTokenizer
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from conftest import CHATML, make_tiny_model
from trl_perce import PerCETrainer, PersonaError
from trl_perce.cli.main import main


GOOD = {"prompt": "Me: <persona>I sew</persona> What?", "completion": "A needle."}


@pytest.fixture
def attempt(make_args, tokenizer):
    def run(rows, model="/no/such/model", processing_class=None, trainer_kwargs=None, **kwargs):
        processing_class = processing_class or copy.deepcopy(tokenizer)  # the trainer may set its chat template
        dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
        return PerCETrainer(
            model,
            make_args(**kwargs),
            train_dataset=dataset,
            processing_class=processing_class,
            **(trainer_kwargs or {}),
        )

    return run


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Me: <persona>I sew", "completion": "x"}, "'<persona>' is not closed"),
        ({"prompt": "Me: I sew</persona>", "completion": "x"}, "'</persona>' without '<persona>'"),
        ({"prompt": "<persona>I <persona>sew</persona></persona>", "completion": "x"}, "inside of another persona"),
        ({"prompt": "Me: {persona}", "completion": "x"}, "there is no column 'persona'"),
        ({"prompt": "Me: What?", "completion": "<persona>x</persona>"}, "inside of the response"),
    ],
)
def test_rows_that_are_unclear_are_named(attempt, row, reason):
    with pytest.raises(PersonaError, match=f"^train dataset, row 1: .*{reason}"):
        attempt([GOOD, row])


def test_an_eval_row_is_named_too(attempt):
    bad = Dataset.from_list([{"prompt": "Me: <persona>I sew", "completion": "x"}])
    with pytest.raises(PersonaError, match="^held_out dataset, row 0: .*is not closed"):
        attempt([GOOD], trainer_kwargs={"eval_dataset": {"held_out": bad}})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD, "persona": "I sew"}, "both ways"),
        ({"prompt": "What?", "completion": "x", "persona": "I sew"}, r"no '\{persona\}' in the prompt"),
    ],
)
def test_columns_that_are_unclear(attempt, row, reason):
    with pytest.raises(PersonaError, match=f"^train dataset, row 0: .*{reason}"):
        attempt([row])


@pytest.mark.parametrize("streaming", [False, True])
def test_forgotten_markers(make_args, tokenizer, streaming):
    dataset = Dataset.from_list([{"prompt": "What?", "completion": "A needle."}] * 3)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    args = make_args(max_steps=1)
    with pytest.raises(PersonaError, match="no row .*has a persona. Write <persona>…</persona> around"):
        PerCETrainer("/no/such/model", args, train_dataset=dataset, processing_class=tokenizer)


def test_an_empty_dataset(attempt):
    with pytest.raises(ValueError, match="The train dataset is empty"):
        attempt(Dataset.from_dict({"prompt": [], "completion": []}))


def test_markers_lost_by_a_chat_template(attempt, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(
        CHATML.replace("{{'<|im_start|>'", "{% if message['role'] != 'system' %}{{'<|im_start|>'", 1).replace(
            "{% endfor %}", "{% endif %}{% endfor %}"
        )
    )
    row = {
        "messages": [
            {"role": "system", "content": "<persona>I sew</persona>"},
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "A needle."},
        ]
    }
    with pytest.raises(
        PersonaError, match=r"^train dataset, row 0: the chat template rendered 0 of 1 personas.*'system'"
    ):
        attempt([row], chat_template_path=str(template))


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, which has no offsets."""

    @property
    def vocab_size(self):
        return 256

    def get_vocab(self):
        return {chr(i): i for i in range(256)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) % 256


def test_a_tokenizer_without_offsets(attempt):
    with pytest.raises(ValueError, match="SlowTokenizer.* gives no character offsets.*Use a fast tokenizer"):
        attempt([GOOD], processing_class=SlowTokenizer())


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["model.lm_head"], ".*(q_proj|lm_head)"])
def test_an_adapter_on_lm_head(attempt, targets):
    with pytest.raises(ValueError, match="adapter sits on `lm_head`.*Remove 'lm_head' from `target_modules`"):
        attempt([GOOD], trainer_kwargs={"peft_config": LoraConfig(target_modules=targets)})


def test_an_adapter_on_lm_head_of_a_model_that_is_loaded(attempt):
    model = get_peft_model(make_tiny_model("llama"), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="`lm_head` is not supported"):  # TRL's own
        attempt([GOOD], model=model)


def test_an_adapter_on_other_modules_is_not_mistaken(attempt):
    for targets in ("all-linear", ["q_proj"], ".*q_proj"):
        attempt(
            [GOOD], model=make_tiny_model("llama"), trainer_kwargs={"peft_config": LoraConfig(target_modules=targets)}
        )


def test_vision_data(attempt):
    with pytest.raises(ValueError, match="holds images, for which `token_weighting='perce'` is not supported"):
        attempt([{**GOOD, "images": ["a.png"]}])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"packing": True, "packing_strategy": "wrapped"}, "cuts rows apart"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "cuts rows apart"),
        ({"packing": True, "max_length": None}, "needs `max_length`"),
        ({"eval_packing": True}, "documents see each other"),
        ({"counterfactual_refresh_epochs": 0}, "Write 1"),
        ({"counterfactual_batch_tokens": 0}, "positive number of tokens, 'auto', or not set"),
        ({"counterfactual_batch_tokens": "many"}, "positive number of tokens, 'auto', or not set"),
        ({"loss_type": "dft"}, "Leave `loss_type` at 'nll'"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` at 0"),
    ],
)
def test_options_that_do_not_go_together(attempt, options, reason):
    with pytest.raises(ValueError, match=reason):
        attempt([GOOD], **options)


def test_virtual_tokens_are_not_packed(attempt):
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="PEFT ignores the positions"):
        attempt([GOOD], packing=True, trainer_kwargs={"peft_config": peft_config})


def test_a_collator_without_the_counterfactual(attempt):
    collator = DataCollatorForLanguageModeling(pad_token_id=0)
    with pytest.raises(ValueError, match="`DataCollatorForLanguageModeling`, which does not build the counterfactual"):
        attempt([GOOD], trainer_kwargs={"data_collator": collator})


def test_the_config_of_another_trainer(tokenizer):
    with pytest.raises(TypeError, match="`args` must be a `PerCEConfig`, got a `SFTConfig`"):
        PerCETrainer("/no/such/model", SFTConfig("out", use_cpu=True), processing_class=tokenizer)


def test_a_persona_mask_that_does_not_fit(attempt):
    rows = [{"input_ids": [5, 6], "labels": [5, 6], "persona_mask": [1, 0]}] * 2
    with pytest.raises(PersonaError, match="row 1: 'persona_mask' must be a list of 0 and 1 as long as 'input_ids'"):
        attempt([rows[0], {**rows[1], "persona_mask": [1]}], model=make_tiny_model("llama"))
    with pytest.raises(PersonaError, match=r"row 0: .* got 2 values from \[1, 2\]"):
        attempt([{**rows[0], "persona_mask": [1, 2]}], model=make_tiny_model("llama"))


def test_a_template_that_rewrites_the_text_is_an_error_and_never_a_shifted_mask(attempt, tmp_path):
    # Renders the length of the message: other with the borders of the persona in it than without
    template = tmp_path / "t.jinja"
    template.write_text(
        CHATML.replace("+ message['content'] +", "+ (message['content'] | length | string) + message['content'] +")
    )
    row = {
        "messages": [
            {"role": "user", "content": "Me: <persona>I sew</persona>"},
            {"role": "assistant", "content": "x"},
        ]
    }
    with pytest.raises(PersonaError, match="^train dataset, row 0: the persona cannot be aligned"):
        attempt([row], model=make_tiny_model("llama"), chat_template_path=str(template))


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_line(tmp_path, capsys):
    def error_of(*argv):
        with pytest.raises(SystemExit) as exit_info:
            main(["train", "--model_name_or_path", "no/model", "--use_cpu", "true", *argv])
        assert exit_info.value.code == 2
        return capsys.readouterr().err

    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(GOOD))
    config = tmp_path / "config.yaml"

    config.write_text("weight_clip_maximum: 3\n")
    assert "unknown key or argument `weight_clip_maximum`. Did you mean `weight_clip_max`?" in error_of(
        "--config", str(config)
    )
    config.write_text("token_weighting: percent\n")
    assert "`token_weighting` is 'percent'. Write one of" in error_of("--config", str(config))
    assert "no/config.yaml" in error_of("--config", "no/config.yaml")
    assert "unknown key or argument `lerning_rate`. Did you mean `learning_rate`" in error_of("--lerning_rate", "1")
    assert "no file or folder 'no/rows.jsonl'" in error_of("--dataset_name", "no/rows.jsonl")
    assert "no file or folder './data'" in error_of("--dataset_name", "./data")
    assert "`dataset_name` (or `datasets`) is missing" in error_of()
    assert "'weight_clip_min` (9.0)" in error_of("--weight_clip_min", "9").replace("`weight", "'weight")
    other = tmp_path / "rows.xyz"
    other.write_text("")
    assert "not one of the known kinds of data file" in error_of("--dataset_name", str(other))
    message = "`model_name_or_path`: there is no folder './model'"
    assert message in error_of("--dataset_name", str(data), "--model_name_or_path", "./model")


def test_the_command_line_in_its_own_process_ends_without_a_traceback(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "Me: <persona>I sew", "completion": "x"}))
    argv = ["--model_name_or_path", "no/model", "--dataset_name", str(data), "--use_cpu", "true"]
    result = subprocess.run(
        [sys.executable, "-m", "trl_perce", "train", *argv, "--output_dir", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert result.returncode == 2
    assert "trl-perce train: error: train dataset, row 0: '<persona>' is not closed" in result.stderr
    assert "Traceback" not in result.stderr
    assert "gemm_4bit" not in result.stderr  # bitsandbytes, on CPUs with AVX512-BF16: nothing here has 4 bits
