# SPDX-License-Identifier: Apache-2.0

"""
What is measured of an evaluation's rows, beyond what it writes itself: some figures are the difference of two, some come of its scores, and
what a figure means depends on the kind of rows.

    own           rows of held-out users
    seen          training rows, without a persona: what an adapter answers from memory
    irrelevant    personas of held-out users, with questions to which they do not matter
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..evaluation.likelihood import ratio_values
from ..scoring.score_file import read_scores
from ..utils.files import read_lines
from ..utils.statistics import bootstrap_interval, mean_over_seeds
from .settings import IRRELEVANT, OWN, SEEN


SAME = 0.05
"""Nats a token within which a likelihood counts as unchanged: 5 % of a token's probability."""

Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Measure:
    """
    A figure of an evaluation.

    Parameters:
        name (`str`): Its key in reports.
        kind (`str`): The kind of rows that it is of.
        group (`str`): Of [`~trl_perce.compare.findings.GROUPS`]; `""` for what stands in a grid's comparisons alone.
        title (`str`): For people, in its group.
        heading (`str`): For people, in a grid's comparisons.
        unit (`str`): `"nats"` (a token), `"share"`, `"words"`, `"tokens"` or `"score"`.
        note (`str`, *optional*): What it is, in a sentence.
        better (`str`, *optional*): `"higher"` or `"lower"`; `None` where neither is.
        values (`Callable`, *optional*): Makes the rows' values of those of an evaluation. By default those of the name.
        same (`float`, *optional*, defaults to `0.0`): A change whose interval is within it, in the unit, to either side, counts as none.
    """

    name: str
    kind: str
    group: str
    title: str
    heading: str
    unit: str
    note: str = ""
    better: str | None = None
    values: Callable[[Values], np.ndarray | None] | None = None
    same: float = 0.0

    def of(self, found: Values) -> np.ndarray | None:
        return found.get(self.name) if self.values is None else self.values(found)


def _difference(of: str, less: str) -> Callable[[Values], np.ndarray | None]:
    return lambda found: found[of] - found[less] if of in found and less in found else None


def _share(of: str) -> Callable[[Values], np.ndarray | None]:
    return lambda found: np.where(np.isnan(found[of]), np.nan, found[of] > 0) if of in found else None


def _excess(of: str, less: str) -> Callable[[Values], np.ndarray | None]:
    def values(found: Values) -> np.ndarray | None:
        own, other = (_share(name)(found) for name in (of, less))
        return None if own is None or other is None else own - other

    return values


def _renamed(name: str) -> Callable[[Values], np.ndarray | None]:
    return lambda found: found.get(name)


PERSONAL, OTHER, GAIN = "log_likelihood/personal", "log_likelihood/other", "gain/personal"
MEASURES = (
    Measure(
        PERSONAL,
        *(OWN, "use", "Personal tokens", "log P personal", "nats"),
        "Log-likelihood of the tokens of your users' own replies that depend on the persona, a token.",
        "higher",
    ),
    Measure(
        GAIN,
        *(OWN, "use", "… over another's persona", "log P personal, over another persona", "nats"),
        "How much likelier a personal token is with the user's own persona than with another user's.",
        "higher",
        _difference(PERSONAL, f"{PERSONAL}_swapped"),
    ),
    Measure(
        "uptake/own",
        *(OWN, "use", "Words of the persona", "uptake", "words"),
        "Content words of the user's persona in an answer that the prompt has not.",
        "higher",
    ),
    Measure(
        "uptake/other",
        *(OWN, "use", "… of another's, by chance", "uptake of another persona, by chance", "words"),
        "Content words of another user's persona in the same answers.",
    ),
    Measure("swapped/uptake/other", *(OWN, "", "", "uptake of another persona in the prompt", "words")),
    Measure(
        OTHER,
        *(OWN, "lost", "Other tokens", "log P other", "nats"),
        "Log-likelihood of all other tokens of your users' own replies, a token.",
        "higher",
        same=SAME,
    ),
    Measure(
        f"{PERSONAL}_swapped",
        *(OWN, "lost", "Personal, another's persona", "log P personal, another persona", "nats"),
        "The personal tokens, where the prompt has another user's persona: what is likelier here needs no persona.",
    ),
    Measure(
        f"{PERSONAL}_without",
        *(OWN, "lost", "Personal, no persona", "log P personal, no persona", "nats"),
        "The personal tokens, where the prompt has no persona at all.",
    ),
    Measure("pir/personal", *(OWN, "", "", "PIR personal", "nats")),
    Measure("pir/other", *(OWN, "", "", "PIR other", "nats")),
    Measure(
        "leak",
        *(SEEN, "lost", "… of users trained on", "log P personal, no persona, users trained on", "nats"),
        "The same of users in the training data: higher than before means that the adapter tells of them from memory.",
        "lower",
        _renamed(f"{PERSONAL}_without"),
    ),
    Measure(
        "irrelevant/share",
        *(IRRELEVANT, "irrelevant", "Answers with persona words", "answers with persona words, less chance", "share"),
        "Share of the answers with a word of the persona, less the share with a word of another user's, which is chance.",
        "lower",
        _excess("uptake/own", "uptake/other"),
    ),
    Measure(
        "irrelevant/pir",
        *(
            IRRELEVANT,
            "irrelevant",
            "The persona shifts a token by",
            "the persona shifts a token of the right answer by",
            "nats",
        ),
        "Mean of |PIR| over the tokens of the right answer, which is the same for everybody.",
        "lower",
        _renamed("pir/absolute"),
        same=SAME,
    ),
    Measure(
        "irrelevant/log_likelihood",
        *(IRRELEVANT, "irrelevant", "The right answer", "log P of the right answer", "nats"),
        "Log-likelihood of the right answer, a token.",
        "higher",
        _renamed("log_likelihood/all"),
    ),
    Measure(
        "options/likelihood",
        *(OWN, "options", "The right one is likeliest", "right option likeliest", "share"),
        "Share of rows whose right option has the highest mean log-likelihood a token.",
        "higher",
    ),
    Measure(
        "options/pir",
        *(OWN, "options", "The right one gains most", "right option gains most", "share"),
        "Share of rows whose right option gains the most from the persona (sum of PIR).",
        "higher",
    ),
    Measure("options/pir_margin", *(OWN, "", "", "gain of the right option over the mean option", "nats")),
    Measure("options/without", *(OWN, "", "", "its option likeliest, no persona", "share")),
    Measure(
        "options/swapped",
        *(OWN, "options", "… likeliest, another's persona", "its option likeliest, another persona", "share"),
        "Share of rows whose option is the likeliest where the prompt has another user's persona: chance.",
    ),
    Measure(
        "rougeL",
        *(OWN, "answers", "ROUGE-L", "ROUGE-L", "score"),
        "Overlap of an answer with the user's own reply; says little where there are many good replies.",
        "higher",
    ),
    Measure("meteor", *(OWN, "", "", "METEOR", "score")),
    Measure("judge/personalization", *(OWN, "", "", "judge, personalization", "score")),
    Measure("num_tokens", *(OWN, "answers", "Length", "tokens", "tokens"), "Generated tokens of an answer."),
    Measure(
        "finished",
        *(OWN, "answers", "Ended by itself", "answers that ended by themselves", "share"),
        "Share that ended before the limit.",
    ),
)


def read_values(folder: Path, with_scores: bool = True) -> tuple[Values, list[str]]:
    """
    The values of an evaluation's rows, NaN where a row has none, and the user of each row.

    Args:
        folder (`Path`): Of the evaluation.
        with_scores (`bool`, *optional*, defaults to `True`): Whether to read its scores, too, which take longer: they have what no file of
            metrics has, `log_likelihood/all`, `pir/absolute` and `has_persona`, and the persona, which tells users without a name apart.

    Returns:
        `tuple[Values, list[str]]`: Values by name; users by name, else by the persona's text, else by the row alone.
    """
    lines = [*read_lines(folder / "metrics.jsonl")]
    names = [name for name in lines[0] if name not in ("row", "id", "user")]
    values = {name: np.array([line[name] for line in lines], dtype=float) for name in names}
    users = [line["user"] or f"row {line['row']}" for line in lines]
    if not with_scores:
        return values, users
    sums, counts, gains, paired = ([] for _ in range(4))
    for place, row in enumerate(read_scores(folder / "scores")):
        has_pir = np.isfinite(row.pir)
        sums.append(row.log_probs.sum(dtype=np.float64))
        counts.append(len(row.log_probs))
        gains.append(np.abs(row.pir[has_pir]).sum(dtype=np.float64))
        paired.append(has_pir.sum())
        users[place] = lines[place]["user"] or row.persona or users[place]
    values["log_likelihood/all"] = ratio_values(np.array(sums), np.array(counts))
    values["pir/absolute"] = ratio_values(np.array(gains), np.array(paired))
    values["has_persona"] = np.array(paired) > 0
    values.setdefault("num_tokens", np.full(len(lines), np.nan))
    return values, users


def mean_of(values: np.ndarray, groups: Sequence[str]) -> tuple[float, list[float] | None]:
    """Mean over seeds and rows, and its 95 % interval: over new users, and with two or more seeds over new seeds, too."""
    found = (
        mean_over_seeds([*values], groups)["interval"] if len(values) > 1 else bootstrap_interval(values[0], groups)
    )
    return float(values.mean()), None if found is None else list(found)
