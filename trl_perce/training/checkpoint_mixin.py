# SPDX-License-Identifier: Apache-2.0

"""Resuming: a trainer goes on from whole checkpoints alone, with the random numbers and the kept log-probabilities of the run before."""

from pathlib import Path

from safetensors import SafetensorError
from transformers import ProcessorMixin, Trainer

from ..utils.logger import get_logger
from .checkpoints import CheckpointError, check_whole, last_whole_checkpoint
from .log_prob_store import LogProbStore


logger = get_logger(__name__)


class CheckpointMixin(Trainer):
    """
    Over a trainer: `train(resume_from_checkpoint=True)` passes over checkpoints that were not written to their end, and a checkpoint
    that cannot be written is a [`~checkpoints.CheckpointError`] that names the last whole one. The processor of a multimodal model, of
    which the tokenizer alone is trained with, is saved beside it.
    """

    processor = None  # a tokenizer, or the processor that it is of

    _log_prob_store: LogProbStore | None = None
    _rng_checkpoint: str | Path | None = None  # whose random state is still to be loaded

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
        self._rng_checkpoint = resume_from_checkpoint if isinstance(resume_from_checkpoint, (str, Path)) else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False):
        if isinstance(self.processor, ProcessorMixin) and self.args.should_save:
            self.processor.tokenizer = self.processing_class  # as it was trained with
            self.processor.chat_template = self.processing_class.chat_template
            self.processor.save_pretrained(output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)

    def load_rng_state_once(self) -> None:
        """Load the random state of the checkpoint that the run resumes from, for what draws before `Trainer` loads it."""
        if self._rng_checkpoint is not None:
            self._load_rng_state(self._rng_checkpoint)

    def _load_rng_state(self, checkpoint):
        if checkpoint is not None and self._rng_checkpoint is not None:
            super()._load_rng_state(checkpoint)
            self._rng_checkpoint = None

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # which one a full disk raises depends on who writes
            whole = last_whole_checkpoint(self.args.output_dir)[0]
            raise CheckpointError(
                f"The checkpoint of step {self.state.global_step} could not be written: {error} "
                + (f"The last complete one is {whole}." if whole else "There is no complete one yet.")
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
