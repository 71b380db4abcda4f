# SPDX-License-Identifier: Apache-2.0

"""The trainer: E-step, weights and M-step of the PerCE loss on TRL's SFT trainer."""

import copy
import dataclasses
from typing import Any

import torch
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import get_config_model_id

from .config import PerCEConfig, autocast_dtype, copy_config, has_accelerator
from .hub.upload import make_repo
from .hub.upload_mixin import UploadMixin
from .persona.dataset import (
    check_rendering,
    count_personas,
    count_weights,
    mark_dataset,
    pack_dataset_with_mask,
    tokenize_with_mask,
)
from .persona.turns import choose_turns, is_messages
from .training.adapters import fit_adapter, freeze_unused, trains_text_alone
from .training.checkpoint_mixin import CheckpointMixin
from .training.checks import (
    chat_template,
    check_4bit_weights_trainable,
    check_arguments,
    check_dataset,
    check_model,
    check_trackers,
    is_prepared_by_trl,
    keep_4bit_weights_trainable_on_cpu,
    load_processor,
    load_tokenizer,
    make_trainable_in_fp16,
    warn_of_noise,
)
from .training.collator import DataCollatorForPerCE, DataCollatorForTokenWeights
from .training.estep import EStep
from .training.finite_check import FiniteCheck
from .training.fused_head import labelled_positions_only
from .training.log_prob_store import LogProbStore
from .training.model_check import ModelCheckMixin, check_architecture
from .training.placement import check_placement
from .training.progress import print_in_lines
from .training.token_metrics import TokenMetrics
from .training.weighting import (
    entropy_weights,
    loss_weights,
    normalize_weights,
    perce_weights,
    personal_influence_ratio,
)
from .utils.bfloat16 import warn_of_slow_bf16
from .utils.logger import get_logger


logger = get_logger(__name__)


class PerCETrainer(CheckpointMixin, UploadMixin, ModelCheckMixin, SFTTrainer):
    """
    Trainer for the PerCE loss, from [Rethinking Personalization in Large Language Models at the Token
    Level](https://huggingface.co/papers/2603.06595).

    The loss is that of [`~trl.SFTTrainer`] with a weight on each trained token,

    `−(1/n) Σ_i w_i log P_θ(y_i | p, x, y_<i)`,

    where `n` is the number of trained tokens of the whole batch, over accumulation steps and processes. The weights are
    estimated with the current `θ` at every step and carry no gradient (E-step); the gradient step on the weighted loss
    is the M-step:

    `w_i = clip(PIR(y_i; θ), m, M)`, `PIR(y_i; θ) = log P_θ(y_i | p, x, y_<i) − log P_θ(y_i | x, y_<i)`.

    What alone changes against [`~trl.SFTTrainer`]: the preparation of a dataset finds the persona in it, the collator
    adds the rows without their personas, `get_batch_samples` runs the E-step over the micro-batches of an optimizer step
    ([`EStep`]), and `compute_loss` weights the tokens. Everything else is inherited. With `token_weighting="uniform"` the
    loss is that of [`~trl.SFTTrainer`], bit for bit, but for two kinds of models: where TRL averages over micro-batches because
    the model's own loss does not take `num_items_in_batch` (many vision-language models), the mean is over the window's tokens
    here; and where TRL's fused head is not the model's own, its logits are taken ([`ModelCheck`]).

    With `loss_type="dft"` a token's weight is `w_i P_θ(y_i | p, x, y_<i)`, no gradient through either factor.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from peft import LoraConfig
    >>> from trl_perce import PerCEConfig, PerCETrainer

    >>> row = {
    ...     "prompt": "About me: <persona>I sew my own dresses.</persona>\\nWhat should I buy?\\n",
    ...     "completion": "A new set of needles.",
    ... }
    >>> trainer = PerCETrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=PerCEConfig(output_dir="qwen3-perce"),
    ...     train_dataset=Dataset.from_list([row]),
    ...     peft_config=LoraConfig(),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in [`~trl.SFTTrainer`]. Both passes run through it as it is: adapters on, base weights quantized or not.
            Dropout draws a mask of its own in each pass, which adds noise to PIR, and is warned of: set `lora_dropout=0`.
        args ([`PerCEConfig`] or [`~transformers.TrainingArguments`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used. `TrainingArguments` become a
            [`PerCEConfig`] with the same values.
        data_collator ([`~transformers.DataCollator`], *optional*):
            With `token_weighting="perce"`, a [`DataCollatorForPerCE`], and with `"given"` a [`DataCollatorForTokenWeights`], which are
            also the defaults.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Any dataset type of [`~trl.SFTTrainer`]. The persona stands between markers (`<persona>…</persona>`) in any
            message but the response, or in a column `persona`, whose text takes the place of `{persona}` in the prompt.
            Rows that are already tokenized have a column `persona_mask`: 1 where a token belongs to the persona. Rows
            without a persona train as plain CE. With `token_weighting="given"`, tokenized rows have a column `token_weights`, or the
            assistant's messages a key `weight`.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Dataset to use for evaluation, of the same types. `eval_loss` is the weighted loss; `eval_nll` is not weighted.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer, which must give character offsets. If `None`, it is loaded from the model's name.
        *positional, **kwargs:
            The further arguments of [`~trl.SFTTrainer`], such as `peft_config` and `quantization_config`.

    Raises:
        `PersonaError`: The persona cannot be told from a row, or no row of `train_dataset` has one. Raised before the
            model loads wherever the rows themselves show it.
        `ValueError`: Arguments that cannot go together.
        `ModelCheckError`: Before the first step: the model would be scored wrongly (`check_model`); the message says what to set.
        `FloatingPointError`: In training, with `on_nonfinite="stop"`: a log-probability, a PIR or the gradient is NaN or infinite.
        `UploadError`: With `push_to_hub`: the repository cannot be made, before the model loads; an upload failed after several tries.
        `CheckpointError`: In training: a checkpoint could not be written (a full disk). Those before are as they were.

    Metrics, in every log line, over all processes and micro-batches since the last one: `pir/mean` (nats) and
    `pir/personal_fraction` (share with PIR > 1) over the tokens that the counterfactual pass scores; `weight/mean`,
    `weight/at_min` and `weight/at_max` (shares at the clipping bounds, where weights are clipped) over all trained tokens, before
    `weight_normalization`; `counterfactual/token_ratio`, the tokens of the counterfactual pass over those of the factual
    one; `nll`, the unweighted loss in nats a token, which compares across weightings. With `on_nonfinite="skip"` also
    `skipped_steps`, how many were left out so far.
    """

    _tag_names = ["trl", "sft", "perce"]
    _name = "PerCE"
    _paper = {
        "title": "Rethinking Personalization in Large Language Models at the Token Level",
        "id": "2603.06595",
        # docstyle-ignore
        "citation": """@article{zhang2026rethinking,
    title         = {{Rethinking Personalization in Large Language Models at the Token Level}},
    author        = {Zhang, Chenheng and Lu, Yijun and Fang, Lizhe and Zheng, Chunyuan and Chai, Jiajun and Wang, Xiaohan and Yin, Guojun and Lin, Wei and Wang, Yisen and Lin, Zhouchen},
    year          = 2026,
    eprint        = {arXiv:2603.06595},
}""",
    }

    def __init__(
        self,
        model,
        args: PerCEConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *positional,
        **kwargs,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = PerCEConfig(f"{model_name.split('/')[-1]}-PerCE")
        elif isinstance(args, TrainingArguments) and not isinstance(args, SFTConfig):
            args = PerCEConfig(**{**args.to_dict(), "hub_token": args.hub_token})  # which `to_dict` hides
        if not isinstance(args, PerCEConfig):
            raise TypeError(f"`args` must be a `PerCEConfig`, got a `{type(args).__name__}`.")
        check_arguments(args, data_collator, kwargs)
        check_model(model, kwargs)
        check_architecture(model, args)
        check_dataset(train_dataset, "train_dataset")
        evaluated = eval_dataset if type(eval_dataset) is dict else {"eval_dataset": eval_dataset}
        for name, dataset in evaluated.items():
            check_dataset(dataset, name)
        check_trackers(args.report_to)
        if args.push_to_hub and args.process_index == 0:
            make_repo(args)

        self._assistant_only_loss = by_marks = args.assistant_only_loss
        # Before the model loads: find the personas, and try the chat template on one of them.
        if is_prepared_by_trl(train_dataset, args):
            formatting_func = kwargs.get("formatting_func")
            train_dataset, found = _mark_and_count(train_dataset, "train", args, formatting_func)
            if isinstance(eval_dataset, dict):
                eval_dataset = {
                    name: _mark_and_count(dataset, name, args, formatting_func)[0]
                    for name, dataset in eval_dataset.items()
                }
            elif eval_dataset is not None:
                eval_dataset, _ = _mark_and_count(eval_dataset, "eval", args, formatting_func)
            first = next(iter(train_dataset))
            if found or (is_messages(first) and args.assistant_only_loss is not False):
                self.processor = load_processor(model, args) if processing_class is None else processing_class
                tokenizer = processing_class = load_tokenizer(model, args, self.processor)
                template = chat_template(args)
                if template is not None:
                    tokenizer = copy.deepcopy(processing_class)
                    tokenizer.chat_template = template
                turns = choose_turns(first, tokenizer, args.assistant_only_loss)
                check_rendering(train_dataset, "train", tokenizer, turns, args)
                by_marks = turns.by == "marks"

        if args.token_weighting == "perce":
            # Dispatching would cut a batch by rows, of which the counterfactual pass has fewer than the factual one
            if args.accelerator_config.dispatch_batches:
                logger.warning("`dispatch_batches` is set to `False`, since PerCE's two passes differ in their rows.")
            args.accelerator_config.dispatch_batches = False
        text_alone = train_dataset is not None and trains_text_alone(train_dataset)
        if text_alone and kwargs.get("peft_config") is not None:
            kwargs["peft_config"] = fit_adapter(kwargs["peft_config"], model, args, kwargs.get("quantization_config"))
        self._marked_ahead = True  # what `SFTTrainer.__init__` prepares is marked, what `evaluate` prepares is not
        args.assistant_only_loss = bool(by_marks)  # TRL checks the template's marks where it goes by them
        try:
            super().__init__(
                model, args, data_collator, train_dataset, eval_dataset, processing_class, *positional, **kwargs
            )
        finally:
            args.assistant_only_loss = self._assistant_only_loss
        self._marked_ahead = False
        print_in_lines(self)
        check_placement(self.model, trained=True)
        if text_alone:
            freeze_unused(self.model)
        if self.is_deepspeed_enabled and args.on_nonfinite == "skip":
            raise ValueError(
                "`on_nonfinite='skip'` does not go with DeepSpeed, whose engine steps by itself. Set it to 'stop'."
            )
        parallelism = self.accelerator.parallelism_config
        if args.token_weighting != "uniform" and parallelism is not None:
            if parallelism.cp_enabled or parallelism.sp_enabled:
                raise ValueError(
                    f"`token_weighting='{args.token_weighting}'` does not go with context or sequence parallelism, which cut "
                    "rows apart. Set `cp_size` and `sp_size` to 1, or `token_weighting='uniform'`."
                )
        if parallelism is None or not parallelism.sp_enabled:
            # Some models' own losses take no `num_items_in_batch`. Ours does, and without it accumulation would average averages.
            self.model_accepts_loss_kwargs: bool = True
            self._loss_shifts_labels: bool = True
        if args.fp16:
            make_trainable_in_fp16(self.model)
        if not has_accelerator():
            dtype = "bfloat16" if self.accelerator.mixed_precision == "bf16" else str(self.model.dtype).split(".")[-1]
            logger.warning(f"No accelerator: training on the CPU in {dtype}.")
        warn_of_slow_bf16(self.model, autocast_dtype(args))
        check_4bit_weights_trainable(self.model)
        keep_4bit_weights_trainable_on_cpu(self.model)

        if args.token_weighting == "perce":
            self._warned_of_noise = warn_of_noise(self.model, args)
            if data_collator is None:  # the collator that TRL built, with both passes
                self.data_collator: Any = DataCollatorForPerCE(
                    **dataclasses.asdict(self.data_collator),
                    counterfactual="mask" if args.counterfactual == "mask" else "drop",
                )
            hidden_size = self.model.config.get_text_config().hidden_size
            self._e_step = EStep(self.accelerator, self.data_collator, hidden_size, args.counterfactual_batch_tokens)
        elif args.token_weighting == "given" and data_collator is None:
            self.data_collator = DataCollatorForTokenWeights(**dataclasses.asdict(self.data_collator))
        self._finite_check = FiniteCheck(self.accelerator, args.on_nonfinite, self.train_dataset)
        self._token_metrics = TokenMetrics(self.accelerator, (args.weight_clip_min, args.weight_clip_max))

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if not self._marked_ahead:
            dataset, _ = _mark_and_count(dataset, dataset_name, args, formatting_func)
        # TRL asks the training set alone, and the kinds of rows may differ
        first = next(iter(dataset))
        turns = choose_turns(first, processing_class, self._assistant_only_loss)
        self.chat_template = turns.chat_template
        if args.completion_only_loss is None and "prompt" in first:
            self.completion_only_loss = "completion" in first
        # TRL truncates behind us, when the persona has been trimmed
        dataset, is_final = tokenize_with_mask(
            super()._prepare_dataset,
            dataset,
            dataset_name,
            processing_class,
            self._tokenizer,
            turns,
            args,
        )
        if packing and args.token_weighting not in ("perce", "given"):
            return super()._prepare_dataset(dataset, processing_class, args, True, None, dataset_name)
        # Where nothing is left to truncate, TRL need not read and write every row for it
        rest = copy_config(args, max_length=None) if is_final else args
        dataset = super()._prepare_dataset(dataset, processing_class, rest, False, None, dataset_name)
        # TRL would pack `input_ids` and `labels` alone
        return pack_dataset_with_mask(dataset, dataset_name, args) if packing else dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "persona_mask" not in self._signature_columns:
            self._signature_columns: list[str] = [*self._signature_columns, "persona_mask", "token_weights"]

    def train(self, *args, **kwargs):
        if self.args.token_weighting == "perce" and self.args.counterfactual_refresh_epochs > 1:
            self._log_prob_store = self._e_step.store = LogProbStore(self.args.counterfactual_refresh_epochs)
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._finite_check.start(batches)
        if batches:
            with self.compute_loss_context_manager():
                self.check_model_once(self.model_wrapped, batches[0], training=True)
        if self.args.token_weighting == "perce" and batches:
            self.load_rng_state_once()  # `Trainer` loads it after the E-step, whose dropout has drawn by then
            # E-step, with the parameters and in the mode of the M-step
            self.model_wrapped.train()
            self.optimizer.train()
            with self.compute_loss_context_manager():
                self._e_step(self.scored(self.model_wrapped), batches, epoch=int(self.state.epoch))
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.check_model_once(model, inputs, training=False)  # where no window came before: evaluation
        model = self.scored(model)
        if self.args.token_weighting == "uniform":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        if "counterfactual_rows" in inputs:  # not from a training window: evaluation
            self._e_step(model, [inputs])
        ours = {key: inputs.pop(key) for key in [*inputs] if "counterfactual" in key or key == "token_weights"}

        loss_type = self.args.loss_type

        def weighted_model(**kwargs):
            # TRL's NLL is linear in `log_probs`: weighting them here weights the loss, and leaves the rest to TRL
            outputs = model(**kwargs)
            if kwargs.get("fused_lm_head"):
                weights = self._token_weights(outputs, inputs, **ours)
                if loss_type == "dft":  # its weight is the token's probability
                    weights = weights * outputs.log_probs.detach().exp()
                outputs.log_probs = outputs.log_probs * weights
            return outputs

        self.args.loss_type = "nll"  # TRL would take the probability from what is weighted already
        try:
            with labelled_positions_only():
                return super().compute_loss(weighted_model, inputs, return_outputs, num_items_in_batch)  # M-step
        finally:
            self.args.loss_type = loss_type

    @torch.no_grad()
    def _token_weights(
        self,
        outputs,
        inputs,
        has_counterfactual=None,
        counterfactual_log_probs=None,
        counterfactual_tokens=0,
        token_weights=None,
    ) -> torch.Tensor:
        """Weights of the shape of `outputs.log_probs`, 0 on tokens that are not trained. Notes the metrics."""
        args, scored = self.args, outputs.label_mask
        log_probs = outputs.log_probs[scored].detach()
        bounds = (args.weight_clip_min, args.weight_clip_max)
        pir, paired = log_probs[:0], None
        if args.token_weighting == "loss":
            weights = loss_weights(log_probs, *bounds)
        elif args.token_weighting == "entropy":
            weights = entropy_weights(outputs.entropy[scored], *bounds)
        elif args.token_weighting == "given":
            weights = _like(scored, token_weights)[scored].to(log_probs.dtype)
        else:
            paired = _like(scored, has_counterfactual)[scored]  # the k-th has the k-th counterfactual log-probability
            pir = personal_influence_ratio(log_probs[paired], counterfactual_log_probs.to(log_probs.device))
            weights = torch.ones_like(log_probs).masked_scatter(
                paired, perce_weights(pir, *bounds).to(log_probs.dtype)
            )
        self._note(inputs, scored, log_probs, weights, pir, paired, counterfactual_tokens)
        if args.weight_normalization == "sequence":
            # Index of each token's row; with `padding_free` TRL's collator gives that of its document
            rows = torch.arange(len(scored), device=scored.device)[:, None].expand_as(scored)
            if "seq_idx" in inputs:
                rows = _like(scored, inputs["seq_idx"])
            weights = normalize_weights(weights, rows[scored].long(), int(rows.max()) + 1)
        return torch.zeros_like(outputs.log_probs).masked_scatter(scored, weights.to(log_probs.dtype))

    def _note(self, inputs, scored, log_probs, weights, pir, paired, counterfactual_tokens) -> None:
        """Note a micro-batch for the log, and in training where its values are not finite."""
        if self.model.training:
            bad = ~torch.isfinite(log_probs)
            if len(pir):
                bad[paired] |= ~torch.isfinite(pir)
            self._finite_check.note(torch.zeros_like(scored).masked_scatter(scored, bad))
        factual_tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        self._token_metrics.add(self._mode, log_probs, weights, pir, factual_tokens, counterfactual_tokens)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not self._finite_check.is_good(self.state.global_step + 1, grad_norm):
            self.optimizer.zero_grad()  # to `None`, which optimizers pass over
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._token_metrics.pop(self._mode)
        if self.args.token_weighting != "perce":
            metrics.pop("counterfactual/token_ratio", None)
        if self.args.token_weighting == "given":  # which are not clipped
            metrics = {name: value for name, value in metrics.items() if not name.startswith("weight/at_")}
        if self.model.training and self.args.on_nonfinite == "skip":
            metrics["skipped_steps"] = self._finite_check.skipped_steps
        self._metrics[self._mode].update({name: [value] for name, value in metrics.items()})
        super().log(logs, start_time)


def _like(scored: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    # Scores are of the next token: one column less than tokens. Virtual tokens (prompt tuning) come before. The head, and so the
    # scores, may be on another device than the inputs (`device_map`).
    return torch.nn.functional.pad(tokens.to(scored.device), (scored.size(1) - tokens.size(1), 0))


def _mark_and_count(dataset, name: str, args: PerCEConfig, formatting_func):
    dataset = mark_dataset(dataset, name, args, formatting_func)
    count_weights(dataset, name, args, required=name == "train")
    return dataset, count_personas(dataset, name, args, required=name == "train")
