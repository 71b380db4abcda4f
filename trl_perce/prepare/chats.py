# SPDX-License-Identifier: Apache-2.0

"""
Conversations → rows: a reply, what was said before it, and who it is for.

In logs with roles the assistant's replies are trained, and the persona is the user's. In a flat log of people, without roles, each person's
replies to others are, and the persona is their own.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..benchmarks.reading import Skips
from ..history.entries import HistoryEntry, HistoryRow, folded
from ..persona.marks import PLACEHOLDER, ROLES
from .arguments import PrepareArguments
from .columns import Columns
from .loaded import DEFAULT_NOTES, Loaded, first_message, why_not, with_persona
from .tables import Record


_WROTE = f"What this user wrote before:\n\n{PLACEHOLDER}\n\n{{query}}"
_ABOUT_ME = f"You are this person:\n{PLACEHOLDER}\n\n{{query}}"
_I_WROTE = f"You are this person, who wrote before:\n\n{PLACEHOLDER}\n\n{{query}}"


@dataclass
class Message:
    """
    Attributes:
        role (`str`): `"system"`, `"user"` or `"assistant"`; `"tool"` for what is no text of any of them.
        text (`str`): What is said.
        time (`float`, *optional*): When.
        is_trained (`bool`, *optional*, defaults to `True`): Whether it may be a response: not with `"weight": 0` (OpenAI's format).
    """

    role: str
    text: str
    time: float | None = None
    is_trained: bool = True


class _Written(NamedTuple):
    conversation: int
    folded: str
    entry: HistoryEntry


@dataclass
class Conversation:
    """
    A conversation as one of its users has it.

    Attributes:
        id (`str`): Identifies it.
        user (`str`): Whose persona the prompt holds.
        messages (`list[Message]`): In order; two of the same role are one.
        persona (`str`, *optional*): Given by columns. If `None`, it is the history.
        own (`str`): Role of the messages that the user wrote.
    """

    id: str
    user: str
    persona: str | None
    messages: list[Message] = field(default_factory=list)
    own: str = "user"

    def add(self, message: Message) -> None:
        last = self.messages[-1] if self.messages else None
        if last is not None and last.role == message.role and last.text and message.text:
            last.text, last.time = f"{last.text}\n\n{message.text}", message.time
            last.is_trained = last.is_trained and message.is_trained
        else:
            self.messages.append(message)


def load_chats(records: list[Record], name: str, columns: Columns, args: PrepareArguments, skips: Skips) -> Loaded:
    """
    Rows of chat logs.

    Args:
        records (`list[Record]`): The records.
        name (`str`): `"messages"`, `"conversations"`, `"pairs"` or `"flat"`.
        columns ([`Columns`]): Of the records.
        args ([`PrepareArguments`]): Says which rows.
        skips ([`~trl_perce.benchmarks.reading.Skips`]): Counts what is left out.

    Returns:
        [`Loaded`]: The rows.

    Raises:
        `ValueError`: A record is not of the format; the message names its file, row and column.
    """
    loaded = Loaded(name, from_history=args.persona_column is None and args.persona_template is None)
    user_column = columns.need("user", "the user's, by which splits are made")
    if name == "flat":
        conversations = [*_flat(records, user_column, columns, args, skips, loaded)]
    else:
        conversations = [*_nested(records, name, user_column, columns, skips)]
    conversations = [one for one in conversations if _is_whole(one, skips)]
    loaded.columns = columns.used
    loaded.rows = [*_rows(conversations, args, skips)]
    return loaded


# ── records → conversations ──────────────────────────────────────────────────────────────────────────────────────────


def _nested(
    records: list[Record], name: str, user_column: str, columns: Columns, skips: Skips
) -> Iterator[Conversation]:
    """A record is a conversation."""
    time_column = columns.find("time")
    ids = [str(record.values.get("id")) for record in records]
    has_ids = len({*ids}) == len(ids)
    for number, record in enumerate(records):
        user = columns.user(record, user_column)
        if user is None:
            skips.add("the user is empty")
            continue
        time = columns.time(record, time_column)
        one = Conversation(ids[number] if has_ids else str(number), user, columns.persona([record]))
        if name == "pairs":
            for role, kind in (("user", "prompt"), ("assistant", "response")):
                one.add(Message(role, columns.text(record, columns.need(kind, f"the {kind}'s")), time))
        else:
            messages = record.values.get(name)
            if not isinstance(messages, list):
                raise ValueError(
                    f"{record.where}, column {name!r}: it is a {type(messages).__name__} and must be a list of messages, "
                    'such as [{"role": "user", "content": "…"}, …].'
                )
            for index, message in enumerate(messages):
                one.add(_message(message, f"{record.where}, column {name!r}, message {index}", columns, time))
        yield one


def _message(message: Any, where: str, columns: Columns, time: float | None) -> Message:
    """A message of OpenAI's form, `role` and `content`, or of ShareGPT's, `from` and `value`."""
    if not isinstance(message, dict):
        raise ValueError(f'{where}: it is a {type(message).__name__} and must be {{"role": …, "content": …}}.')
    role = _role(message.get("role", message.get("from")), where)
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # parts, some of which may be images
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else None
    own_time = message.get("time", message.get("timestamp"))
    if own_time is not None:
        time = columns.time(Record(where, {"time": own_time}), "time")
    if not isinstance(content, str) or message.get("tool_calls"):
        return Message("tool", "", time)
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(
            f"{where}: the weight of a message is {weight!r}. Write 0 (not trained) or 1 here, and others into the rows."
        )
    return Message(role, columns.secrets.clean(content.strip()), time, weight != 0)


def _role(value: Any, where: str) -> str:
    role = ROLES.get(str(value).strip().lower())
    if role is None:
        raise ValueError(f"{where}: the role is {value!r}. Write 'system', 'user', 'assistant' or 'tool'.")
    return {"developer": "system", "function": "tool", "ipython": "tool"}.get(role, role)


def _flat(
    records: list[Record], user_column: str, columns: Columns, args: PrepareArguments, skips: Skips, loaded: Loaded
) -> Iterator[Conversation]:
    """A record is a message. Those of a conversation are put together, in the order of their times."""
    text_column, time_column = columns.need("text", "the messages'"), columns.find("time")
    role_column, conversation_column = columns.find("role"), columns.find("conversation")
    if conversation_column is None and time_column is None:
        raise ValueError(
            "Neither a column of conversations nor one of times says which messages belong together. Name one with "
            f"`--conversation_column` or `--time_column`. {columns.there()}"
        )
    if role_column is None and conversation_column is None:
        raise ValueError(
            "Without a column of roles, the messages of people who talk with each other need `--conversation_column`. "
            f"{columns.there()}"
        )
    timed = [(record, columns.time(record, time_column)) for record in records]
    if time_column is not None:
        kept = [(record, time) for record, time in timed if time is not None]
        skips.add("a message without a time", len(timed) - len(kept))
        timed = sorted(kept, key=lambda pair: pair[1] or 0.0)  # of the same time: in the order of the file
    parts: dict[Any, list[tuple[Record, float | None]]] = defaultdict(list)
    current: dict[str, tuple[int, float]] = {}  # of a user: number of the conversation, time of the last message
    for record, time in timed:
        if columns.user(record, user_column) is None:
            skips.add("a message without a user")
        elif conversation_column is not None:
            # In logs with roles, numbers of conversations may be those of each user
            user = columns.user(record, user_column) if role_column is not None else None
            parts[user, str(record.values.get(conversation_column))].append((record, time))
        else:
            user = columns.user(record, user_column)
            assert user is not None and time is not None
            number, last = current.get(user, (0, time))
            number += (time - last) * 24 > args.gap_hours
            current[user] = number, time
            parts[user, str(number)].append((record, time))
    for (user, name), messages in parts.items():
        if role_column is not None:
            one = Conversation(f"{user}/{name}", user, columns.persona(record for record, _ in messages))
            for record, time in messages:
                role = _role(record.values.get(role_column), f"{record.where}, column {role_column!r}")
                one.add(Message(role, columns.text(record, text_column), time))
            yield one
        else:
            said = [
                (columns.user(record, user_column) or "", columns.text(record, text_column), time, record)
                for record, time in messages
            ]
            loaded.groups.append({speaker for speaker, *_ in said})
            yield from _as_each_has_it(name, said, columns)


def _as_each_has_it(
    name: str, said: list[tuple[str, str, float | None, Record]], columns: Columns
) -> Iterator[Conversation]:
    """A conversation between people, once for each of them, who is then the one that replies."""
    speakers = [*dict.fromkeys(speaker for speaker, *_ in said)]
    for user in speakers if len(speakers) > 1 else ():
        own = (record for speaker, _, _, record in said if speaker == user)
        one = Conversation(f"{name}/{speakers.index(user)}", user, columns.persona(own), own="assistant")
        for speaker, text, time, _ in said:
            if speaker == user:
                one.add(Message("assistant", text, time))
            else:
                one.add(Message("user", f"{speaker}: {text}" if len(speakers) > 2 else text, time))
        yield one


def _is_whole(conversation: Conversation, skips: Skips) -> bool:
    replies = any(message.role == "assistant" for message in conversation.messages)
    if not replies:
        skips.add("a conversation without a reply")
    return replies


# ── conversations → rows ─────────────────────────────────────────────────────────────────────────────────────────────


def _rows(conversations: list[Conversation], args: PrepareArguments, skips: Skips) -> Iterator[HistoryRow]:
    written: dict[str, list[_Written]] = defaultdict(list)
    for number, one in enumerate(conversations):
        for message in one.messages:
            if message.role == one.own and message.text:
                entry = HistoryEntry(message.text, message.text, response=message.text, time=message.time)
                written[one.user].append(_Written(number, folded(entry.text), entry))
    seen = set()
    for number, one in enumerate(conversations):
        others = [other for other in written[one.user] if other.conversation != number]
        for row in _rows_of(one, number, others, args, skips):
            key = (row.user, tuple(message["content"] for message in row.prompt), row.response)
            if key in seen:
                skips.add("the same prompt and response once more")
                continue
            seen.add(key)
            yield row


def _rows_of(
    one: Conversation, number: int, others: list[_Written], args: PrepareArguments, skips: Skips
) -> Iterator[HistoryRow]:
    system = [message.text for message in one.messages if message.role == "system" and message.text]
    said = [message for message in one.messages if message.role != "system"]
    indices = [index for index, message in enumerate(said) if message.role == "assistant"]
    if args.replies == "last":
        skips.add("not the last reply of its conversation (`replies`)", len(indices) - 1)
        indices = indices[-1:]
    for index in indices:
        if not said[index].is_trained:
            skips.add("a reply with the weight 0, which is not to be trained")
            continue
        before = said[max(0, index - args.turns) : index]
        while before and before[0].role == "assistant":
            before = before[1:]
        if not before or before[-1].role == "assistant":
            skips.add("nobody speaks before the reply")
            continue
        if any(message.role == "tool" or not message.text for message in before):
            skips.add("a message before the reply has no text (a tool, an image)")
            continue
        texts, reply = [message.text for message in before], said[index]
        reason = why_not([*system, *texts], reply.text, args)
        if reason is not None:
            skips.add(reason)
            continue
        history = _history(others, number, texts, reply, args.max_history) if one.persona is None else ()
        is_timed = bool(history) and history[0].time is not None
        template = {
            ("user", False): DEFAULT_NOTES,
            ("user", True): _WROTE,
            ("assistant", False): _ABOUT_ME,
            ("assistant", True): _I_WROTE,
        }[one.own, one.persona is None]
        contents = [first_message(args, template, texts[0]), *texts[1:]]
        row = HistoryRow(
            id=f"{one.id}/{index}",
            user=one.user,
            prompt=(
                *({"role": "system", "content": text} for text in ["\n\n".join(system)] if text),
                *({"role": m.role, "content": text} for m, text in zip(before, contents, strict=True)),
            ),
            response=reply.text,
            history=history,
            search=texts[-1],
            time=reply.time if is_timed else None,
        )
        made = with_persona(row, one.persona, skips)
        if made is not None:
            yield made


def _history(
    others: list[_Written], number: int, texts: list[str], reply: Message, limit: int
) -> tuple[HistoryEntry, ...]:
    """
    What a user wrote in other conversations, earlier than the reply: by time where all is timed, else by the order of the source. Each text
    once, and none that the prompt or the reply holds.
    """
    is_timed = reply.time is not None and all(other.entry.time is not None for other in others)
    if is_timed:
        others = [other for other in others if (other.entry.time or 0.0) < (reply.time or 0.0)]
        others.sort(key=lambda other: other.entry.time or 0.0)
    else:
        others = [other for other in others if other.conversation < number]
    known = {folded(text) for text in (*texts, reply.text)}
    kept: dict[str, HistoryEntry] = {}
    for other in reversed(others):  # of equal ones the latest
        if other.folded not in known:
            kept.setdefault(other.folded, other.entry)
        if len(kept) == limit:
            break
    entries = reversed(kept.values())
    return tuple(entries) if is_timed else tuple(replace(entry, time=None) for entry in entries)
