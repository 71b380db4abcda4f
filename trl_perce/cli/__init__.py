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

"""The command line: one module a command."""

import logging


# PEFT imports bitsandbytes, quantized model or not, which warns on CPUs with AVX512-BF16 that it lacks a kernel for packed 4-bit
# weights. Ours are not packed (`checks.keep_4bit_weights_trainable_on_cpu`).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
