# SPDX-License-Identifier: Apache-2.0

"""Accelerate's logger, whose lines name the process only where there are several."""

from accelerate import PartialState
from accelerate.logging import MultiProcessAdapter
from accelerate.logging import get_logger as get_accelerate_logger


class _Logger(MultiProcessAdapter):
    def process(self, msg, kwargs):
        text, kwargs = super().process(msg, kwargs)
        return text if PartialState().num_processes > 1 else text.removeprefix("[RANK 0] "), kwargs


def get_logger(name: str) -> MultiProcessAdapter:
    """
    [`~accelerate.logging.get_logger`] without `[RANK 0]` where there is one process.

    Args:
        name (`str`): Of the module.

    Returns:
        [`~accelerate.logging.MultiProcessAdapter`]: Logs on the main process, unless `main_process_only=False`.
    """
    return _Logger(get_accelerate_logger(name).logger, {})
