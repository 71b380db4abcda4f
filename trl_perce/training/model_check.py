# SPDX-License-Identifier: Apache-2.0

"""Before the first step: does the way in which rows are scored give this model's own log-probabilities?"""

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import extract_model_from_parallel, send_to_device
from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig, Trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..config import PerCEConfig, autocast_dtype
from ..utils.logger import get_logger
from .checks import linear_4bit_modules
from .collator import DataCollatorForPerCE
from .estep import labelled_log_probs
from .fused_head import Head, ModelCheckError, logits_head


logger = get_logger(__name__)

# Tokens of the rows that are scored. The second is the beginning of the third.
LENGTHS = (24, 9, 17)
# The persona in the first of them, where it is masked
PERSONA = slice(5, 12)
# Share of the tokens that is left out of a difference, the largest: where rounding sends a token to another expert, it jumps
OUTLIERS = 0.1
# A fault shows in any rows. Rounding is rarely worse than its bound, but in 16 bits a single token behind an attention sink can be off by
# nats, and what follows with it: then other rows are drawn
_DRAWS = 3


def check_architecture(model, args: PerCEConfig) -> None:
    """
    Raise a `ValueError` on a kind of model that cannot be trained, or not with these settings, before it loads.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): As the trainer gets it.
        args ([`PerCEConfig`]): Configuration of the trainer.
    """
    config = _config_of(model, args)
    if config is None:
        return
    name = (config.architectures or [type(config).__name__])[0]
    if config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder–decoder, which reads the prompt apart from the response. A decoder is needed, such as a model "
            "that loads with `AutoModelForCausalLM`."
        )
    if not (args.packing or args.padding_free):
        return
    missing = [package for package in _kernels_of(getattr(transformers, name, None)) if find_spec(package) is None]
    if missing:
        distributions = " and ".join({"fla": "flash-linear-attention"}.get(name, name) for name in missing)
        raise ValueError(
            f"{name} has recurrent layers, which keep packed documents apart only with the kernels of "
            f"{distributions.replace('_', '-')} (for GPUs), if at all. Set `packing: false` and `padding_free: false`, or install "
            "them."
        )


def _config_of(model, args: PerCEConfig) -> PreTrainedConfig | None:
    if not isinstance(model, str):
        return model.config
    kwargs = args.model_init_kwargs or {}
    try:
        return AutoConfig.from_pretrained(
            model, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError):
        return None  # loading the model says what is wrong


def _kernels_of(model_class: type | None) -> list[str]:
    """Packages whose kernels the layers of a class of Transformers take where they are there, a convolution over tokens among them."""
    if model_class is None:
        return []
    text = inspect.getsource(sys.modules[model_class.__module__])
    packages = [*dict.fromkeys(re.findall(r'hub_with_fallback\(\s*"\w+",\s*(?:package=)?"(\w+)"', text))]
    return packages if "causal_conv1d" in packages else []


class ModelCheck:
    """
    Score a few short rows in the ways that training takes and by plain forward passes with logits, and compare.

    The rows are made of tokens of the user's data in another order: no token is then a matter of course, so that a fault shows in all of
    them. What is compared is the root mean square of the differences of tokens' log-probabilities, without the largest tenth. It
    must not exceed what rounding does, in at least one of three draws of rows: `sqrt(10 L) e s`, some ten roundings in each of `L` layers
    that add up as their root, with `e` the relative error of one ([`rounding_error`]) and `s` the standard deviation of the logits in
    nats. At least `50 e` and 0.001 nats are allowed.

    Nothing is left behind: no gradient, the modes of all modules and the random state as they were.

    Args:
        model ([`~torch.nn.Module`]): The model as it is run (wrapped), under its autocast.
        tokens (`list[int]`): Token ids of the user's data, at least one.
        device (`torch.device`): Where the model takes its inputs.
        autocast (`torch.dtype`, *optional*): Of autocast, if any.
        pad_token_id (`int`, *optional*, defaults to `0`): Token ID to use for padding.
        gather (`Callable`, *optional*): Gathers a tensor of all processes, which then must all take part and come to the same end.
    """

    def __init__(
        self,
        model,
        tokens: list[int],
        device: torch.device,
        autocast: torch.dtype | None = None,
        pad_token_id: int = 0,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.model, self.device, self.autocast, self.gather = model, device, autocast, gather
        self.pad_token_id = pad_token_id
        self.base = extract_model_from_parallel(model)
        self._has_virtual_tokens = False
        self._hint = "Is it a model that predicts the next token of a text?"
        if isinstance(self.base, PeftModel):
            self._hint = (
                "Does the adapter sit on a layer that is not a plain one, such as a router? See `target_modules`."
            )
            self._has_virtual_tokens = self.base.active_peft_config.is_prompt_learning
            self.base = self.base.get_base_model()
        self.name = type(self.base).__name__.removeprefix("FSDP")  # which FSDP2 puts before it
        self.tokens, self.rows = tokens, make_rows(tokens)
        self.head: Head | None = None  # that scores, if not TRL's

    @torch.no_grad()
    def run(self, flattened: bool, mask: bool) -> Head | None:
        """
        Compare.

        Args:
            flattened (`bool`): Whether rows are laid end to end (packed or padding-free) instead of padded.
            mask (`bool`): Whether personas are masked (`counterfactual="mask"`).

        Returns:
            `Callable` or `None`: What is to be put around the model where TRL's fused head gives other log-probabilities than the
            model's logits; `None` where it gives the same.

        Raises:
            `ModelCheckError`: The scores are wrong in a way that cannot be mended here. The message says in which, by how much, and what
                to set.
        """
        errors: list[ModelCheckError] = []
        passed: tuple[Head | None, list[str]] | None = None
        for draw in range(_DRAWS):
            self.rows, self.head = make_rows(self.tokens, draw), None
            self._warnings: list[str] = []
            error = self._run(flattened, mask)
            if error is not None:
                errors.append(error)
                continue
            passed = self.head, self._warnings
            if self.head is None:
                break
        if passed is None:
            raise errors[-1]
        self.head, warnings = passed
        for warning in warnings:
            logger.warning(warning)
        return self.head

    def _run(self, flattened: bool, mask: bool) -> ModelCheckError | None:
        """Compare one draw of rows, and return what is wrong with it."""
        with self._undisturbed(training=False):
            try:
                plain = [self._plain(row) for row in self.rows]
            except MODELS_OWN as error:
                unless_out_of_memory(error)
                raise ModelCheckError(
                    f"{self.name} fails on a short row of text: {type(error).__name__}: {error}. {self._hint} " + _SKIP
                ) from error
            nats = self._difference(plain[1], plain[2][: len(plain[1])])
            if nats is not None:
                return ModelCheckError(
                    f"{self.name} sees the tokens that it is to predict: what stands behind a token changes its log-probability by "
                    f"{nats:.2g} nats. Only causal models (decoders) can be trained and scored. " + _SKIP
                )
            expected = torch.cat(plain)
            nats, failure = self._compare_layout(flattened, expected)
            if nats is not None and self._head_is_off(expected):
                nats, failure = self._compare_layout(flattened, expected)
            if nats is not None:
                wrong = ModelCheckError(self._describe_layout(flattened, nats, failure))
                wrong.__cause__ = failure
                return wrong
            # PEFT takes no positions beside virtual tokens, so that there is nothing to compare a mask with
            if mask and not self._has_virtual_tokens:
                return self._check_mask(plain[0])
        return None

    @torch.no_grad()
    def noise(self) -> float:
        """Nats by which two passes over the same rows differ in training mode, `0.0` if it is no more than rounding."""
        with self._undisturbed(training=True):
            first, second = (torch.cat([self._plain(row) for row in self.rows]) for _ in range(2))
            return self._difference(first, second, outliers=0.0) or 0.0

    def _compare_layout(self, flattened: bool, expected: torch.Tensor) -> tuple[float | None, Exception | None]:
        found = self._scored(self.rows, DataCollatorForLanguageModeling(self.pad_token_id, padding_free=flattened))
        if isinstance(found, Exception):
            return self._difference(None, expected), found
        if flattened:  # the first document has none before it
            found, expected = found[LENGTHS[0] - 1 :], expected[LENGTHS[0] - 1 :]
        return self._difference(found, expected), None

    def _head_is_off(self, expected: torch.Tensor) -> bool:
        """Whether the fused head is to blame. If it is, logits take its place."""
        collate = DataCollatorForLanguageModeling(self.pad_token_id)
        rows = [self._scored([row], collate) for row in self.rows]
        failed = any(isinstance(row, Exception) for row in rows)
        nats = self._difference(None if failed else torch.cat(rows), expected)
        if nats is None:
            return False
        self.head = logits_head
        off = "fails" if math.isinf(nats) else f"is off by {nats:.2g} nats a token"
        self._warnings.append(
            f"TRL's fused head {off} on {self.name}:\nlog-probabilities are taken from the model's logits instead, with more memory."
        )
        return True

    def _describe_layout(self, flattened: bool, nats: float, error: Exception | None) -> str:
        off = _off(nats, error)
        if flattened:
            return (
                f"{self.name} does not keep documents of a packed or flattened row apart{off}. Set `packing: false` and "
                "`padding_free: false`, or try another `attn_implementation`, such as a FlashAttention. " + _SKIP
            )
        return (
            f"{self.name} scores rows otherwise in a padded batch than alone{off}. Try another `attn_implementation`, or batches of "
            "one row (`per_device_train_batch_size: 1`, `counterfactual_batch_tokens: 1`, `score_batch_tokens: 1`) with "
            "`check_model: false`, which skips this check."
        )

    def _check_mask(self, plain: torch.Tensor) -> ModelCheckError | None:
        """The persona masked in place, against the row without it at the positions that it leaves; and beside it a row without any."""
        ids = np.array(self.rows[0])
        hidden: np.ndarray = np.zeros(len(ids), dtype=int)
        hidden[PERSONA] = 1
        behind = np.arange(len(ids)) > PERSONA.stop  # the first token behind it is predicted by the persona's last
        rows = [
            {"input_ids": ids, "labels": np.where(behind, ids, -100), "attention_mask": 1 - hidden},
            {"input_ids": ids[:9], "labels": np.append(-100, ids[1:9]), "attention_mask": np.ones(9, dtype=int)},
        ]
        collator = DataCollatorForPerCE(self.pad_token_id, counterfactual="mask")
        found = self._scored(rows, collator.counterfactual_batch)
        error = found if isinstance(found, Exception) else None
        nats: float | None = math.inf
        if error is None:
            nats = self._difference(found[-8:], plain[:8])
            if nats is None and self._has_short_window():
                self._warnings.append(f"`mask` is not checked: {self.name} has a window of under {LENGTHS[0]} tokens.")
                return None
            if nats is None:
                nats = self._difference(found[:-8], self._without_persona())
                if nats is None:
                    return None
                # A bias by distance (ALiBi) does not know positions: then a mask for each pair of tokens, and no trace of what is masked
                rows[0]["input_ids"] = np.where(hidden, ids[::-1], ids)
                other = self._scored(rows, collator.counterfactual_batch)
                is_hidden = self._difference(found, None if isinstance(other, Exception) else other) is None
                if is_hidden and self._difference(found[:-8], self._hidden_persona()) is None:
                    return None
        off = _off(nats, error)
        return ModelCheckError(
            f"{self.name} does not leave a masked persona out of its sight in place{off}. Set `counterfactual: drop`, or try another "
            "`attn_implementation`. " + _SKIP
        )

    def _without_persona(self) -> torch.Tensor:
        ids = torch.tensor(self.rows[0])
        kept = torch.ones(len(ids), dtype=torch.bool)
        kept[PERSONA] = False
        examples = [{"input_ids": row, "labels": row} for row in (ids[kept].tolist(), self.rows[1])]
        batch = DataCollatorForLanguageModeling(self.pad_token_id, return_position_ids=True)(examples)
        del batch["labels"]
        # Not alone, since a row with gaps in its positions and nothing masked is taken for a packed one
        batch["position_ids"][0, : kept.sum()] = kept.nonzero()[:, 0]
        logits = self._logits(batch)[0, : kept.sum()]
        return _log_probs(logits, ids[kept])[PERSONA.start :]

    def _hidden_persona(self) -> torch.Tensor | None:
        ids = torch.tensor(self.rows[0])
        seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        seen[:, PERSONA] = False
        seen |= torch.eye(len(ids), dtype=torch.bool)  # a row of the softmax needs one entry
        dtype = next(p.dtype for p in self.base.parameters() if p.is_floating_point())
        bias = torch.zeros(1, 1, len(ids), len(ids), dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        batch = {"input_ids": ids[None], "attention_mask": bias, "position_ids": torch.arange(len(ids))[None]}
        try:
            return _log_probs(self._logits(batch)[0], ids)[PERSONA.stop :]
        except MODELS_OWN as error:  # an attention that takes no such mask
            unless_out_of_memory(error)
            return None

    def _has_short_window(self) -> bool:
        """Whether a layer sees less than a row: what is masked then pushes tokens out of it, and what has left does not."""
        config = self.base.config.get_text_config()
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        return any(isinstance(window, int) and 0 < window < LENGTHS[0] for window in windows)

    def _scored(self, rows: list[Any], collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        """Log-probabilities of rows as training takes them, or what the model raised."""
        if isinstance(rows[0], list):  # no label on a first token, which virtual tokens (prompt tuning) would predict
            rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]
        model = self.model if self.head is None else self.head(self.model)
        try:
            return labelled_log_probs(model, collate(rows), self.device).float().cpu()
        except MODELS_OWN as error:
            return unless_out_of_memory(error)

    def _plain(self, row: list[int]) -> torch.Tensor:
        return _log_probs(self._logits({"input_ids": torch.tensor([row])})[0], torch.tensor(row))

    def _logits(self, batch: dict[str, Any]) -> torch.Tensor:
        logits = self.model(**send_to_device(batch, self.device), use_cache=False).logits
        self._tolerance = rounding_bound(self.base, logits, self.autocast)
        return logits[:, -batch["input_ids"].size(1) :].float().cpu()  # virtual tokens (prompt tuning) come before

    def _difference(
        self, found: torch.Tensor | None, expected: torch.Tensor | None, outliers: float = OUTLIERS
    ) -> float | None:
        """Root mean square of the differences in nats, on the worst process, if it is over the bound; `None` if it is not."""
        nats = math.inf
        if found is not None and expected is not None:
            nats = typical_difference(found, expected, outliers)
        values = torch.tensor([[nats, self._tolerance]], device=self.device)
        if self.gather is not None:
            values = self.gather(values)
        off = values[values[:, 0] > values[:, 1], 0]  # NaN, of a model that gives NaN, is not
        return off.max().item() if len(off) else None

    @contextmanager
    def _undisturbed(self, training: bool) -> Iterator[None]:
        modes = {module: module.training for module in self.model.modules()}
        on_cards = self.device.type in ("cuda", "xpu", "npu")  # whose random states have numbers
        devices = [*range(torch.accelerator.device_count())] if on_cards else []
        try:
            with torch.random.fork_rng(devices, device_type=self.device.type if on_cards else "cuda"):
                self.model.train(training)
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode


_SKIP = "`check_model: false` skips this check."
# What a model raises that cannot do what is asked of it
MODELS_OWN = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)


def unless_out_of_memory(error: Exception) -> Exception:
    """The error, unless it is for want of memory: then it is raised."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    return error


def _off(nats: float | None, error: Exception | None) -> str:
    return f": {type(error).__name__}: {error}" if error else f": log-probabilities are off by {nats:.2g} nats a token"


def _log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def make_rows(tokens: list[int], draw: int = 0) -> list[list[int]]:
    """
    Three short rows: each begins with the first token, which may be a BOS token, and goes on with the others in random order, the same
    order at each call.

    Args:
        tokens (`list[int]`): Token ids of the user's data, at least one. Few are repeated.
        draw (`int`, *optional*, defaults to `0`): Seed of the order.

    Returns:
        `list[list[int]]`: Of 24, 9 and 17 tokens; the second is the beginning of the third.
    """
    others = [*dict.fromkeys(tokens[1:])] or tokens
    need = LENGTHS[0] + LENGTHS[2]
    others = (others * (need // len(others) + 1))[:need]
    order = torch.randperm(need, generator=torch.Generator().manual_seed(draw)).tolist()
    shuffled = [others[index] for index in order]
    first, third = ([tokens[0], *part] for part in (shuffled[: LENGTHS[0] - 1], shuffled[-LENGTHS[2] + 1 :]))
    return [first, third[: LENGTHS[1]], third]


def typical_difference(found: torch.Tensor, expected: torch.Tensor, outliers: float = OUTLIERS) -> float:
    """Root mean square of the differences of log-probabilities, in nats, without the share `outliers` that is the largest."""
    squares = (found - expected).square().sort().values
    return squares[: math.ceil(len(squares) * (1 - outliers))].mean().sqrt().item()


def rounding_bound(model, logits: torch.Tensor, autocast: torch.dtype | None = None) -> float:
    """
    Bound on what rounding does to a model's log-probabilities ([`ModelCheck`] says which), in nats.

    Args:
        model ([`~torch.nn.Module`]): Without an adapter or a wrapper around it.
        logits (`torch.Tensor`): Some of its logits, for their spread.
        autocast (`torch.dtype`, *optional*): Of autocast, if any.
    """
    error = rounding_error(model, autocast)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 32
    return max(math.sqrt(10 * layers) * error * logits.float().std().item(), 50 * error, 1e-3)


def rounding_error(model, autocast: torch.dtype | None = None) -> float:
    """
    Relative error of one rounding where a model computes, as a root mean square: about a quarter of the distance of two numbers next to 1.

    Args:
        model ([`~torch.nn.Module`]): In one or several dtypes, quantized or not.
        autocast (`torch.dtype`, *optional*): Of autocast, if any.

    Returns:
        `float`: Such as 2⁻⁹ of bfloat16, 2⁻¹² of float16 and 2⁻²⁵ of float32 (2⁻¹² with TF32).
    """
    dtypes = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    dtypes |= {layer.compute_dtype for layer in linear_4bit_modules(model) if layer.compute_dtype is not None}
    errors = [torch.finfo(dtype).eps / 4 for dtype in dtypes | ({autocast} if autocast else set())]
    backends = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    precisions = [getattr(backend, "fp32_precision", None) for backend in backends]
    if None in precisions:  # before torch 2.9; later it is an error where the new names have been used
        precisions.append({"high": "tf32", "medium": "bf16"}.get(torch.get_float32_matmul_precision()))
    errors += [{"tf32": 2**-12, "bf16": 2**-9}.get(str(precision), 0.0) for precision in precisions]
    if getattr(model, "is_loaded_in_8bit", False):
        errors.append(2**-8)  # of the largest value of a token
    return max(errors)


class ModelCheckMixin(Trainer):
    """Over a trainer: once a run, before the first batch, all processes check together how the model is scored ([`ModelCheck`])."""

    _model_is_checked = False
    _warned_of_noise = False
    _head: Head | None = None

    def scored(self, model):
        """The model as it is to be called for scores: with TRL's fused head, or what takes its place."""
        return model if self._head is None else self._head(model)

    def check_model_once(self, model, batch: dict[str, Any], training: bool) -> None:
        """
        Check the model, if that has not been done.

        Args:
            model ([`~torch.nn.Module`]): The model as it is run (wrapped).
            batch (`dict[str, Any]`): From the collator, for its tokens.
            training (`bool`): Whether it is about to be trained: warn of the noise that it makes by itself.
        """
        args: Any = self.args
        parallelism = self.accelerator.parallelism_config
        is_cut = parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled)
        if self._model_is_checked or not args.check_model or is_cut or getattr(self, "_is_vision_dataset", False):
            return
        self._model_is_checked = True
        ids = batch["input_ids"]
        ids = ids[batch["attention_mask"].bool()] if "attention_mask" in batch else ids.flatten()
        check = ModelCheck(
            model,
            ids[:256].tolist(),
            self.accelerator.device,
            autocast_dtype(args),
            getattr(self.data_collator, "pad_token_id", 0),
            self.accelerator.gather if self.accelerator.num_processes > 1 else None,
        )
        perce = args.token_weighting == "perce"
        with torch.compiler.set_stance("force_eager") if args.torch_compile else nullcontext():
            self._head = check.run(getattr(self, "padding_free", False), perce and args.counterfactual == "mask")
            nats = check.noise() if perce and training and not self._warned_of_noise else 0.0
        if nats:
            config = self.model.config.get_text_config().to_dict()
            keys = [
                f"`{key}` {value:g}"
                for key, value in config.items()
                if ("jitter" in key or "noise" in key) and isinstance(value, float) and value
            ]
            logger.warning(
                "Each of the two passes draws noise inside of the model, which makes PIR\nnoisy: the same row twice in training mode "
                f"differs by {nats:.2g} nats a token."
                + (f"\nSee the model's configuration: {', '.join(keys)}." if keys else "")
            )
