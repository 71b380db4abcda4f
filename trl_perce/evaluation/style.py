# SPDX-License-Identifier: Apache-2.0

"""
Style: is a reply more like the user's own texts than like other users'?

    style/own      mean cosine with the user's responses in other rows
    style/other    mean cosine with each other user's responses, then over these users
    style/margin   the first less the second: over 0, it is more like this user's

What is alike, the encoder decides: one that was trained to tell authors apart (LUAR) measures style, one of meaning (MiniLM) topics, too.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig

from ..history.encoders import SentenceEncoder, embed_texts
from ..history.entries import folded


_BATCH = 32  # texts that are embedded at once
_LUAR_TOKENS = 512


class LuarEncoder:
    """
    LUAR (Rivera-Soto et al., 2021, [Learning Universal Authorship Representations](https://aclanthology.org/2021.emnlp-main.70)), such as
    `rrivera1849/LUAR-MUD` and `rrivera1849/LUAR-CRUD`: embeddings of authors. It takes several texts of an author at once, an
    episode; here each text is an episode of its own, so that users with many texts and with few are compared alike.

    Written after the model card, which calls it with `input_ids` and `attention_mask` of shape `(authors, texts, tokens)` and gets
    `(authors, 512)`. The published weights were not run where this library was written.

    Args:
        name (`str`): Name or folder of the model. Its own code is run.
        device (`str`, *optional*): Such as `"cuda"`. If `None`, the accelerator if there is one, else the CPU.

    Raises:
        `OSError`: There is no such model.
        `ValueError`: The weights are not those of its code.
    """

    def __init__(self, name: str, device: str | None = None):
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
        # Its code loads another model while it is made, which Transformers 5 does not allow in `from_pretrained`
        config = AutoConfig.from_pretrained(name, trust_remote_code=True)
        model = AutoModel.from_config(config, trust_remote_code=True)
        path = Path(name) / "model.safetensors"
        weights = load_file(path if path.is_file() else hf_hub_download(name, "model.safetensors"))
        missing = model.load_state_dict(weights, strict=False).missing_keys
        if missing:
            raise ValueError(
                f"`style_encoder`: the weights of {name!r} lack {', '.join(missing[:3])}. Take another one."
            )
        accelerator = torch.accelerator.current_accelerator(True)
        self.model = model.to(device or accelerator or "cpu").eval()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], is_query: bool = False) -> np.ndarray:
        """
        Args:
            texts (`Sequence[str]`): One batch.
            is_query (`bool`, *optional*, defaults to `False`): Makes no difference here.

        Returns:
            `np.ndarray`: `float32` of shape `(len(texts), dimension)`.
        """
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=_LUAR_TOKENS, return_tensors="pt"
        ).to(self.model.device)
        ids, mask = (inputs[name][:, None] for name in ("input_ids", "attention_mask"))
        return self.model(input_ids=ids, attention_mask=mask).float().cpu().numpy()


def check_encoder(name: str, trust_remote_code: bool) -> bool:
    """
    Whether an encoder is LUAR, from its `config.json`; no weights are loaded.

    Args:
        name (`str`): Name or folder of LUAR, or of any encoder that sentence-transformers loads.
        trust_remote_code (`bool`): Whether code that comes with a model may be run.

    Raises:
        `FileNotFoundError`: There is no such encoder.
        `ImportError`: A package is missing that it needs.
        `ValueError`: It brings code of its own, and `trust_remote_code` is off.
    """
    try:
        config, _ = PretrainedConfig.get_config_dict(name)
    except OSError as error:
        if not (Path(name) / "modules.json").is_file():  # sentence-transformers has models without a `config.json`
            raise FileNotFoundError(
                f"`style_encoder`: there is no encoder {name!r}, neither as a folder (seen from {os.getcwd()}) nor on the Hub, as far as "
                "it can be reached."
            ) from error
        config = {}
    is_luar = config.get("model_type") == "LUAR"
    package, source = ("einops", "einops") if is_luar else ("sentence_transformers", "'trl_perce[retrieval]'")
    if find_spec(package) is None:
        raise ImportError(f"`style_encoder`: {name!r} needs the package {package}: pip install {source}")
    if is_luar and not trust_remote_code:
        raise ValueError(f"`style_encoder`: {name!r} brings code of its own. Set `trust_remote_code` to run it.")
    return is_luar


def check_baseline(folder: str | Path, name: str) -> None:
    """
    Args:
        folder (`str` or `Path`): Folder of another evaluation.
        name (`str`): The encoder of this one.

    Raises:
        `ValueError`: There, style was measured by another encoder.
    """
    path = Path(folder) / "metrics.json"
    theirs = json.loads(path.read_text(encoding="utf-8")).get("style_encoder") if path.is_file() else None
    if theirs not in (None, name):
        raise ValueError(
            f"`baseline`: style in {str(folder)!r} was measured by {theirs!r}, and here by {name!r}. Compare by the same encoder."
        )


def check_texts(texts: Sequence[str], users: Sequence[str | None]) -> None:
    """
    Args:
        texts (`Sequence[str]`): The response of each row.
        users (`Sequence[str | None]`): Its user.

    Raises:
        `ValueError`: There are fewer than two users, or none has two texts.
    """
    number_of_texts = Counter(user for user, _ in _distinct_texts(texts, users))
    if len(number_of_texts) < 2:
        raise ValueError(
            f"`style_encoder` compares users, and there are rows of {len(number_of_texts)}. Give rows of two or more, with a column 'user'."
        )
    if max(number_of_texts.values()) < 2:
        raise ValueError(
            "`style_encoder` compares a prediction with the user's responses in other rows, and no user has two different ones. Give "
            "several rows of each user, with a column 'user', or leave it out."
        )


def load_encoder(name: str, trust_remote_code: bool, device: str | None = None) -> LuarEncoder | SentenceEncoder:
    """
    Load an encoder that [`check_encoder`] has looked at.

    Args:
        name (`str`): Its name or folder.
        trust_remote_code (`bool`): Whether code that comes with a model may be run.
        device (`str`, *optional*): Such as `"cuda"`. If `None`, the accelerator if there is one, else the CPU.
    """
    return (LuarEncoder if check_encoder(name, trust_remote_code) else SentenceEncoder)(name, device)


def style_values(
    predictions: Sequence[str],
    rows: Sequence[int],
    texts: Sequence[str],
    users: Sequence[str | None],
    encoder: LuarEncoder | SentenceEncoder,
) -> dict[str, np.ndarray]:
    """
    Cosine similarity of predictions with texts of users. A user's texts are the different responses in their rows, without the one that
    is the prediction's own reference (but for white space and case), which is left out of the other users', too. Means are over single
    texts, so that they do not depend on how many a user has. Each other user counts alike.

    Args:
        predictions (`Sequence[str]`): Of `P` rows. An empty one has 0 everywhere.
        rows (`Sequence[int]` of length `P`): Which rows these are.
        texts (`Sequence[str]` of length `R`): The response of each row, empty where it is not known.
        users (`Sequence[str | None]` of length `R`): Its user. Rows of nobody known are nobody's texts.
        encoder ([`LuarEncoder`] or [`~trl_perce.history.encoders.SentenceEncoder`]): Whose embeddings are compared.

    Returns:
        `dict[str, np.ndarray]`: `style/own`, `style/other` and `style/margin`, arrays of shape `(P,)`, between -1 and 1, the margin between
            -2 and 2. All three are NaN where the user, or all other users, have no other text.
    """
    owned = _distinct_texts(texts, users)
    numbers = {user: number for number, user in enumerate(dict.fromkeys(user for user, _ in owned))}
    same = {key: number for number, key in enumerate(dict.fromkeys(key for _, key in owned))}
    owners, keys = (
        np.array(found) for found in zip(*((numbers[user], same[key]) for user, key in owned), strict=True)
    )
    said = [text for text in predictions if text.strip()]
    embeddings = embed_texts(encoder, [*said, *owned.values()], False, _BATCH, what="texts")  # type: ignore[arg-type]
    directions = {text: _direction(embedding) for text, embedding in embeddings.items()}
    known = np.stack([directions[text] for text in owned.values()])

    values = {name: np.full(len(predictions), np.nan) for name in ("style/own", "style/other", "style/margin")}
    for place, (prediction, row) in enumerate(zip(predictions, rows, strict=True)):
        kept = keys != same.get(folded(texts[row]), -1)
        counts = np.bincount(owners[kept], minlength=len(numbers))
        own = numbers.get(users[row] or "")
        if own is None or not counts[own]:
            continue
        similarities = known @ directions[prediction] if prediction.strip() else np.zeros(len(known))
        sums = np.bincount(owners[kept], similarities[kept], len(numbers))
        means = sums[counts > 0] / counts[counts > 0]
        of_own = sums[own] / counts[own]
        if len(means) < 2:
            continue
        of_others = (means.sum() - of_own) / (len(means) - 1)
        for name, value in (("own", of_own), ("other", of_others), ("margin", of_own - of_others)):
            values[f"style/{name}"][place] = value
    return values


def _distinct_texts(texts: Sequence[str], users: Sequence[str | None]) -> dict[tuple[str, str], str]:
    """By user and folded text, the first of the user's texts that are the same but for white space and case."""
    owned: dict[tuple[str, str], str] = {}
    for text, user in zip(texts, users, strict=True):
        if user is not None and text.strip():
            owned.setdefault((user, folded(text)), text)
    return owned


def _direction(embedding: np.ndarray) -> np.ndarray:
    vector: np.ndarray = embedding.astype(np.float64)
    return vector / max(np.linalg.norm(vector), np.finfo(np.float64).tiny)
