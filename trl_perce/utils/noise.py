# SPDX-License-Identifier: Apache-2.0

"""Messages of other libraries that the user of ours can do nothing about, and that read like a broken installation."""

import logging
import warnings


# Logger → how its message begins, and why it is kept off the screen
LOGGED = {
    # On import, which PEFT causes for any model, on CPUs with AVX512-BF16: it lacks a kernel for packed 4-bit weights. Ours are not packed
    # (`training/checks.py`: `keep_4bit_weights_trainable_on_cpu`).
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
# Category → regular expression for the start of a warning, and why
WARNED = {
    # PEFT 0.21 and TRL 1.16 ask a model by the names of before Transformers 5.23
    FutureWarning: r".(is_)?gradient_checkpointing(_enable|_disable)?. is deprecated",
    # PEFT 0.21 sets these by itself for mixtures of experts, adapted or not
    RuntimeWarning: r"The following (rank|alpha)_pattern keys did not match .* ignored: \['[^',]*gate_up_proj'\]",
}


def _is_for_the_user(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(LOGGED[record.name])


def keep_noise_off() -> None:
    """Keep the messages of `LOGGED` and `WARNED` off the screen, and no others. It can be called again."""
    for name in LOGGED:
        logging.getLogger(name).addFilter(_is_for_the_user)
    for category, pattern in WARNED.items():
        warnings.filterwarnings("ignore", pattern, category)
