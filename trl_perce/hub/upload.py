# SPDX-License-Identifier: Apache-2.0

"""The Hub: uploads that try again, and errors that say what to do."""

import os
import shlex
import time
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, get_token
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.hub import hf_api

from ..config import PerCEConfig
from ..utils.logger import get_logger


logger = get_logger(__name__)

# What `huggingface_hub` raises when a request or an upload fails
UPLOAD_ERRORS = (HTTPError, OSError, RuntimeError)
_NOT_UPLOADED = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*")


class UploadError(OSError):
    """An upload to the Hub failed for good; the message says why and how to upload what is there."""


def make_repo(args: PerCEConfig) -> None:
    """
    Make the repository that a run pushes to, if there is none: with a token that is not accepted, training need not begin.

    Args:
        args ([`PerCEConfig`]): With `push_to_hub`.

    Raises:
        `UploadError`: It cannot be made.
    """
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    try:
        hf_api().create_repo(name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True)
    except UPLOAD_ERRORS as error:
        raise UploadError(
            f"`push_to_hub`: there is no repository {name!r} to push to. {_reason(error, args)}"
        ) from error


def upload_again(
    error: Exception,
    repo: str,
    args: PerCEConfig,
    commit_message: str,
    token: str | None = None,
    revision: str | None = None,
    attempts: int = 5,
    wait: float = 1.0,
) -> CommitInfo:
    """
    Go on with an upload that failed, as long as the Hub or the network may come back. Files that arrived are not sent again.

    Args:
        error (`Exception`): Of the first attempt.
        repo (`str`): Where to.
        args ([`PerCEConfig`]): Of the run: its `output_dir` is uploaded, less checkpoints, as by [`~transformers.Trainer`].
        commit_message (`str`): Of the commit.
        token (`str`, *optional*): Instead of that of `args`.
        revision (`str`, *optional*): Instead of that of `args`.
        attempts (`int`, *optional*, defaults to `5`): How often at most, with the first.
        wait (`float`, *optional*, defaults to `1.0`): Seconds before the second attempt; twice as many before each further one.

    Returns:
        [`~huggingface_hub.CommitInfo`]: What was committed.

    Raises:
        `UploadError`: All attempts failed, or the error is not one that passes.
    """
    for attempt in range(2, attempts + 1):
        if not _may_pass(error):
            break
        logger.warning(f"The upload to {repo} failed. {_reason(error, args)} Trying again ({attempt} of {attempts}).")
        time.sleep(wait * 2 ** (attempt - 2))
        try:
            return hf_api().upload_folder(
                repo_id=repo,
                folder_path=args.output_dir,
                commit_message=commit_message,
                token=token or args.hub_token,
                ignore_patterns=[*_NOT_UPLOADED],
                revision=revision or args.hub_revision,
            )
        except UPLOAD_ERRORS as again:
            error = again
    excluded = [word for pattern in _NOT_UPLOADED for word in ("--exclude", pattern)]
    command = shlex.join(["hf", "upload", repo, str(args.output_dir), *excluded])
    raise UploadError(
        f"The upload to {repo} failed. {_reason(error, args)} {args.output_dir} is as it was; `{command}` uploads it."
    ) from error


def warn_if_failed(job: Future, repo: str, args: PerCEConfig) -> None:
    """
    Warn if an upload in the background failed, which nothing else would tell.

    Args:
        job ([`~concurrent.futures.Future`]): The upload, done.
        repo (`str`): Where to.
        args ([`PerCEConfig`]): Of the run.
    """
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.warning(
            f"An upload to {repo} during training failed. {_reason(error, args)} Training goes on; the next one "
            "uploads everything."
        )


def _status(error: BaseException | None) -> int | None:
    """HTTP status of an error, or of what caused it."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__
    return None


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, (LocalTokenNotFoundError, OfflineModeIsEnabled)):
        return False
    status = _status(error)
    return status is None or status >= 500 or status in (408, 425, 429)


def _reason(error: BaseException, args: PerCEConfig) -> str:
    status = _status(error)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "The Hub does not accept the token (or there is none): log in with `hf auth login`, or set `HF_TOKEN`."
    if status == 403:
        return "The token may not write there: make one with write permission, or choose another `hub_model_id`."
    if isinstance(error, OfflineModeIsEnabled):
        return "`HF_HUB_OFFLINE` is set: unset it to upload."
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
    for token in (args.hub_token, get_token(), os.environ.get("HF_TOKEN")):  # a server may repeat it
        text = text.replace(token, "<token>") if token else text
    return f"{text}."
