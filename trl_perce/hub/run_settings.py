# SPDX-License-Identifier: Apache-2.0

"""
`trl_perce.json`, beside a saved model or adapter: how its rows were rendered and cut to length and where their personas were, so that what uses it
later need not be told. (`training_args.bin`, which has the same, is a pickle, and loading one from the Hub would run its code.)
"""

import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..config import PerCEConfig
from ..utils.files import write_json
from ..utils.logger import get_logger


logger = get_logger(__name__)

NAME = "trl_perce.json"
# Settings of a training that are kept, and their types
_KEPT: dict[str, tuple[type, ...]] = {
    "max_length": (int, type(None)),
    "truncate_persona": (bool,),
    "persona_start_marker": (str,),
    "persona_end_marker": (str,),
    "chat_template_kwargs": (dict, type(None)),
    "answer_only_loss": (bool,),
}


def write_run_settings(args: PerCEConfig, folder: str | Path) -> None:
    """
    Write `trl_perce.json`.

    Args:
        args ([`PerCEConfig`]): Of the training.
        folder (`str` or `Path`): Where the model or adapter is saved. It goes to the Hub with it.
    """
    write_json(Path(folder) / NAME, {name: getattr(args, name) for name in _KEPT})


def read_run_settings(name: str) -> dict[str, Any]:
    """
    What `trl_perce.json` says.

    Args:
        name (`str`): Folder or name on the Hub of a model or an adapter.

    Returns:
        `dict[str, Any]`: `"max_length"`, `"truncate_persona"`, `"persona_start_marker"`, `"persona_end_marker"`,
            `"chat_template_kwargs"` and `"answer_only_loss"` of its training; empty if there is no such file, which is so where it was trained with
            something else. Values of a wrong type are left out, with a warning.
    """
    path = cached_file(
        name,
        NAME,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        logger.warning(f"{path} is not a JSON object, and is ignored.")
        return {}
    settings = {key: found[key] for key, types in _KEPT.items() if key in found and type(found[key]) in types}
    wrong = [key for key in _KEPT if key in found and key not in settings]
    if wrong:
        logger.warning(f"{path}: ignored what it says of {', '.join(wrong)}, which is of a wrong type.")
    return settings
