# SPDX-License-Identifier: Apache-2.0

"""Text encoders for retrieval, and their embeddings kept on disk."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from ..utils.files import written_whole


logger = logging.getLogger(__name__)

SHARD = 1024  # texts in a file of the cache: what a killed run may have to embed again


class ContrieverEncoder:
    """
    Contriever (Izacard et al. 2022, arXiv 2112.09118): the mean of BERT's last hidden states over a text's tokens, compared
    by dot product, as the code of LaMP and LongLaMP does it. Texts are cut at the model's limit (512 tokens).

    Args:
        name (`str`): Name or folder of a BERT-like encoder.
        device (`str`, *optional*): Such as `"cuda"`. If `None`, the accelerator if there is one, else the CPU.

    Attributes:
        identity (`str`): Of everything that an embedding depends on besides its text.

    Raises:
        `OSError`: There is no such model.
    """

    def __init__(self, name: str, device: str | None = None):
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        with _fixed_random_weights():
            model = AutoModel.from_pretrained(name, dtype=torch.float32)
        self.model = model.to(_device(device)).eval()
        self.max_length = min(self.tokenizer.model_max_length, model.config.max_position_embeddings)
        self.identity = _identity(model, self.tokenizer, "contriever", self.max_length)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], is_query: bool) -> np.ndarray:
        """
        Args:
            texts (`Sequence[str]`): One batch.
            is_query (`bool`): Makes no difference here.

        Returns:
            `np.ndarray`: `float32` of shape `(len(texts), dimension)`.
        """
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.model.device)
        mask = inputs["attention_mask"][..., None]
        states = self.model(**inputs).last_hidden_state * mask
        return (states.sum(dim=1) / mask.sum(dim=1)).cpu().numpy()

    def similarity(self, query: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """Dot products of a query, shape `(dimension,)`, with entries, shape `(N, dimension)`: shape `(N,)`."""
        return entries @ query


class SentenceEncoder:
    """
    Any model of sentence-transformers. Queries and entries get the model's own prompts for queries and documents, if it has
    any, and are compared by its own similarity function. Texts are cut at the model's limit.

    Args:
        name (`str`): Name or folder of the model.
        device (`str`, *optional*): Such as `"cuda"`. If `None`, the accelerator if there is one, else the CPU.

    Attributes:
        identity (`str`): Of everything that an embedding depends on besides its text.

    Raises:
        `ValueError`: There is no such model.
    """

    def __init__(self, name: str, device: str | None = None):
        from sentence_transformers import SentenceTransformer

        try:
            with _fixed_random_weights():
                model = SentenceTransformer(name, device="cpu", model_kwargs={"dtype": torch.float32})
        except OSError as error:
            raise ValueError(
                f"The retrieval method {name!r} is neither 'contriever', 'bm25', 'recency' nor 'random', and no model of "
                f"sentence-transformers can be loaded from there: {error}"
            ) from error
        self.model = model.to(_device(device))
        prompts = json.dumps([model.prompts, model.default_prompt_name])
        self.identity = _identity(model, model.tokenizer, repr(model), model.max_seq_length, prompts)

    def embed(self, texts: Sequence[str], is_query: bool) -> np.ndarray:
        """
        Args:
            texts (`Sequence[str]`): One batch.
            is_query (`bool`): Whether they are queries or entries, for models that tell them apart.

        Returns:
            `np.ndarray`: `float32` of shape `(len(texts), dimension)`.
        """
        encode = self.model.encode_query if is_query else self.model.encode_document
        return encode(list(texts), batch_size=len(texts), show_progress_bar=False, convert_to_numpy=True)

    def similarity(self, query: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """The model's similarity of a query, shape `(dimension,)`, to entries, shape `(N, dimension)`: shape `(N,)`."""
        return self.model.similarity(query[None], entries)[0].numpy()


def embed_texts(
    encoder: ContrieverEncoder | SentenceEncoder,
    texts: Sequence[str],
    is_query: bool,
    batch_size: int,
    cache_dir: str | Path | None = None,
    what: str = "history entries",
) -> dict[str, np.ndarray]:
    """
    Embed each distinct text once, in batches of about the same length, the longest first. Holds 4 bytes a dimension and text.

    With `cache_dir`, what is known there is not embedded, and every 1,024 new embeddings are written to a file of their own,
    whole or not at all, under the encoder's identity and a hash of each text: a run that was killed goes on from there. Of
    several processes with the same folder one embeds while the others wait for it.

    Args:
        encoder ([`ContrieverEncoder`] or [`SentenceEncoder`]): The encoder.
        texts (`Sequence[str]`): The texts.
        is_query (`bool`): Whether they are queries or entries.
        batch_size (`int`): Texts in a batch.
        cache_dir (`str` or `Path`, *optional*): Folder of embeddings on disk, for any number of encoders. If `None`, nothing
            is kept.
        what (`str`, *optional*, defaults to `"history entries"`): What to call the texts where they are no queries.

    Returns:
        `dict[str, np.ndarray]`: The embedding of each text, `float32` of shape `(dimension,)`.
    """
    texts = list(dict.fromkeys(texts))
    kind = "queries" if is_query else what
    if cache_dir is None:
        return dict(_embed_batches(encoder, texts, is_query, batch_size, kind))
    folder = Path(cache_dir) / encoder.identity
    folder.mkdir(parents=True, exist_ok=True)
    keys = {_key(text, is_query): text for text in texts}
    with FileLock(folder / "lock"):
        embeddings = {keys[key]: embedding for key, embedding in _read_shards(folder, keys)}
        logger.info(f"{folder}: the embeddings of {len(embeddings)} of {len(texts)} {kind} are known")
        missing = [text for text in texts if text not in embeddings]
        shard = {}
        for text, embedding in _embed_batches(encoder, missing, is_query, batch_size, kind):
            embeddings[text] = shard[_key(text, is_query)] = embedding
            if len(shard) == SHARD or len(embeddings) == len(texts):
                _write_shard(folder, shard)
                shard = {}
    return embeddings


def _embed_batches(encoder, texts, is_query, batch_size, kind) -> Iterator[tuple[str, np.ndarray]]:
    texts = sorted(texts, key=len, reverse=True)
    with tqdm(total=len(texts), desc=f"Embedding {kind}", disable=None) as bar:
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            yield from zip(batch, encoder.embed(batch, is_query), strict=True)
            bar.update(len(batch))


def _write_shard(folder: Path, shard: dict[bytes, np.ndarray]) -> None:
    name = hashlib.blake2b(b"".join(shard), digest_size=16).hexdigest()
    keys = np.frombuffer(b"".join(shard), dtype=np.uint8).reshape(len(shard), -1)
    with written_whole(folder / f"{name}.safetensors") as part:
        save_file({"keys": keys, "embeddings": np.stack(list(shard.values()))}, part)


def _read_shards(folder: Path, wanted: dict[bytes, str]) -> Iterator[tuple[bytes, np.ndarray]]:
    """Embeddings of those keys that are there. A file that cannot be read is removed: what it held is embedded again."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                keys = [key.tobytes() for key in file.get_tensor("keys")]
                rows = [row for row, key in enumerate(keys) if key in wanted]
                embeddings = file.get_tensor("embeddings")[rows] if rows else ()
        except SafetensorError as error:
            logger.warning(f"{path} cannot be read ({error}) and is removed; what it held is embedded again.")
            path.unlink()
            continue
        yield from zip((keys[row] for row in rows), embeddings, strict=True)


def _key(text: str, is_query: bool) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"query" if is_query else b"entry").digest()


def _identity(model: torch.nn.Module, tokenizer, *settings) -> str:
    """Of the weights themselves, so that neither a moved folder nor another revision under the same name misleads."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            digest.update(module.config.to_json_string().encode())
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def _fixed_random_weights() -> Iterator[None]:
    """Weights that a checkpoint lacks, such as BERT's unused pooler, come out the same each time: the identity has them."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _device(device: str | None) -> torch.device:
    return torch.device(device) if device else torch.accelerator.current_accelerator(True) or torch.device("cpu")
