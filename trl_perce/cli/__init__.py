# SPDX-License-Identifier: Apache-2.0

"""The command line: one module a command."""

import logging


# PEFT imports bitsandbytes, quantized model or not, which warns on CPUs with AVX512-BF16 that it lacks a kernel for packed 4-bit
# weights. Ours are not packed (`checks.keep_4bit_weights_trainable_on_cpu`).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
