# SPDX-License-Identifier: Apache-2.0

"""
Checkpoints that were written whole. Transformers writes a checkpoint file by file into its place, `trainer_state.json` last: a
process that is killed meanwhile, or a full disk, leaves a part of one behind.
"""

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


_STATE = "trainer_state.json"


class CheckpointError(OSError):
    """A checkpoint could not be written; the message names the last one that was written whole."""


def find_damage(checkpoint: str | Path) -> str | None:
    """
    What is missing from a checkpoint. The headers of its files are read, not their content.

    Args:
        checkpoint (`str` or `Path`): Its folder.

    Returns:
        `str` or `None`: What is wrong, for a message; `None` if the checkpoint is whole.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    if not (checkpoint / _STATE).is_file():
        return f"it has no {_STATE}"
    try:
        TrainerState.load_from_json(checkpoint / _STATE)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
        return f"{_STATE} is not whole"
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix == ".safetensors" and not _is_whole_safetensors(path):
            return f"{path.relative_to(checkpoint)} is not whole"
        # What `torch.save` writes is a ZIP file, whose directory comes last
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"{path.relative_to(checkpoint)} is not whole"
    return None


def check_whole(checkpoint: str | Path) -> None:
    """
    Raise on a checkpoint that a run cannot go on from.

    Args:
        checkpoint (`str` or `Path`): Its folder.

    Raises:
        `ValueError`: It is not there, or [`find_damage`] finds something.
    """
    if damage := find_damage(checkpoint):
        raise ValueError(f"`resume_from_checkpoint`: {checkpoint} is not whole: {damage}.")


def last_whole_checkpoint(folder: str | Path) -> tuple[str | None, list[str]]:
    """
    The checkpoint that a run can go on from.

    Args:
        folder (`str` or `Path`): The run's `output_dir`; there need not be one.

    Returns:
        `tuple[str | None, list[str]]`: The whole checkpoint with the highest step, or `None` if there is none; and, of those with
        a higher step, what is wrong with each.
    """
    steps = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            steps[int(match[1])] = path
    damages: list[str] = []
    for step in sorted(steps, reverse=True):
        damage = find_damage(steps[step])
        if damage is None:
            return str(steps[step]), damages
        damages.append(f"{steps[step]} was not written to its end ({damage})")
    return None, damages


def _is_whole_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):  # compares the size that its header tells with that of the file
            return True
    except (SafetensorError, OSError):
        return False
