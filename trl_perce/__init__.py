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

"""Fine-tune language models to be personal: PerContrast and the PerCE loss on top of TRL."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .callbacks import PerContrastCallback
    from .collator import DataCollatorForPerCE
    from .config import PerCEConfig, PerContrastConfig
    from .percontrast import PerContrast
    from .persona import PersonaError
    from .scores import TokenScores
    from .trainer import PerCETrainer


__version__ = "0.1.0"

__all__ = [
    "DataCollatorForPerCE",
    "PerCEConfig",
    "PerCETrainer",
    "PerContrast",
    "PerContrastCallback",
    "PerContrastConfig",
    "PersonaError",
    "TokenScores",
]

_MODULES = {
    "DataCollatorForPerCE": "collator",
    "PerCEConfig": "config",
    "PerCETrainer": "trainer",
    "PerContrast": "percontrast",
    "PerContrastCallback": "callbacks",
    "PerContrastConfig": "config",
    "PersonaError": "persona",
    "TokenScores": "scores",
}


def __getattr__(name: str):
    # Imported when asked for, so that `trl-perce --help` does not wait for torch
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
