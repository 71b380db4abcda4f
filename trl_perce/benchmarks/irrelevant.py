# SPDX-License-Identifier: Apache-2.0

"""
Over-personalization: does a persona turn up in answers where it does not belong?

    a user's rows ── ask_irrelevant() ──► the same personas, other questions ── evaluate ──► uptake/own against uptake/other

The 100 questions of `data/irrelevant` have the same right answer for everybody. Words of the persona in an answer are there by chance,
which `uptake/other` tells, or because the model brings the persona up anyway.
"""

import copy
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

from trl import maybe_convert_to_chatml

from ..evaluation.predictions import split_conversation
from ..persona.marks import PLACEHOLDER, PersonaError, mark_persona
from ..persona.parts import join_parts
from .reading import Skips, check_unique, random_order, read_records, take


logger = logging.getLogger(__name__)

FILE = Path(__file__).parent / "data" / "irrelevant" / "questions.jsonl"

# A mark of a chat format that is written out, such as <|im_start|>user or [INST]
_TAG = r"(?:<+[^<>\s]+>+|\[[^\[\]\s]+\])(?:\w+\n)?"
_LABEL = r"[*_#>]*(?:(?:the|my|user'?s?)\s)?(?:user|human|question|query|q|me|input|request|message)[*_]*\s?[:：][*_]*"
# What may stand before a query and stays: "\n\nQuestion: ". A longer instruction goes with the query.
_LEAD = re.compile(rf"(?:{_TAG}|{_LABEL}|\W*\s|[.!?:;|。！？：；]+)*", re.IGNORECASE)
# Where an ending begins that all queries share: a line, a sentence, a bracket or a mark of its own
_TAIL = re.compile(rf"\s*\n|(?<=[.!?…:。！？])\s+|\s+\(|\s*{_TAG}")
# The same where there is one query alone: a last line such as "Answer:"
_LAST_LINE = re.compile(r"\s*\n\W*(?:\w+ ){0,2}\w+\W*[:：]\W*$")
_END = re.compile(r"[\n.!?…:;|>。！？：；]")  # of a sentence or a line
_HEADING = re.compile(r"\s*[^\n.!?]*[:：]\s*")  # "About me: "
_INSIDE = "a persona inside of the query"


class _Place(NamedTuple):
    """
    Where a row's query is: in `text`, of the message with the index `message` or the prompt itself, before `start` or behind `end`.
    Personas and what is between them lie there; in a message before, if there is nothing there. `edges` are their first and last character.
    """

    row: dict[str, Any]
    user: str
    kept: set[int]  # other messages that stay
    message: int
    text: str
    start: int = 0
    end: int = 0
    edges: str = ""
    between: tuple[str, ...] = ()
    later: "_Place | None" = None  # the place in the user's last message, where that is another one

    @property
    def around(self) -> tuple[str, str]:
        return self.text[: self.start], self.text[self.end :]


def load() -> list[dict[str, str]]:
    """
    The questions that come with the package: ten on each of ten topics, see `data/irrelevant/README.md`.

    Returns:
        `list[dict[str, str]]`: `id` (`"arithmetic/3"`), `topic`, `question` and `answer`, in the order of the file.
    """
    numbers: Counter[str] = Counter()
    questions = []
    for line, record in enumerate(read_records(FILE), start=1):
        own = {key: take(record, key, str, f"{FILE}, line {line}") for key in ("topic", "question", "answer")}
        numbers[own["topic"]] += 1
        questions.append({"id": f"{own['topic']}/{numbers[own['topic']]}", **own})
    check_unique((own["question"] for own in questions), str(FILE))
    return questions


def ask_irrelevant(
    rows: Iterable[dict[str, Any]],
    seed: int = 0,
    num_questions: int = 100,
    start_marker: str = "<persona>",
    end_marker: str = "</persona>",
    skips: Skips | None = None,
) -> list[dict[str, Any]]:
    """
    Rows with the personas of given rows and with irrelevant questions, to be evaluated as those are.

    The query is replaced, and the persona stays where and as it stands: in a system message, or in a message of the user (or a text), before
    or behind the query. What the rows share around it stays too: system messages, the words around the persona ("About me: "), a label of
    the query ("Question: "), an ending ("\\nAnswer:"). Other turns go, but for a message that holds the persona and no query, and the reply
    to it. Parts of a message are joined by a line break.

    Args:
        rows (iterable of `dict`): Rows with `prompt` and `completion`, or `messages`, and a persona as `evaluate` takes them, better of many
            users.
        seed (`int`, *optional*, defaults to `0`): Of the order of questions and users.
        num_questions (`int`, *optional*, defaults to `100`): How many to ask, 1 to 100, drawn at random. A user gets a second one only
            when each has one. Users without a name are told apart by their personas.
        start_marker (`str`, *optional*, defaults to `"<persona>"`): Text that opens a persona.
        end_marker (`str`, *optional*, defaults to `"</persona>"`): Text that closes it.
        skips ([`~trl_perce.benchmarks.reading.Skips`], *optional*): Counts rows that cannot be used, by reason, instead of the log.

    Returns:
        `list[dict[str, Any]]`: A row each question: `id`, `topic`, `prompt` and `completion` (messages or texts, as the given ones), and `user`,
            `persona` and `chat_template_kwargs` where they have them.

    Raises:
        `PersonaError`: A row's persona is unclear (the message names the row), or no row can be used.
        `ValueError`: A row has no prompt and response, or there are not as many questions.
    """
    questions = load()
    if not 1 <= num_questions <= len(questions):
        raise ValueError(f"`num_questions` is {num_questions}. Write a number from 1 to {len(questions)}.")
    counted, places = Skips() if skips is None else skips, []
    for index, row in enumerate(rows):
        place = _place(row, index, start_marker, end_marker)
        if isinstance(place, str):
            counted.add(place)
        else:
            places.append(place)
    by_user = defaultdict(list)
    for usable in _framed(_without_later(places), counted):
        by_user[usable[0].user].append(usable)
    if not by_user:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in counted.counts.most_common())
        raise PersonaError(
            f"No row's query can be replaced by another question: {reasons or 'there is no row'}. Write the same words around the persona in "
            f"each row, and a line break between it and the query, as in 'About me: {PLACEHOLDER}\\n\\nWhat now?'; or put the persona into a "
            "system message."
        )
    if skips is None:
        counted.log(logger, "rows, whose query cannot be replaced by another question,")
    users = [[*by_user.values()][index] for index in random_order(len(by_user), seed)]
    asked = []
    for number, index in enumerate(random_order(len(questions), seed)[:num_questions]):
        turn, user = divmod(number, len(users))
        asked.append(_row(questions[index], *users[user][turn % len(users[user])]))
    return asked


def _place(row: dict[str, Any], index: int, start_marker: str, end_marker: str) -> _Place | str:
    """The place of a row's query, or why there is none."""
    try:
        row = split_conversation(row)
        if row.get("prompt") is None or row.get("completion") is None:
            raise PersonaError(
                f"it needs 'prompt' and 'completion', or 'messages'; it has {', '.join(map(repr, row))}."
            )
        marked, spans = mark_persona(copy.deepcopy(row), "text", start_marker, end_marker)
    except PersonaError as error:
        raise PersonaError(f"row {index}: {error}") from error
    if not spans:
        return "no persona"
    try:
        spans = join_parts(marked, spans)
    except PersonaError:
        return "a message that is not text alone"
    raw, is_chat = maybe_convert_to_chatml(copy.deepcopy(row)), not isinstance(row["prompt"], str)
    texts, clean = ([_text(one) for one in of["prompt"]] if is_chat else [of["prompt"]] for of in (raw, marked))
    roles = [one["role"] for one in marked["prompt"]] if is_chat else ["user"]
    asked = [number for number, role in enumerate(roles) if role == "user"]
    systems = {number for number, role in enumerate(roles) if role in ("system", "developer")}
    holders = {span.message or 0 for span in spans} - systems
    if not asked:
        return "no message of the user"
    if len(holders) > 1 or not holders <= {*asked}:
        return "a persona in several turns, or in one that is not the user's"
    personas = [clean[span.message or 0][span.start : span.end] for span in spans]
    user = "\n\n".join(personas) if row.get("user") is None else str(row["user"])
    last = asked[-1]
    replies = {number + 1 for number in holders if number < last and roles[number + 1] == "assistant"}
    place = _Place(raw, user, systems | holders | replies, last, texts[last])
    if not holders:
        return place
    message = holders.pop()
    marks = rf"{re.escape(PLACEHOLDER)}|{re.escape(start_marker)}.*?{re.escape(end_marker)}"
    found = [*re.finditer(marks, texts[message], re.DOTALL)]
    here = [own for own, span in zip(personas, spans, strict=True) if (span.message or 0) == message]
    return place._replace(
        kept=systems,
        message=message,
        text=texts[message],
        start=found[0].start(),
        end=found[-1].end(),
        edges=here[0][0] + here[-1][-1],
        between=tuple(texts[message][a.end() : b.start()] for a, b in zip(found, found[1:], strict=False)),
        later=place if message < last else None,
    )


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _without_later(places: list[_Place]) -> list[_Place]:
    """Where a message holds the persona and no query, that is in the last one."""
    around = Counter(place.around for place in places if place.later)
    is_shared = len(around) == 1 and around.total() > 1
    return [
        place.later
        if place.later and (is_shared or not place.around[1].strip() and place.around[0].rstrip()[-1:] in ("", ":"))
        else place
        for place in places
    ]


def _framed(places: list[_Place], skips: Skips) -> list[tuple[_Place, str, str]]:
    """The places whose query can be told from the persona, with what goes before and behind a question in its place."""
    between = Counter(place.between for place in places)
    both = [place.around for place in places if all(map(str.strip, place.around))]
    firsts, seconds = Counter(one[0] for one in both), Counter(one[1] for one in both)
    groups = defaultdict(list)
    for place in places:
        first, second = place.around
        # What most rows have is not the query
        is_first, is_second = 2 * firsts[first] > len(both), 2 * seconds[second] > len(both)
        is_heading = is_first == is_second and _HEADING.fullmatch(first) and not _HEADING.fullmatch(second)
        if any(map(str.strip, place.between)) and between[place.between] == 1 < len(places):
            skips.add(_INSIDE)
        elif second.strip() and (not first.strip() or is_first > is_second or is_heading):
            groups[True, place.end > 0, first].append(place)
        elif first.strip() and (not second.strip() or is_second > is_first):
            groups[False, True, second].append(place)
        else:
            skips.add(_INSIDE if first.strip() else "no query beside the persona")
    framed = []
    for (is_behind, is_here, _), own in groups.items():
        lead, tail = _shared([place.around[is_behind] for place in own])
        for place in own:
            if is_here and not _is_apart(place, is_behind, lead, tail):
                skips.add(_INSIDE)
            elif is_behind:
                framed.append((place, place.text[: place.end] + lead, tail))
            else:
                framed.append((place, lead, tail + place.text[place.start :]))
    return framed


def _shared(texts: list[str]) -> tuple[str, str]:
    """What stays of the beginning and of the end of texts with a query each."""
    texts = [*dict.fromkeys(texts)]
    lead = _LEAD.match(commonprefix(texts))[0]  # type: ignore[index]  # it may be empty
    rests = [text[len(lead) :] for text in texts]
    ending, same = _TAIL, len(commonprefix([rest[::-1] for rest in rests]))
    if len(rests) == 1:
        ending = _LAST_LINE
    found = [(rest, ending.search(rest, len(rest) - same)) for rest in rests]
    return lead, min((rest[match.start() :] if match else "" for rest, match in found), key=len)


def _is_apart(place: _Place, is_behind: bool, lead: str, tail: str) -> bool:
    """Whether persona and query are not of one sentence."""
    if not is_behind:
        return (tail or place.edges)[0] in "(<[" or (tail or place.edges)[0].isspace()
    join, query = place.edges[1] + lead, place.around[1][len(lead) :]
    is_begun = bool(join[-1].isspace() or _END.match(join[-1])) and not query[:1].islower()
    return is_begun or "\n" in join or bool(_END.search(lead))


def _row(question: dict[str, str], place: _Place, before: str, behind: str) -> dict[str, Any]:
    row, completion = place.row, place.row["completion"]
    text, answer = before + question["question"] + behind, question["answer"]
    made: dict[str, Any] = {"id": question["id"], "topic": question["topic"]}
    made |= {name: row[name] for name in ("user", "persona", "chat_template_kwargs") if name in row}
    if isinstance(row["prompt"], str):
        made["prompt"] = text
    else:
        messages = [*row["prompt"]]
        message = messages[place.message]
        messages[place.message] = {**message, "content": _like(message, text)}
        made["prompt"] = [messages[number] for number in sorted(place.kept | {place.message})]
    if isinstance(completion, str):
        made["completion"] = completion[: len(completion) - len(completion.lstrip())] + answer
    else:
        made["completion"] = [{"role": "assistant", "content": _like(completion[0], answer)}]
    return made


def _like(message: dict[str, Any], text: str) -> str | list[dict[str, str]]:
    return [{"type": "text", "text": text}] if isinstance(message.get("content"), list) else text
