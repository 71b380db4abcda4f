"""
Conversations through TRL's own chat templates: what a row becomes in training, in scoring and in evaluation, against Transformers' own
rendering of it.
"""

import copy
from datetime import datetime, timedelta
from importlib import resources

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, load_from_disk
from tokenizers import processors
from transformers import CanineTokenizer
from transformers.tokenization_mistral_common import MistralCommonBackend

from conftest import GENERATION, ROOT, make_tiny_model
from trl_perce import PerCETrainer, PerContrast, PersonaError
from trl_perce.evaluation.arguments import GenerationArguments
from trl_perce.evaluation.predictions import make_prompts
from trl_perce.persona.thoughts import thought_end
from trl_perce.persona.turns import choose_turns
from trl_perce.scoring.percontrast import _to_dataset
from trl_perce.scoring.preparation import Preparation


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


@pytest.fixture
def with_template(tokenizer):
    """The tests' tokenizer with one of TRL's templates, by its name, or with another template."""

    def make(template):
        own = copy.deepcopy(tokenizer)
        if "{" not in template:
            template = resources.files("trl").joinpath(f"chat_templates/{template}.jinja").read_text(encoding="utf-8")
        own.chat_template = template
        return own

    return make


@pytest.fixture
def prepare(make_args):
    """Rows as they are trained, scored and scored by themselves, which must be the same."""

    def run(rows, tokenizer, trains=True, **options):
        args = make_args(max_length=None, **options)
        dataset = _to_dataset(rows)
        scored = [*Preparation(tokenizer, args)(dataset, "a").dataset]
        alone = [Preparation(tokenizer, args)(_to_dataset([row]), "b").dataset[0] for row in rows]
        stream = IterableDataset.from_generator(lambda: iter(rows))
        streamed = [*Preparation(tokenizer, args)(stream, "c").dataset]
        ways = [scored, alone, streamed]
        if trains:
            own = copy.deepcopy(tokenizer)
            trainer = PerCETrainer(make_tiny_model("llama"), args, train_dataset=dataset, processing_class=own)
            ways.append([*trainer.train_dataset])
        columns = ("input_ids", "labels", "persona_mask")
        found = [[{column: row[column] for column in columns} for row in way] for way in ways]
        assert all(way == found[0] for way in found)
        return found[0]

    return run


def trained(row, tokenizer):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def personal(row, tokenizer):
    return tokenizer.decode([token for token, own in zip(row["input_ids"], row["persona_mask"], strict=True) if own])


def test_a_base_model_sees_plain_text(tokenizer, prepare, make_args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the template comes with the package
    base = copy.deepcopy(tokenizer)
    base.chat_template, base.bos_token = None, "<|endoftext|>"
    begins = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    base.backend_tokenizer.post_processor = begins
    row = {"persona": "I sew.", "prompt": "About me: {persona}\n\nWhat should I buy?\n", "completion": "Needles."}
    chat = {"prompt": [user(row["prompt"].rstrip())], "completion": [assistant("Needles.")], "persona": "I sew."}
    assert prepare([chat], base, chat_template_path="recipes/plain_text.jinja") == prepare([row], base)
    args, with_template = make_args(GenerationArguments, max_new_tokens=4), copy.deepcopy(base)
    with_template.chat_template = (ROOT / "recipes" / "plain_text.jinja").read_text(encoding="utf-8")
    asked = [make_prompts([own], by, args)[0].input_ids for own, by in ((chat, with_template), (row, base))]
    assert asked[0] == asked[1]


# ── arguments of the template ────────────────────────────────────────────────────────────────────────────────────────


def test_arguments_of_the_template(with_template, prepare, make_args, caplog):
    tokenizer = with_template("qwen3")
    talk = {"prompt": [user("<persona>I sew.</persona> What?")], "completion": [assistant("A needle.")]}
    rows = [talk, {**talk, "chat_template_kwargs": {"enable_thinking": True}}]
    sharegpt = {"conversations": [{"from": "human", "value": "<persona>I sew.</persona> What?"}]}
    sharegpt["conversations"].append({"from": "gpt", "value": "A needle."})
    (one,) = prepare([sharegpt], tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert personal(one, tokenizer).strip() == "I sew."
    prompt = [user("I sew. What?")]
    for option, thinks in ((None, (True, True)), ({"enable_thinking": False}, (False, True))):
        got = prepare(rows, tokenizer, chat_template_kwargs=option)
        args = make_args(GenerationArguments, max_length=None, chat_template_kwargs=option)
        asked = make_prompts(rows, tokenizer, args)
        for row, ask, thinking in zip(got, asked, thinks, strict=True):
            begin = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, enable_thinking=thinking)
            assert row["labels"][: len(begin["input_ids"])] == [-100] * len(begin["input_ids"])
            assert ask.input_ids == begin["input_ids"] == row["input_ids"][: len(begin["input_ids"])]
            assert ("</think>" in tokenizer.decode(ask.input_ids)) is not thinking
            assert trained(row, tokenizer).endswith("A needle.<|im_end|>\n")
    assert "does not read" not in caplog.text
    prepare(rows[:1], tokenizer, trains=False, chat_template_kwargs={"enable_thinkin": False})
    assert "the chat template does not read `enable_thinkin`" in caplog.text


@pytest.mark.parametrize("value", ["{enable_thinking: false}", "[1]", 3, True])
def test_arguments_that_are_no_object(make_args, value):
    with pytest.raises(
        ValueError, match="`chat_template_kwargs` is .*Write a JSON object, such as '{\"enable_thinking"
    ):
        make_args(chat_template_kwargs=value)
    assert make_args(chat_template_kwargs='{"a": [1, null]}').chat_template_kwargs == {"a": [1, None]}


def test_arguments_of_a_row_that_are_no_object(make_args, tokenizer):
    row = {"prompt": [user("<persona>I</persona>")], "completion": [assistant("x")], "chat_template_kwargs": "{}"}
    with pytest.raises(PersonaError, match="row 0: column 'chat_template_kwargs' holds a str. Write an object"):
        Preparation(tokenizer, make_args())(Dataset.from_list([row]), "a")


# ── tools ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def call(name, **arguments):
    return assistant(None, tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])


def without_none(message):
    return {key: value for key, value in message.items() if value is not None}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {"type": "object", "properties": {argument: {"type": kind}}},
        },
    }
    for name, argument, kind in (("weather", "city", "string"), ("shop", "count", "integer"))
]
ASK, BUY = user("<persona>I live in Paris.</persona> What now?"), call("shop", count=3)
CALLS = [
    {"prompt": [ASK], "completion": [call("weather", city="Paris")], "tools": TOOLS[:1]},
    {
        "prompt": [ASK, BUY, {"role": "tool", "name": "shop", "content": "ok"}],
        "completion": [assistant("Bought.")],
        "tools": TOOLS,
    },
    {"prompt": [ASK], "completion": [call("look", city=7)], "tools": None},
]


@pytest.mark.parametrize("template", ["qwen3", "llama3_1", "qwen3_instruct_2507"])
def test_arguments_of_tools_that_differ(with_template, prepare, template):
    """Alone or in one table with the others, where Arrow gives each call the arguments of all: the tokens of plain dictionaries."""
    tokenizer = with_template(template)
    for row, got in zip(CALLS, prepare(CALLS, tokenizer), strict=True):
        messages = [without_none(message) for message in row["prompt"] + row["completion"]]
        messages[0] = user("I live in Paris. What now?")
        expected = tokenizer.apply_chat_template(messages, tools=row["tools"])["input_ids"]
        assert got["input_ids"] == expected and personal(got, tokenizer).strip() == "I live in Paris."
        assert "null" not in tokenizer.decode(got["input_ids"]) and "None" not in tokenizer.decode(got["input_ids"])


def test_a_call_is_what_a_prediction_is_compared_with(with_template, make_args):
    args, tokenizer = make_args(GenerationArguments, max_length=None), with_template("qwen3")
    for rows in (CALLS, [*_to_dataset(CALLS)]):
        prompts = make_prompts(rows, tokenizer, args)
        assert [prompt.reference for prompt in prompts] == [
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
            "Bought.",
            '<tool_call>\n{"name": "look", "arguments": {"city": 7}}\n</tool_call>',
        ]
    (prompt,) = make_prompts(
        [{**CALLS[0], "completion": [{**CALLS[0]["completion"][0], "content": ""}]}], tokenizer, args
    )
    assert prompt.reference == prompts[0].reference


# ── the date ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Clock(datetime):
    days = 0

    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(cls.days)


@pytest.mark.parametrize(
    "template, date",
    [("llama3_2", "%d %b %Y"), ("gptoss", "%Y-%m-%d"), ("muse_glimmer", "%Y-%m-%d")],
)
@pytest.mark.parametrize("kind", ["pair", "messages"])
def test_a_template_with_a_date(with_template, make_args, tmp_path, monkeypatch, template, date, kind):
    """What was tokenized yesterday is tokenized anew where it lies in the cache, and so is what a template of TRL's training renders."""
    for module in ("transformers.utils.chat_template_utils", "trl_perce.persona.turns"):
        monkeypatch.setattr(f"{module}.datetime", Clock)
    tokenizer = with_template(template)
    talk = [user("<persona>I sew my own dresses.</persona> What?"), assistant("A needle.")]
    row = {"prompt": talk[:1], "completion": talk[1:]} if kind == "pair" else {"messages": talk}
    Dataset.from_list([row]).save_to_disk(tmp_path / "rows")
    for days, max_length in ((0, None), (1, None), (2, 400)):
        monkeypatch.setattr(Clock, "days", days)
        preparation = Preparation(tokenizer, make_args(max_length=max_length))
        (got,) = preparation(load_from_disk(str(tmp_path / "rows")), "a").dataset
        assert Clock.now().strftime(date) in tokenizer.decode(got["input_ids"])
        assert personal(got, tokenizer).strip() == "I sew my own dresses."
        expected = tokenizer.apply_chat_template([user("I sew my own dresses. What?"), talk[1]])["input_ids"]
        assert got["input_ids"] == expected


# ── tokenizers without offsets ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind, hint", [(CanineTokenizer, ""), (MistralCommonBackend, ": `PreTrainedTokenizerFast")])
def test_a_tokenizer_without_offsets(make_args, kind, hint):
    """A slow one; Mistral's own, whose package is not here, and of which nothing but its class is looked at."""
    slow = kind() if kind is CanineTokenizer else object.__new__(kind)
    model, rows = make_tiny_model("llama"), Dataset.from_list([{"text": "<persona>I sew.</persona> Yes."}])
    message = rf"The tokenizer \({kind.__name__}\) gives no character offsets.*library\){hint}"
    with pytest.raises(ValueError, match=message):
        PerContrast(model, slow, use_cpu=True)
    with pytest.raises(ValueError, match=message):
        PerCETrainer(model, make_args(), train_dataset=rows, processing_class=slow)
    if kind is CanineTokenizer:  # where no persona is looked for, it does what it does in TRL
        rows = Dataset.from_list([{"text": "Yes."}])
        args = make_args(token_weighting="uniform", eos_token=None)
        trainer = PerCETrainer(model, args, train_dataset=rows, processing_class=slow)
        assert slow.decode(trainer.train_dataset[0]["input_ids"], skip_special_tokens=True).startswith("Yes.")


# ── content in parts ─────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = [
    "gptoss",
    "llama3_1",
    "llama3_2",
    "qwen2_5",
    "qwen3",
    "qwen3_instruct_2507",
    "nemotron_3_nano",
    "lfm2",
    "phi3",
]
PARTS = ["glm4moe", "qwen3_5_think", "qwen2_5_vl"]


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("template", TEXTS + PARTS)
def test_content_in_parts(with_template, prepare, make_args, template):
    """A template of texts gets them with a line break between, one of parts gets the parts."""
    tokenizer = with_template(template)
    one = [user(parts("Note: é🧵", "Me: <persona>I sew</persona>, <persona>I love linen</persona>", "What?"))]
    both = {"prompt": one, "completion": [assistant(parts("A needle."))]}
    talk = {"messages": [system(parts("Be brief.")), *both["prompt"], *both["completion"]]}
    as_text = template in TEXTS
    plain = [
        user(
            "Note: é🧵\nMe: I sew, I love linen\nWhat?"
            if as_text
            else parts("Note: é🧵", "Me: I sew, I love linen", "What?")
        ),
        assistant("A needle." if as_text else parts("A needle.")),
    ]
    for row, messages in ((both, plain), (talk, [system("Be brief." if as_text else parts("Be brief.")), *plain])):
        (got,) = prepare([row], tokenizer, trains=template in ("qwen3", "glm4moe"), chat_template_kwargs={"a": 1})
        template_of_row = choose_turns(row, tokenizer, None).chat_template
        expected = tokenizer.apply_chat_template(messages, chat_template=template_of_row)["input_ids"]
        assert got["input_ids"] == expected and "'type'" not in tokenizer.decode(expected)
        assert personal(got, tokenizer).split() == ["I", "sew", "I", "love", "linen"]
        assert "A needle." in trained(got, tokenizer)
    (prompt,) = make_prompts([both], tokenizer, make_args(GenerationArguments, max_length=None))
    expected = tokenizer.apply_chat_template(plain[:1], add_generation_prompt=True)["input_ids"]
    assert prompt.input_ids == expected and sum(prompt.persona_mask) == sum(got["persona_mask"])
    assert (prompt.persona, prompt.reference) == ("I sew\n\nI love linen", "A needle.")


def test_a_part_that_is_no_text(with_template, make_args):
    row = {"prompt": [user([*parts("<persona>I sew</persona>"), {"type": "audio", "path": "a.wav"}])]}
    row["completion"] = [assistant("x")]
    with pytest.raises(PersonaError, match="row 0: message 0 of 'prompt' has a part of the type 'audio'"):
        Preparation(with_template("qwen3"), make_args())(_to_dataset([row]), "a")


# ── a persona that is the whole system message ───────────────────────────────────────────────────────────────────────

CHATML_WITH_SYSTEM = (  # as SmolLM2's
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are an assistant.<|im_end|>\n' }}{% endif %}"
    + GENERATION
)
# What the template writes of a conversation without its system message is what it writes with it, less a stretch
SHORTER = ["gptoss", "lfm2", "phi3_5", "qwen3", "qwen3_6", "glm4moe", "gemma3", "llama3_1", "cohere2", GENERATION]
OTHERWISE = ["qwen2_5", CHATML_WITH_SYSTEM]  # have a system message of their own


def without_persona(row):
    return [token for token, own in zip(row["input_ids"], row["persona_mask"], strict=True) if not own]


def test_the_turn_leaves_with_its_persona(with_template, prepare):
    for template in SHORTER:
        tokenizer = with_template(template)
        tokenizer.bos_token = "<|endoftext|>"
        rest = [user("What?"), assistant("A needle."), user("And <persona>I love linen</persona>, then?")]
        rows = [
            {
                "prompt": [system("<persona>I sew my own dresses.</persona>\n"), *rest],
                "completion": [assistant("Cloth.")],
            },
            {
                "prompt": [system("Be brief. <persona>I sew.</persona>"), *rest[:1]],
                "completion": [assistant("Cloth.")],
            },
            {"prompt": rest, "completion": [assistant("Cloth.")]},
        ]
        whole, part, none = prepare(rows, tokenizer, trains=template is GENERATION, counterfactual="drop_turn")
        plain = [*rest[:2], user("And , then?"), assistant("Cloth.")]
        # The persona in the user's message is a token or two more or less around its blanks: as it is without the system message
        assert without_persona(whole) == without_persona(none)
        expected = tokenizer.apply_chat_template(plain)["input_ids"]
        assert tokenizer.decode(without_persona(whole)).replace(" ", "") == tokenizer.decode(expected).replace(" ", "")
        dropped, dropped_part, _ = prepare(rows, tokenizer, trains=False)
        assert dropped_part == part and len(without_persona(dropped)) > len(without_persona(whole)) - (
            template in ("llama3_1", "gemma3")
        )
        assert {**whole, "persona_mask": 0} == {**dropped, "persona_mask": 0}  # the factual pass is the same


@pytest.mark.parametrize("template", OTHERWISE)
def test_a_template_with_a_system_message_of_its_own(with_template, prepare, make_args, template):
    row = {"prompt": [system("<persona>I sew.</persona>"), user("What?")], "completion": [assistant("A needle.")]}
    with pytest.raises(
        PersonaError, match="row 0: `counterfactual='drop_turn'`: where the system message is left out.*'You are"
    ):
        prepare([row], with_template(template), counterfactual="drop_turn")
    args = make_args(counterfactual="drop_turn")
    with pytest.raises(PersonaError, match="train dataset, row 0"):  # before the model loads
        PerCETrainer("no/such-model", args, train_dataset=_to_dataset([row]), processing_class=with_template(template))


def test_trimming_takes_no_part_of_the_turn(with_template, prepare, make_args):
    tokenizer = with_template(GENERATION)
    row = {
        "prompt": [system("<persona>I sew my own dresses.</persona>"), user("What?")],
        "completion": [assistant("x")],
    }
    (whole,) = prepare([row], tokenizer, trains=False, counterfactual="drop_turn")
    persona = len(tokenizer("I sew my own dresses.")["input_ids"])
    for kept in (persona, 2, 0):
        args = make_args(counterfactual="drop_turn", max_length=len(whole["input_ids"]) - persona + kept)
        (got,) = Preparation(tokenizer, args)(Dataset.from_list([row]), "a").dataset
        text = tokenizer.decode(got["input_ids"])
        assert text.startswith("<|im_start|>system\nI" if kept else "<|im_start|>system\n<|im_end|>")
        # All of the turn leaves where some of the persona is left
        assert len(without_persona(got)) == (len(without_persona(whole)) if kept else len(got["input_ids"]))


def test_scores_without_the_turn(with_template, make_args):
    """Against the model's own passes over the conversation with and without its system message."""
    tokenizer, model = with_template(GENERATION), make_tiny_model("llama").eval()
    messages = [system("I sew my own dresses."), user("What?"), assistant("A needle.")]
    row = {"prompt": [system("<persona>I sew my own dresses.</persona>"), messages[1]], "completion": messages[2:]}
    log_probs = []
    for talk in (messages, messages[1:]):
        ids = torch.tensor([tokenizer.apply_chat_template(talk)["input_ids"]])
        begin = len(tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True)["input_ids"])
        with torch.no_grad():
            own = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[begin - 1 :, 0]
        log_probs.append(own)
    scores = PerContrast(model, tokenizer, use_cpu=True, counterfactual="drop_turn").score(row)
    assert scores.pir == pytest.approx((log_probs[0] - log_probs[1]).numpy(), abs=1e-4)
    empty = PerContrast(model, tokenizer, use_cpu=True).score(row)
    assert np.abs(empty.pir - scores.pir).max() > 1e-2
    args = make_args(counterfactual="drop_turn", max_length=None)
    trainer = PerCETrainer(model, args, train_dataset=Dataset.from_list([row]), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer._e_step(trainer.model, [batch])
    assert batch["counterfactual_log_probs"].double().numpy() == pytest.approx(log_probs[1].numpy(), abs=1e-4)


def test_guidance_does_not_go_with_it(make_args):
    with pytest.raises(ValueError, match="`guidance_scale` does not go with `counterfactual='drop_turn'`"):
        make_args(GenerationArguments, counterfactual="drop_turn", guidance_scale=2.0)


# ── thoughts ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_FINAL = "<|start|>assistant<|channel|>final<|message|>"
# What is trained of two turns, the second with a thought; what of the second's thought as a row by itself; and the answer alone
THOUGHTS = {
    "qwen3": (["<think>\nHm.\n</think>\n\n"], "<think>\nHm.\n</think>\n\n", ("", "<|im_end|>\n")),
    "qwen3_6": (["<think>\nHm.\n</think>\n\n"], "Hm.\n</think>\n\n", ("", "<|im_end|>\n")),
    "nemotron_3_nano": (["<think>\nHm.\n</think>\n"], "Hm.\n</think>\n", ("", "<|im_end|>\n")),
    "glm4moe": (["\n<think>Hm.</think>\n"], "\n<think>Hm.</think>\n", ("", "")),
    "gptoss": (
        ["<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"],
        "<|channel|>analysis<|message|>Hm.<|end|>",
        (_FINAL, "<|return|>"),
    ),
}


@pytest.mark.parametrize("template", THOUGHTS)
def test_thoughts(with_template, prepare, template):
    tokenizer = with_template(template)
    (in_talk,), by_itself, (head, tail) = THOUGHTS[template]
    asked = user("<persona>I sew.</persona> What?")
    talk = [asked, assistant("Cloth."), user("And?"), assistant("A needle.", reasoning_content="Hm.")]
    rows = [{"messages": talk}, {"messages": talk[:2]}]
    pairs = [{"prompt": talk[:3], "completion": talk[3:]}, {"prompt": talk[:1], "completion": talk[1:2]}]
    for only in (False, True):
        options = {"answer_only_loss": only, "trains": template == "qwen3"}
        long, short = (trained(row, tokenizer) for row in prepare(rows, tokenizer, **options))
        pair, plain = (trained(row, tokenizer) for row in prepare(pairs, tokenizer, **options))
        thought = "" if only else in_talk
        assert f"{thought}{head}A needle.{tail}" in long and long.count("Hm.") == (not only)
        assert pair.rstrip() == f"{'' if only else by_itself}{head}A needle.{tail}".rstrip()
        # A thought without a word, which the template adds, is never trained
        assert "think>" not in short + plain and short.count("Cloth.") == plain.count("Cloth.") == 1
        assert long.count("Cloth.") == 1 and long.count("think>") == thought.count("think>")


def test_an_empty_thought_of_ones_own(with_template, prepare):
    """What somebody wrote is trained; with `answer_only_loss` it is not."""
    tokenizer = with_template(GENERATION)
    row = {"messages": [user("<persona>I sew.</persona>"), assistant("<think>\n\n</think>\n\nCloth, not <think>.")]}
    for only, expected in ((False, "<think>\n\n</think>\n\nCloth, not <think>."), (True, "Cloth, not <think>.")):
        (got,) = prepare([row], tokenizer, answer_only_loss=only)
        assert trained(got, tokenizer) == f"{expected}<|im_end|>"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("A <think>", "A <think>"),
        ("<think>Hm.", "<think>Hm."),  # has no end
        ("<think>a</think> <think>b</think>\nA", "A"),
        ("<|channel>thought\nHm.<channel|>A", "A"),
        ("<｜Assistant｜><think>\nHm.\n</think>\n\nA", "A"),
        ("assistant<think>\n|Hm.\n</think>\n\nA </think>", "A </think>"),
        ("<|channel|>analysis<|message|>|Hm.<|end|><|start|>assistant", "<|start|>assistant"),
    ],
)
def test_where_a_thought_ends(text, answer):
    """`|` alone before `Hm.` is where the turn begins, behind what opens its thought."""
    start = max(text.find("|Hm."), 0)
    text = text.replace("|Hm.", "Hm.")
    assert text[thought_end(text, start) :] == answer
    assert thought_end(text, start, empty_only=True) == start


# ── a persona in the system message, ten turns ───────────────────────────────────────────────────────────────────────


def test_ten_turns(with_template, make_args):
    """Every reply is trained, with weights from the model's own passes over the conversation with and without the persona."""
    tokenizer, model = with_template(GENERATION), make_tiny_model("llama").eval()
    rounds = [
        message
        for index in range(10)
        for message in (user(f"Question {index}, what?"), assistant(f"A needle, number {index}."))
    ]
    row = {"persona": "I sew my own dresses.", "messages": [system("Be brief.\n{persona}\nThat is all."), *rounds]}
    found = []
    for persona in ("I sew my own dresses.", ""):
        talk = [system(f"Be brief.\n{persona}\nThat is all."), *rounds]
        encoded = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        ids, own = torch.tensor([encoded["input_ids"]]), torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append((ids[0], own, log_probs[own[1:]]))
    (ids, own, with_persona), (without, _, without_it) = found
    args = make_args(max_length=2048)
    trainer = PerCETrainer(model, args, train_dataset=_to_dataset([row]), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    (labels,) = batch["labels"]
    assert (labels != -100).tolist() == own.tolist() and tokenizer.decode(labels[own]).count("A needle") == 10
    trainer._e_step(trainer.model, [batch])
    assert batch["counterfactual_log_probs"].double() == pytest.approx(without_it, abs=1e-4)
    weights = (with_persona - without_it).clamp(0.8, 5.0)
    loss = trainer.compute_loss(model.eval(), batch, num_items_in_batch=own.sum())
    assert float(loss) == pytest.approx(float(-(weights * with_persona).sum() / own.sum()), abs=1e-4)
    scores = PerContrast(model, tokenizer, use_cpu=True).score(row)
    assert scores.pir == pytest.approx((with_persona - without_it).numpy(), abs=1e-4)
    assert scores.num_counterfactual_tokens == len(without) and scores.num_tokens == len(ids)
