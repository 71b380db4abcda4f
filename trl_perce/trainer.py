# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import dataclasses
from collections import defaultdict
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from .checkpoints import CheckpointError, check_whole, last_whole_checkpoint
from .checks import (
    chat_template,
    check_4bit_weights_trainable,
    check_arguments,
    is_prepared_by_trl,
    keep_4bit_weights_trainable_on_cpu,
    load_tokenizer,
    make_trainable_in_fp16,
)
from .collator import DataCollatorForPerCE
from .config import PerCEConfig, copy_config
from .dataset import check_rendering, count_personas, mark_dataset, pack_dataset_with_mask, tokenize_with_mask
from .estep import EStep
from .files import is_disk_error
from .finite_check import FiniteCheck
from .fused_head import labelled_positions_only
from .hub import UPLOAD_ERRORS, make_repo, upload_again, warn_if_failed
from .log_prob_store import LogProbStore
from .model_card import write_model_card
from .weighting import entropy_weights, loss_weights, normalize_weights, perce_weights, personal_influence_ratio


logger = get_logger(__name__)


class PerCETrainer(SFTTrainer):
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
    loss is that of [`~trl.SFTTrainer`], bit for bit.

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
            Dropout draws a mask of its own in each pass, which adds noise to PIR: set `lora_dropout=0`.
        args ([`PerCEConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            With `token_weighting="perce"`, a [`DataCollatorForPerCE`], which is also the default.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Any dataset type of [`~trl.SFTTrainer`]. The persona stands between markers (`<persona>…</persona>`) in any
            message but the response, or in a column `persona`, whose text takes the place of `{persona}` in the prompt.
            Rows that are already tokenized have a column `persona_mask`: 1 where a token belongs to the persona. Rows
            without a persona train as plain CE.
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
        `FloatingPointError`: In training, with `on_nonfinite="stop"`: a log-probability, a PIR or the gradient is NaN or infinite.
        `UploadError`: With `push_to_hub`: the repository cannot be made, before the model loads; an upload failed after several tries.
        `CheckpointError`: In training: a checkpoint could not be written (a full disk). Those before are as they were.

    Metrics, in every log line, over all processes and micro-batches since the last one: `pir/mean` (nats) and
    `pir/personal_fraction` (share with PIR > 1) over the tokens that the counterfactual pass scores; `weight/mean`,
    `weight/at_min` and `weight/at_max` (shares at the clipping bounds) over all trained tokens, before
    `weight_normalization`; `counterfactual/token_ratio`, the tokens of the counterfactual pass over those of the factual
    one; `nll`, the unweighted loss in nats a token, which compares across weightings. With `on_nonfinite="skip"` also
    `skipped_steps`, how many were left out so far.
    """

    _tag_names = ["trl", "perce"]
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
        if not isinstance(args, PerCEConfig):
            raise TypeError(f"`args` must be a `PerCEConfig`, got a `{type(args).__name__}`.")
        check_arguments(args, data_collator, kwargs)
        if args.push_to_hub and args.process_index == 0:
            make_repo(args)

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
            if found:
                processing_class = load_tokenizer(model, args, processing_class)
                template = chat_template(args)
                check_rendering(train_dataset, "train", processing_class, template, args.dataset_text_field)

        if args.token_weighting == "perce":
            # Dispatching would cut a batch by rows, of which the counterfactual pass has fewer than the factual one
            if args.accelerator_config.dispatch_batches:
                logger.warning("`dispatch_batches` is set to `False`, since PerCE's two passes differ in their rows.")
            args.accelerator_config.dispatch_batches = False
        self._marked_ahead = True  # what `SFTTrainer.__init__` prepares is marked, what `evaluate` prepares is not
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, *positional, **kwargs
        )
        self._marked_ahead = False
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
        if args.fp16:
            make_trainable_in_fp16(self.model)
        check_4bit_weights_trainable(self.model)
        keep_4bit_weights_trainable_on_cpu(self.model)

        if args.token_weighting == "perce":
            if data_collator is None:  # the collator that TRL built, with both passes
                self.data_collator: Any = DataCollatorForPerCE(
                    **dataclasses.asdict(self.data_collator), counterfactual=args.counterfactual
                )
            hidden_size = self.model.config.get_text_config().hidden_size
            self._e_step = EStep(self.accelerator, self.data_collator, hidden_size, args.counterfactual_batch_tokens)
        self._log_prob_store: LogProbStore | None = None
        self._finite_check = FiniteCheck(self.accelerator, args.on_nonfinite, self.train_dataset)
        self._uploads: WeakSet[Future] = WeakSet()  # in the background
        self._rng_checkpoint: str | Path | None = None  # whose random state is still to be loaded
        # Sums over trained tokens, one tensor a micro-batch; their ratios are logged
        self._token_sums: dict[str, list[torch.Tensor]] = defaultdict(list)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if not self._marked_ahead:
            dataset, _ = _mark_and_count(dataset, dataset_name, args, formatting_func)
        # TRL truncates behind us, when the persona has been trimmed
        dataset, is_final = tokenize_with_mask(
            super()._prepare_dataset,
            dataset,
            dataset_name,
            processing_class,
            self._tokenizer,
            self.chat_template,
            args,
        )
        if packing and args.token_weighting != "perce":
            return super()._prepare_dataset(dataset, processing_class, args, True, None, dataset_name)
        # Where nothing is left to truncate, TRL need not read and write every row for it
        rest = copy_config(args, max_length=None) if is_final else args
        dataset = super()._prepare_dataset(dataset, processing_class, rest, False, None, dataset_name)
        # TRL would pack `input_ids` and `labels` alone
        return pack_dataset_with_mask(dataset, dataset_name, args) if packing else dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "persona_mask" not in self._signature_columns:
            self._signature_columns: list[str] = [*self._signature_columns, "persona_mask"]

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if isinstance(resume_from_checkpoint, (str, Path)):
            check_whole(resume_from_checkpoint)
        if resume_from_checkpoint is True:
            whole, damages = last_whole_checkpoint(self.args.output_dir)
            for damage in damages:
                logger.warning(f"{damage}: it is passed over.")
            if damages and whole is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True`: no checkpoint in {self.args.output_dir} is whole. Train without it to "
                    "start anew."
                )
            resume_from_checkpoint = whole or True  # `True` where there is none: `Trainer` says so
        if self.args.token_weighting == "perce" and self.args.counterfactual_refresh_epochs > 1:
            self._log_prob_store = self._e_step.store = LogProbStore(self.args.counterfactual_refresh_epochs)
        self._rng_checkpoint = resume_from_checkpoint if isinstance(resume_from_checkpoint, (str, Path)) else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._finite_check.start(batches)
        if self.args.token_weighting == "perce" and batches:
            if self._rng_checkpoint is not None:
                self._load_rng_state(self._rng_checkpoint)
            # E-step, with the parameters and in the mode of the M-step
            self.model_wrapped.train()
            self.optimizer.train()
            with self.compute_loss_context_manager():
                self._e_step(self.model_wrapped, batches, epoch=int(self.state.epoch))
        return batches, num_items_in_batch

    def _load_rng_state(self, checkpoint):
        # `Trainer` loads it after the E-step, whose dropout has drawn by then: once is enough, before it
        if checkpoint is not None and self._rng_checkpoint is not None:
            super()._load_rng_state(checkpoint)
            self._rng_checkpoint = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.token_weighting == "uniform":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        if "counterfactual_rows" in inputs:  # not from a training window: evaluation
            self._e_step(model, [inputs])
        counterfactual = {key: inputs.pop(key) for key in [*inputs] if "counterfactual" in key}

        def weighted_model(**kwargs):
            # TRL's loss is linear in `log_probs`: weighting them here weights the loss, and leaves the rest to TRL
            outputs = model(**kwargs)
            if kwargs.get("fused_lm_head"):
                outputs.log_probs = outputs.log_probs * self._token_weights(outputs, inputs, **counterfactual)
            return outputs

        with labelled_positions_only():
            return super().compute_loss(weighted_model, inputs, return_outputs, num_items_in_batch)  # M-step

    @torch.no_grad()
    def _token_weights(
        self, outputs, inputs, has_counterfactual=None, counterfactual_log_probs=None, counterfactual_tokens=0
    ) -> torch.Tensor:
        """Weights of the shape of `outputs.log_probs`, 0 on tokens that are not trained. Notes the metrics."""
        args, scored = self.args, outputs.label_mask
        log_probs = outputs.log_probs[scored].detach()
        weights, pir = torch.ones_like(log_probs), log_probs[:0]
        bounds = (args.weight_clip_min, args.weight_clip_max)
        if args.token_weighting == "loss":
            weights = loss_weights(log_probs, *bounds)
        elif args.token_weighting == "entropy":
            weights = entropy_weights(outputs.entropy[scored], *bounds)
        else:
            paired = _like(scored, has_counterfactual)[scored]  # the k-th has the k-th counterfactual log-probability
            pir = personal_influence_ratio(log_probs[paired], counterfactual_log_probs.to(log_probs.device))
            weights[paired] = perce_weights(pir, *bounds)

        mode = "train" if self.model.training else "eval"
        if mode == "train":
            bad = ~torch.isfinite(log_probs)
            if len(pir):
                bad[paired] |= ~torch.isfinite(pir)
            self._finite_check.note(torch.zeros_like(scored).masked_scatter(scored, bad))
        factual_tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        sums = [
            *(log_probs.numel(), -log_probs.sum(), weights.sum()),
            *((weights <= bounds[0]).sum(), (weights >= bounds[1]).sum()),
            *(pir.numel(), pir.sum(), (pir > 1).sum()),
            *(counterfactual_tokens, factual_tokens),
        ]
        self._token_sums[mode].append(torch.stack([torch.as_tensor(x, device=log_probs.device).float() for x in sums]))

        if args.weight_normalization == "sequence":
            # Index of each token's row; with `padding_free` TRL's collator gives that of its document
            rows = torch.arange(len(scored), device=scored.device)[:, None].expand_as(scored)
            if "seq_idx" in inputs:
                rows = _like(scored, inputs["seq_idx"])
            weights = normalize_weights(weights, rows[scored].long(), int(rows.max()) + 1)
        return torch.zeros_like(outputs.log_probs).masked_scatter(scored, weights.to(log_probs.dtype))

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not self._finite_check.is_good(self.state.global_step + 1, grad_norm):
            self.optimizer.zero_grad()  # to `None`, which optimizers pass over
        return grad_norm

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # which one a full disk raises depends on who writes
            whole = last_whole_checkpoint(self.args.output_dir)[0]
            raise CheckpointError(
                f"The checkpoint of step {self.state.global_step} could not be written: {error} "
                + (f"The last whole one is {whole}." if whole else "There is no whole one yet.")
            ) from error

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # `trainer_state.json` comes next and tells that the checkpoint is whole: those of all processes are there
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self._log_prob_store is not None:
            self._log_prob_store.save(output_dir, self.args.process_index, self.args.world_size)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._log_prob_store is not None and checkpoint is not None:
            rows = self._log_prob_store.load(checkpoint)
            logger.info(f"{checkpoint} holds the counterfactual log-probabilities of {rows} rows.")

    def _send_telemetry(self):
        pass  # no request that nobody asked for

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
        args = self.args
        try:
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
        except UPLOAD_ERRORS as error:
            if self.hub_model_id is None or is_disk_error(error):  # there is no repository yet; saving failed
                raise
            # Only the upload again: saving is done, and would want all processes
            return upload_again(error, self.hub_model_id, args, commit_message, token, revision)

    def _push_from_checkpoint(self, checkpoint_folder):
        super()._push_from_checkpoint(checkpoint_folder)
        jobs = self.push_in_progress.jobs if self.is_world_process_zero() and self.push_in_progress else []
        for job in jobs:
            if job not in self._uploads:
                self._uploads.add(job)
                job.add_done_callback(lambda job: warn_if_failed(job, self.hub_model_id, self.args))

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            write_model_card(self, model_name, dataset_name)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        sums = self._token_sums.pop(mode, None)
        if sums is not None:
            # Summed on the CPU in float64, which counts beyond float32's 16 million
            total = torch.stack(sums).cpu().double().sum(0).float().to(self.accelerator.device)
            tokens, nll, weight, at_min, at_max, paired, pir, personal, ours, theirs = self.accelerator.reduce(
                total, reduction="sum"
            ).tolist()
            metrics = self._metrics[mode]
            if tokens:
                metrics["nll"] = [nll / tokens]
                metrics["weight/mean"] = [weight / tokens]
                metrics["weight/at_min"] = [at_min / tokens]
                metrics["weight/at_max"] = [at_max / tokens]
            if paired:
                metrics["pir/mean"] = [pir / paired]
                metrics["pir/personal_fraction"] = [personal / paired]
            if self.args.token_weighting == "perce":
                metrics["counterfactual/token_ratio"] = [ours / theirs]
        if mode == "train" and self.args.on_nonfinite == "skip":
            self._metrics[mode]["skipped_steps"] = [self._finite_check.skipped_steps]
        super().log(logs, start_time)


def _like(scored: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    # Scores are of the next token: one column less than tokens. Virtual tokens (prompt tuning) come before. The head, and so the
    # scores, may be on another device than the inputs (`device_map`).
    return torch.nn.functional.pad(tokens.to(scored.device), (scored.size(1) - tokens.size(1), 0))


def _mark_and_count(dataset, name: str, args: PerCEConfig, formatting_func):
    dataset = mark_dataset(dataset, name, args, formatting_func)
    return dataset, count_personas(dataset, name, args, required=name == "train")
