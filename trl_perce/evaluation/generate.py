# SPDX-License-Identifier: Apache-2.0

"""
Predictions, as they are finished:

    generator = TransformersGenerator("outputs/adapter", max_new_tokens=512)
    for prediction in generator.generate(rows):
        print(prediction["prediction"])
"""

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from packaging.version import Version
from peft import PeftConfig, PeftModel
from torch.nn.functional import pad
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from ..config import autocast_dtype
from ..scoring.loading import find_adapter, load_model, load_scoring_tokenizer
from ..scoring.preparation import Preparation
from ..training.checks import keep_4bit_weights_trainable_on_cpu, load_tokenizer
from ..training.estep import split_into_chunks
from ..training.model_check import MODELS_OWN, rounding_bound, typical_difference, unless_out_of_memory
from ..utils.bfloat16 import warn_of_slow_bf16
from ..utils.logger import get_logger
from ..utils.share import EVERYTHING, Share
from .arguments import GenerationArguments
from .predictions import Prompt, length_of_text, make_prompts, stop_tokens, to_prediction


logger = get_logger(__name__)

# Rows that what batches by itself (vLLM, continuous batching) is given at a time. What is finished is written in between.
_BLOCK_ROWS = 256
# Types of device on which continuous batching was measured to be faster (`examples/benchmarks/generation_speed.py`)
_CONTINUOUS_ON: frozenset[str] = frozenset()
# Tokens of one forward of continuous batching, whose mask has as many rows, and of one block of its cache
_FORWARD_TOKENS, _BLOCK_TOKENS = 2048, 256
# Share of a padded batch that has to be finished for the others to go on without it
_LEAVING = 1 / 8
# To see whether generated tokens are the model's own: how many after how many of a prompt, how often with other rows if they seem not to be,
# and what they may be off at least, in nats, since recurrent layers sum in another order step by step
_CHECKED_TOKENS, _CHECKED_PROMPT, _DRAWS, _LEAST_BOUND = 8, 128, 3, 0.01
# What generation calls the keys and values that it keeps: Transformers renamed it
_CACHE = "cache" if Version(transformers.__version__) >= Version("5.24.0") else "past_key_values"


class _Generator:
    """What the generators share: arguments, prompts and the progress bar."""

    stop: frozenset[int]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: GenerationArguments):
        self.args = args
        self.tokenizer = Preparation(tokenizer, args).tokenizer  # with the chat template of `args`

    def generate(
        self, rows: Iterable[dict[str, Any]], done: Collection[int] = (), swap_persona: bool = False
    ) -> Iterator[dict[str, Any]]:
        """
        Generate a prediction for each row.

        Args:
            rows (iterable of `dict` or [`~datasets.Dataset`]): Rows with a prompt, a response and a persona ([`make_prompts`]).
            done (`Collection[int]`, *optional*): Indices of rows to pass over.
            swap_persona (`bool`, *optional*, defaults to `False`): Whether each row gets the persona of the next row with another
                user's: what of the persona still comes up then is not owed to it.

        Yields:
            `dict[str, Any]`: Predictions ([`to_prediction`]), those of a batch as soon as it is finished, in no order.

        Raises:
            `PersonaError`: A row's persona is unclear; the message names the row.
            `ValueError`: There is no row, or a row has no response.
        """
        yield from self.iterate(make_prompts(rows, self.tokenizer, self.args, swap_persona), done)

    def iterate(
        self, prompts: list[Prompt], done: Collection[int] = (), share: Share = EVERYTHING
    ) -> Iterator[dict[str, Any]]:
        """
        Generate a prediction for each prompt.

        Args:
            prompts (`list[Prompt]`): From [`make_prompts`].
            done (`Collection[int]`, *optional*): Indices of rows to pass over. A batch of which any is missing is generated as a
                whole, so that a run that was killed ends as if it had not been.
            share ([`~share.Share`], *optional*): What this process generates, where several share the work. By default all.

        Yields:
            `dict[str, Any]`: As [`~TransformersGenerator.generate`].
        """
        missing = sum(prompt.row not in done for prompt in prompts)
        batches = (batch for batch in self._batches(prompts) if any(prompt.row not in done for prompt in batch))
        with share.bar(missing, "Generating", self.args.disable_tqdm) as bar:
            for batch in share.of(batches):
                for prompt, tokens in zip(batch, self._generate(batch), strict=True):
                    if prompt.row not in done:
                        share.advance(bar)
                        yield to_prediction(prompt, tokens, self.stop, self.tokenizer)

    def _batches(self, prompts: list[Prompt]) -> list[list[Prompt]]:
        raise NotImplementedError

    def _generate(self, prompts: list[Prompt]) -> list[list[int]]:
        raise NotImplementedError


class TransformersGenerator(_Generator):
    """
    Generates with Transformers: rows batched by length, the longest first, padded on the left; or, with
    `args.continuous_batching`, rows that take each other's place in a paged cache, without padding.

    A row's tokens are drawn with random numbers of its own, from `args.seed` and the row's index. On one kind of device they do not
    depend on which other rows there are, how they are batched, or whether the run was killed in between; batches only round
    logits differently, which can tip a token that is as good as tied.

    Before the first row a few tokens are generated after the beginnings of the longest and the shortest prompt, and their
    log-probabilities compared with those of plain forward passes. Where they are off by more than rounding, as some models' are in a
    padded batch or with their cache, that is left out, with a warning: rows are generated one at a time, and if need be without the
    cache.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Name or folder of a model or of an adapter, which is loaded with `model_init_kwargs` (its own dtype by default); or a
            model, which is run where it is, with its adapters, in evaluation mode. It is left as it was.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, it is loaded from the model's name.
        args ([`GenerationArguments`], *optional*):
            Configuration. If `None`, it is made of `config`.
        **config:
            Fields of [`GenerationArguments`], such as `temperature=0`.
    """

    def __init__(
        self,
        model,
        processing_class: PreTrainedTokenizerBase | None = None,
        args: GenerationArguments | None = None,
        **config,
    ):
        args = GenerationArguments(**config) if args is None else args
        if isinstance(model, str):
            base, adapter = find_adapter(model)
            tokenizer = load_scoring_tokenizer(base, adapter, args, processing_class)
            model = load_model(base, adapter, args)
        else:
            tokenizer = load_tokenizer(model, args, processing_class)
        super().__init__(tokenizer, args)
        self.model = model
        self._base = extract_model_from_parallel(model)
        if isinstance(self._base, PeftModel):
            self._base = self._base.get_base_model()
        self.stop = stop_tokens(self.tokenizer, self._base.generation_config)
        self._is_checked, self._is_batched, self._has_cache = False, True, True
        self._logits: dict[int, list[torch.Tensor]] | None = None  # of each row, while they are to be kept
        why_not = self._why_not_continuous()
        self.is_continuous = why_not is None and (
            self._device.type in _CONTINUOUS_ON if args.continuous_batching is None else args.continuous_batching
        )
        if args.continuous_batching and why_not is not None:
            logger.warning(f"`continuous_batching` {why_not}. Rows are padded to batches instead.")

    def iterate(
        self, prompts: list[Prompt], done: Collection[int] = (), share: Share = EVERYTHING
    ) -> Iterator[dict[str, Any]]:
        if not self._is_checked and any(prompt.row not in done for prompt in prompts):
            self._is_checked = True
            self._leave_out_what_is_wrong(prompts)
        yield from super().iterate(prompts, done, share)

    def _leave_out_what_is_wrong(self, prompts: list[Prompt]) -> None:
        """Of continuous batching, padding and the cache."""
        ordered, name = sorted(prompts, key=lambda prompt: len(prompt.input_ids)), type(self._base).__name__
        draws = [_beginnings(ordered[draw], ordered[-1 - draw]) for draw in range(min(_DRAWS, len(ordered) // 2))]
        draws = draws or [_beginnings(*ordered)]
        if self.is_continuous and (nats := self._off(draws)) is not None:
            self.is_continuous = False
            logger.warning(
                f"Continuous batching gives {name} other log-probabilities{_so_much(nats)}. Rows are padded to batches instead."
            )
        if self.is_continuous or (padded := self._off(draws)) is None:
            return
        self._is_batched = False
        if (alone := self._off(draws)) is None:
            logger.warning(
                f"In a padded batch {name} generates with other log-probabilities than alone{_so_much(padded)}. Rows are generated one at a "
                "time instead, which is slower."
            )
            return
        self._has_cache = False
        uncached = self._off(draws)
        if uncached is None:
            logger.warning(
                f"With its cache {name} generates with other log-probabilities than without{_so_much(alone)}. Rows are generated one at a "
                "time and without a cache instead, which is much slower."
            )
        elif math.isinf(uncached):  # it does not generate at all, and says why when it is to
            self._is_batched = self._has_cache = True
        else:
            logger.warning(
                f"{name} generates with other log-probabilities than those of its forward pass{_so_much(uncached)}, one row at a time and "
                "without a cache, too: do not trust its predictions."
            )

    def _off(self, draws: list[list[Prompt]]) -> float | None:
        """By how many nats a token is off in the mean that is generated as it would be now; `None` if it is rounding, in one draw at least."""
        args, self.args = self.args, copy.copy(self.args)
        self.args.max_new_tokens, self.args.guidance_scale = min(args.max_new_tokens, _CHECKED_TOKENS), 1.0
        smallest = None
        try:
            for prompts in draws:
                nats = self._difference(prompts)
                if nats is None:
                    return None
                smallest = nats if smallest is None else min(smallest, nats)
        except FloatingPointError:  # of a row that will be named when its turn comes
            return None
        finally:
            self.args, self._logits = args, None
        return smallest

    @torch.no_grad()
    def _difference(self, prompts: list[Prompt]) -> float | None:
        self._logits = {}
        found: list[torch.Tensor] = []
        expected: list[torch.Tensor] = []
        bound = _LEAST_BOUND
        for batch in self._batches(prompts):
            try:
                made = self._generate(batch)
            except MODELS_OWN as error:
                unless_out_of_memory(error)
                return math.inf
            for prompt, tokens in zip(batch, made, strict=True):
                if prompt.row not in self._logits:
                    return None  # the model has a `generate` of its own, which keeps them to itself
                size = min(length_of_text(tokens, self.stop) + 1, len(tokens))
                ids = torch.tensor([prompt.input_ids + tokens[: size - 1]], device=self._device)
                try:
                    with self._generating(), self._autocast():
                        logits = self.model(input_ids=ids, use_cache=False).logits[0, -size:].float().cpu()
                except MODELS_OWN as error:  # it takes more than tokens, which `generate` makes
                    unless_out_of_memory(error)
                    return None
                bound = max(bound, rounding_bound(self._base, logits, autocast_dtype(self.args)))
                chosen = torch.tensor(tokens[:size])[:, None]
                for log_probs, one in ((found, torch.stack(self._logits[prompt.row][:size])), (expected, logits)):
                    log_probs.append(one.log_softmax(-1).gather(1, chosen)[:, 0])
        nats = typical_difference(torch.cat(found), torch.cat(expected))
        return nats if nats > bound else None

    def _why_not_continuous(self) -> str | None:
        if self.args.guidance_scale != 1:
            return "does not go with `guidance_scale`"
        if not self._has_plain_cache:
            return "needs a model that is all attention over a cache, and no prompt tuning"
        if autocast_dtype(self.args) not in (None, self._base.dtype):
            return f"keeps its cache in the model's dtype, {self._base.dtype}, and `bf16` or `fp16` asks for another"
        return None

    @property
    def _has_plain_cache(self) -> bool:
        """Whether nothing is kept between steps but keys and values of tokens, row by row."""
        model = extract_model_from_parallel(self.model)
        is_prompt_tuned = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        return (
            self.args.guidance_scale == 1
            and self._has_cache
            and not is_prompt_tuned
            and not self._base._is_stateful
            # Of Qwen's multimodal models: where each row's positions begin, which stays when a row leaves
            and not any(hasattr(module, "rope_deltas") for module in self._base.modules())
            and not self._base.config.is_encoder_decoder
            and self._base.generation_config.cache_implementation is None
            and self._layer_types <= {"full_attention", "sliding_attention"}
        )

    @property
    def _layer_types(self) -> set[str]:
        return {*(getattr(self._base.config.get_text_config(), "layer_types", None) or ["full_attention"])}

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _batches(self, prompts: list[Prompt]) -> list[list[Prompt]]:
        if self.is_continuous:
            return [prompts[start : start + _BLOCK_ROWS] for start in range(0, len(prompts), _BLOCK_ROWS)]
        return self._padded_batches(prompts)

    def _padded_batches(self, prompts: list[Prompt]) -> list[list[Prompt]]:
        lengths = [len(prompt.input_ids) + self.args.max_new_tokens for prompt in prompts]
        guided = self.args.guidance_scale != 1
        if guided:
            lengths = [2 * length for length in lengths]
        # Transformers gives the negative prompts' pass no positions: where they are not relative, padding would shift them
        shifts = guided and "rope_parameters" not in self._base.config.get_text_config().to_dict()
        alone = shifts or not self._is_batched
        chunks = split_into_chunks(lengths, 1 if alone else self.args.generation_batch_tokens, padded=True)
        return [[prompts[index] for index in chunk] for chunk in chunks]

    @torch.no_grad()
    def _generate(self, prompts: list[Prompt]) -> list[list[int]]:
        return self._generate_continuously(prompts) if self.is_continuous else self._generate_padded(prompts)

    def _generate_padded(self, prompts: list[Prompt]) -> list[list[int]]:
        ids, mask = self._left_padded([prompt.input_ids for prompt in prompts])
        guidance = {}
        if self.args.guidance_scale != 1:
            negative = self._left_padded([prompt.counterfactual_ids for prompt in prompts])
            guidance = dict(zip(("negative_prompt_ids", "negative_prompt_attention_mask"), negative, strict=True))
        start, end, cache = ids.shape[1], ids.shape[1] + self.args.max_new_tokens, None
        rows = [prompt.row for prompt in prompts]
        random_numbers = self._random_numbers(rows)
        made: dict[int, list[int]] = {}
        with self._generating(), self._autocast():
            while True:
                finished = _Finished(self.stop, len(rows), _LEAVING if self._has_plain_cache else 1, ids.device)
                output = extract_model_from_parallel(self.model).generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=self._config(end - ids.shape[1]),
                    logits_processor=self._processors(rows, random_numbers),
                    stopping_criteria=StoppingCriteriaList([finished]),
                    **guidance,
                    **({} if cache is None else {_CACHE: cache}),
                )
                ids, cache = output.sequences, getattr(output, _CACHE)
                made.update(zip(rows, ids[:, start:].tolist(), strict=True))
                left = (~finished.rows).nonzero()[:, 0]
                if not len(left) or ids.shape[1] == end:
                    return [made[prompt.row] for prompt in prompts]
                cache.batch_select_indices(left)
                mask = pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)[left]
                ids, rows = ids[left], [rows[index] for index in left.tolist()]

    def _generate_continuously(self, prompts: list[Prompt]) -> list[list[int]]:
        longest = max(len(prompt.input_ids) for prompt in prompts) + self.args.max_new_tokens
        blocks = -(-max(longest, self.args.generation_batch_tokens) // _BLOCK_TOKENS) + 1
        # One step after the other and no graphs: each row's random numbers are drawn by its own generator
        config = ContinuousBatchingConfig(
            num_blocks=blocks * len(self._layer_types),
            max_batch_tokens=_FORWARD_TOKENS,
            use_cuda_graph=False,
            use_async_batching=False,
        )
        processor = _RowProcessor(self._processors, self._random_numbers([prompt.row for prompt in prompts]))
        made: dict[int, list[int]] = {}
        with self._generating(), _around_forward(self._base, self._autocast()):
            manager = self._base.init_continuous_batching(self._config(), config)
            manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([processor]))
            manager.logit_processor.tensors_required = 1
            for prompt in prompts:  # all of them before it starts, so that it batches them the same way each time
                manager.add_request(prompt.input_ids, str(prompt.row))
            manager.start()
            try:
                while len(made) < len(prompts) and processor.error is None:
                    output = manager.get_result(timeout=0.1)
                    if output is None and manager.is_running():
                        continue
                    if output is None or output.error is not None:
                        reason = output.error if output else manager.background_thread_status.fatal_error
                        raise RuntimeError(f"Continuous batching stopped: {reason}")
                    made[int(output.request_id)] = output.generated_tokens
            finally:
                manager.stop(hard_stop=True)
                manager.destroy()
        if processor.error is not None:
            # A NaN spreads over the rows of a step: find those that have it by themselves
            for batch in self._padded_batches(prompts):
                self._generate_padded(batch)
            raise processor.error
        return [made[prompt.row] for prompt in prompts]

    def _left_padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, of shape `(rows, longest)`, on the model's device."""
        longest, device = max(map(len, rows)), self._device
        ids = torch.tensor([[self._pad] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        return ids, mask

    @property
    def _pad(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0  # hidden by the mask

    def _config(self, max_new_tokens: int | None = None) -> GenerationConfig:
        # `generate` takes from the model's own configuration what is not set here. Sampling is ours: see `_RowSampler`.
        return GenerationConfig(
            **{"max_new_tokens": max_new_tokens or self.args.max_new_tokens},
            **{"guidance_scale": self.args.guidance_scale, "return_dict_in_generate": True},
            **{"eos_token_id": sorted(self.stop) or None, "pad_token_id": self._pad, "use_cache": self._has_cache},
            **{"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0},
            **{"num_beams": 1},
        )

    def _processors(self, rows: list[int], random_numbers: dict[int, torch.Generator]) -> LogitsProcessorList:
        """What is done to logits, of shape `(rows, tokens)`."""
        processors = LogitsProcessorList([_FiniteLogits(rows)])
        if self._logits is not None:
            processors.append(_Recorder(rows, self._logits))
        if self.args.temperature:
            processors.append(TemperatureLogitsWarper(float(self.args.temperature)))
            if self.args.top_p < 1:
                processors.append(TopPLogitsWarper(self.args.top_p))
            processors.append(_RowSampler([random_numbers[row] for row in rows]))
        return processors

    def _random_numbers(self, rows: list[int]) -> dict[int, torch.Generator]:
        return {row: torch.Generator(self._device).manual_seed(row_seed(self.args.seed, row)) for row in rows}

    def _autocast(self) -> torch.autocast:
        dtype = autocast_dtype(self.args)
        return torch.autocast(self._device.type, dtype, enabled=dtype is not None)

    @contextmanager
    def _generating(self):
        """The model in evaluation mode, and back as it was."""
        keep_4bit_weights_trainable_on_cpu(self._base)
        warn_of_slow_bf16(self._base, autocast_dtype(self.args))
        training = {module: module.training for module in self.model.modules()}
        head = self._base.get_output_embeddings()
        hook = None if head is None else head.register_forward_pre_hook(_make_contiguous)
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        try:
            self.model.eval()
            # The first choice on Hopper and data centres' Blackwell. It gets ready anew for each length, which each token changes, and on
            # B200 gave models with under 8 key-value heads other tokens (PyTorch's issue 193893, torch 2.11 to 2.13)
            torch.backends.cuda.enable_cudnn_sdp(False)
            yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            if hook is not None:
                hook.remove()
            for module, mode in training.items():
                module.training = mode


def _make_contiguous(head: torch.nn.Module, arguments: tuple) -> tuple:
    """
    What comes into the head, as a tensor of its own. It is a slice, of each row's last token; PyTorch (2.13) on a CPU would copy the weights of a
    head that is not trained once for each row: 16 GiB for 48 rows of Gemma 3's vocabulary.
    """
    return tuple(value.contiguous() if isinstance(value, torch.Tensor) else value for value in arguments)


class VLLMGenerator(_Generator):
    """
    Generates with vLLM (`pip install vllm`, on a machine with a supported GPU), which is much faster than Transformers and batches
    by itself. Each row has a seed of its own.

    Written after vLLM's documented `LLM.generate` and `LoRARequest`; it was not run where this library was written.

    Args:
        model (`str`): Name or folder of a model or of a LoRA adapter.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, it is loaded from the model's name.
        args ([`GenerationArguments`], *optional*):
            Configuration. If `None`, it is made of `config`.
        **config:
            Fields of [`GenerationArguments`], such as `temperature=0`.

    Raises:
        `ImportError`: vLLM is not installed.
        `ValueError`: `guidance_scale` is not 1, which vLLM does not do.
    """

    def __init__(
        self,
        model: str,
        processing_class: PreTrainedTokenizerBase | None = None,
        args: GenerationArguments | None = None,
        **config,
    ):
        args = GenerationArguments(**config) if args is None else args
        if args.guidance_scale != 1:
            raise ValueError("vLLM has no `guidance_scale`. Set it to 1, or generate with Transformers.")
        vllm = import_vllm()
        base, adapter = find_adapter(model)
        super().__init__(load_scoring_tokenizer(base, adapter, args, processing_class), args)
        kwargs = {name: (args.model_init_kwargs or {}).get(name) for name in ("revision", "dtype")}
        kwargs |= {"max_model_len": args.max_length, "seed": args.seed, "trust_remote_code": args.trust_remote_code}
        if adapter is not None:
            kwargs |= {
                "enable_lora": True,
                "max_lora_rank": max(8, 2 ** (PeftConfig.from_pretrained(adapter).r - 1).bit_length()),
            }
        self._vllm = vllm
        self.model = vllm.LLM(base, **{name: value for name, value in kwargs.items() if value is not None})
        self._lora = None if adapter is None else vllm.lora.request.LoRARequest("adapter", 1, adapter)
        self.stop = stop_tokens(self.tokenizer, GenerationConfig.from_pretrained(base))

    def _batches(self, prompts: list[Prompt]) -> list[list[Prompt]]:
        return [prompts[start : start + _BLOCK_ROWS] for start in range(0, len(prompts), _BLOCK_ROWS)]

    def _generate(self, prompts: list[Prompt]) -> list[list[int]]:
        shared: dict[str, Any] = {"temperature": self.args.temperature, "top_p": self.args.top_p, "detokenize": False}
        shared |= {"max_tokens": self.args.max_new_tokens, "stop_token_ids": sorted(self.stop)}
        outputs = self.model.generate(
            [{"prompt_token_ids": prompt.input_ids} for prompt in prompts],
            [self._vllm.SamplingParams(**shared, seed=row_seed(self.args.seed, prompt.row)) for prompt in prompts],
            lora_request=self._lora,
            use_tqdm=False,
        )
        return [[*output.outputs[0].token_ids] for output in outputs]


class _Finished(StoppingCriteria):
    """
    Stops a batch of which a share of the rows is finished.

    Args:
        stop (`Collection[int]`): Tokens that end a row.
        num_rows (`int`): Rows of the batch.
        share (`float`): Between 0 and 1.
        device (`torch.device`): Where the tokens are.

    Attributes:
        rows (`torch.Tensor` of shape `(num_rows,)`): Which rows are finished.
    """

    def __init__(self, stop: Collection[int], num_rows: int, share: float, device: torch.device):
        self.rows = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._stop, self._share = torch.tensor(sorted(stop), dtype=torch.long, device=device), share

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self.rows |= torch.isin(input_ids[:, -1], self._stop)
        return self.rows | (self.rows.float().mean() >= self._share)


class _FiniteLogits(LogitsProcessor):
    """Stops where a logit is NaN or positively infinite, from which any token could come."""

    def __init__(self, rows: list[int]):
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bad = (scores.isnan() | scores.isposinf()).any(-1)
        if bad.any():
            rows = ", ".join(str(row) for row, is_bad in zip(self._rows, bad.tolist(), strict=True) if is_bad)
            raise FloatingPointError(
                f"Row {rows}: the model's logits are NaN or infinite. Check the row, or load the model in bfloat16 or "
                "float32 instead of float16 (`dtype`)."
            )
        return scores


def _beginnings(*prompts: Prompt) -> list[Prompt]:
    """Of one prompt or two, of which the first is the shorter one, and then only half as long."""
    *shorter, longer = prompts
    size = min(len(longer.input_ids), _CHECKED_PROMPT)
    sizes = [*(min(len(prompt.input_ids), max(size // 2, 1)) for prompt in shorter), size]
    return [
        replace(prompt, input_ids=prompt.input_ids[:size], persona_mask=prompt.persona_mask[:size])
        for prompt, size in zip(prompts, sizes, strict=True)
    ]


def _so_much(nats: float) -> str:
    return "" if math.isinf(nats) else f", off by {nats:.2g} nats a token"


class _Recorder(LogitsProcessor):
    """Keeps the logits of each row, of shape `(tokens,)`, one a step."""

    def __init__(self, rows: list[int], logits: dict[int, list[torch.Tensor]]):
        self._rows, self._logits = rows, logits

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, own in zip(self._rows, scores.float().cpu(), strict=True):
            self._logits.setdefault(row, []).append(own)
        return scores


class _RowSampler(LogitsProcessor):
    """
    Makes the greedy choice a sample, with random numbers of each row's own: the largest `log p_i + g_i` with Gumbel noise `g` is
    token `i` with probability `p_i` (Gumbel-max). `generate`'s own sampling draws for a batch as a whole.
    """

    def __init__(self, generators: list[torch.Generator]):
        self._generators = generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp_min_(torch.finfo(torch.float32).tiny).log_()


class _RowProcessor(ContinuousBatchingLogitsProcessor):
    """
    Does to the rows that are in a step of continuous batching what `processors` does to those of a batch.

    Args:
        processors (`Callable`): From rows and their generators to a [`~transformers.LogitsProcessorList`].
        random_numbers (`dict[int, torch.Generator]`): Generator of each row.

    Attributes:
        error (`FloatingPointError` or `None`): What `processors` raised. Here it would end a thread with a traceback.
    """

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs = ()

    def __init__(self, processors: Callable, random_numbers: dict[int, torch.Generator]):
        self._processors, self._random_numbers = processors, random_numbers
        self._rows: list[int] = []
        self.error: FloatingPointError | None = None

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token) -> torch.Tensor:
        self._rows = [int(request.state.request_id) for request in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        own = scores[: len(self._rows)]  # behind them: prompts of which a part is still to come
        try:
            return torch.cat([self._processors(self._rows, self._random_numbers)(None, own), scores[len(own) :]])
        except FloatingPointError as error:
            self.error = self.error or error
            return scores


@contextmanager
def _around_forward(model, context) -> Iterator[None]:
    """A context around each forward pass, in the thread that makes it: autocast is a thread's own."""

    def enter(*_):
        context.__enter__()

    def leave(*_):
        context.__exit__(None, None, None)

    hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def row_seed(seed: int, row: int) -> int:
    """A seed (32 bits) for one row of a run."""
    return int(np.random.SeedSequence((seed, row)).generate_state(1)[0])


def import_vllm():
    """The package vLLM, or an `ImportError` that says what to install."""
    try:
        import vllm
        import vllm.lora.request
    except ImportError as error:
        raise ImportError(
            "`use_vllm` needs the package vllm, and a machine that it supports: pip install vllm. Leave `use_vllm` out to "
            "generate with Transformers."
        ) from error
    return vllm
