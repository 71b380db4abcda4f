"""Every dataset type of TRL's SFT: TRL's own tokens and labels, and a mask that holds exactly the persona."""

import copy
import json
import logging
import subprocess
import sys

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, LlamaConfig
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen2_5_chat_template

from conftest import CHATML, GENERATION, ROOT, make_tiny_model
from trl_perce import PerCETrainer, PersonaError
from trl_perce.scoring.preparation import Preparation


PERSONA = "I sew dresses 🧵"


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


# name → (row with a mark, the row as TRL alone would get it, options)
TYPES = {
    "prompt-completion": (
        {"prompt": "Me: <persona>{}</persona> What?", "completion": " A needle."},
        {"prompt": "Me: {} What?", "completion": " A needle."},
        {},
    ),
    "column": (
        {"prompt": "Me: {{persona}} What {{else}}?", "completion": " A needle.", "persona": "{}"},
        {"prompt": "Me: {} What {{else}}?", "completion": " A needle."},
        {},
    ),
    "conversational prompt-completion": (
        {"prompt": [user("Me: <persona>{}</persona>\nWhat?")], "completion": [assistant("A needle.")]},
        {"prompt": [user("Me: {}\nWhat?")], "completion": [assistant("A needle.")]},
        {},
    ),
    "conversational column": (
        {"prompt": [user("Me: {{persona}}\nWhat?")], "completion": [assistant("A needle.")], "persona": "{}"},
        {"prompt": [user("Me: {}\nWhat?")], "completion": [assistant("A needle.")]},
        {},
    ),
    "messages, many turns, assistant only": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                user("<persona>{}</persona>"),
                assistant("Hello."),
                user("And <persona>{}</persona>, what?"),
                assistant("A needle."),
            ]
        },
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                user("{}"),
                assistant("Hello."),
                user("And {}, what?"),
                assistant("A needle."),
            ]
        },
        {"assistant_only_loss": True},
    ),
    "messages, all trained": (
        {"messages": [user("<persona>{}</persona> what?"), assistant("A needle.")]},
        {"messages": [user("{} what?"), assistant("A needle.")]},
        {"assistant_only_loss": False},
    ),
    "sharegpt": (
        {"conversations": [{"from": "user", "value": "<persona>{}</persona> x"}, {"from": "assistant", "value": "y"}]},
        {"conversations": [{"from": "user", "value": "{} x"}, {"from": "assistant", "value": "y"}]},
        {"assistant_only_loss": False},
    ),
    "sharegpt's roles, assistant only": (
        {"conversations": [{"from": "human", "value": "<persona>{}</persona> x"}, {"from": "gpt", "value": "y"}]},
        {"messages": [user("{} x"), assistant("y")]},
        {"assistant_only_loss": True},
    ),
    "text": ({"text": "Me: <persona>{}</persona> what? A needle."}, {"text": "Me: {} what? A needle."}, {}),
    "text field": (
        {"body": "Me: <persona>{}</persona> what? A needle."},
        {"body": "Me: {} what? A needle."},
        {"dataset_text_field": "body"},
    ),
    "own markers": (
        {"text": "Me: [[{}]] what? <persona> is text here."},
        {"text": "Me: {} what? <persona> is text here."},
        {"persona_start_marker": "[[", "persona_end_marker": "]]"},
    ),
}


def fill(value, persona):
    if isinstance(value, str):
        return value.format(persona)
    if isinstance(value, list):
        return [fill(item, persona) for item in value]
    return {key: fill(item, persona) for key, item in value.items()}


@pytest.fixture
def prepare(make_args, tokenizer, tmp_path):
    def run(cls, rows, dataset=Dataset.from_list, **kwargs):
        if kwargs.get("assistant_only_loss"):
            template = tmp_path / "generation.jinja"
            template.write_text(GENERATION)
            kwargs["chat_template_path"] = str(template)
        extra = {key: kwargs.pop(key) for key in ("eval_dataset", "formatting_func") if key in kwargs}
        config = {} if cls is PerCETrainer else {"cls": SFTConfig}
        args = make_args(**config, **{"max_length": None, **kwargs})
        return cls(
            make_tiny_model("llama"),
            args,
            train_dataset=dataset(rows),
            processing_class=copy.deepcopy(tokenizer),
            **extra,
        )

    return run


def decoded_persona(row, tokenizer):
    return tokenizer.decode([t for t, m in zip(row["input_ids"], row["persona_mask"], strict=True) if m])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_types(prepare, tokenizer, name, streaming):
    marked, clean, options = TYPES[name]
    personas = [PERSONA, "linen, and dresses  too ", "x"]
    options = {**options, **({"max_steps": 1} if streaming else {})}
    as_dataset = (lambda rows: Dataset.from_list(rows).to_iterable_dataset()) if streaming else Dataset.from_list
    ours = prepare(PerCETrainer, [fill(marked, p) for p in personas], as_dataset, **options)
    theirs = prepare(
        SFTTrainer,
        [fill(clean, p) for p in personas],
        as_dataset,
        **{key: value for key, value in options.items() if not key.startswith("persona_")},
    )
    count = sum(str(marked).count(mark) for mark in ("<persona>{}", "[[{}", "{{persona}}"))
    rows = list(zip(ours.train_dataset, theirs.train_dataset, personas, strict=True))
    assert len(rows) == 3
    for row, expected, persona in rows:
        assert row["input_ids"] == expected["input_ids"]
        assert row["labels"] == expected["labels"]
        assert "".join(decoded_persona(row, tokenizer).split()) == "".join(persona.split()) * count
    # One batch goes through the collator and the model
    assert ours.compute_loss(ours.model, next(iter(ours.get_train_dataloader()))).isfinite()


def test_a_dict_of_eval_sets_and_evaluate_on_fresh_rows(prepare, tokenizer, caplog):
    row = {"prompt": f"Me: <persona>{PERSONA}</persona> What?", "completion": " A needle."}
    plain = {"prompt": "What?", "completion": " A needle."}
    trainer = prepare(
        PerCETrainer,
        [row],
        eval_dataset={"personal": Dataset.from_list([row, plain]), "plain": Dataset.from_list([plain])},
    )
    assert "plain dataset: no row has a persona" in caplog.text
    assert decoded_persona(trainer.eval_dataset["personal"][0], tokenizer).strip() == PERSONA
    metrics = trainer.evaluate()
    assert {"eval_personal_loss", "eval_plain_loss"} <= metrics.keys()
    before = metrics["eval_personal_loss"]
    # Rows that were not seen by `__init__`, raw and already prepared
    assert trainer.evaluate(Dataset.from_list([row, plain]))["eval_loss"] == pytest.approx(before)
    assert trainer.evaluate(trainer.eval_dataset["personal"])["eval_loss"] == pytest.approx(before)


def test_a_formatting_function_may_write_the_markers(prepare, tokenizer):
    trainer = prepare(
        PerCETrainer,
        [{"who": PERSONA, "question": "What?", "answer": "A needle."}],
        formatting_func=lambda row: f"Me: <persona>{row['who']}</persona> {row['question']} {row['answer']}",
    )
    (row,) = trainer.train_dataset
    assert tokenizer.decode(row["input_ids"]) == f"Me: {PERSONA} What? A needle.<|im_end|>"
    assert decoded_persona(row, tokenizer).strip() == PERSONA


def test_rows_without_a_persona_are_counted(prepare, caplog):
    rows = [{"text": "<persona>I sew</persona> x"}, {"text": "y z"}, {"text": "z y"}]
    prepare(PerCETrainer, rows)
    assert "2 of 3 rows have no persona and count as plain CE" in caplog.text


def test_two_processes_prepare_the_same_rows(prepare):
    rows = [{"text": f"{'<persona>I sew</persona>' * (i % 2)} number {i}"} for i in range(8)]
    one, two = (prepare(PerCETrainer, rows, dataset_num_proc=n).train_dataset for n in (None, 2))
    assert one.to_list() == two.to_list()


def test_a_tokenizer_whose_tokens_do_not_spell_the_text(prepare, make_args, tokenizer):
    # It writes in lower case: where the persona is, only its offsets tell
    lowering = copy.deepcopy(tokenizer)
    lowering.backend_tokenizer.normalizer = normalizers.Lowercase()
    row = {"prompt": f"Me: <persona>{PERSONA}</persona> What?", "completion": " A needle."}
    trainer = PerCETrainer(
        make_tiny_model("llama"),
        make_args(max_length=None),
        train_dataset=Dataset.from_list([row]),
        processing_class=lowering,
    )
    (got,) = trainer.train_dataset
    assert tokenizer.decode(got["input_ids"]).startswith(f"me: {PERSONA.lower()} what?")
    assert decoded_persona(got, tokenizer).strip() == PERSONA.lower()


def test_a_second_start_finds_the_cache(tmp_path, tokenizer):
    rows = [{"prompt": f"Me: <persona>{PERSONA}</persona> {i}?", "completion": " A needle."} for i in range(20)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def files_of_a_process(*max_lengths) -> list[dict[str, int]]:
        """After each trainer that it makes."""
        script = f"""
import json, pathlib, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from conftest import make_tiny_model
from datasets import load_from_disk
from transformers import AutoTokenizer
from trl_perce import PerCEConfig, PerCETrainer

for max_length in {max_lengths}:
    trainer = PerCETrainer(
        make_tiny_model("llama"),
        PerCEConfig("{tmp_path}/out", use_cpu=True, bf16=False, report_to="none", max_length=max_length),
        train_dataset=load_from_disk("{tmp_path}/rows"),
        processing_class=AutoTokenizer.from_pretrained("{tmp_path}/tokenizer"),
    )
    assert len(trainer.train_dataset) == 20 and max(trainer.train_dataset[3]["persona_mask"]) == 1
    files = pathlib.Path("{tmp_path}/rows").glob("cache-*.arrow")
    print("files", json.dumps({{path.name: path.stat().st_mtime_ns for path in files}}))
"""
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        return [json.loads(line[6:]) for line in result.stdout.splitlines() if line.startswith("files ")]

    (first,) = files_of_a_process(30)
    assert len(first) == 5  # marked, ended with EOS, tokenized, labelled, masked: nothing is left for TRL to truncate
    again, other = files_of_a_process(30, 25)
    assert again == first
    # Masked (trimmed) anew, the rest is the same
    assert first.items() < other.items() and len(other) == len(first) + 1


# ── max_length ───────────────────────────────────────────────────────────────────────────────────────────────────────


def tokenized(before, persona, after, response):
    size = before + persona + after + response
    return {
        "input_ids": list(range(4, 4 + size)),
        "labels": [-100] * (size - response) + list(range(4 + size - response, 4 + size)),
        "persona_mask": [0] * before + [1] * persona + [0] * (after + response),
    }


@pytest.mark.parametrize("too_long", [False, True])
def test_rows_without_a_trained_token_are_dropped_as_by_trl(prepare, too_long):
    rows = [tokenized(2, 8 if too_long else 3, 2, 0), tokenized(2, 3, 2, 3), tokenized(2, 0, 2, 0)]
    trainer = prepare(PerCETrainer, rows, max_length=10)
    assert list(trainer.train_dataset["input_ids"]) == [rows[1]["input_ids"]]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_a_long_row_loses_persona_tokens_from_the_end(prepare, caplog, streaming):
    caplog.set_level(logging.WARNING)
    rows = [
        tokenized(2, 3, 2, 3),  # 10: fits
        tokenized(2, 20, 2, 3),  # 27: keeps 3 of 20
        tokenized(3, 5, 4, 3),  # 15: its persona leaves altogether
        tokenized(6, 5, 4, 3),  # 18: does not fit without its persona
        tokenized(8, 0, 1, 3),  # 12: no persona to trim
    ]
    as_dataset = (lambda rows: Dataset.from_list(rows).to_iterable_dataset()) if streaming else Dataset.from_list
    options = {"max_steps": 1} if streaming else {}
    trainer = prepare(PerCETrainer, rows, as_dataset, max_length=10, **options)
    got = list(trainer.train_dataset)
    assert [len(row["input_ids"]) for row in got] == [10, 10, 10, 10]
    assert got[0]["input_ids"] == rows[0]["input_ids"]
    ids = rows[1]["input_ids"]
    assert got[1]["input_ids"] == ids[:5] + ids[22:] and got[1]["persona_mask"] == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert got[1]["labels"] == [-100] * 7 + ids[-3:]
    assert got[2]["input_ids"] == rows[2]["input_ids"][:3] + rows[2]["input_ids"][8:] and not any(
        got[2]["persona_mask"]
    )
    assert got[3]["input_ids"] == rows[4]["input_ids"][:10] and got[3]["persona_mask"] == [0] * 10  # TRL's truncation
    if not streaming:
        assert "trimmed the persona of 2 of 5 rows, by 22 tokens in all, to fit into `max_length=10`" in caplog.text
        assert "left out 1 of 5 rows, whose question and response alone are longer" in caplog.text
        assert "1 of 5 rows are longer than `max_length=10` and no persona may be trimmed" in caplog.text
    else:  # counts as it goes: at the first row that does not fit
        assert "trimmed the persona of 1 of 2 rows, by 17 tokens in all" in caplog.text


def test_truncate_persona_off_leaves_the_row_to_trl(prepare):
    row = tokenized(2, 6, 2, 3)
    trainer = prepare(PerCETrainer, [row], max_length=11, truncate_persona=False)
    (got,) = trainer.train_dataset
    assert got["input_ids"] == row["input_ids"][:11]
    assert got["labels"] == row["labels"][:11] and got["persona_mask"] == row["persona_mask"][:11]


def test_trimming_from_text_keeps_question_and_response(prepare, tokenizer):
    row = {"prompt": f"Me: <persona>{'I sew dresses. ' * 50}</persona>\nWhat?", "completion": " A new needle."}
    trainer = prepare(PerCETrainer, [row], max_length=40)
    (got,) = trainer.train_dataset
    text = tokenizer.decode(got["input_ids"])
    assert len(got["input_ids"]) == 40
    assert text.startswith("Me: I sew dresses. I sew") and text.endswith("\nWhat? A new needle.<|im_end|>")


def test_no_row_fits(prepare):
    with pytest.raises(PersonaError, match="no row fits into `max_length=5` without its persona"):
        prepare(PerCETrainer, [tokenized(2, 3, 2, 3)], max_length=5)


def test_rows_that_skip_preparation(prepare):
    rows = [tokenized(2, 3, 2, 3)]
    trainer = prepare(PerCETrainer, rows, dataset_kwargs={"skip_prepare_dataset": True})
    batch = next(iter(trainer.get_train_dataloader()))
    (row,) = batch["counterfactual_rows"]
    assert row["input_ids"].tolist() == [4, 5, 9, 10, 11, 12, 13]
    with pytest.raises(ValueError, match="needs a dataset with the columns 'input_ids', 'labels' and 'persona_mask'"):
        rows = [{key: value for key, value in rows[0].items() if key != "persona_mask"}]
        prepare(PerCETrainer, rows, dataset_kwargs={"skip_prepare_dataset": True})


def test_streaming_from_a_generator(prepare, tokenizer):
    def generate():
        for index in range(5):
            yield {"prompt": f"Me: <persona>I sew {index}</persona> What?", "completion": " A needle."}

    trainer = prepare(PerCETrainer, None, lambda _: IterableDataset.from_generator(generate), max_steps=2)
    assert [decoded_persona(row, tokenizer).strip() for row in trainer.train_dataset] == [
        f"I sew {i}" for i in range(5)
    ]
    trainer.train()


def test_a_stream_that_hands_out_the_same_objects_in_each_epoch(prepare, tokenizer):
    rows = [{"prompt": [user(f"Me: <persona>{PERSONA}</persona>\nWhat?")], "completion": [assistant("A needle.")]}]

    def generate():
        yield from rows

    trainer = prepare(PerCETrainer, None, lambda _: IterableDataset.from_generator(generate), max_steps=1)
    for _ in range(2):
        (row,) = trainer.train_dataset
        assert decoded_persona(row, tokenizer).strip() == PERSONA


def test_batches_are_not_dispatched(prepare, caplog):
    rows = [tokenized(2, 3, 2, 3)]
    trainer = prepare(PerCETrainer, rows, accelerator_config={"dispatch_batches": True})
    assert trainer.accelerator.dataloader_config.dispatch_batches is False
    assert "`dispatch_batches` is set to `False`" in caplog.text


# ── whose turn it is ─────────────────────────────────────────────────────────────────────────────────────────────────

# Two replies, the persona in the system message and in the second of the user's
TALK = {
    "messages": [
        {"role": "system", "content": f"The user: <persona>{PERSONA}</persona>"},
        user("What to buy?"),
        assistant("A needle."),
        user("<persona>I love linen.</persona> And then?"),
        assistant(" Three metres of linen, 🧵"),
    ]
}
# The same text by hand. What is trained stands at the odd places: by marks, and by where the next turn begins.
_HEAD, _TURN = (
    "<|im_start|>system\nThe user: I sew dresses 🧵<|im_end|>\n<|im_start|>user\nWhat to buy?<|im_end|>\n",
    "<|im_end|>",
)
_REPLY, _NEXT = "<|im_start|>assistant\n", "<|im_start|>user\nI love linen. And then?<|im_end|>\n"
_MARKED = [f"{_HEAD}{_REPLY}", f"A needle.{_TURN}", f"\n{_NEXT}{_REPLY}", f" Three metres of linen, 🧵{_TURN}", "\n"]
_WHOLE = [f"{_HEAD}{_REPLY}", f"A needle.{_TURN}\n", f"{_NEXT}{_REPLY}", f" Three metres of linen, 🧵{_TURN}\n"]
# TRL's marks for Qwen2.5 begin at the line break of the header
_QWEN = [_WHOLE[0][:-1], "\n" + _WHOLE[1], _WHOLE[2][:-1], "\n" + _WHOLE[3]]


def by_hand(pieces, tokenizer):
    """Tokens of a text and their labels: -100 for what lies in the pieces at even places."""
    encoded = tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
    owners = [index for index, piece in enumerate(pieces) for _ in piece]
    labels = [
        token if owners[start] % 2 else -100
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return encoded["input_ids"], labels


@pytest.mark.parametrize("weighting", ["perce", "uniform"])
@pytest.mark.parametrize(
    "template, asked, pieces",
    [
        (GENERATION, None, _MARKED),
        (qwen2_5_chat_template, None, _QWEN),
        (CHATML, None, _WHOLE),
        (CHATML, True, _WHOLE),
        (CHATML, False, [""] + ["".join(_WHOLE)]),
    ],
    ids=["marks", "known to TRL", "neither", "neither, asked for", "all"],
)
def test_the_assistants_turns_are_trained(make_args, tokenizer, weighting, template, asked, pieces, caplog):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    ids, labels = by_hand(pieces, tokenizer)
    args = make_args(token_weighting=weighting, assistant_only_loss=asked, max_length=None)
    rows = Dataset.from_list([TALK, TALK])
    trainer = PerCETrainer(make_tiny_model("llama"), args, train_dataset=rows, processing_class=tokenizer)
    assert trainer.args.assistant_only_loss is asked  # as it was given
    scored = Preparation(tokenizer, args)(rows, "scored").dataset
    fresh = trainer._prepare_dataset(rows, tokenizer, args, False, None, "fresh")
    assert len(trainer.train_dataset) == len(scored) == len(fresh) == 2
    for row in [*trainer.train_dataset, *scored, *fresh]:
        assert row["input_ids"] == ids and row["labels"] == labels
        assert decoded_persona(row, tokenizer).replace(" ", "") == f"{PERSONA}I love linen.".replace(" ", "")
    _, whole = by_hand(_WHOLE, tokenizer)
    others = f"trains {2 * whole.count(-100)} tokens that are not the assistant's, in 2 rows."
    # Once a dataset: of the trainer, the scores, and of the trainer again
    assert caplog.text.count(others) == (3 if asked is False else 0) == caplog.text.count("not the assistant's")


def test_the_turns_of_smollm2(make_args, smollm2_tokenizer):
    single = {"messages": TALK["messages"][:3]}
    pair = {"prompt": TALK["messages"][:2], "completion": TALK["messages"][2:3]}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(smollm2_tokenizer), **sizes))
    trainer = PerCETrainer(
        model,
        make_args(max_length=None),
        train_dataset=Dataset.from_list([TALK, single]),
        eval_dataset=Dataset.from_list([pair]),
        processing_class=smollm2_tokenizer,
    )
    talk, alone = trainer.train_dataset
    assert (talk["input_ids"], talk["labels"]) == by_hand(_WHOLE, smollm2_tokenizer)
    (same,) = trainer.eval_dataset  # as prompt and completion
    for column in ("input_ids", "labels", "persona_mask"):
        assert alone[column] == same[column]
    assert decoded_persona(talk, smollm2_tokenizer).replace(" ", "") == f"{PERSONA}I love linen.".replace(" ", "")
    scored = Preparation(smollm2_tokenizer, trainer.args)(IterableDataset.from_generator(lambda: iter([TALK])), "a")
    assert next(iter(scored.dataset))["labels"] == talk["labels"]


def test_rows_that_are_too_long_keep_the_assistants_turns(make_args, tokenizer):
    ids, labels = by_hand(_WHOLE, tokenizer)
    (row,) = Preparation(tokenizer, make_args(max_length=len(ids) - 8))(Dataset.from_list([TALK]), "a").dataset
    assert len(row["input_ids"]) == len(ids) - 8
    assert [label for label in row["labels"] if label != -100] == [label for label in labels if label != -100]
    args = make_args(max_length=len(ids) - 8, truncate_persona=False)  # TRL cuts the end
    (row,) = Preparation(tokenizer, args)(Dataset.from_list([TALK]), "a").dataset
    assert (row["input_ids"], row["labels"]) == (ids[:-8], labels[:-8])


def test_other_kinds_of_rows_in_evaluation(prepare, tokenizer):
    """Each dataset goes by its own rows: the trainer's are pairs, those of the evaluation conversations."""
    pair = {"prompt": TALK["messages"][:2], "completion": TALK["messages"][2:3]}
    trainer = prepare(PerCETrainer, [pair], eval_dataset=Dataset.from_list([TALK]))
    assert trainer.eval_dataset[0]["labels"] == by_hand(_WHOLE, tokenizer)[1]
    assert trainer.train_dataset[0]["labels"] == by_hand(_WHOLE[:2], tokenizer)[1]


@pytest.mark.parametrize(
    "human, bot", [("human", "gpt"), ("Human", "bot"), ("prompter", "model"), ("USER", "chatbot")]
)
def test_roles_of_other_formats(make_args, tokenizer, human, bot):
    names = {"system": "system", "user": human, "assistant": bot}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in TALK["messages"]]
    renamed = [{"role": names[m["role"]], "content": m["content"]} for m in TALK["messages"]]
    for row in (
        {"conversations": turns},
        {"messages": renamed},
        {"prompt": renamed[:4], "completion": renamed[4:]},
    ):
        (prepared,) = Preparation(tokenizer, make_args(max_length=None))(Dataset.from_list([row]), "a").dataset
        ids, labels = by_hand(_WHOLE if "prompt" not in row else ["".join(_WHOLE[:3]), _WHOLE[3]], tokenizer)
        assert prepared["input_ids"] == ids and prepared["labels"] == labels


# Renders the last reply otherwise than those before it, as templates of thinking models do
THINKING = CHATML.replace(
    "message['content'] + ", "message['content'] + ('</s>' if loop.last and message['role'] == 'assistant' else '') + "
)


@pytest.mark.parametrize(
    "row, template, message",
    [
        (
            {"messages": [user("<persona>I sew.</persona>"), {"role": "narrator", "content": "x"}]},
            CHATML,
            "'narrator'",
        ),
        ({"messages": [user("<persona>I sew.</persona>"), {"role": None, "content": "x"}]}, CHATML, "the role None"),
        (
            {"messages": [user("<persona>I sew.</persona>")]},
            CHATML,
            "no message of the conversation is the assistant's",
        ),
        ({"messages": [assistant("Hi."), *TALK["messages"][1:]]}, CHATML, "begins with the assistant"),
        (TALK, THINKING, r"turn \(message 2\) cannot be told.*first 3 messages"),
    ],
)
def test_turns_that_cannot_be_told(make_args, tokenizer, row, template, message):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    rows = [{"messages": [user("<persona>x</persona>"), assistant("y")]}, row]
    with pytest.raises(PersonaError, match=f"a dataset, row 1: .*{message}"):
        Preparation(tokenizer, make_args())(Dataset.from_list(rows), "a")
    if template != THINKING:  # which the first row does not show: found before the model loads where it does
        return
    with pytest.raises(PersonaError, match="train dataset, row 0"):
        PerCETrainer("no/such-model", make_args(), train_dataset=Dataset.from_list([row]), processing_class=tokenizer)


def test_tokens_that_cannot_be_counted_are_said(make_args, tokenizer, caplog):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = THINKING
    args = make_args(assistant_only_loss=False, max_length=None)
    Preparation(tokenizer, args)(Dataset.from_list([TALK]), "a")
    assert "in 1 row (1 of them not counted" in caplog.text
    tokenizer.chat_template = CHATML
    Preparation(tokenizer, args)(IterableDataset.from_generator(lambda: iter([TALK] * 3)), "a")
    others = by_hand(_WHOLE, tokenizer)[1].count(-100)
    assert f"trains {3 * others} tokens that are not the assistant's, in the first 3 rows." in caplog.text


def test_text_has_no_turns(make_args, tokenizer):
    args = make_args(assistant_only_loss=True)
    rows = Dataset.from_list([{"text": "<persona>I sew.</persona> x"}])
    with pytest.raises(ValueError, match="`assistant_only_loss` is True, and the rows are not conversations"):
        PerCETrainer("no/such-model", args, train_dataset=rows, processing_class=tokenizer)
