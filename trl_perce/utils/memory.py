# SPDX-License-Identifier: Apache-2.0

"""How much memory something took at its peak."""

import ctypes
import gc
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
    can_reset = not gpus and reset_peak_resident()
    yield found
    if gpus:
        used = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
        found |= {"bytes": used, "of": "GPU"} if used else {}  # or other processes did the work
    elif can_reset:
        found |= {"bytes": peak_resident(), "of": "process"}


def reset_peak_resident() -> bool:
    """Measure the resident memory of this process anew, from what is held now. Whether that can be done: on Linux."""
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else the heap that the last run grew to would count as this one's
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # another system, or another C library than glibc
        return False
    return True


def peak_resident() -> int:
    """Peak of the resident memory since [`reset_peak_resident`], in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
