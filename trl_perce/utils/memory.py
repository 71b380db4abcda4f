# SPDX-License-Identifier: Apache-2.0

"""How much memory something took at its peak."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def peak_memory() -> Iterator[dict[str, Any]]:
    """
    Peak memory of the block: of the GPU what PyTorch has allocated, over all that this process sees; without one what is resident of
    this process (Linux; elsewhere nothing is measured).

    Yields:
        `dict`: Empty in the block; afterwards `"bytes"` and `"of"`, `"GPU"` or `"process"`, or empty where it cannot be measured.
    """
    import torch

    found: dict[str, Any] = {}
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    can_reset = not gpus and _reset_resident()
    yield found
    if gpus:
        used = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
        found |= {"bytes": used, "of": "GPU"} if used else {}  # or other processes did the work
    elif can_reset:
        found |= {"bytes": _peak_resident(), "of": "process"}


def _reset_resident() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
