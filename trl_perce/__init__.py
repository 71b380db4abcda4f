# SPDX-License-Identifier: Apache-2.0

"""Fine-tune language models to be personal: PerContrast and the PerCE loss on top of TRL."""

import importlib
from typing import TYPE_CHECKING

from .utils.noise import keep_noise_off


if TYPE_CHECKING:
    from .config import PerCEConfig, PerContrastConfig
    from .persona.marks import PersonaError
    from .scoring.callbacks import PerContrastCallback
    from .scoring.percontrast import PerContrast
    from .scoring.scores import TokenScores
    from .trainer import PerCETrainer
    from .training.collator import DataCollatorForPerCE, DataCollatorForTokenWeights


__version__ = "0.1.0"

keep_noise_off()  # before PEFT is imported, which imports bitsandbytes

__all__ = [
    "DataCollatorForPerCE",
    "DataCollatorForTokenWeights",
    "PerCEConfig",
    "PerCETrainer",
    "PerContrast",
    "PerContrastCallback",
    "PerContrastConfig",
    "PersonaError",
    "TokenScores",
]

_MODULES = {
    "DataCollatorForPerCE": "training.collator",
    "DataCollatorForTokenWeights": "training.collator",
    "PerCEConfig": "config",
    "PerCETrainer": "trainer",
    "PerContrast": "scoring.percontrast",
    "PerContrastCallback": "scoring.callbacks",
    "PerContrastConfig": "config",
    "PersonaError": "persona.marks",
    "TokenScores": "scoring.scores",
}


def __getattr__(name: str):
    # Imported when asked for, so that `trl-perce --help` does not wait for torch
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
