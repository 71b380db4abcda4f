"""Bad input is told before the model loads: the model named here does not exist, so loading it would be another error."""

import copy
import json
import os
import subprocess
import sys

import pandas
import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedTokenizer
from trl import DatasetMixtureConfig, ScriptArguments, SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from conftest import CHATML, make_tiny_model
from trl_perce import PerCEConfig, PerCETrainer, PerContrast, PerContrastConfig, PersonaError
from trl_perce.cli import common
from trl_perce.cli.common import load_data
from trl_perce.cli.main import main
from trl_perce.cli.train import make_parser
from trl_perce.persona.dataset import logger as dataset_logger
from trl_perce.persona.marks import mark_persona
from trl_perce.persona.rows import find_bad_encoding
from trl_perce.utils.files import write_json_lines


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
        ({"prompt": "Me: What?", "completion": "<persona>x</persona>"}, "is in the response"),
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
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` at 0"),
    ],
)
def test_options_that_do_not_go_together(attempt, options, reason):
    with pytest.raises(ValueError, match=reason):
        attempt([GOOD], **options)


def test_a_dataset_with_a_transform(attempt):
    with pytest.raises(ValueError, match="with_transform.*'persona_mask'.*'skip_prepare_dataset': True"):
        attempt(Dataset.from_list([GOOD]).with_transform(lambda rows: rows))


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


CHAT = [{"role": "user", "content": "Me: <persona>I sew</persona> What?"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"question": "What?", "answer": "x"},
            "has 'question', 'answer'. Rename 'question' to 'prompt' and 'answer' to 'completion'",
        ),
        (
            {"instruction": "What?", "input": "Now.", "output": "x"},
            "Rename 'instruction' to 'prompt' and 'output' to 'completion', with 'input' behind it",
        ),
        ({"query": "What?", "response": "x"}, "Rename 'query' to 'prompt' and 'response' to 'completion'"),
        ({"prompt": "What?", "response": "x"}, "Rename 'response' to 'completion'."),
        ({"user": "u", "history": ["a"], "query": "q", "response": "r"}, "`trl-perce prepare FILES --format rows"),
        ({"reviews": [{"overall": "5"}]}, "`trl-perce prepare FILES --format reviews"),
        ({"colour": "red"}, "this one has 'colour'."),
    ],
)
def test_rows_of_another_format(attempt, row, reason):
    with pytest.raises(PersonaError) as error:
        attempt([row])
    assert str(error.value).startswith("train dataset, row 0: column ") and reason in str(error.value)


@pytest.mark.parametrize(
    "marked",
    ["<Persona>I sew</Persona>", "[persona]I sew[/persona]", "&lt;persona&gt;I sew&lt;/persona&gt;"]
    + ["< persona >I sew</ persona >", "<persona >I sew<persona >", "{{persona}}I sew{{/persona}}"],
)
@pytest.mark.parametrize("good", [0, 3])
def test_markers_that_are_nearly_right(attempt, marked, good):
    marked = marked.replace("{{", "{").replace("}}", " }")  # `{persona}` itself is the placeholder
    with pytest.raises(PersonaError) as error:
        attempt([GOOD] * good + [{"prompt": f"Me: {marked} What?", "completion": "x"}])
    assert str(error.value).startswith(f"train dataset, row {good}: 'prompt' holds {marked!r}, which looks like")


def test_one_near_marker_alone_is_counted_since_it_may_be_meant(attempt, caplog):
    near = {"prompt": "What does the tag [PERSONA] mean?", "completion": "x"}
    with pytest.raises(
        PersonaError, match=r"no row has a persona. 2 of them: with '\[PERSONA\]' or the like, which is"
    ):
        attempt([near, near])
    with caplog.at_level("WARNING"), pytest.raises(OSError):  # which comes with the model
        attempt([GOOD, near, {"prompt": "What?", "completion": "x"}])
    assert "2 of 3 rows have no persona and count as plain CE (weight 1). 1 of them: with '[PERSONA]'" in caplog.text


@pytest.mark.parametrize(
    "prompt",
    [
        "<Persona>\n<persona>I sew</persona>\n</Persona>\nWhat?",
        "The persona: what? persona persona",
        "[Persona]\n\n[/Persona]",
    ],
)
def test_headings_are_no_near_markers(prompt):
    mark_persona({"prompt": prompt, "completion": "x"})


@pytest.mark.parametrize("text", ["nan", "None", " null ", "<NA>"])
def test_a_persona_that_is_a_missing_value(attempt, text):
    rows = [
        {"persona": persona, "prompt": "Me: {persona} What?", "completion": "x"} for persona in ("I sew", "", text)
    ]
    with pytest.raises(
        PersonaError, match=f"^train dataset, row 2: the persona is '{text.strip()}', as a missing value"
    ):
        attempt(rows)
    with pytest.raises(
        PersonaError, match=f"^train dataset, row 1: the persona is '{text.strip()}', as a missing value"
    ):
        attempt([GOOD, {"prompt": f"<persona>{text}</persona> What?", "completion": "x"}])


def test_not_a_number_is_no_persona():
    row = {"persona": float("nan"), "prompt": "Me: {persona} What?", "completion": "x"}
    assert mark_persona(row) == ({**row, "prompt": "Me:  What?"}, [])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": GOOD["prompt"], "completion": ""}, "the response in 'completion' is empty"),
        ({"prompt": GOOD["prompt"], "completion": " \n"}, "the response in 'completion' is empty"),
        ({"prompt": GOOD["prompt"], "completion": None}, "column 'completion' is missing or empty"),
        ({"prompt": CHAT, "completion": []}, "the response in 'completion' is empty"),
        (
            {"prompt": CHAT, "completion": [{"role": "assistant", "content": ""}]},
            "the response in 'completion' is empty",
        ),
        (
            {"prompt": CHAT, "completion": [{"role": "assistant", "content": None}]},
            "message 0 of 'completion' ('assistant') has no 'content'",
        ),
        (
            {"prompt": [{"role": "user", "content": None}], "completion": [{"role": "assistant", "content": "x"}]},
            "message 0 of 'prompt' ('user') has no 'content'",
        ),
        ({"messages": [*CHAT, {"role": "assistant", "content": ""}]}, "the response in 'messages' is empty"),
    ],
)
def test_a_row_without_a_response(attempt, row, reason):
    good = {"prompt": row["prompt"], "completion": "x"} if isinstance(row.get("prompt"), str) else None
    good = good or {
        "prompt": CHAT,
        "completion": [{"role": "assistant", "content": "x"}],
    }
    rows = [row] if "messages" in row else [good, row]
    with pytest.raises(PersonaError) as error:
        attempt(rows)
    assert str(error.value).startswith(f"train dataset, row {len(rows) - 1}: {reason}")


def test_a_tool_call_says_something():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    mark_persona(
        {
            "messages": [
                *copy.deepcopy(CHAT),
                call,
                {"role": "tool", "content": "1"},
                {"role": "assistant", "content": "x"},
            ]
        }
    )


@pytest.mark.parametrize(
    ("dataset", "remedy"),
    [
        ([GOOD], "is a list, .*Write `Dataset.from_list"),
        ("rows.jsonl", "is a str, .*Load it first"),
        (DatasetDict(train=Dataset.from_list([GOOD])), r"is a DatasetDict, .*dataset\['train'\]"),
        (GOOD, "is a dict, .*Dataset.from_dict"),
        (pandas.DataFrame([GOOD]), "is a DataFrame, .*from_pandas"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_dataset(make_args, tokenizer, dataset, remedy):
    with pytest.raises(TypeError, match=f"`train_dataset` {remedy}"):
        PerCETrainer("/no/such/model", make_args(), train_dataset=dataset, processing_class=tokenizer)


def test_what_is_no_dataset_to_evaluate_on(attempt):
    with pytest.raises(TypeError, match="`eval_dataset` is a list"):
        attempt([GOOD], trainer_kwargs={"eval_dataset": [GOOD]})
    with pytest.raises(TypeError, match="`held_out` is a list"):
        attempt([GOOD], trainer_kwargs={"eval_dataset": {"held_out": [GOOD]}})


def test_what_is_no_row_to_score(tiny_model):
    scorer = PerContrast(tiny_model, use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="`rows` is a str. Give a row such as"):
        scorer.score("rows.jsonl")
    with pytest.raises(TypeError, match="`rows` is a DatasetDict"):
        scorer.score(DatasetDict(train=Dataset.from_list([GOOD])))
    with pytest.raises(PersonaError, match="Row 1: it is a str and must be an object"):
        scorer.score([GOOD, "row"])


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("weight_clip_max", "5", 5.0),
        ("weight_clip_max", "5e0", 5.0),
        ("weight_clip_min", "0.5", 0.5),
        ("counterfactual_refresh_epochs", "2", 2),
        ("weight_clip_max", "5,0", None),
        ("weight_clip_max", None, None),
        ("weight_clip_max", True, None),
        ("counterfactual_refresh_epochs", 2.5, None),
        ("score_batch_tokens", "many", None),
        ("personal_threshold", "2", 2.0),
    ],
)
def test_numbers_as_text(make_args, name, value, read):
    cls = PerContrastConfig if name in ("score_batch_tokens", "personal_threshold") else PerCEConfig
    if read is None:
        with pytest.raises(ValueError, match=f"`{name}` is {value!r}. Write a number, such as "):
            make_args(cls, **{name: value})
    else:
        found = getattr(make_args(cls, **{name: value}), name)
        assert found == read and type(found) is type(read)


@pytest.mark.parametrize(
    ("tracker", "reason"),
    [("flyte", "FlyteCallback requires .*Or write `report_to: none`"), ("papyrus", "not supported")],
)
def test_a_tracker_that_is_not_there(attempt, tracker, reason):
    with pytest.raises(ValueError, match=f"^`report_to` is {tracker}: .*{reason}"):
        attempt([GOOD], report_to=[tracker])


def test_four_bits_without_an_adapter(attempt):
    with pytest.raises(ValueError, match="only be trained through an adapter. Set `use_peft`"):
        attempt([GOOD], trainer_kwargs={"quantization_config": BitsAndBytesConfig(load_in_4bit=True)})


def test_an_adapter_as_the_model(attempt, tmp_path):
    LoraConfig(base_model_name_or_path="some/base").save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="is an adapter, of the model 'some/base'. Write the model .*`model_name_or_path`"
    ):
        attempt([GOOD], model=str(tmp_path / "adapter"))


@pytest.mark.parametrize("is_chat", [False, True])
def test_plain_prompts_for_a_chat_model_are_said_once(attempt, caplog, is_chat):
    row = {"prompt": CHAT, "completion": [{"role": "assistant", "content": "x"}]} if is_chat else GOOD
    type(dataset_logger).warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        for _ in range(2):
            with pytest.raises(OSError):  # which comes with the model
                attempt([row])
    assert caplog.text.count("the chat template is not applied. For a chat model, write") == (0 if is_chat else 1)


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
    for name, ours in {
        "torch_dtype": "dtype",
        "base_model": "model_name_or_path",
        "sequence_len": "max_length",
    }.items():
        config.write_text(f"{name}: 1\n")
        assert f"unknown key or argument `{name}`. It is called `{ours}` here." in error_of("--config", str(config))
    assert "`max-seq-length`. It is called `max_length` here" in error_of("--max-seq-length", "8")
    for mixture, reason in {
        "rows.jsonl": "Write `dataset_name: …` for one dataset",
        "[{path: some/data, type: alpaca}]": "`datasets`, entry 0: unknown key `type`. There are path, name",
        f"[{{path: {data}}}]": f"`datasets`, entry 0: write a file as `path: json` and `data_files: {data}`",
    }.items():
        config.write_text(f"datasets: {mixture}\n")
        assert reason in error_of("--config", str(config))
    config.write_text("eval_strategy: yes\n")
    assert "`eval_strategy` is True. Write 'epoch', 'steps' or 'no'" in error_of("--config", str(config))
    config.write_text("save_strategy: no\neval_strategy: steps\neval_steps: 1\n")  # YAML reads `no` as `False`
    assert "has no split 'test'; it has 'train'" in error_of("--config", str(config), "--dataset_name", str(data))
    assert "`load_in_4bit`" in error_of("--dataset_name", str(data), "--load_in_4bit")
    assert "share between 0 and 1" in error_of("--dataset_name", str(data), "--test_split_size", "2")
    other = tmp_path / "rows.xyz"
    other.write_text("")
    assert "not one of the known kinds of data file" in error_of("--dataset_name", str(other))
    message = "`model_name_or_path`: there is no folder './model'"
    assert message in error_of("--dataset_name", str(data), "--model_name_or_path", "./model")


def test_every_alias_is_a_key_of_ours():
    known = {option.lstrip("-") for option in make_parser()._option_string_actions} | {"env"}
    for alias, key in common._ALIASES.items():
        assert key.split(":")[0] in known and alias not in known, alias


@pytest.mark.parametrize(
    ("suffix", "encoding", "reason"),
    [
        (
            "jsonl",
            "latin-1",
            "byte 0xe9 at position {latin}, in line 2. .*`iconv -f WINDOWS-1252 -t UTF-8 rows.jsonl > utf8.jsonl`",
        ),
        ("csv", "latin-1", "byte 0xe9 at position {latin}, in line 2"),
        ("jsonl", "utf-16", "byte 0xff at position 0, in line 1. .*iconv -f UTF-16 -t UTF-8"),
        ("jsonl", "utf-16-le", "byte 0x00 at position 1, in line 1. .*iconv -f UTF-16 -t UTF-8"),
    ],
)
def test_files_in_another_encoding(tmp_path, suffix, encoding, reason):
    lines = [json.dumps(GOOD), json.dumps({**GOOD, "completion": "A café."}, ensure_ascii=False)]
    if suffix == "csv":
        lines = ["prompt,completion", "<persona>I sew</persona>,café"]
    data = tmp_path / f"rows.{suffix}"
    text = "\n".join(lines) + "\n"
    data.write_bytes(text.encode(encoding))
    for name in (data, tmp_path):  # a file, and a folder of files
        with pytest.raises(
            ValueError, match=f"^`dataset_name`: {data} .* not UTF-8: {reason.format(latin=text.index('é'))}"
        ):
            load_data(ScriptArguments(dataset_name=str(name)), DatasetMixtureConfig())
    data.write_bytes(text.encode())
    assert find_bad_encoding(data) is None


def test_a_share_of_the_rows_is_split_off(tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    write_json_lines(data, [{**GOOD, "completion": str(index)} for index in range(20)])
    mixture = [{"path": "json", "data_files": str(data), "split": "train"}]
    found = [
        load_data(
            ScriptArguments(dataset_name=None if datasets else str(data)),
            DatasetMixtureConfig(datasets, test_split_size=0.25),
        )
        for datasets in ([], [], mixture)
    ]
    for splits in found:  # the same in each process and run
        assert splits["test"]["completion"][:] == found[0]["test"]["completion"][:] and len(splits["test"]) == 5
        assert sorted([*splits["train"]["completion"], *splits["test"]["completion"]], key=int) == [
            *map(str, range(20))
        ]
    assert "5 of 20 rows are 'test' (`test_split_size`)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the dataset has a split 'train'. Leave out the one or the other"):
        load_data(ScriptArguments(str(data), dataset_test_split="train"), DatasetMixtureConfig(test_split_size=0.25))


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
