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

"""Bisection."""

from collections.abc import Callable


def largest_that_fits(fits: Callable[[int], bool], limit: int, resolution: int = 64) -> int | None:
    """
    The largest multiple of `resolution` up to `limit` that fits, found by doubling and bisection.

    Args:
        fits (`Callable[[int], bool]`): Whether a number fits. If one does, all smaller ones are taken to.
        limit (`int`): No number over it is tried.
        resolution (`int`, *optional*, defaults to `64`): Step of the numbers.

    Returns:
        `int` or `None`: The number; `None` if even `resolution` does not fit.
    """
    fitting, top = 0, limit // resolution
    candidate = 1
    while fitting < top:
        if fits(candidate * resolution):
            fitting = candidate
            candidate = min(2 * candidate, top) if top == limit // resolution else (fitting + top + 1) // 2
        else:
            top = candidate - 1
            candidate = (fitting + top + 1) // 2
    return fitting * resolution or None
