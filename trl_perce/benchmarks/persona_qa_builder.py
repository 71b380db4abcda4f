# SPDX-License-Identifier: Apache-2.0

"""
Writes rows as those of `data/persona_qa` for given personas, by any model behind an OpenAI-compatible endpoint (PerCE paper,
Appendix D.2: question, answer and keywords are generated for each persona; the prompt's wording and its example are ours).
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..evaluation.endpoint import Endpoint
from ..evaluation.thoughts import split_thought
from ..scoring.scores import WORD
from ..utils.files import write_json_lines
from .persona_qa import PROMPT, find_word


BUILDER_PROMPT = """\
Here is a user's persona:
{persona}

Write one short question about {topic} that this user could ask an assistant, and the answer for this very user.
- The question must be one that anybody could ask. It gives nothing of the persona away.
- The answer has 5 to 20 words. It fits this user and would be wrong or odd for most others. It says so mostly in other words \
than the persona's.
- The keywords are the words of the answer that depend on the persona: single words, copied from the answer, none of which is \
in the question.

Reply with one JSON object of "question", "answer" and "keywords" and nothing else."""
EXAMPLE = {
    "question": "What should I cook on Sunday?",
    "answer": "A coconut curry with chickpeas, since you leave meat and milk alone.",
    "keywords": ["coconut", "chickpeas", "meat", "milk"],
}
_EXAMPLE_PERSONA = "I'm a vegan nurse in Leeds. I sleep by day, and I collect old maps."
# Each question of a person is about another one
TOPICS = (
    *(
        "food",
        "a gift",
        "an evening at home",
        "a trip",
        "free time",
        "money",
        "health",
        "learning something",
        "clothes",
    ),
    *("music or films", "the home", "work or school", "meeting people", "exercise", "a plan for this week"),
)
MIN_WORDS, MAX_WORDS = 5, 20


class RejectedItem(ValueError):
    """An item that is not fit for the data. The message is the reason, the same for all items that are rejected for it."""


@dataclass
class BuiltRows:
    """
    What a model wrote.

    Attributes:
        rows (`list[dict[str, Any]]`): Accepted rows: `id`, `persona`, `prompt`, `completion`, `personal_words`.
        rejected (`list[dict[str, str]]`): The other replies: `id`, `reason`, `persona`, `reply`.
    """

    rows: list[dict[str, Any]]
    rejected: list[dict[str, str]]

    @property
    def reasons(self) -> Counter:
        """How many replies were rejected for which reason."""
        return Counter(item["reason"] for item in self.rejected)


def read_personas(source: str | Path, split: str = "train") -> list[str]:
    """
    Personas of a file or of a dataset of the Hub, each once, in order.

    Args:
        source (`str` or `Path`): A `.txt` file with one persona a line; a `.jsonl` file; or the name of a dataset of the Hub,
            such as `"google/Synthetic-Persona-Chat"`. A row's personas are in the columns whose name holds "persona"
            (`persona`, `user_1_persona`, `user 2 personas`), each a string or a list of sentences.
        split (`str`, *optional*, defaults to `"train"`): Of the dataset of the Hub.

    Raises:
        `ValueError`: There is no persona in it, or it is neither.
    """
    path = Path(source)
    if path.suffix == ".txt":
        found = path.read_text(encoding="utf-8").splitlines()
    elif path.suffix == ".jsonl":
        found = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                found += _personas_of(json.loads(line))
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{source}, line {number} is no JSON object: {error}") from error
    elif path.exists():
        raise ValueError(f"{source}: personas come from a .txt file, a .jsonl file or a dataset of the Hub.")
    else:
        from datasets import load_dataset

        found = [persona for row in load_dataset(str(source), split=split) for persona in _personas_of(row)]
    personas = list(dict.fromkeys(" ".join(persona.split()) for persona in found if persona.strip()))
    if not personas:
        raise ValueError(f"{source}: no persona found. A row needs a column whose name holds 'persona'.")
    return personas


def _personas_of(row: dict[str, Any]) -> list[str]:
    values = [value for name, value in row.items() if "persona" in name.lower() and value]
    return [value if isinstance(value, str) else " ".join(value) for value in values]


def build_rows(personas: list[str], endpoint: Endpoint, questions: int = 3, seed: int = 0) -> BuiltRows:
    """
    Have rows written and keep those that pass [`check_item`]. With the endpoint's `cache_path`, a run that was killed goes on.

    Args:
        personas (`list[str]`): Of people, each once.
        endpoint ([`~trl_perce.evaluation.endpoint.Endpoint`]): Who writes.
        questions (`int`, *optional*, defaults to `3`): Of a person, each about another topic; 15 at most.
        seed (`int`, *optional*, defaults to `0`): For the choice of topics.
    """
    rng, items = random.Random(seed), []
    for person, persona in enumerate(personas):
        for number, topic in enumerate(rng.sample(TOPICS, questions)):
            items.append((f"p{person + 1:03d}-{number + 1}", persona, topic))
    replies = endpoint.ask([builder_messages(persona, topic) for _, persona, topic in items], desc="Rows")
    return check_replies([(name, persona) for name, persona, _ in items], replies)


def builder_messages(persona: str, topic: str) -> list[dict[str, str]]:
    """The request for one question of a person about a topic, behind an answered example."""
    return [
        {"role": "user", "content": BUILDER_PROMPT.format(persona=_EXAMPLE_PERSONA, topic="food")},
        {"role": "assistant", "content": json.dumps(EXAMPLE)},
        {"role": "user", "content": BUILDER_PROMPT.format(persona=persona, topic=topic)},
    ]


def check_replies(items: list[tuple[str, str]], replies: list[str]) -> BuiltRows:
    """Sort a model's replies, each about an item of `(id, persona)`, into rows and rejected ones."""
    built, seen = BuiltRows([], []), set()
    for (name, persona), reply in zip(items, replies, strict=True):
        try:
            question, answer, words = check_item(read_item(reply))
            if answer == EXAMPLE["answer"]:
                raise RejectedItem("copy of the prompt's example")
            if answer in seen:
                raise RejectedItem("answer is there already")
        except RejectedItem as reason:
            built.rejected.append({"id": name, "reason": str(reason), "persona": persona, "reply": reply})
            continue
        seen.add(answer)
        built.rows.append(
            {
                "id": name,
                "persona": persona,
                "prompt": [{"role": "user", "content": PROMPT + question}],
                "completion": [{"role": "assistant", "content": answer}],
                "personal_words": words,
            }
        )
    return built


def read_item(reply: str) -> dict[str, Any]:
    """
    The last JSON object of a model's reply, alone, in a code fence or in prose. A thought before it does not count.

    Raises:
        `RejectedItem`: There is none.
    """
    reply, found, position = split_thought(reply).answer, None, 0
    while (position := reply.find("{", position)) >= 0:
        try:
            found, position = json.JSONDecoder().raw_decode(reply, position)
        except ValueError:
            position += 1
    if found is None:
        raise RejectedItem("no JSON object")
    return found


def check_item(item: dict[str, Any]) -> tuple[str, str, list[str]]:
    """
    Check what a model wrote.

    Args:
        item (`dict[str, Any]`): With `question` and `answer` (text) and `keywords` (list of text). A keyword's case does not
            matter.

    Returns:
        `tuple[str, str, list[str]]`: Question, answer, and its personal words as they and in the order they stand in it.

    Raises:
        `RejectedItem`: A field is missing, of another type or empty; the answer has fewer than 5 or more than 20 words; a
            keyword is no single word, is not in the answer as a whole word, is in it more than once (so that nobody knows
            which one is meant), is in the question or is a part of another one ("cat" of "cat's"); a text holds a mark of the
            trainer's (`{persona}`, `<persona>`).
    """
    question, answer, keywords = (item.get(name) for name in ("question", "answer", "keywords"))
    if not (isinstance(question, str) and isinstance(answer, str) and isinstance(keywords, list)):
        raise RejectedItem("question, answer or keywords missing")
    question, answer = " ".join(question.split()), " ".join(answer.split())
    if not question or not answer or not keywords:
        raise RejectedItem("question, answer or keywords empty")
    if any(mark in question + answer for mark in ("{persona}", "<persona>", "</persona>")):
        raise RejectedItem("mark of a persona in the text")
    if not MIN_WORDS <= len(answer.split()) <= MAX_WORDS:
        raise RejectedItem(f"answer not of {MIN_WORDS} to {MAX_WORDS} words")
    spans = set()
    for keyword in keywords:
        if not isinstance(keyword, str) or not WORD.fullmatch(keyword.strip()):
            raise RejectedItem("keyword is no single word")
        found = find_word(keyword.strip(), answer, re.IGNORECASE)
        if not found:
            raise RejectedItem("keyword not in the answer")
        if len(found) > 1:
            raise RejectedItem("keyword more than once in the answer")
        if find_word(keyword.strip(), question, re.IGNORECASE):
            raise RejectedItem("keyword in the question")
        spans.update(found)
    if any(end > start for (_, end), (start, _) in pairwise(sorted(spans))):
        raise RejectedItem("keyword inside of another")
    return question, answer, [answer[start:end] for start, end in sorted(spans)]


def write_rows(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    write_json_lines(path, rows)
