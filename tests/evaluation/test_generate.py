import copy
import gc
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaForCausalLM

from conftest import ROOT, TINY_CONFIGS, make_tiny_model
from trl_perce import PersonaError
from trl_perce.evaluation.generate import GenerationArguments, TransformersGenerator, VLLMGenerator, row_seed
from trl_perce.evaluation.predictions import make_prompts, other_rows, stop_tokens, to_prediction
from trl_perce.scoring.preparation import Preparation
from trl_perce.utils.row_file import RowFile


def make_row(index, words=1, **columns):
    return {
        "persona": f"I sew dress number {index}. " + "I love linen. " * words,
        "prompt": [{"role": "user", "content": "About me: {persona}\nWhat should I buy?"}],
        "completion": [{"role": "assistant", "content": f"A new set of {index} needles."}],
        **columns,
    }


ROWS = [make_row(index, words=index % 4, id=f"r{index}", user=f"u{index}") for index in range(7)]


@pytest.fixture
def arguments(make_args):
    def make(**kwargs):
        return make_args(GenerationArguments, **{"max_new_tokens": 12, "temperature": 0, "max_length": None, **kwargs})

    return make


@pytest.fixture
def quick_collections():
    """Continuous batching collects garbage each time that it stops, which takes long in a process as full as this one."""
    gc.freeze()
    yield
    gc.unfreeze()


def texts(generator, rows=ROWS, **kwargs):
    return {line["row"]: line["prediction"] for line in generator.generate(rows, **kwargs)}


def greedy_by_hand(model, ids, stop, steps=12, negative=None, scale=1.0):
    """One token after the other, whole sequence anew each time: no cache, no padding, no batch."""
    made = []
    for _ in range(steps):
        scores = model(torch.tensor([ids + made])).logits[0, -1].log_softmax(-1)
        if negative is not None:
            without = model(torch.tensor([negative + made])).logits[0, -1].log_softmax(-1)
            scores = without + scale * (scores - without)
        made.append(int(scores.argmax()))
        if made[-1] in stop:
            break
    return made


def test_the_head_gets_tensors_of_their_own(tiny_model, tokenizer, arguments):
    """PyTorch 2.13 multiplies a slice with frozen weights in as many copies of them as there are rows."""
    generator = TransformersGenerator(tiny_model, tokenizer, arguments())
    head = generator.model.requires_grad_(False).get_output_embeddings()
    plain = texts(generator)
    got = []
    with head.register_forward_hook(lambda module, inputs, output: got.append(inputs[0])):
        assert texts(generator) == plain
    assert got[0].shape[:2] == (len(ROWS), 1) and all(states.is_contiguous() for states in got)
    assert not head._forward_pre_hooks


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["chat", "plain", "messages"])
def test_prompts_are_those_of_the_training(smollm2_tokenizer, arguments, kind):
    rows = ROWS
    if kind == "messages":
        reply = [{"role": "assistant", "content": "What do you sew?"}, {"role": "user", "content": "Dresses."}]
        rows = [{"persona": row["persona"], "messages": row["prompt"] + reply + row["completion"]} for row in ROWS]
    if kind == "plain":
        rows = [
            {"persona": row["persona"], "prompt": row["prompt"][0]["content"] + "\n", "completion": "Needles."}
            for row in ROWS
        ]
    args = arguments()
    prepared = Preparation(smollm2_tokenizer, args)(Dataset.from_list(rows), "test").dataset
    for prompt, row in zip(make_prompts(rows, smollm2_tokenizer, args), prepared, strict=True):
        starts = [i for i in range(1, len(row["labels"])) if row["labels"][i - 1] == -100 != row["labels"][i]]
        assert prompt.earlier_replies == len(starts) - 1 == (kind == "messages")
        length, query_of = starts[-1], "About me: …\nWhat should I buy?\n"
        assert prompt.input_ids == row["input_ids"][:length] and sum(prompt.persona_mask) > 5
        assert prompt.persona_mask == row["persona_mask"][:length]
        assert prompt.conversation == (query_of + "What do you sew?\nDresses." if kind == "messages" else prompt.query)
        assert prompt.query == row["_query"] and prompt.persona == row["_persona"]


def test_markers_ids_and_references(tokenizer, arguments):
    content = [{"type": "text", "text": "Needles."}]
    row = {"prompt": "<persona>I sew.</persona> What?", "completion": "Needles.", "id": 7}
    rows = [row, make_row(1, user=3, completion=[{"role": "assistant", "content": content}])]
    first, second = make_prompts(rows, tokenizer, arguments())
    assert (first.row, first.id, first.user, first.persona, first.query) == (0, "7", None, "I sew.", "… What?")
    assert tokenizer.decode(first.input_ids) == "I sew. What?"
    assert tokenizer.decode(first.counterfactual_ids) == " What?"
    assert (second.user, second.reference) == ("3", "Needles.")


def test_long_personas_are_trimmed_and_counted(tokenizer, arguments, caplog):
    whole = make_prompts(ROWS, tokenizer, arguments())
    lengths = [len(prompt.input_ids) for prompt in whole]
    room = sorted(lengths)[3]
    prompts = make_prompts(ROWS, tokenizer, arguments(max_length=room + 12))
    assert [prompt.trimmed for prompt in prompts] == [max(length - room, 0) for length in lengths]
    assert all(prompt.counterfactual_ids == own.counterfactual_ids for prompt, own in zip(prompts, whole, strict=True))
    tokens = sum(max(length - room, 0) for length in lengths)
    assert (
        f"Trimmed the persona of {sum(length > room for length in lengths)} of 7 prompts, by {tokens} tokens"
        in caplog.text
    )

    query = make_row(7)
    query["prompt"] = [{"role": "user", "content": "{persona} " + "What should I buy? " * 40}]
    prompts = make_prompts([*ROWS, query], tokenizer, arguments(max_length=room + 12))
    assert [prompt.row for prompt in prompts] == [*range(7)] and "Left out 1 of 8 prompts" in caplog.text
    untrimmed = make_prompts(ROWS, tokenizer, arguments(max_length=room + 12, truncate_persona=False))
    assert [prompt.row for prompt in untrimmed] == [row for row in range(7) if lengths[row] <= room]
    with pytest.raises(ValueError, match="No prompt is short enough"):
        make_prompts([query], tokenizer, arguments(max_length=20))


def test_swapped_personas_are_another_users(tokenizer, arguments):
    rows = [
        make_row(0, user="a"),
        make_row(1, user="a"),
        make_row(2, user="b"),
        {**make_row(3, user="c"), "persona": ""},
    ]
    own, swapped = (make_prompts(rows, tokenizer, arguments(), swap_persona=swap) for swap in (False, True))
    assert swapped[0].persona == swapped[1].persona == rows[2]["persona"]
    assert swapped[2].persona in (rows[0]["persona"], rows[1]["persona"]) and swapped[3] == own[3]
    for before, after in zip(own[:3], swapped[:3], strict=True):
        assert after.counterfactual_ids == before.counterfactual_ids and after.row == before.row
        expected = tokenizer.decode(before.input_ids).replace(before.persona, after.persona)
        assert tokenizer.decode(after.input_ids) == expected
    with pytest.raises(PersonaError, match="rows of several users"):
        make_prompts(rows[:2], tokenizer, arguments(), swap_persona=True)
    assert other_rows([None, None], ["a", "b"]) == [1, 0]


@pytest.mark.parametrize(
    "row, message",
    [
        ({**make_row(0), "prompt": "What?"}, "row 1: .*there is a column 'persona'"),
        (make_row(0, completion=[{"role": "assistant", "content": "A"}] * 3), "row 1: 'completion' has 3 messages"),
    ],
)
def test_bad_rows(tokenizer, arguments, row, message):
    with pytest.raises(ValueError, match=message):
        make_prompts([make_row(1), row], tokenizer, arguments())


# ── generation ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "gpt2"])
def test_batched_greedy_is_that_of_each_row_alone(kind, tokenizer, arguments):
    model = make_tiny_model(kind).eval()
    generator = TransformersGenerator(model, tokenizer, arguments())
    assert len(generator._batches(make_prompts(ROWS, tokenizer, generator.args))) == 1
    predictions = {line["row"]: line for line in generator.generate(ROWS)}
    for prompt in make_prompts(ROWS, tokenizer, generator.args):
        expected = greedy_by_hand(model, prompt.input_ids, {2})
        line = predictions[prompt.row]
        assert line["finished"] == (expected[-1] == 2) and line["num_tokens"] == len(expected) - line["finished"]
        assert line["prediction"] == tokenizer.decode(expected, skip_special_tokens=True).strip()
        own = ("persona", "query", "reference", "id", "user")
        assert all(line[key] == getattr(prompt, key) for key in own)


@pytest.mark.parametrize("temperature", [0, 0.4])
def test_logits_that_are_not_finite_stop_it(tokenizer, arguments, temperature):
    model, rows = make_tiny_model("llama"), [dict(row) for row in ROWS]
    rows[5]["persona"] += " Zq"
    (*_, token) = tokenizer(" Zq", add_special_tokens=False)["input_ids"]
    assert not any(token in tokenizer(row["persona"])["input_ids"] for row in ROWS)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    generator = TransformersGenerator(model, tokenizer, arguments(temperature=temperature))
    with pytest.raises(FloatingPointError, match="^Row 5: the model's logits are NaN or infinite"):
        texts(generator, rows)


class Faulty(LlamaForCausalLM):
    """What goes wrong in some of Transformers' models when they generate, and not in a forward pass of one row."""

    fault = ""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        is_padded = attention_mask is not None and (attention_mask.dim() > 2 or not attention_mask.all())
        if is_padded and self.fault == "crash":
            raise AttributeError("no such attribute")
        if is_padded and self.fault == "padding":  # takes it for a part of the text
            attention_mask = None
            kwargs["position_ids"] = kwargs["position_ids"] if "cu_seq_lens_q" in kwargs else None
        goes_on = self.fault == "cache" and input_ids.size(1) == 1  # a prompt has more tokens
        output = super().forward(input_ids, attention_mask=attention_mask, **kwargs)
        if goes_on:
            output.logits = output.logits.roll(1, -1)
        return output

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if self.fault == "everywhere":
            inputs["input_ids"] = inputs["input_ids"] // 2
        return inputs


@pytest.mark.parametrize(
    ("fault", "messages"),
    [
        ("", []),
        ("padding", ["In a padded batch Faulty generates with other log-probabilities than alone, off by "]),
        ("crash", ["In a padded batch Faulty generates with other log-probabilities than alone. Rows are"]),
        ("cache", ["With its cache Faulty generates with other log-probabilities than without, off by "]),
        ("everywhere", ["Faulty generates with other log-probabilities than those of its forward pass, off by "]),
    ],
)
def test_what_a_model_gets_wrong_when_it_generates_is_left_out(tokenizer, arguments, caplog, fault, messages):
    torch.manual_seed(0)
    model = Faulty(TINY_CONFIGS["llama"]).eval()
    model.fault = fault
    generator = TransformersGenerator(model, tokenizer, arguments())
    found = texts(generator)
    assert [
        record.getMessage()[: len(message)] for record, message in zip(caplog.records, messages, strict=True)
    ] == messages
    prompts = make_prompts(ROWS, tokenizer, arguments())
    with torch.no_grad():
        made = {prompt.row: greedy_by_hand(model, prompt.input_ids, generator.stop) for prompt in prompts}
    expected = {row: tokenizer.decode(tokens, skip_special_tokens=True).strip() for row, tokens in made.items()}
    assert (found == expected) == (fault != "everywhere")
    assert generator.args.max_new_tokens == 12 and generator._logits is None


def test_a_batch_that_is_wrong_is_not_made_continuously_either(tokenizer, arguments, caplog, quick_collections):
    torch.manual_seed(0)
    model = Faulty(TINY_CONFIGS["llama"]).eval()
    expected = texts(TransformersGenerator(model, tokenizer, arguments()))
    model.fault = "padding"
    assert texts(TransformersGenerator(model, tokenizer, arguments(continuous_batching=True))) == expected
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("Continuous batching gives Faulty other") and second.startswith("In a padded batch")


def test_a_row_that_leaves_takes_its_position_with_it(tokenizer, arguments):
    model = make_tiny_model("llama")
    assert TransformersGenerator(model, tokenizer, arguments())._has_plain_cache
    model.model.rope_deltas = None
    assert not TransformersGenerator(model, tokenizer, arguments())._has_plain_cache


def test_cudnn_does_not_generate(tokenizer, arguments):
    model, seen = make_tiny_model("llama"), []
    hook = lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled())  # noqa: E731
    with model.register_forward_hook(hook):
        texts(TransformersGenerator(model, tokenizer, arguments()))
    assert {*seen} == {False} and torch.backends.cuda.cudnn_sdp_enabled()


def test_small_batches_give_the_same(tokenizer, arguments):
    model = make_tiny_model("llama").eval()
    for kwargs in ({}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.8}):
        whole = TransformersGenerator(model, tokenizer, arguments(**kwargs))
        small = TransformersGenerator(model, tokenizer, arguments(**kwargs, generation_batch_tokens=1))
        assert texts(whole) == texts(small)
        # A row's sample does not depend on which other rows there are
        assert texts(whole, done={0, 1, 2}) == {row: text for row, text in texts(whole).items() if row > 2}


def test_samples_follow_the_distribution(tokenizer, arguments):
    model = make_tiny_model("llama").eval()
    rows = [make_row(0)] * 2000
    args = arguments(temperature=0.7, max_new_tokens=1, generation_batch_tokens=10**6)
    generator = TransformersGenerator(model, tokenizer, args)
    prompts = make_prompts(rows, tokenizer, args)
    drawn = np.array([tokens[0] for tokens in generator._generate(prompts)])
    with torch.no_grad():
        expected = (model(torch.tensor([prompts[0].input_ids])).logits[0, -1] / 0.7).softmax(-1).numpy()
    likely = expected.argsort()[-5:]
    share = np.array([(drawn == token).mean() for token in likely])
    assert np.abs(share - expected[likely]).max() < 4 * np.sqrt(expected[likely].max() / 2000) and len({*drawn}) > 5
    again = [tokens[0] for tokens in generator._generate(prompts[5:9])]
    assert again == drawn[5:9].tolist()
    generator.args.seed += 1
    assert [tokens[0] for tokens in generator._generate(prompts[:50])] != drawn[:50].tolist()
    assert row_seed(1, 2) != row_seed(2, 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("scale", [2.5, 0.0])
def test_guidance_is_that_of_the_logits(kind, scale, tokenizer, arguments):
    model = make_tiny_model(kind).eval()
    # Queries of several lengths, so that negative prompts are padded too; one row has no persona
    rows = [*ROWS, {**make_row(9), "persona": ""}]
    for row in range(4):
        prompt = [{"role": "user", "content": "About me: {persona}" + "\nWhat should I buy?" * (row + 1)}]
        rows[row] = {**rows[row], "prompt": prompt}
    generator = TransformersGenerator(model, tokenizer, arguments(guidance_scale=scale))
    prompts = make_prompts(rows, tokenizer, generator.args)
    assert len(generator._batches(prompts)) == (8 if kind == "gpt2" else 1)
    predictions, plain = texts(generator, rows), texts(TransformersGenerator(model, tokenizer, arguments()), rows)
    for prompt in prompts:
        made = greedy_by_hand(model, prompt.input_ids, {2}, negative=prompt.counterfactual_ids, scale=scale)
        assert predictions[prompt.row] == tokenizer.decode(made, skip_special_tokens=True).strip()
    assert predictions[7] == plain[7] and predictions != plain
    only_persona = {"persona": "I sew.", "prompt": "{persona}", "completion": "A"}
    with pytest.raises(PersonaError, match="row 0: `guidance_scale` needs"):
        texts(generator, [only_persona])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_continuous_batching_makes_the_same(kind, tokenizer, arguments, quick_collections):
    model = make_tiny_model(kind).eval()
    attention = model.config._attn_implementation
    padded, continuous = (
        TransformersGenerator(model, tokenizer, arguments(temperature=0.7, top_p=0.8, continuous_batching=on))
        for on in (None, True)
    )
    expected = texts(padded)
    assert not padded.is_continuous  # on CPU it is slower
    assert texts(continuous) == expected
    # A cache with room for about one row at a time, and fewer rows
    narrow = arguments(temperature=0.7, top_p=0.8, continuous_batching=True, generation_batch_tokens=1)
    assert max(len(prompt.input_ids) for prompt in make_prompts(ROWS, tokenizer, narrow)) + 12 < 256
    made = texts(TransformersGenerator(model, tokenizer, narrow), done={0, 1, 2, 3})
    assert made == {row: text for row, text in expected.items() if row > 3}
    greedy = texts(TransformersGenerator(model, tokenizer, arguments(continuous_batching=True)), ROWS[:3])
    assert greedy == texts(TransformersGenerator(model, tokenizer, arguments()), ROWS[:3])
    assert model.config._attn_implementation == attention and not model._forward_hooks


def test_continuous_batching_with_adapters_autocast_and_nan(tokenizer, arguments, quick_collections):
    base = make_tiny_model("llama").to(torch.bfloat16)
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    padded, continuous = (
        TransformersGenerator(model, tokenizer, arguments(bf16=True, temperature=0.7, continuous_batching=on))
        for on in (False, True)
    )
    expected, made = texts(padded), texts(continuous)
    assert model.training and sum(made[row] == expected[row] for row in made) >= 6  # one may be tipped by rounding
    with model.disable_adapter():
        assert texts(continuous) != made

    (*_, token) = tokenizer(" Zq", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    rows = [dict(row) for row in ROWS]
    rows[5]["persona"] += " Zq"
    with pytest.raises(FloatingPointError, match="^Row 5: the model's logits are NaN or infinite"):
        texts(continuous, rows)


@pytest.mark.parametrize(
    "kwargs, peft_config, message",
    [
        ({"guidance_scale": 2.0}, None, "does not go with `guidance_scale`"),
        ({"bf16": True}, None, "keeps its cache in the model's dtype, torch.float32"),
        ({}, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "and no prompt tuning"),
    ],
)
def test_what_continuous_batching_does_not_go_with(tokenizer, arguments, caplog, kwargs, peft_config, message):
    model = make_tiny_model("llama")
    model = model if peft_config is None else get_peft_model(model, peft_config)
    generator = TransformersGenerator(model, tokenizer, arguments(**kwargs, continuous_batching=True))
    assert message in caplog.text and not generator.is_continuous and len(texts(generator)) == 7


def test_rows_that_are_finished_leave_the_batch(tokenizer, arguments):
    model = make_tiny_model("llama").eval()
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    generator = TransformersGenerator(model, tokenizer, arguments(temperature=1.0, max_new_tokens=40))
    prompts = make_prompts(ROWS, tokenizer, generator.args)
    # With every eighth token as an end, rows are finished at different steps
    generator.stop = frozenset(range(0, tokenizer.vocab_size, 8))
    made = generator._generate(prompts)
    lengths = [
        next((place for place, token in enumerate(tokens, 1) if token in generator.stop), 40) for tokens in made
    ]
    assert len({*lengths}) > 3
    # A step runs on the rows that are not finished before it
    assert sizes == [sum(length > step for length in lengths) for step in range(max(lengths))]
    sizes.clear()
    alone = [generator._generate([prompt])[0] for prompt in prompts]
    for row, (together, own) in enumerate(zip(made, alone, strict=True)):
        assert together[: lengths[row]] == own[: lengths[row]]


def test_adapters_and_the_model_as_it_was(tiny_model, tokenizer, arguments, tmp_path):
    base = make_tiny_model("llama")
    model = get_peft_model(
        base, LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    saved["base_model_name_or_path"] = tiny_model
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(saved))
    model.train()
    config = model.generation_config.to_dict()
    tuned = texts(TransformersGenerator(model, tokenizer, arguments()))
    assert model.training and model.generation_config.to_dict() == config
    merged = model.merge_and_unload().eval()
    prompts = make_prompts(ROWS, tokenizer, arguments())
    for prompt in prompts:
        made = greedy_by_hand(merged, prompt.input_ids, {2})
        assert tuned[prompt.row] == tokenizer.decode(made, skip_special_tokens=True).strip()
    loaded = TransformersGenerator(str(tmp_path / "adapter"), tokenizer, arguments())
    assert texts(loaded) == tuned != texts(TransformersGenerator(tiny_model, args=arguments()))


def test_what_ends_an_answer(tokenizer):
    class Config:
        eos_token_id = [5, 2]

    assert stop_tokens(tokenizer, Config) == {2, 5}
    other = json.loads(json.dumps(tokenizer.chat_template)).replace("<|im_end|>", "<|endoftext|>")
    changed = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", chat_template=other
    )
    changed.add_special_tokens({"pad_token": "<|endoftext|>"})
    assert stop_tokens(changed) == {0, 2}


def test_a_thought_is_not_part_of_the_prediction(tokenizer, arguments):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>", "<|end|>"]})
    (prompt,) = make_prompts([make_row(0)], tokenizer, arguments())
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    (opened,) = make_prompts([make_row(0)], tokenizer, arguments())
    harmony = "<|channel|>analysis<|message|>I sew.<|end|>assistant<|channel|>final<|message|>Buy linen."
    for asked, text, expected, has_thought in (
        (prompt, "<think>\nI sew?\n</think>\n\nBuy linen.", "Buy linen.", True),
        (prompt, "<think>I sew", "", True),
        (prompt, "<think>\n\n</think>\n\nBuy.", "Buy.", False),
        (prompt, "Buy <think>x</think> linen. ", "Buy <think>x</think> linen.", False),
        (prompt, "Buy linen.<|end|>", "Buy linen.", False),
        (prompt, harmony, "Buy linen.", True),
        (opened, "I sew?\n</think>\n\nBuy linen.<|end|>", "Buy linen.", True),
        (opened, "I sew", "", True),
    ):
        tokens = tokenizer(text)["input_ids"]
        line = to_prediction(asked, [*tokens, 2, 7, 7], frozenset({2}), tokenizer)
        assert line["prediction"] == expected and line["finished"] and line["num_tokens"] == len(tokens)
        assert line.get("raw") == (text if has_thought else None)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"temperature": -1}, "`temperature` is -1"),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"top_p": 0}, "`top_p` is 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"guidance_scale": float("inf")}, "`guidance_scale` is inf"),
        ({"max_length": 12}, "leaves no room for a prompt"),
    ],
)
def test_bad_arguments(arguments, kwargs, message):
    with pytest.raises(ValueError, match=message):
        arguments(**kwargs)


def test_vllm_says_what_is_missing(tiny_model, arguments):
    with pytest.raises(ValueError, match="vLLM has no `guidance_scale`"):
        VLLMGenerator(tiny_model, args=arguments(guidance_scale=2.0))
    with pytest.raises(ImportError, match="pip install vllm"):
        VLLMGenerator(tiny_model, args=arguments())


# ── killed runs ──────────────────────────────────────────────────────────────────────────────────────────────────────


def generate_to(folder, model):
    """150 rows, four or fewer at a time."""
    config = {"use_cpu": True, "bf16": False, "temperature": 0, "max_new_tokens": 12, "max_length": None}
    generator = TransformersGenerator(str(model), generation_batch_tokens=400, **config)
    file = RowFile(folder, "predictions.jsonl", {})
    rows = [make_row(index, words=index % 4) for index in range(150)]
    file.append_lines(generator.generate(rows, done=frozenset(file.done)))
    file.finish()
    return file.path.read_bytes()


def test_a_killed_run_ends_as_if_it_had_not_been(tiny_model, tmp_path):
    part = tmp_path / "killed" / "predictions.jsonl.part"
    code = "import sys; sys.path.append('..'); from test_generate import generate_to; generate_to(*sys.argv[1:])"
    killed = subprocess.Popen(
        [sys.executable, "-c", code, str(part.parent), tiny_model], cwd=ROOT / "tests" / "evaluation"
    )
    while not part.is_file() or part.read_bytes().count(b"\n") < 12:
        assert killed.poll() is None
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    lines = part.read_bytes().splitlines(keepends=True)
    assert 12 <= len(lines) < 150 and not part.with_suffix("").exists()
    lines = [line for line in lines if line.endswith(b"\n")][:-1]  # as if it had been killed within a batch, too
    part.write_bytes(b"".join(lines) + '{"row": 149, "prediction": "n\u00e4'.encode()[:-1])

    resumed, whole = (generate_to(tmp_path / name, tiny_model) for name in ("killed", "whole"))
    assert resumed == whole and not part.exists()
    assert [json.loads(line)["row"] for line in whole.splitlines()] == [*range(150)]
