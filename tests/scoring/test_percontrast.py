import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import trl_perce.trainer
from conftest import CHATML, GENERATION, TINY_CONFIGS, make_tiny_model
from reference import (
    BF16,
    FLOAT32,
    make_rows,
    put_4bit_weights,
    reference,
    response_log_probs,
    root_mean_square,
)
from trl_perce import PerCEConfig, PerCETrainer, PerContrast, PerContrastConfig, PersonaError, TokenScores
from trl_perce.benchmarks.persona_qa import load_rows
from trl_perce.config import describe_precision
from trl_perce.evaluation.arguments import GenerationArguments
from trl_perce.persona.marks import describe, mark_persona
from trl_perce.persona.masks import swap_persona, text_and_offsets
from trl_perce.scoring.loading import find_adapter, load_model
from trl_perce.scoring.percontrast import NONFINITE
from trl_perce.scoring.preparation import TOO_LONG, UNTRAINED, Preparation
from trl_perce.utils.share import Share


OPTIONS = {"use_cpu": True, "bf16": False}
CONVERSATION = {
    "persona": "I sew my own dresses.",
    "prompt": [{"role": "user", "content": "About me: {persona}\nWhat should I buy?"}],
    "completion": [{"role": "assistant", "content": "A new set of needles 🧵."}],
}


@pytest.fixture(scope="module")
def scorer(tiny_model):
    return PerContrast(tiny_model, **OPTIONS)


@pytest.fixture(scope="module")
def double_scorer(tokenizer):
    """In float64, for what is compared over batches of other shapes, which CPUs round each in their own way."""
    return PerContrast(make_tiny_model("llama").double(), tokenizer, **OPTIONS)


# ── the numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("counterfactual", ["drop", "mask"])
@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_scores_are_those_of_the_formula(tokenizer, kind, counterfactual):
    rows = make_rows(seed=41, count=9)
    model = make_tiny_model(kind).double()
    expected = reference(model, rows, counterfactual=counterfactual)
    scorer = PerContrast(model, tokenizer, counterfactual=counterfactual, score_batch_tokens=60, **OPTIONS)
    scores = scorer.score([row.tokenized() for row in rows])
    assert [one.row for one in scores] == [*range(9)]
    pir = iter(expected.pir)
    for row, one, weights in zip(rows, scores, expected.weights, strict=True):
        log_probs, _ = response_log_probs(model.eval(), row.before + row.persona + row.after, row.response)
        assert one.log_probs == pytest.approx(log_probs.detach().numpy(), abs=FLOAT32)
        assert one.weights == pytest.approx(weights, abs=FLOAT32)
        assert one.num_tokens == len(row.tokenized()["input_ids"]) and one.num_persona_tokens == len(row.persona)
        if row.persona:
            own = next(pir)
            assert one.pir == pytest.approx(own, abs=FLOAT32)
            assert one.is_personal.tolist() == [value > 1 for value in own]
            assert one.num_counterfactual_tokens == one.num_tokens - (counterfactual == "drop") * len(row.persona)
        else:
            assert np.isnan(one.pir).all() and not one.is_personal.any() and (one.weights == 1).all()
            assert np.isnan(one.counterfactual_log_probs).all() and one.num_counterfactual_tokens == 0
    assert next(pir, None) is None


def test_swap_puts_the_next_other_persona_in_its_place(tokenizer):
    rows = make_rows(seed=42, count=8, with_persona=0.7)
    rows[3].persona = rows[2].persona = rows[1].persona = [7, 8, 9]  # three rows of one user
    with_persona = [index for index, row in enumerate(rows) if row.persona]
    model = make_tiny_model("llama").double().eval()
    scores = PerContrast(model, tokenizer, counterfactual="swap", **OPTIONS).score([row.tokenized() for row in rows])
    for position, index in enumerate(with_persona):
        row = rows[index]
        others = [rows[i].persona for i in with_persona[position + 1 :] + with_persona[:position]]
        other = next(persona for persona in others if persona != row.persona)
        expected, _ = response_log_probs(model, row.before + other + row.after, row.response)
        assert scores[index].counterfactual_log_probs == pytest.approx(expected.detach().numpy(), abs=FLOAT32), index
        assert scores[index].num_counterfactual_tokens == len(row.before + other + row.after + row.response)
    assert all(np.isnan(scores[i].pir).all() for i in range(8) if i not in with_persona)


def test_swap_needs_a_second_persona(scorer, tokenizer):
    swap = PerContrast(scorer.model, tokenizer, counterfactual="swap", **OPTIONS)
    with pytest.raises(ValueError, match="finds no other persona for row 0"):
        swap.score([CONVERSATION, {**CONVERSATION, "completion": [{"role": "assistant", "content": "Linen."}]}])


@pytest.mark.parametrize("counterfactual, bf16", [("drop", True), ("mask", False)])
def test_the_same_numbers_as_the_trainer(make_args, smollm2, monkeypatch, counterfactual, bf16):
    """Real model, real rows, through both ways from text to PIR; bf16 in autocast rounds by batch."""
    rows = load_rows(("test",))[:4]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    recorded, original = [], trl_perce.trainer.personal_influence_ratio
    monkeypatch.setattr(
        trl_perce.trainer, "personal_influence_ratio", lambda *args: recorded.append(original(*args)) or recorded[-1]
    )
    args = make_args(counterfactual=counterfactual, bf16=bf16, per_device_eval_batch_size=1)
    dataset = Dataset.from_list(rows)
    trainer = PerCETrainer(model, args, train_dataset=dataset, eval_dataset=dataset)
    logs = trainer.evaluate()
    scores = PerContrast(model, counterfactual=counterfactual, score_batch_tokens=1, use_cpu=True, bf16=bf16).score(
        rows
    )
    assert len(recorded) == 4
    for one, pir in zip(scores, recorded, strict=True):
        assert one.pir == pytest.approx(pir.numpy(), abs=1e-6)
    tokens = sum(len(one.pir) for one in scores)
    assert logs["eval_weight/mean"] == pytest.approx(sum(one.weights.sum() for one in scores) / tokens, rel=1e-5)
    assert logs["eval_pir/personal_fraction"] == pytest.approx(sum(one.is_personal.sum() for one in scores) / tokens)
    tokens = [sum(getattr(one, name) for one in scores) for name in ("num_counterfactual_tokens", "num_tokens")]
    assert logs["eval_counterfactual/token_ratio"] == pytest.approx(tokens[0] / tokens[1])


def test_a_model_runs_in_its_own_dtype_unless_autocast_is_asked_for(tokenizer):
    model = make_tiny_model("llama")
    own, plain, autocast = (
        PerContrast(model, tokenizer, use_cpu=True, **kwargs).score(CONVERSATION).log_probs
        for kwargs in ({}, {"bf16": False}, {"bf16": True})
    )
    assert own.tolist() == plain.tolist() != autocast.tolist()
    args = GenerationArguments(use_cpu=True)
    assert (args.bf16, args.fp16) == (False, False) and describe_precision(args, model.dtype) == "float32"
    args = PerContrastConfig(use_cpu=True, bf16=True)
    assert describe_precision(args, "auto") == "the model's own dtype, under bfloat16 autocast"


def test_scores_do_not_depend_on_the_batch(double_scorer, tokenizer):
    rows = [row.tokenized() for row in make_rows(seed=43, count=12)]
    together = double_scorer.score(rows)
    for budget in (1, 50):
        args = PerContrastConfig(score_batch_tokens=budget, **OPTIONS)
        for one, other in zip(together, PerContrast(double_scorer.model, tokenizer, args).score(rows), strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=FLOAT32)
            assert one.pir == pytest.approx(other.pir, abs=FLOAT32, nan_ok=True)


def test_clip_bounds_and_threshold(scorer, tokenizer):
    rows = [row.tokenized() for row in make_rows(seed=44, count=5, with_persona=1)]
    plain = scorer.score(rows)
    own = PerContrast(
        scorer.model, tokenizer, weight_clip_min=0.1, weight_clip_max=0.4, personal_threshold=0.2, **OPTIONS
    ).score(rows)
    for one, other in zip(plain, own, strict=True):
        assert other.weights == pytest.approx(np.clip(one.pir, 0.1, 0.4), abs=1e-6)
        assert other.is_personal.tolist() == (other.pir > 0.2).tolist() and other.threshold == 0.2


# ── the texts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_conversation(scorer):
    scores = scorer.score(CONVERSATION)
    assert isinstance(scores, TokenScores)
    assert scores.persona == "I sew my own dresses." and scores.query == "About me: …\nWhat should I buy?"
    assert scores.response == "A new set of needles 🧵.<|im_end|>\n"
    for token, (start, end) in zip(scores.tokens, scores.offsets, strict=True):
        assert token == scores.response[start:end]
    assert [token for token, special in zip(scores.tokens, scores.is_special, strict=True) if special] == [
        "<|im_end|>"
    ]
    assert [word.text for word in scores.words] == ["A", "new", "set", "of", "needles"]
    needles = scores.words[-1]
    inside = [start < needles.end and end > needles.start for start, end in scores.offsets]
    assert needles.pir == pytest.approx(float(scores.pir[inside].astype(np.float64).sum()), abs=1e-6)
    assert needles.is_personal == (needles.pir > 1)


@pytest.mark.parametrize(
    "row, options, response, query",
    [
        (
            {"prompt": "Me: <persona>I sew.</persona> Buy? ", "completion": "Linen."},
            {},
            "Linen.<|im_end|>",
            "Me: … Buy?",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "<persona>I sew.</persona>Buy?"},
                    {"role": "assistant", "content": "Linen."},
                    {"role": "user", "content": "And then?"},
                    {"role": "assistant", "content": "Needles."},
                ]
            },
            {},
            "Linen.<|im_end|>\nNeedles.<|im_end|>\n",
            "And then?",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "<persona>I sew.</persona>Buy?"},
                    {"role": "assistant", "content": "Linen."},
                    {"role": "user", "content": "And then?"},
                    {"role": "assistant", "content": "Needles."},
                ]
            },
            {"assistant_only_loss": False},
            "user\nI sew.Buy?<|im_end|>\n<|im_start|>assistant\nLinen.<|im_end|>\n<|im_start|>user\nAnd then?"
            "<|im_end|>\n<|im_start|>assistant\nNeedles.<|im_end|>\n",
            "And then?",
        ),
        (
            {"text": "I am <persona>a tailor</persona> and love linen."},
            {},
            " am a tailor and love linen.<|im_end|>",
            "",
        ),
    ],
    ids=["prompt-completion", "messages", "messages, all", "text"],
)
def test_other_formats(scorer, tokenizer, row, options, response, query):
    scores = PerContrast(scorer.model, tokenizer, **options, **OPTIONS).score(row)
    assert scores.response == response and scores.query == query  # nothing predicts the first token of all
    assert len(scores.pir) == len(scores.tokens) and scores.persona in ("I sew.", "a tailor")


def test_tokens_of_the_persona_itself_have_no_pir(scorer):
    scores = scorer.score({"text": "I am <persona>a tailor</persona> and love linen."})
    start = scores.response.index("a tailor")
    inside = np.array([begin < start + 8 and end > start for begin, end in scores.offsets])
    assert inside.any() and np.isnan(scores.pir[inside]).all() and not np.isnan(scores.pir[~inside]).any()
    assert (scores.weights[inside] == 1).all()


@pytest.mark.parametrize("options", [{}, {"assistant_only_loss": True}], ids=["by default", "asked for"])
def test_what_assistants_say_is_scored(scorer, tokenizer, tmp_path, options):
    row = {
        "messages": [
            {"role": "user", "content": "<persona>I sew.</persona>\nWhat to buy?"},
            {"role": "assistant", "content": "Buy linen."},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": "Needles."},
        ]
    }
    (tmp_path / "template.jinja").write_text(GENERATION)
    options = {**options, "chat_template_path": str(tmp_path / "template.jinja")}
    scores = PerContrast(scorer.model, tokenizer, **options, **OPTIONS).score(row)
    assert scores.response == "Buy linen.<|im_end|>Needles.<|im_end|>" and scores.query == "And then?"
    assert [word.text for word in scores.words] == ["Buy", "linen", "Needles"]
    assert tokenizer.chat_template == CHATML  # not changed


def test_json_and_back(scorer):
    for scores in (scorer.score(CONVERSATION), TokenScores.left_out(3, "why")):
        line = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
        back = TokenScores.from_dict(line)
        assert back.pir == pytest.approx(scores.pir, abs=1e-5, nan_ok=True) and back.pir.dtype == np.float32
        for name in ("row", "persona", "query", "response", "tokens", "offsets", "num_tokens", "skipped", "threshold"):
            assert getattr(back, name) == getattr(scores, name)
        assert back.is_personal.tolist() == scores.is_personal.tolist() and len(line["words"]) == len(back.words)


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_many_rows_one_by_one_and_as_a_stream(double_scorer):
    scorer = double_scorer
    rows = load_rows(("test",))[:5]
    listed = scorer.score(rows)
    for other in (
        scorer.score(Dataset.from_list(rows)),
        scorer.score(IterableDataset.from_generator(lambda: iter(rows))),
    ):
        other = [*other]
        assert [one.response for one in other] == [one.response for one in listed]
        assert [one.pir.tolist() for one in other] == [one.pir.tolist() for one in listed]
    alone = scorer.score(rows[3])
    assert alone.row == 0 and alone.pir == pytest.approx(listed[3].pir, abs=FLOAT32)


def test_rows_need_not_have_the_same_columns(scorer):
    plain = {**CONVERSATION, "prompt": [{"role": "user", "content": "What should I buy?"}]}
    plain.pop("persona")
    without, with_persona = scorer.score([plain, CONVERSATION])
    assert np.isnan(without.pir).all() and not np.isnan(with_persona.pir).any()


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_the_trainer_leaves_out_say_why(scorer, tokenizer, streaming):
    rows = make_rows(seed=45, count=6, with_persona=1)
    tokenized = [row.tokenized() for row in rows]
    tokenized[1]["labels"] = [-100] * len(tokenized[1]["labels"])
    for index in (2, 5):  # too long even without its persona
        size = len(tokenized[index]["input_ids"])
        tokenized[index] = {
            "input_ids": [5] * 40 + tokenized[index]["input_ids"],
            "labels": [-100] * 40 + tokenized[index]["labels"],
            "persona_mask": [0] * 40 + tokenized[index]["persona_mask"],
        }
        assert size < 40
    dataset = Dataset.from_list(tokenized)
    short = PerContrast(scorer.model, tokenizer, max_length=40, **OPTIONS)
    scores = [*short.score(dataset.to_iterable_dataset() if streaming else dataset)]
    assert [one.row for one in scores] == [*range(6)]
    assert [one.skipped is None for one in scores] == [True, False, False, True, True, False]
    reasons = [scores[1].skipped, scores[2].skipped, scores[5].skipped]
    if streaming:
        assert all(TOO_LONG in reason and UNTRAINED in reason for reason in reasons)
    else:
        assert reasons == [UNTRAINED, TOO_LONG, TOO_LONG]
    assert scores[2].tokens == [] and len(scores[2].pir) == 0


def test_a_row_without_a_trained_token_is_skipped_without_max_length_too(scorer, tokenizer):
    row = make_rows(seed=46, count=1)[0].tokenized()
    row["labels"] = [row["input_ids"][0]] + [-100] * (len(row["labels"]) - 1)  # nothing predicts the first token
    assert PerContrast(scorer.model, tokenizer, max_length=None, **OPTIONS).score(row).skipped == UNTRAINED


def test_a_long_persona_is_trimmed_as_in_training(scorer, tokenizer):
    row = {**CONVERSATION, "persona": "I sew my own dresses and love linen. " * 30}
    scores = PerContrast(scorer.model, tokenizer, max_length=100, **OPTIONS).score(row)
    assert scores.num_tokens == 100 and 0 < scores.num_persona_tokens < 100 and scores.persona == row["persona"]


def test_rows_that_are_done_are_passed_over(double_scorer):
    scorer = double_scorer
    preparation = Preparation(scorer.tokenizer, scorer.args)
    prepared = preparation(Dataset.from_list([row.tokenized() for row in make_rows(seed=47, count=6)]), "scored")
    everything = {one.row: one for one in scorer.iterate(prepared)}
    rest = {one.row: one for one in scorer.iterate(prepared, done={0, 3, 4})}
    assert sorted(everything) == [*range(6)] and sorted(rest) == [1, 2, 5]
    for row, one in rest.items():  # to the bit: a batch of which any row is missing is scored as a whole
        assert np.array_equal(one.pir, everything[row].pir, equal_nan=True)


def test_processes_share_the_batches_of_one(scorer):
    small = PerContrast(scorer.model, scorer.tokenizer, score_batch_tokens=70, **OPTIONS)
    rows = [row.tokenized() for row in make_rows(seed=48, count=9)]
    rows.append({**rows[0], "labels": [-100] * len(rows[0]["labels"])})  # left out
    prepared = small.prepare(rows)
    whole = {one.row: one for one in small.iterate(prepared)}
    shares = [[*small.iterate(prepared, {2, 5}, Share(index, 3))] for index in range(3)]
    assert all(shares) and sorted(one.row for own in shares for one in own) == [0, 1, 3, 4, 6, 7, 8, 9]
    for one in (one for own in shares for one in own):
        assert one.skipped == whole[one.row].skipped and (one.row == 9) == (one.skipped is not None)
        assert np.array_equal(one.pir, whole[one.row].pir, equal_nan=True)


@pytest.mark.parametrize(
    "rows, error, message",
    [
        ([], ValueError, "scored dataset is empty"),
        (
            [CONVERSATION, {**CONVERSATION, "prompt": [{"role": "user", "content": "Hi"}]}],
            PersonaError,
            r"scored dataset, row 1: .*no '\{persona\}' in the prompt",
        ),
        ([{"prompt": "a", "completion": "b", "image": None}], ValueError, "holds images"),
    ],
    ids=["none", "persona", "images"],
)
def test_bad_rows(scorer, rows, error, message):
    with pytest.raises(error, match=message):
        scorer.score(rows)


def test_bad_configuration(tiny_model, scorer):
    for options, message in (
        ({"counterfactual": "erase"}, "'drop', 'drop_turn', 'mask', 'swap'"),
        ({"score_batch_tokens": 0}, "positive number of tokens"),
        ({"personal_threshold": float("nan")}, "finite number of nats"),
    ):
        with pytest.raises(ValueError, match=message):
            PerContrast(tiny_model, **OPTIONS, **options)
    with pytest.raises(TypeError, match="not both"):
        PerContrast(scorer.model, scorer.tokenizer, scorer.args, bf16=False)
    with pytest.raises(TypeError, match="must be a `PerContrastConfig`, got a `PerCEConfig`"):
        PerContrast(scorer.model, scorer.tokenizer, PerCEConfig(use_cpu=True, bf16=False))


def test_defaults_work_without_a_gpu(tiny_model):
    scorer = PerContrast(tiny_model)
    assert scorer.args.use_cpu and not scorer.args.bf16 and len(scorer.score(CONVERSATION).pir) > 5


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(tokenizer, training):
    model = make_tiny_model("qwen3").train(training)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    model.model.register_forward_hook(lambda module, *_: seen.append(module.training))
    PerContrast(model, tokenizer, **OPTIONS).score(CONVERSATION)
    assert len(seen) > 2 and not any(seen)
    assert [module.training for module in model.modules()] == modes and "forward" not in model.__dict__
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adapters_are_on_and_load_by_their_folder(tmp_path, tiny_model, tokenizer, scorer):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(0)
    model = get_peft_model(
        base, LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    model.peft_config["default"].base_model_name_or_path = tiny_model
    model.save_pretrained(tmp_path / "adapter")
    scores = PerContrast(model.double(), tokenizer, **OPTIONS).score(CONVERSATION)
    merged = copy.deepcopy(model).merge_and_unload()
    expected = PerContrast(merged, tokenizer, **OPTIONS).score(CONVERSATION)
    assert scores.pir == pytest.approx(expected.pir, abs=FLOAT32)
    assert np.abs(scores.pir - scorer.score(CONVERSATION).pir).max() > 1e-2

    by_name = PerContrast(str(tmp_path / "adapter"), **OPTIONS)
    by_name.model.double()
    assert by_name.score(CONVERSATION).pir == pytest.approx(scores.pir, abs=FLOAT32)
    assert find_adapter(tiny_model) == (tiny_model, None)
    assert find_adapter(tiny_model, str(tmp_path / "adapter")) == (tiny_model, str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="are adapters"):
        find_adapter(str(tmp_path / "adapter"), str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="no 'adapter_config.json'"):
        find_adapter(tiny_model, tiny_model)


def test_a_4bit_model_can_be_trained_after_it_was_scored(smollm2):
    args = PerContrastConfig(use_cpu=True, model_init_kwargs={"dtype": torch.bfloat16})
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = load_model(smollm2, None, args, quantization)
    rows = load_rows(("test",))[:3]
    scores = PerContrast(model, args=args).score(rows)
    exact = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    put_4bit_weights(exact, model)
    exact = PerContrast(exact, **OPTIONS).score(rows)
    log_probs, expected = (np.concatenate([one.log_probs for one in each]) for each in (scores, exact))
    assert root_mean_square(log_probs - expected) < BF16

    model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    ids = torch.arange(10, 30)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad.abs().sum() for name, p in model.named_parameters() if "lora_A" in name]
    assert gradients and all(gradient > 0 for gradient in gradients)


# ── properties ───────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.text(), st.data())
def test_offsets_cover_the_text_whatever_the_cuts(text, data):
    encoded = text.encode(errors="surrogatepass").decode(errors="replace").encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)))))
    pieces = [encoded[start:end] for start, end in zip([0, *cuts], [*cuts, len(encoded)], strict=True)]
    found, offsets = text_and_offsets(pieces)
    assert found == encoded.decode() and len(offsets) == len(pieces)
    for piece, (start, end) in zip(pieces, offsets, strict=True):
        assert piece in found[start:end].encode() and (end > start) == bool(piece)
        assert len(found[start:end].encode()) <= len(piece) + 6  # no more than the characters that it has a part of


@given(st.lists(st.binary(max_size=4)))
def test_offsets_of_bytes_that_are_no_text(pieces):
    text, offsets = text_and_offsets(pieces)
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    text.encode()  # can be written to a file
    assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)


@given(
    st.lists(st.tuples(st.integers(10, 99), st.booleans()), min_size=1).filter(lambda row: any(m for _, m in row)),
    st.lists(st.lists(st.integers(100, 199), min_size=1), min_size=1),
)
def test_swapped_rows_keep_everything_but_the_persona(row, others):
    ids, mask = [token for token, _ in row], [int(is_persona) for _, is_persona in row]
    new_ids, labels = swap_persona(ids, ids, mask, others)
    assert [token for token in new_ids if token < 100] == [token for token, m in zip(ids, mask, strict=True) if not m]
    assert [token for token in new_ids if token >= 100] == [token for stretch in others for token in stretch]
    assert labels == [-100 if token >= 100 else token for token in new_ids]
    # Each stretch is where one of the row's own was
    first = mask.index(1)
    assert new_ids[:first] == ids[:first] and new_ids[first] == others[0][0]


def test_what_is_shown_of_a_row():
    row, spans = mark_persona(
        {
            "prompt": [
                {"role": "system", "content": "You know: <persona>I sew.</persona>"},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "<persona>I run.</persona> Buy? <persona>I sing.</persona>!"},
            ],
            "completion": [{"role": "assistant", "content": "Shoes."}],
        }
    )
    assert describe(row, spans) == ("I sew.\n\nI run.\n\nI sing.", "… Buy? …!")


def test_values_that_are_not_finite(tokenizer, caplog):
    model = make_tiny_model("llama")
    rows = [row.tokenized() for row in make_rows(seed=3, count=5, vocab=399, with_persona=1.0)]
    good = PerContrast(model, tokenizer, use_cpu=True, bf16=False).score(rows)
    with torch.no_grad():
        model.get_input_embeddings().weight[399] = torch.nan
    rows[3]["input_ids"][rows[3]["persona_mask"].index(1)] = 399  # only with its persona
    with pytest.raises(FloatingPointError, match="^Row 3: the model's log-probabilities are NaN or infinite"):
        PerContrast(model, tokenizer, use_cpu=True, bf16=False).score(rows)
    found = PerContrast(model, tokenizer, use_cpu=True, bf16=False, on_nonfinite="skip").score(rows)
    assert found[3].skipped == NONFINITE and "Row 3 is left out" in caplog.text
    for index in (0, 1, 2, 4):
        np.testing.assert_allclose(found[index].pir, good[index].pir, atol=1e-5)
