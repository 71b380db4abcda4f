# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

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
