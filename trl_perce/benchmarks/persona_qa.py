# SPDX-License-Identifier: Apache-2.0

"""
The identification experiment (PerCE paper, Appendix A): how well does a method find the personal tokens of an answer?

Rows have `persona`, `prompt`, `completion` and `personal_words`, as those in `data/persona_qa`. The unit is the token of
the answer. Special tokens, tokens of white space alone, and what the chat template puts around the answer do not count. A
token is personal if it holds at least one character of an annotated word: " needles," counts as " needles", and every
piece of a word that the tokenizer cuts up counts. Words that word matching and a judge predict become tokens by the same
rule ([`~trl_perce.persona.masks.token_mask`]).
"""

import ast
import importlib.util
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.endpoint import Endpoint
from ..evaluation.nltk_data import missing_nltk_data
from ..evaluation.thoughts import split_thought
from ..evaluation.words import content_words
from ..persona.masks import token_mask
from ..scoring.scores import TokenScores


logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "data" / "persona_qa"
# Of a row; `{persona}` stays, the trainer puts the row's persona there
PROMPT = "About me: {persona}\n\n"
# Edges of the PIR ranges of Figure 5, in nats. The threshold 1 is one of them: no range has both decisions.
PIR_EDGES = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)

# Wording and example ours
JUDGE_PROMPT = """\
Persona of a user:
{persona}

Question of this user:
{question}

Answer to this user:
{answer}

Some words of the answer depend on the persona: another user with the same question would have got other words there. Which \
words are these? Reply with a JSON list of single words and nothing else. Copy each word from the answer as it stands there. \
If no word depends on the persona, reply with []."""
JUDGE_EXAMPLE = [
    {
        "role": "user",
        "content": JUDGE_PROMPT.format(
            persona="I'm a retired baker in Lyon. I have a bad back, and I spoil my six nieces.",
            question="How could I spend the weekend?",
            answer="Invite the girls for croissants on Sunday, and let them carry the heavy trays.",
        ),
    },
    {"role": "assistant", "content": '["girls", "croissants", "carry", "heavy", "trays"]'},
]

_NLTK_DATA = {
    "punkt_tab": "tokenizers/punkt_tab/english/",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng/",
}

Spans = list[tuple[int, int]]


def load_rows(splits: tuple[str, ...] = ("train", "test")) -> list[dict[str, Any]]:
    """
    The rows that come with the package: 210 questions of 70 people, see `data/persona_qa/README.md`.

    Args:
        splits (`tuple[str, ...]`, *optional*, defaults to `("train", "test")`): 159 and 51 rows.
    """
    lines = [line for split in splits for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def question_of(row: dict[str, Any]) -> str:
    """The question of a row, without the persona."""
    return row["prompt"][-1]["content"].removeprefix(PROMPT)


def answer_of(row: dict[str, Any]) -> str:
    """The answer of a row."""
    return row["completion"][0]["content"]


def find_word(word: str, text: str, flags: re.RegexFlag = re.NOFLAG) -> Spans:
    """Character spans of a word (or phrase) in a text, as whole words: "sun" is not in "sunny"."""
    return [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags)]


@dataclass
class AnswerTokens:
    """
    The `N` tokens of one answer that count.

    Attributes:
        person (`str`): Whose answer it is: the row's persona.
        indices (`list[int]`): Which of the row's scored tokens they are.
        offsets (`list[tuple[int, int]]`): Half-open character span of each token in the answer.
        pir (`np.ndarray` of shape `(N,)`): Personal Influence Ratios, in nats.
        is_personal (`np.ndarray` of shape `(N,)` and dtype `bool`): Whether the token lies in an annotated word.
    """

    person: str
    indices: list[int]
    offsets: Spans
    pir: np.ndarray
    is_personal: np.ndarray


def answer_tokens(row: dict[str, Any], scores: TokenScores) -> AnswerTokens:
    """
    Bring a row's annotation and its scores together.

    Args:
        row (`dict[str, Any]`): A row with `personal_words`.
        scores ([`~trl_perce.scoring.scores.TokenScores`]): Of this row.

    Raises:
        `ValueError`: The row was not scored, has no persona, is not the one that was scored, or an annotated word is not in
            its answer.
    """
    answer, name = answer_of(row), row.get("id", scores.row)
    if scores.skipped is not None:
        raise ValueError(f"row {name!r} was not scored: {scores.skipped}")
    start = scores.response.find(answer)
    if start < 0:
        raise ValueError(f"row {name!r}: the answer {answer!r} is not in the scored response {scores.response!r}.")
    personal = [find_word(word, answer) for word in row["personal_words"]]
    if not all(personal):
        missing = [word for word, spans in zip(row["personal_words"], personal, strict=True) if not spans]
        raise ValueError(f"row {name!r}: the personal words {missing} are not in the answer {answer!r}.")
    offsets, counted = [], []
    for index, (first, last) in enumerate(scores.offsets):
        first, last = max(first - start, 0), min(last - start, len(answer))
        if not scores.is_special[index] and answer[first : max(last, 0)].strip():
            counted.append(index)
            offsets.append((first, last))
    pir = scores.pir[counted]
    if np.isnan(pir).any():
        raise ValueError(f"row {name!r} has tokens without a PIR: it needs a persona.")
    return AnswerTokens(row["persona"], counted, offsets, pir, in_spans(offsets, sorted(sum(personal, []))))


def in_spans(offsets: Spans, spans: Spans) -> np.ndarray:
    """Which tokens hold a character of a span: `bool` of shape `(N,)`. `spans` are in order."""
    return np.array(token_mask(offsets, spans), dtype=bool)


class ContentWords:
    """
    Finds nouns, verbs, adjectives and adverbs by NLTK's tokenizer and tagger. Their data (`punkt_tab` and
    `averaged_perceptron_tagger_eng`) are downloaded where they are missing, unless `HF_HUB_OFFLINE` is set. Without NLTK or its
    data, content words are those of [`~trl_perce.evaluation.words.content_words`]: then auxiliaries are left out that the tagger would
    keep as verbs.

    Attributes:
        method (`str`): `"NLTK"` or `"function words"`. Also logged.
    """

    def __init__(self):
        reason = _why_no_nltk()
        self.method = "NLTK" if reason is None else "function words"
        if reason:
            logger.warning(f"Word matching takes words that are not in a list of function words: {reason}")
        else:
            logger.info("Word matching takes the words that NLTK tags as nouns, verbs, adjectives and adverbs.")

    def __call__(self, text: str) -> Spans:
        """Character spans of the content words, in order."""
        if self.method == "NLTK":
            return _content_words_by_tag(text)
        return content_words(text)


def _why_no_nltk() -> str | None:
    if importlib.util.find_spec("nltk") is None:
        return "NLTK is not installed (pip install nltk)."
    missing = " ".join(missing_nltk_data(_NLTK_DATA))
    return (
        f"NLTK's data are not here and were not downloaded (python -m nltk.downloader {missing})." if missing else None
    )


def _content_words_by_tag(text: str) -> Spans:
    import nltk
    from nltk.tokenize import NLTKWordTokenizer, PunktTokenizer

    found = []
    for start, end in PunktTokenizer("english").span_tokenize(text):
        spans = [(start + a, start + b) for a, b in NLTKWordTokenizer().span_tokenize(text[start:end])]
        tags = nltk.pos_tag([text[a:b] for a, b in spans])
        found += [span for span, (_, tag) in zip(spans, tags, strict=True) if tag[:2] in ("NN", "VB", "JJ", "RB")]
    return found


def match_words(persona: str, answer: str, content_words: Callable[[str], Spans]) -> Spans:
    """
    Word matching, the baseline of Appendix A: content words of the answer that are content words of the persona too. Words
    are compared in lower case as they stand: "cat" is not "cats".

    Args:
        persona (`str`): The persona.
        answer (`str`): The answer.
        content_words (`Callable`): From a text to the spans of its content words: a [`ContentWords`].

    Returns:
        `list[tuple[int, int]]`: Character spans in the answer, in order.
    """
    known = {persona[start:end].lower() for start, end in content_words(persona)}
    return [(start, end) for start, end in content_words(answer) if answer[start:end].lower() in known]


@dataclass
class Judgement:
    """
    What a judge says of `R` rows.

    Attributes:
        spans (`list[list[tuple[int, int]]]`): Of each row, character spans of the words that it names, in order. None where
            its reply could not be read.
        words (`int`): Words that it named.
        rejected (`int`): Those of them that are not in the answer.
        unparseable (`int`): Replies without a list of words.
    """

    spans: list[Spans]
    words: int
    rejected: int
    unparseable: int


def judge_words(rows: list[dict[str, Any]], endpoint: Endpoint) -> Judgement:
    """
    LLM as a judge, the other baseline of Appendix A: a model names the words of each answer that depend on the persona. Each
    counts wherever it stands in the answer as a whole word, in upper or lower case; a phrase that stands there counts too.

    Args:
        rows (`list[dict[str, Any]]`): Rows; `personal_words` is not shown to the judge.
        endpoint ([`~trl_perce.evaluation.endpoint.Endpoint`]): The judge.
    """
    replies = endpoint.ask([judge_messages(row) for row in rows], desc="Judge")
    return read_judgement(rows, replies)


def judge_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """The question to the judge about a row, behind an answered example."""
    content = JUDGE_PROMPT.format(persona=row["persona"], question=question_of(row), answer=answer_of(row))
    return [*JUDGE_EXAMPLE, {"role": "user", "content": content}]


def read_judgement(rows: list[dict[str, Any]], replies: list[str]) -> Judgement:
    """The replies of a judge about rows, read and counted; see [`judge_words`]."""
    judgement = Judgement([], 0, 0, 0)
    for row, reply in zip(rows, replies, strict=True):
        words = parse_words(reply)
        judgement.unparseable += words is None
        found = [find_word(word, answer_of(row), re.IGNORECASE) if word else [] for word in words or []]
        judgement.words += len(found)
        judgement.rejected += found.count([])
        judgement.spans.append(sorted(set(sum(found, []))))
    logger.info(
        f"Judge: {judgement.words} words named, {judgement.rejected} of them not in the answer; {judgement.unparseable} of "
        f"{len(rows)} replies without a list of words, which count as no word"
    )
    return judgement


def parse_words(reply: str) -> list[str] | None:
    """
    The words in a model's reply: the last list of strings in it, in JSON or as Python writes it, alone, in an object, in a
    code fence or in prose; without one, the items of a bulleted or numbered list, up to a colon, a dash or a bracket. A
    thought before it does not count.

    Returns:
        `list[str]` or `None`: The words; `[]` if the list is empty, `None` if there is no list.
    """
    reply = split_thought(reply).answer
    found = None
    for match in re.finditer(r"\[[^\[\]]*\]", reply):
        for read in (json.loads, ast.literal_eval):
            try:
                words = read(match.group())
            except (ValueError, SyntaxError):
                continue
            if all(isinstance(word, str) for word in words):
                found = [word.strip() for word in words]
            break
    if found is None:
        items = re.findall(r"^\s*(?:[-*•]|\d+[.)])\s+(.+?)\s*$", reply, re.MULTILINE)
        found = [re.split(r":|\(|\s[-–—]\s", item)[0].strip(" \"'`*.,;“”‘’") for item in items] or None
    return found


def precision_recall_f1(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """
    Precision, recall and F1 of a decision, each 0 where it is 0 / 0.

    Args:
        predicted (`np.ndarray` of shape `(N,)` and dtype `bool`): Tokens that a method takes for personal.
        actual (`np.ndarray` of shape `(N,)` and dtype `bool`): Personal tokens.

    Returns:
        `dict[str, float]`: `"precision"`, `"recall"`, `"f1"`.
    """
    right, predicted, actual = (predicted & actual).sum(), predicted.sum(), actual.sum()
    return {
        "precision": float(right / max(predicted, 1)),
        "recall": float(right / max(actual, 1)),
        "f1": float(2 * right / max(predicted + actual, 1)),
    }


def f1_interval(
    predicted: list[np.ndarray], tokens: list[AnswerTokens], samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """
    95 % confidence interval of F1 by the percentile bootstrap over people, not tokens: the tokens of an answer and the answers
    of a person are not independent.

    Args:
        predicted (`list[np.ndarray]`): Tokens that a method takes for personal, of each row.
        tokens (`list[AnswerTokens]`): Of each row.
        samples (`int`, *optional*, defaults to `2000`): Bootstrap samples.
        seed (`int`, *optional*, defaults to `0`): Of the samples.
    """
    people = {person: index for index, person in enumerate(dict.fromkeys(row.person for row in tokens))}
    # Of each person: right tokens, predicted + personal tokens
    counts: np.ndarray = np.zeros((len(people), 2), dtype=int)
    for row_predicted, row in zip(predicted, tokens, strict=True):
        right = (row_predicted & row.is_personal).sum()
        counts[people[row.person]] += (right, row_predicted.sum() + row.is_personal.sum())
    drawn = np.random.default_rng(seed).integers(len(people), size=(samples, len(people)))
    right, total = counts[drawn].sum(1).T
    low, high = np.quantile(2 * right / np.maximum(total, 1), (0.025, 0.975))
    return float(low), float(high)


def precision_recall_curve(pir: np.ndarray, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """
    Precision and recall of the decision "PIR ≥ t" for every threshold t at which it changes (Figure 4).

    Args:
        pir (`np.ndarray` of shape `(N,)`): In nats.
        actual (`np.ndarray` of shape `(N,)` and dtype `bool`): Personal tokens, at least one.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray, float]`: Thresholds in nats, falling; precision and recall at each; and
        average precision, `Σ (recall_k − recall_{k−1}) precision_k`.
    """
    order = np.argsort(-pir, kind="stable")
    pir, right = pir[order], np.cumsum(actual[order])
    last = np.flatnonzero(np.append(np.diff(pir) != 0, True))  # of tokens with equal PIR, all or none
    precision, recall = right[last] / (last + 1), right[last] / right[-1]
    return pir[last], precision, recall, float(np.sum(np.diff(recall, prepend=0) * precision))


def accuracy_by_pir(
    pir: np.ndarray, actual: np.ndarray, edges: tuple[float, ...] = PIR_EDGES, threshold: float = 1.0
) -> list[dict[str, Any]]:
    """
    In each range of PIR, the share of tokens for which the decision "PIR > threshold" is right (Figure 5).

    Args:
        pir (`np.ndarray` of shape `(N,)`): In nats.
        actual (`np.ndarray` of shape `(N,)` and dtype `bool`): Personal tokens.
        edges (`tuple[float, ...]`, *optional*): Borders between the ranges, in nats, rising. A range holds its upper end.
        threshold (`float`, *optional*, defaults to `1.0`): In nats.

    Returns:
        `list[dict[str, Any]]`: Of each range `"low"` and `"high"` (`None` at the ends), `"tokens"`, and `"right"`, a share, or
        `None` where there are no tokens.
    """
    bins = np.searchsorted(edges, pir, side="left")
    right = (pir > threshold) == actual
    return [
        {
            "low": edges[index - 1] if index else None,
            "high": edges[index] if index < len(edges) else None,
            "tokens": int((bins == index).sum()),
            "right": float(right[bins == index].mean()) if (bins == index).any() else None,
        }
        for index in range(len(edges) + 1)
    ]
