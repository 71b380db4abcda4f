# SPDX-License-Identifier: Apache-2.0

"""NLTK's data: found, or downloaded once, or named."""

import io
import logging


logger = logging.getLogger(__name__)


def missing_nltk_data(files: dict[str, str]) -> list[str]:
    """
    Which of NLTK's data are not here. Missing ones are downloaded into NLTK's default folder first, unless `HF_HUB_OFFLINE` is
    set.

    Args:
        files (`dict[str, str]`): From the name of a package of NLTK data to a file or folder in it, by which it is found:
            `{"wordnet": "corpora/wordnet/data.noun"}`.

    Returns:
        `list[str]`: Names of packages that are still missing.
    """
    import nltk
    from huggingface_hub import is_offline_mode

    missing = []
    for name, file in files.items():
        try:
            nltk.data.find(file)
        except LookupError:
            if is_offline_mode() or not _download(name):
                missing.append(name)
    return missing


def _download(name: str) -> bool:
    import nltk

    logger.warning(f"Downloading NLTK's data `{name}`, which are not in any of {', '.join(nltk.data.path)}.")
    return nltk.download(name, quiet=True, print_error_to=io.StringIO())
