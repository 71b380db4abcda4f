# SPDX-License-Identifier: Apache-2.0

"""bfloat16 on a CPU, most of which have no instructions for it."""

import time
from functools import cache

import torch

from .logger import get_logger


logger = get_logger(__name__)

_SLOW = 2.0


@cache
def bf16_slowdown() -> float:
    """
    How many times as long the matrix products of a linear layer take on this CPU in bfloat16 as in float32, forward and backward:
    below 1 with instructions for bfloat16 (AVX512-BF16, AMX), 10 and more where PyTorch does without. Measured once, in 0.1 s.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several wait for each other
    try:
        return _seconds(torch.bfloat16) / _seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of some rounds, the first of which sets up."""
    inputs, gradient = torch.ones(2, 64, 256, dtype=dtype)
    weight = torch.ones(256, 256, dtype=dtype)
    times = []
    for _ in range(12):
        started = time.perf_counter()
        _ = inputs @ weight.T, gradient @ weight, gradient.T @ inputs
        times.append(time.perf_counter() - started)
    return min(times)


def slow_bf16() -> str | None:
    """What to say where bfloat16 would be slow on this CPU, at least twice as slow as float32; `None` where it would not."""
    if bf16_slowdown() < _SLOW:
        return None
    return (
        f"bfloat16 is slow on this CPU: the matrix products of a training step take {bf16_slowdown():.0f} times as long as in float32. Set "
        "`dtype: float32` and `bf16: false`."
    )


def warn_of_slow_bf16(model, autocast: torch.dtype | None = None) -> None:
    """
    Warn, once, where a model computes in bfloat16 on a CPU that is slow at it ([`slow_bf16`]).

    Args:
        model ([`~torch.nn.Module`]): Where it will run.
        autocast (`torch.dtype`, *optional*): Of autocast, if any.
    """
    weights = [*model.parameters()]
    if all(weight.device.type == "cpu" for weight in weights):
        in_bf16 = autocast is torch.bfloat16 or any(weight.dtype is torch.bfloat16 for weight in weights)
        if in_bf16 and (message := slow_bf16()):
            _warn_once(message)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
