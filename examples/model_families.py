# SPDX-License-Identifier: Apache-2.0

"""
Which model families PerCE is right on: a tiny random model of every causal and image-text class of the installed Transformers.

    python examples/model_families.py
    python examples/model_families.py --only qwen3 gemma3

Each class is built from its configuration, shrunk (each type of layer once, a sliding window shorter than the persona), and asked for the
PIR of five rows on every path: PerContrast alone, padded and with `mask`; the trainer padded, with `mask`, padding-free and packed. The
truth is two plain forward passes of single rows, and the formula in float64 on their logits for the loss of one step. Then it goes on with
five prompts, as `trl-perce evaluate` has it do; each token is to be the likeliest of a plain forward pass. A wrapper around vision or audio
is used with text alone.

Each class runs in a process of its own, with a time limit. Results are kept in --output_dir, so that a run goes on where it stopped;
`--fresh` measures again. At the end it writes models.md (--table). The 275 classes of Transformers 5.24
took 19 minutes on one of two busy cores.
"""

import argparse
import dataclasses
import datetime
import functools
import inspect
import json
import logging.handlers
import multiprocessing
import os
import platform
import re
import resource
import sys
import tempfile
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import trl_perce.utils.noise  # noqa: F401  (before PEFT, which has bitsandbytes say what nobody can do anything about)


# isort: split
import datasets
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from trl_perce import PerCEConfig, PerCETrainer, PerContrast
from trl_perce.evaluation.arguments import GenerationArguments
from trl_perce.evaluation.generate import TransformersGenerator
from trl_perce.evaluation.predictions import Prompt, length_of_text
from trl_perce.utils.files import write_json, write_text
from trl_perce.utils.markdown import code, escape, table


VOCAB, WINDOW = 512, 24  # as long as the rows of the library's own check, and shorter than a persona
TOLERANCE = 1e-3  # nats; float32 leaves some 1e-5
LOSS_TOLERANCE = 1e-4  # of the loss
MOST_PARAMETERS = 40_000_000
PACKAGES = ("transformers", "trl", "peft", "torch")
BOUNDS = (0.8, 5.0)  # of the weights

# Fields of configurations: the first pattern that is found in a name gives its value; `None` leaves it
SIZES: list[tuple[str, int | None]] = [
    (r"_token_id$|_token_index$|_start_id$|_end_id$|_newline_id$|_patch_id$|^(pad|bos|eos|sep|cls|mask|unk)_", None),
    (r"type_vocab|task_type|codebook|prompt_(length|types)|segment_types|additional_vocab", None),
    (r"vocab(_size|$)|_vocab_", VOCAB),
    (r"max_position|n_positions|n_ctx|max_seq|context_length|max_(source|target)_pos", 256),
    (r"key_value_heads|kv_heads|kv_n_heads", 2),
    (r"topk_group|n_group$|n_groups$|ngroups$|o_groups", 1),
    (r"n_(routed_)?shared_experts|num_shared_experts", 1),
    # All tokens of a row: scores of an untrained indexer are often equal, and which of them it takes depends on the length
    (r"index_topk$", 64),
    (r"experts_per_tok|top_?k|moe_k$|cross_attn_k", 2),
    (r"(routed|local|num)_experts$|n_routed_experts|zero_expert_num", 4),
    (r"qk_nope_head_dim|qk_rope_head_dim|rotary_dim", 8),
    (r"head_dim|dim_head|^d_head|d_kv|kv_channels|head_size|d_head$", 16),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"heads?$", 4),
    (r"linear_num_(key|value)_heads", 4),
    (r"layers$|n_layer$|^depth$|resampler_depth|num_layers_per_stack", 2),
    (r"rank$", 8),
    (r"sliding_window(_size)?$|attention_chunk_size|^window_size|attention_window_size", WINDOW),
    (r"local_attention$", 2 * WINDOW),  # both sides
    (r"intermediate|ffn|_ff$|^dff$|d_inner|mlp_dim|feed_forward|share_expert_dim", 96),
    (r"d_state|state_size", 16),
    (r"image_size|resolution|crop_size", 32),
    (
        r"hidden_size|d_model|n_embd|emb_dim|embd|embed|_dim$|width|channels?$|hidden_dim|projection|_ssm$|num_patches",
        64,
    ),
]
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
HALF_MROPE = {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
# What the patterns do not get right, by the type of the model, with dots into sub-configurations
SPECIAL: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": VOCAB - 1}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        **{"text_config.num_experts_per_tok": 2, "text_config.n_group": 1, "text_config.topk_group": 1},
    },
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": None,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note": {"text_config.num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "glm5_next": {"text_config.num_key_value_heads": 4},
    "glm46v": {"text_config.rope_parameters": HALF_MROPE},
    "glm4v": {"text_config.rope_parameters": HALF_MROPE},
    "glm4v_moe": {"text_config.rope_parameters": HALF_MROPE},
    "glm_ocr": {"text_config.rope_parameters": MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config.head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "hy_v4_vl": {"text_config.qk_rope_head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "molmo2": {"adapter_config.vision_feature_layer": [-1, -2]},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl": {"text_config.rope_parameters": MROPE},
    "qwen2_5_omni_thinker": {"text_config.rope_parameters": MROPE, "vision_start_token_id": 500},
    "qwen2_5_vl": {"text_config.rope_parameters": MROPE},
    "qwen2_vl": {"text_config.rope_parameters": MROPE},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 500},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "step3p7": {"text_config.sliding_window": WINDOW},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4},
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="types or classes, as Transformers calls them")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/model_families"), help="results of each class"
    )
    parser.add_argument("--table", type=Path, default=Path("examples/models.md"), help="what to write at the end")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in --output_dir")
    parser.add_argument("--build_only", action="store_true", help="only say which classes cannot be built")
    parser.add_argument("--timeout", type=float, default=180, help="seconds a class may take")
    args = parser.parse_args(arguments)

    torch.set_num_threads(1)
    families = find_families()
    chosen = [name for name, types in families.items() if not args.only or {name, *types} & {*args.only}]
    if not chosen:
        parser.error(f"--only: Transformers {transformers.__version__} has none of {', '.join(args.only)}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    bar = tqdm(chosen, disable=not sys.stderr.isatty(), unit="class")
    for name in bar:
        bar.set_postfix_str(name[:30])
        kept = args.output_dir / f"{name}.json"
        if kept.exists() and not args.fresh and not args.build_only:
            if json.loads(kept.read_text())["versions"] == versions():
                continue
        found = in_a_process(name, families[name], args)
        if args.build_only:
            if "not_built" in found:
                print(f"{families[name][0]}: {found['not_built']}", flush=True)
            continue
        write_json(kept, {"class": name, "types": families[name], "versions": versions(), **found})
    if not args.build_only:
        results = [json.loads(path.read_text()) for path in sorted(args.output_dir.glob("*.json"))]
        results = [result for result in results if result["class"] in (chosen if args.only else families)]
        text = report(results)
        if args.only:
            print(text)
        else:
            write_text(args.table, text)
            print(f"{len(results)} classes: {args.table}")
    return 0


def versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def find_families() -> dict[str, list[str]]:
    """Name of each class → the types of models that are loaded with it."""
    families: dict[str, list[str]] = {}
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for model_type, name in mapping.items():
            types = families.setdefault(name, [])
            if model_type not in types:
                types.append(model_type)
    return families


def in_a_process(name: str, types: list[str], args) -> dict[str, Any]:
    """What is found of a class, in a process that may hang or die."""
    context = multiprocessing.get_context("fork")  # Torch and Transformers are imported once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_examine, args=(sender, name, types, args.build_only))
    process.start()
    sender.close()
    found: dict[str, Any] = {"not_built": f"nothing within {args.timeout:g} s"}
    try:
        end = datetime.datetime.now() + datetime.timedelta(seconds=args.timeout)
        while receiver.poll(max((end - datetime.datetime.now()).total_seconds(), 0)):
            found = receiver.recv()  # as much as is known: the last one holds all
    except EOFError:
        process.join()
        if process.exitcode:
            found = {**found, "died": f"exit code {process.exitcode}"}
    else:
        found = {**found, "died": f"stopped after {args.timeout:g} s"}
    process.kill()
    process.join()
    return found


def _examine(sender, name: str, types: list[str], build_only: bool) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, 24 * 2**30))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        model = build(name, types[0])
    except Exception as error:
        sender.send({"not_built": _short(error)})
        return
    found: dict[str, Any] = {"paths": {}}
    sender.send(found)
    if build_only:
        return
    try:
        check(model, found, lambda: sender.send(found))
    except Exception as error:
        found["no_plain_pass"] = _short(error)
    sender.send(found)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


# Models


def build(name: str, model_type: str):
    """A tiny random model of a class, in float32."""
    cls = getattr(transformers, name)
    config_class = cls.config_class or CONFIG_MAPPING[model_type]  # a type may be that of the wrapper around the class
    config = shrink(config_class, SPECIAL.get(config_class.model_type, {}))
    with torch.device("meta"):
        sizes = {key: value.numel() for key, value in cls(config).named_parameters()}
    if sum(sizes.values()) > MOST_PARAMETERS:
        largest = max(sizes, key=sizes.get)
        raise ValueError(f"{sum(sizes.values()):,} parameters; the largest is {largest}")
    torch.manual_seed(0)
    model = cls(config).float()
    for key, weight in model.named_parameters():
        spread(key, weight)
    return model.eval()


@torch.no_grad()
def spread(name: str, weight: torch.Tensor) -> None:
    """Draw a weight such that layers do matter: usual initial values of a tiny model leave its logits next to equal."""
    if not weight.is_floating_point() or re.search(r"A_log|dt_|decay|time_|\.D$", name):
        return
    if weight.dim() >= 2:
        fan_in = 1 if "embed" in name or "wte" in name else weight[0].numel() if weight.dim() != 3 else weight.size(-1)
        weight.normal_(0, 1.5 / fan_in**0.5)
    elif not weight.any():  # biases, gates, sinks
        weight.normal_(0, 0.2)


def shrink(cls: type[PreTrainedConfig], special: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of a class with the sizes of `SIZES`, and the sizes of its parts."""
    default = cls()
    default.allow_global_per_layer_attribute_access = True
    kwargs: dict[str, Any] = {}
    names = {field.name for field in dataclasses.fields(default)} - {"transformers_version"}
    values = {}
    for name in names:
        try:
            values[name] = getattr(default, name)
        except AttributeError:
            continue
    layers = next(
        (values[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(values.get(n), int)), 0
    )
    per_layer = {
        name: value
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and layers > 2 and len(value) == layers and name not in special
    }
    # The first layer of each kind
    kinds = {
        tuple(map(str, kind)): index for index, kind in reversed([*enumerate(zip(*per_layer.values(), strict=True))])
    }
    picked = sorted(kinds.values())
    picked = picked if len(picked) > 1 else [0, 1]
    for name, value in values.items():
        size = next((size for pattern, size in SIZES if re.search(pattern, name)), None)
        if name in cls.sub_configs:
            continue
        if name in per_layer:
            kwargs[name] = [value[index] for index in picked]
            if size is not None and isinstance(value[0], int) and not isinstance(value[0], bool):
                kwargs[name] = [size] * len(picked)
        elif isinstance(value, int) and not isinstance(value, bool):
            if re.search(r"(num_hidden_layers|^n_layer|^num_layers)$", name):
                kwargs[name] = len(picked)
            elif re.search(r"^(pad|bos|eos|sep|cls|mask|unk|decoder_start)_(token_id|index)$", name):
                kwargs[name] = 0
            elif re.search(r"_(token_id|token_index|id)$", name) and value > 100:
                kwargs[name] = (
                    VOCAB
                    - 1
                    - len([key for key in kwargs if kwargs[key].__class__ is int and kwargs[key] > VOCAB - 60])
                )
            elif "kv_lora_rank" in names and re.search("key_value_heads|kv_heads", name):
                kwargs[name] = 4  # as many as there are heads
            elif size is not None and (value > size or size == WINDOW):
                kwargs[name] = size
        elif isinstance(value, dict) and "mrope_section" in str(value):
            kwargs[name] = json.loads(json.dumps(value), object_hook=_small_mrope)
        elif isinstance(value, float) and re.search("drop|jitter", name) and "jitter" not in name:
            kwargs[name] = 0.0
    for name in cls.sub_configs:
        own = {key.removeprefix(f"{name}."): value for key, value in special.items() if key.startswith(f"{name}.")}
        part = getattr(default, name, None)
        if part is not None and name not in special:
            kwargs[name] = shrink(type(part), own)
    kwargs |= {key: value for key, value in special.items() if "." not in key}
    if "is_decoder" in names:
        kwargs["is_decoder"] = True
    if "tie_word_embeddings" in names and default.tie_word_embeddings is None:
        kwargs.pop("tie_word_embeddings", None)
    return cls(**kwargs)


def _small_mrope(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "mrope_section": [2, 3, 3]} if "mrope_section" in value else value


# Rows and the truth


def make_rows() -> list[dict[str, list[int]]]:
    """Five ragged rows, one of them without a persona. Each token of a response is in no other place, so that it names its score."""
    generator = torch.Generator().manual_seed(1)

    def tokens(size):
        return torch.randint(4, 200, (size,), generator=generator).tolist()

    rows, first = [], 200
    for before, persona, after, response in ((3, 30, 4, 5), (6, 37, 2, 7), (4, 0, 9, 4), (2, 28, 5, 6), (5, 33, 3, 3)):
        prompt = tokens(before + persona + after)
        own = list(range(first, first + response))
        first += response
        rows.append(
            {
                "input_ids": prompt + own,
                "labels": [-100] * len(prompt) + own,
                "persona_mask": [0] * before + [1] * persona + [0] * (after + response),
            }
        )
    return rows


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(
        models.BPE({token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<u>", *alphabet])}, [])
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="<pad>")


@torch.no_grad()
def log_softmax_of(model, ids: list[int], **kwargs) -> torch.Tensor:
    """Log-probabilities in nats after each token of one row, of shape `(tokens, vocabulary)`."""
    if {"use_cache", "kwargs"} & {*inspect.signature(type(model).forward).parameters}:
        kwargs["use_cache"] = False
    return model(input_ids=torch.tensor([ids]), **kwargs).logits[0].double().log_softmax(-1)


def plain(model, ids: list[int], labels: list[int], **kwargs) -> dict[int, float]:
    """Label → its log-probability in nats, from the logits of one row."""
    log_softmax = log_softmax_of(model, ids, **kwargs)
    return {label: float(log_softmax[i - 1, label]) for i, label in enumerate(labels) if label != -100}


def without_persona(row) -> tuple[list[int], list[int], list[int]]:
    """Tokens, labels and old positions of what is not the persona."""
    kept = [index for index, masked in enumerate(row["persona_mask"]) if not masked]
    return [row["input_ids"][i] for i in kept], [row["labels"][i] for i in kept], kept


@torch.no_grad()
def beside_another(model, ids: list[int], labels: list[int], positions: list[int]) -> dict[int, float]:
    """[`plain`] in a padded batch: alone, a row with gaps in its positions is taken for a packed one by some models."""
    size, other = len(ids), 5
    logits = model(
        input_ids=torch.tensor([ids, [*ids[:other], *[0] * (size - other)]]),
        attention_mask=torch.tensor([[1] * size, [1] * other + [0] * (size - other)]),
        position_ids=torch.tensor([positions, [*range(size)]]),
        use_cache=False,
    ).logits[0]
    log_softmax = torch.log_softmax(logits.double(), -1)
    return {label: float(log_softmax[i - 1, label]) for i, label in enumerate(labels) if label != -100}


def masked_passes(model, row):
    """What hiding the persona in place may rightly mean, as several computations without the library."""
    ids, labels, kept = without_persona(row)
    yield lambda: plain(model, ids, labels, position_ids=torch.tensor([kept]))
    yield lambda: beside_another(model, ids, labels, kept)
    yield lambda: plain(model, ids, labels)  # positions are none, or counted without what is hidden
    size = len(row["input_ids"])
    seen = torch.ones(size, size, dtype=torch.bool).tril() & (torch.tensor(row["persona_mask"]) == 0)[None]
    seen |= torch.eye(size, dtype=torch.bool)
    distance = torch.arange(size)[:, None] - torch.arange(size)[None]
    masks = {
        "full_attention": seen,
        "indexed_attention": seen,  # of which an indexer takes its share
        "sliding_attention": seen & (distance < WINDOW),
        "chunked_attention": seen & (torch.arange(size)[:, None] // WINDOW == torch.arange(size)[None] // WINDOW),
    }
    biases = {
        kind: torch.zeros(1, 1, size, size).masked_fill(~mask, torch.finfo(torch.float32).min)
        for kind, mask in masks.items()
    }
    for mask in (biases["full_attention"], biases["sliding_attention"], biases):
        yield lambda mask=mask: plain(
            model, row["input_ids"], row["labels"], attention_mask=mask, position_ids=torch.arange(size)[None]
        )


class Truth:
    """PIR and loss by plain forward passes."""

    def __init__(self, model, rows):
        self.log_probs: dict[int, float] = {}
        self.dropped: dict[int, float] = {}
        self.masked: list[list[dict[int, float]]] = []  # of each row: what is right
        for row in rows:
            self.log_probs |= plain(model, row["input_ids"], row["labels"])
            if not any(row["persona_mask"]):
                continue
            ids, labels, _ = without_persona(row)
            self.dropped |= plain(model, ids, labels)
            right = []
            for one in masked_passes(model, row):
                try:
                    right.append(one())
                except Exception:  # this one the model does not offer
                    continue
            self.masked.append(right)

    def error(self, pir: dict[int, float], counterfactual: str) -> float:
        """Largest error in nats."""
        if counterfactual == "drop":
            if pir.keys() != self.dropped.keys():
                return float("inf")
            return max(abs(pir[key] - (self.log_probs[key] - self.dropped[key])) for key in pir)
        return max(
            min(max(abs(pir[key] - (self.log_probs[key] - one[key])) for key in one) for one in right)
            for right in self.masked
        )

    @functools.cached_property
    def loss(self) -> float:
        def weight(key):
            if key not in self.dropped:
                return 1.0
            return min(max(self.log_probs[key] - self.dropped[key], BOUNDS[0]), BOUNDS[1])

        return -sum(weight(key) * value for key, value in self.log_probs.items()) / len(self.log_probs)


# Paths


class Recorder(PerCETrainer):
    """Notes PIR by label, and the loss of the step."""

    def __init__(self, *args, **kwargs):
        self.seen: dict[int, float] = {}
        self.loss = 0.0
        self.without_gradient: list[str] = []
        super().__init__(*args, **kwargs)

    def _note(self, inputs, scored, log_probs, weights, pir, paired, *rest):
        labels = inputs["labels"][:, -scored.size(1) :][scored][paired]
        self.seen.update(zip(labels.tolist(), pir.tolist(), strict=True))
        super()._note(inputs, scored, log_probs, weights, pir, paired, *rest)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.loss += float(loss)
        self.without_gradient = [
            name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None
        ]
        return loss


class Maker(TransformersGenerator):
    """Notes the tokens of each row."""

    def _generate(self, prompts):
        tokens = super()._generate(prompts)
        self.made = vars(self).get("made", {}) | dict(zip((prompt.row for prompt in prompts), tokens, strict=True))
        return tokens


def train(model, rows, tokenizer, peft_config=None, **options) -> Recorder:
    """One step on all rows that leaves the model as it was."""
    with tempfile.TemporaryDirectory() as folder:
        args = PerCEConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
            router_aux_loss_coef=0.0,  # the formula has none
            train_sampling_strategy="sequential",
            learning_rate=0.0,
            max_steps=1,
            **{"per_device_train_batch_size": len(rows), "max_length": None, **options},
        )
        trainer = Recorder(
            model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=peft_config
        )
        trainer.train()
        return trainer


def check(model, found: dict[str, Any], tell) -> None:
    """Note in `found` what comes of each path."""
    rows, tokenizer = make_rows(), make_tokenizer()
    truth = Truth(model, rows)
    forward = model.forward

    def attempt(name: str, run) -> None:
        try:
            found["paths"][name] = run()
        except Exception as error:
            # Ours or TRL's own word on what cannot go together, or an error that came from inside of the model
            last = traceback.extract_tb(error.__traceback__)[-1].filename
            said = isinstance(error, (ValueError, ImportError)) and re.search(r"/(trl|trl_perce)/", last) is not None
            found["paths"][name] = {"refused" if said else "crash": _short(error)}
        finally:
            if "forward" in vars(model):
                del model.forward
        assert model.forward == forward
        tell()

    def score(counterfactual: str, together: bool):
        # One batch of all rows, or one for each
        contrast = PerContrast(
            model,
            tokenizer,
            counterfactual=counterfactual,
            bf16=False,
            disable_tqdm=True,
            score_batch_tokens=10_000 if together else 1,
        )
        pir = {}
        for row, scores in zip(rows, contrast.score(rows), strict=True):
            if any(row["persona_mask"]):
                labels = [label for label in row["labels"] if label != -100]
                pir |= dict(zip(labels, scores.pir.tolist(), strict=True))
        return {"nats": truth.error(pir, counterfactual)}

    def step(counterfactual="drop", **options):
        trainer = train(model, rows, tokenizer, counterfactual=counterfactual, **options)
        outcome = {"nats": truth.error(trainer.seen, counterfactual)}
        if counterfactual == "drop":
            outcome["loss"] = abs(trainer.loss / truth.loss - 1)
        return outcome

    def adapter():
        trainer = train(model, rows, tokenizer, LoraConfig(r=2, target_modules="all-linear"))
        outcome = {"nats": truth.error(trainer.seen, "drop"), "loss": abs(trainer.loss / truth.loss - 1)}
        if trainer.without_gradient:
            outcome["untrained"] = trainer.without_gradient
        return outcome

    attempt("alone", lambda: score("drop", together=False))
    attempt("padded", lambda: score("drop", together=True))
    attempt("mask", lambda: score("mask", together=True))
    attempt("step", lambda: step())
    if "nats" in found["paths"]["step"] and found["paths"]["step"]["nats"] > TOLERANCE:
        model.train()
        first = plain(model, rows[0]["input_ids"], rows[0]["labels"])
        found["noise"] = first != plain(model, rows[0]["input_ids"], rows[0]["labels"])
    model.eval()
    attempt("step, mask", lambda: step("mask"))
    attempt("padding-free", lambda: step(padding_free=True))
    attempt("packed", lambda: step(packing=True, max_length=300, per_device_train_batch_size=1))
    attempt("accumulated", lambda: step(per_device_train_batch_size=2, gradient_accumulation_steps=3))
    attempt("generation", lambda: generate(model, tokenizer))
    attempt("LoRA", adapter)  # the last, since it may leave something in the model


@torch.no_grad()
def generate(model, tokenizer) -> dict[str, Any]:
    """By how many nats a plain forward pass has another token before one that was generated, and of what the library has warned."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(4, 200, (size,), generator=generator).tolist() for size in (40, 33, 12, 7, 55)]
    prompts = [Prompt(index, None, None, "", "", "", ids, [0] * len(ids)) for index, ids in enumerate(rows)]
    handler = logging.handlers.BufferingHandler(100)
    logger = logging.getLogger("trl_perce.evaluation.generate")
    logger.addHandler(handler)
    try:
        args = GenerationArguments(max_new_tokens=12, temperature=0.0, max_length=None, bf16=False, disable_tqdm=True)
        maker = Maker(model, tokenizer, args)
        [*maker.iterate(prompts)]
    finally:
        logger.removeHandler(handler)
    nats = 0.0
    for ids, tokens in zip(rows, (maker.made[index] for index in range(len(rows))), strict=True):
        size = min(length_of_text(tokens, maker.stop) + 1, len(tokens))
        own = log_softmax_of(model, [*ids, *tokens[: size - 1]])[len(ids) - 1 :]
        nats = max(nats, float((own.max(-1).values - own.gather(1, torch.tensor(tokens[:size])[:, None])[:, 0]).max()))
    said = [record.getMessage() for record in handler.buffer]
    if nats > TOLERANCE and said:
        return {"refused": said[-1]}
    return {"nats": nats} | ({"said": said[-1]} if said else {})


# The table

PATHS = (
    *("alone", "padded", "mask", "step", "step, mask", "padding-free", "packed", "accumulated"),
    *("generation", "LoRA"),
)


def verdict(outcome: dict[str, Any]) -> str:
    """`right`, `refused`, `wrong` or `error`."""
    if "refused" in outcome:
        return "refused"
    if "crash" in outcome:
        return "error"
    return "right" if outcome["nats"] <= TOLERANCE and outcome.get("loss", 0) <= LOSS_TOLERANCE else "wrong"


def cell(outcome: dict[str, Any] | None, footnotes: dict[str, int], name: str) -> str:
    if outcome is None:
        return ""
    said = verdict(outcome)
    if said == "right" and "said" not in outcome:
        return "right"
    if said == "wrong":
        if outcome["nats"] > TOLERANCE:
            return f"**off {outcome['nats']:.2g}**"
        return f"**loss {outcome['loss'] * 100:.2g} %**"
    # One footnote for all classes of which the same is said
    message = (outcome.get("refused") or outcome.get("said") or outcome["crash"]).replace(name, "the model")
    message = re.sub(r"off by \S+ nats", "off by … nats", message)
    message = message[:1].upper() + message[1:]
    return f"{said} [{footnotes.setdefault(message, len(footnotes) + 1)}]"


def report(results: list[dict[str, Any]]) -> str:
    footnotes: dict[str, int] = {}
    lines, broken = [], []
    counts = {path: dict.fromkeys(("right", "refused", "wrong", "error"), 0) for path in PATHS}
    for result in sorted(results, key=lambda result: result["class"].lower()):
        reason = result.get("not_built") or result.get("no_plain_pass")
        if reason or not result["paths"]:
            broken.append((code(result["class"]), escape(reason or result["died"])))
            continue
        for path, outcome in result["paths"].items():
            counts[path][verdict(outcome)] += 1
        name = result["class"].removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
        wrapper = result["class"].endswith("ForConditionalGeneration")
        marks = (" (wrapper)" if wrapper else "") + (" (noise)" if result.get("noise") else "")
        marks += f" ({result['died']})" if "died" in result else ""
        lines.append([name + marks, *(cell(result["paths"].get(path), footnotes, result["class"]) for path in PATHS)])
    summary = [(path, *counts[path].values()) for path in PATHS]
    untrained = [
        (code(result["class"]), len(names), code(names[0]))
        for result in results
        if (names := result.get("paths", {}).get("LoRA", {}).get("untrained"))
    ]
    software = ", ".join(f"{package} {number}" for package, number in versions().items())
    pieces = [
        "# Model families",
        f"Which classes of Transformers PerCE is right on, by tiny random models of each: {len(lines)} classes, "
        f"{datetime.date.today()}, {software}, float32 on {platform.machine()}. Made by `python examples/model_families.py`, which says "
        "how.",
        f"- **right**: PIR within {TOLERANCE:g} nats of two plain forward passes, and the loss within {LOSS_TOLERANCE:g} of the formula.\n"
        "- **refused**: an error says so, and what to do instead; the numbers in brackets are of the list below.\n"
        "- **off**: wrong, by so many nats; **loss**: PIR is right and the loss wrong, by so much of it.\n"
        "- **error**: it stopped inside of the model or of another library, without a wrong number.\n"
        "- (wrapper): around vision or audio, used with text alone. (noise): the model draws at random in training mode.",
        "`alone`, `padded` and `mask` are PerContrast; the others are a step of `PerCETrainer`. `accumulated` is the same rows in three "
        "micro-batches, `LoRA` an adapter with `all-linear`. `generation` is greedy, of `trl-perce evaluate`; where it is right with a "
        "number, the library has found a faster way to be wrong, says so, and takes a slower one; refused is what it warns of. `mask` is "
        "compared with the row without its persona (its positions closed up, or as they were) and with a 4D mask; the state of a recurrent layer goes on fading while it reads hidden tokens, so that there it is none "
        "of these.",
        table(("path", "right", "refused", "wrong", "error"), summary),
        table(("family", *PATHS), lines),
        "## What was refused, and errors",
        "\n".join(f"{number}. {escape(message)}" for message, number in footnotes.items()) or "None.",
    ]
    if untrained:
        pieces += [
            "## Adapters with weights that get no gradient",
            table(("class", "weights", "the first"), untrained),
        ]
    if broken:
        pieces += [
            "## Not tried",
            "No tiny model could be made of these from their configuration, or it does not take text alone.",
            table(("class", "why"), broken),
        ]
    return "\n\n".join(pieces) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
