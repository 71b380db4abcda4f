# SPDX-License-Identifier: Apache-2.0

"""Which entries of a user's history go into the prompt of a row."""

import logging
import random
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from .entries import HistoryRow, folded, gives_away


if TYPE_CHECKING:
    from .encoders import ContrieverEncoder, SentenceEncoder


logger = logging.getLogger(__name__)

_CONTRIEVER = "facebook/contriever"

# Encoders round an embedding differently in another batch, and sums in another order. What is equal up to here is a tie.
_SCORE_DECIMALS = 5


class Retriever:
    """
    The entries of each row's history that go best with its query, what the paper takes as the persona (there the top 4 by
    Contriever).

    Never retrieved are the target itself (an entry whose `response` is the row's, but for white space and case) and, where
    the row has a `time`, entries that are not earlier. They have no influence on the others' order either. Ties go to the
    entry that stands first in the history. A row's result does not depend on the other rows, so one `k` gives the beginning
    of what a larger one gives.

    Args:
        method (`str`, *optional*, defaults to `"contriever"`):
            - `"contriever"`: dot product of mean-pooled embeddings, as in the code of LaMP and LongLaMP.
            - `"bm25"`: BM25 (Lucene's variant, k1 = 1.5, b = 0.75) of the package `bm25s`, with its words and its list of
              English stop words. The inverse document frequencies are those of the entries that may be retrieved.
            - `"recency"`: the latest first, by `time` if the entries have one, else by their place in the history; of two
              with the same time the one that stands last.
            - `"random"`: a sample that depends on `seed` and on the row's `user` and `id`.
            - else the name or folder of a model of sentence-transformers, with its own prompts and similarity.
        k (`int`, *optional*, defaults to `4`): Entries that a row gets at most.
        model (`str`, *optional*): Name or folder of the model for `"contriever"`; if `None`, `"facebook/contriever"`.
        cache_dir (`str` or `Path`, *optional*): Folder where embeddings are kept for later calls and runs, by the content of
            the text and of the model's weights. If `None`, nothing is kept.
        batch_size (`int`, *optional*, defaults to `64`): Texts that are embedded at once.
        device (`str`, *optional*): Of the encoder. If `None`, the accelerator if there is one, else the CPU.
        seed (`int`, *optional*, defaults to `0`): Of `"random"`.

    Raises:
        `ValueError`: `k` or `batch_size` is less than 1, or `model` is given with another method.
        `ImportError`: The method needs a package that is not installed.

    Examples:

    ```python
    rows = longlamp.load("train", ...)
    dataset = Dataset.from_list(to_examples(rows, Retriever("contriever", k=4, cache_dir=".cache/embeddings")(rows)))
    ```
    """

    def __init__(
        self,
        method: str = "contriever",
        k: int = 4,
        model: str | None = None,
        cache_dir: str | Path | None = None,
        batch_size: int = 64,
        device: str | None = None,
        seed: int = 0,
    ):
        for name, value in {"k": k, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"`{name}` is {value}, but must be at least 1.")
        if model is not None and method != "contriever":
            raise ValueError(
                f"`model` is {model!r}, but the retrieval method is {method!r}. Only 'contriever' takes a model; give that of "
                "sentence-transformers as the method."
            )
        package = {"contriever": None, "recency": None, "random": None, "bm25": "bm25s"}.get(
            method, "sentence_transformers"
        )
        if package is not None and find_spec(package) is None:
            raise ImportError(
                f"The retrieval method {method!r} needs the package {package}: pip install 'trl_perce[retrieval]'"
            )
        self.method = method
        self.k = k
        self.model = model
        self.cache_dir = cache_dir
        self.batch_size = batch_size
        self.device = device
        self.seed = seed

    def __call__(self, rows: Sequence[HistoryRow]) -> list[list[int]]:
        """
        Args:
            rows (`Sequence[HistoryRow]`): The rows.

        Returns:
            `list[list[int]]`: For each row, indices into its `history`, best first, at most `k`. Empty where the history has
            no entry that may be retrieved; the number of such rows is logged.

        Raises:
            `ValueError`: An entry has no `time` while its row has one, or, for `"recency"`, while other entries have one. Or
                there is no model of the method's name.
            `OSError`: There is no such model for Contriever.
        """
        candidates = _candidates(rows)
        if self.method == "recency":
            rank = _by_recency
        elif self.method == "random":
            rank = partial(_by_chance, seed=self.seed)
        elif self.method == "bm25":
            rank = _by_bm25
        else:
            rank = self._by_embedding(rows, candidates)
        pairs = tqdm(zip(rows, candidates, strict=True), total=len(rows), desc="Retrieving entries", disable=None)
        return [rank(row, indices)[: self.k] if indices else [] for row, indices in pairs]

    @cached_property
    def _encoder(self) -> "ContrieverEncoder | SentenceEncoder":
        from .encoders import ContrieverEncoder, SentenceEncoder

        if self.method == "contriever":
            return ContrieverEncoder(self.model or _CONTRIEVER, self.device)
        return SentenceEncoder(self.method, self.device)

    def _by_embedding(self, rows: Sequence[HistoryRow], candidates: list[list[int]]) -> Callable:
        pairs = [(row, indices) for row, indices in zip(rows, candidates, strict=True) if indices]
        if not pairs:
            return _best_first  # nothing will be ranked, so that no model is needed

        from .encoders import embed_texts

        embed = partial(embed_texts, self._encoder, batch_size=self.batch_size, cache_dir=self.cache_dir)
        queries = embed([row.search for row, _ in pairs], True)
        entries = embed([row.history[index].search for row, indices in pairs for index in indices], False)

        def rank(row: HistoryRow, indices: list[int]) -> list[int]:
            texts = [row.history[index].search for index in indices]
            places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
            # each text once, so that equal ones tie to the bit
            scores = self._encoder.similarity(queries[row.search], np.stack([entries[text] for text in places]))
            return _best_first(indices, scores[[places[text] for text in texts]])

        return rank


def _candidates(rows: Sequence[HistoryRow]) -> list[list[int]]:
    """The entries of each row that may be retrieved; what is left out is counted and logged."""
    candidates, num_targets, num_later, num_excluded_rows = [], 0, 0, 0
    for row in rows:
        target, indices = folded(row.response), []
        for index, entry in enumerate(row.history):
            if row.time is not None and entry.time is None:
                raise ValueError(
                    f"Row {row.id!r}: entry {index} of the history has no `time`, but the row has one, and no entry may be "
                    "later than the row. Give all entries a time, or the row none."
                )
            if entry.response is not None and gives_away(target, folded(entry.response)):
                num_targets += 1
            elif row.time is not None and entry.time is not None and not entry.time < row.time:
                num_later += 1
            else:
                indices.append(index)
        num_excluded_rows += bool(row.history) and not indices
        candidates.append(indices)
    logger.info(
        f"Histories of {len(rows)} rows: {sum(map(len, candidates))} entries may be retrieved; left out are {num_targets} that "
        f"hold the row's own response, or nearly all of it, and {num_later} that are not earlier than the row"
    )
    if num_targets:
        hold = "entry holds" if num_targets == 1 else "entries hold"
        logger.warning(f"{num_targets} {hold} the row's own response, or nearly all of it: not retrieved.")
    num_empty = candidates.count([])
    if num_empty:
        logger.warning(
            f"{num_empty} of {len(rows)} rows get no history entry: {num_empty - num_excluded_rows} have an empty history, of "
            f"{num_excluded_rows} every entry holds the row's own response or is not earlier than the row."
        )
    return candidates


def _best_first(indices: list[int], scores: np.ndarray) -> list[int]:
    return [indices[place] for place in np.argsort(-scores.round(_SCORE_DECIMALS), kind="stable")]


def _by_recency(row: HistoryRow, indices: list[int]) -> list[int]:
    times = [row.history[index].time for index in indices]
    if all(time is None for time in times):
        return indices[::-1]
    if None in times:
        raise ValueError(
            f"Row {row.id!r}: entry {indices[times.index(None)]} of the history has no `time`, but others have one, so that "
            "the latest cannot be told. Give all entries a time, or none."
        )
    return sorted(indices, key=lambda index: (row.history[index].time, index), reverse=True)


def _by_chance(row: HistoryRow, indices: list[int], seed: int) -> list[int]:
    generator = random.Random(repr((seed, row.user, row.id)))  # of a string: the same in every process
    return generator.sample(indices, len(indices))


def _by_bm25(row: HistoryRow, indices: list[int]) -> list[int]:
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of each index that it builds, one a row
    query, *entries = map(_bm25_words, [row.search, *(row.history[index].search for index in indices)])
    if not query or not any(entries):
        return indices  # every score is zero
    bm25 = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    bm25.index(entries, show_progress=False)
    return _best_first(indices, bm25.get_scores(query))


@lru_cache(maxsize=10_000)  # a user's rows share most of their entries
def _bm25_words(text: str) -> list[str]:
    import bm25s

    (words,) = bm25s.tokenize([text], return_ids=False, show_progress=False)
    return [word for word in words if word]  # an empty text has one empty word
