# SPDX-License-Identifier: Apache-2.0

"""What a trainer saves beside a model, and its uploads: they try again, failures in the background are told, the model card is ours."""

from concurrent.futures import Future
from pathlib import Path
from weakref import WeakSet

from transformers import Trainer

from ..config import PerCEConfig, copy_config
from ..utils.files import is_disk_error
from ..utils.logger import get_logger
from .model_card import folder_as_seen, is_written_by_us, write_model_card
from .run_settings import write_run_settings
from .upload import UPLOAD_ERRORS, upload_again, warn_if_failed


logger = get_logger(__name__)


class UploadMixin(Trainer):
    """Over a trainer: what goes to the Hub, and how."""

    args: PerCEConfig
    card_dataset: str | None = None  # name or path of the dataset, where it is known

    def __init__(self, *args, **kwargs):
        self._uploads: WeakSet[Future] = WeakSet()  # in the background
        super().__init__(*args, **kwargs)

    def _send_telemetry(self):
        pass  # no request that nobody asked for

    def save_model(self, output_dir=None, _internal_call=False):
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:  # ahead of the model: what pushes comes last
            write_run_settings(self.args, folder)
        is_own = is_written_by_us(folder / "README.md")
        super().save_model(output_dir, _internal_call)
        if is_own and self.is_world_process_zero():  # else PEFT's stays, which is blank
            self._write_card(folder)

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
        try:
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
        except UPLOAD_ERRORS as error:
            if self.hub_model_id is None or is_disk_error(error):  # there is no repository yet; saving failed
                raise
            # Only the upload again: saving is done, and would want all processes
            return upload_again(error, self.hub_model_id, self.args, commit_message, token, revision)

    def _push_from_checkpoint(self, checkpoint_folder):
        super()._push_from_checkpoint(checkpoint_folder)
        jobs = self.push_in_progress.jobs if self.is_world_process_zero() and self.push_in_progress else []
        for job in jobs:
            if job not in self._uploads:
                self._uploads.add(job)
                job.add_done_callback(lambda job: warn_if_failed(job, self.hub_model_id, self.args))

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        self._write_card(Path(self.args.output_dir), model_name, dataset_name, tags)

    def _write_card(self, folder: Path, model_name=None, dataset_name=None, tags=None) -> None:
        """Write the card of what is saved in a folder. It is written with each checkpoint: whatever fails in it, training goes on."""
        args, is_run = self.args, folder.absolute() == Path(self.args.output_dir).absolute()
        self.card_dataset = dataset_name or self.card_dataset
        repo = self.hub_model_id if is_run and self.hub_model_id else folder_as_seen(folder)
        if not is_run and folder.absolute().is_relative_to(Path(args.output_dir).absolute()):  # a checkpoint
            model_name = model_name or (self.hub_model_id or Path(args.output_dir).absolute().name).split("/")[-1]
        try:
            self.args = copy_config(args, output_dir=str(folder))  # where TRL writes
            super().create_model_card(model_name, self.card_dataset, tags)
            if self.is_world_process_zero():
                write_model_card(self, repo, model_name, self.card_dataset)
        except Exception as error:
            logger.warning(
                f"The model card {folder}/README.md could not be written: {type(error).__name__}: {error}. "
                "The model is saved without it."
            )
        finally:
            self.args = args
