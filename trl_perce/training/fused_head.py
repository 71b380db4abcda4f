# SPDX-License-Identifier: Apache-2.0

"""Scoring of labelled positions only, where TRL's fused head scores every position."""

from collections.abc import Iterator
from contextlib import contextmanager

from trl.trainer import utils


@contextmanager
def labelled_positions_only() -> Iterator[None]:
    """
    Let TRL's fused LM head project only the labelled positions on CPU too, inside of this context.

    TRL 1.16 does so on CUDA and XPU; elsewhere it scores every position, so that the tile shapes stay the same for
    devices that would recompile. On a long prompt that is a third of a training step on CPU. Log-probabilities and
    gradients are the same up to rounding.
    """
    compacts = utils._use_triton  # decides nothing but this in `trl.trainer.utils`
    utils._use_triton = lambda device: device.type == "cpu" or compacts(device)
    try:
        yield
    finally:
        utils._use_triton = compacts
