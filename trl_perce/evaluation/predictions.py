# SPDX-License-Identifier: Apache-2.0

"""From a dataset's rows to prompts, and from generated tokens to the lines of `predictions.jsonl`."""

import copy
import os
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import is_conversational, maybe_convert_to_chatml

from ..persona.marks import ROLES, PersonaError, Span, describe, mark_persona, render, render_messages
from ..persona.masks import TokenBytes, mask_tokens, persona_stretches, swap_persona, trim_persona
from ..persona.parts import join_parts, takes_parts
from ..persona.turns import is_messages
from ..utils.logger import get_logger
from .thoughts import opens_thought, split_thought
from .uptake import other_personas


logger = get_logger(__name__)

# Tokens of a prompt's end that tell whether the template has opened a thought there
_PROMPT_END = 16


@dataclass(frozen=True)
class Prompt:
    """
    What a model is asked to go on with.

    Attributes:
        row (`int`): Index of the row in the dataset.
        id (`str` or `None`): Its column `id`, if it has one.
        user (`str` or `None`): Its column `user`, if it has one.
        persona (`str`): The persona that is in the prompt, before it is trimmed; empty if there is none.
        query (`str`): The text that the response answers, with "…" for the persona.
        reference (`str`): The row's own response; of one that calls a tool without a word, the call as the chat template writes it.
        input_ids (`list[int]`): Tokens of the prompt, up to where the model's answer begins.
        persona_mask (`list[int]`): 1 where a token belongs to the persona.
        trimmed (`int`, *optional*, defaults to `0`): Tokens that the persona lost, to fit into `max_length`.
        earlier_replies (`int`, *optional*, defaults to `0`): Replies of the assistant in a conversation (`messages`) before the last one.
            They are trained and scored like it, and stand in the prompt: of the last one alone there is a prediction.
        conversation (`str`, *optional*, defaults to `""`): The query and what was said before it, without the persona and the system's
            message: words in a reply that are there, too, need not be from the persona.
    """

    row: int
    id: str | None
    user: str | None
    persona: str
    query: str
    reference: str
    input_ids: list[int]
    persona_mask: list[int]
    trimmed: int = 0
    earlier_replies: int = 0
    conversation: str = ""

    @property
    def counterfactual_ids(self) -> list[int]:
        """Tokens of the prompt without its persona."""
        return [token for token, is_persona in zip(self.input_ids, self.persona_mask, strict=True) if not is_persona]


def make_prompts(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, args, swap_persona: bool = False
) -> list[Prompt]:
    """
    Turn rows into prompts, with the persona where the trainer would see it. A persona is trimmed from its end where the
    prompt and `max_new_tokens` do not fit into `max_length` together. Rows that do not fit without their persona (or that may
    not be trimmed: `truncate_persona=False`) are left out. Both are counted and logged.

    Args:
        rows (iterable of `dict`): Rows with `prompt` and `completion`, conversational or text, or with `messages`, whose last one is
            the reply ([`split_conversation`]), and a persona as [`PerCETrainer`] takes it. Columns `id` and `user` are optional.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A fast tokenizer, with the chat template.
        args ([`GenerationArguments`]): Gives the persona's markers, `max_length`, `max_new_tokens`, `truncate_persona` and
            `guidance_scale`.
        swap_persona (`bool`, *optional*, defaults to `False`): Whether each prompt gets another user's persona ([`other_rows`]).
            The k-th place takes the other row's k-th persona; rows without a persona stay as they are.

    Returns:
        `list[Prompt]`: In the order of the rows.

    Raises:
        `PersonaError`: A row's persona is unclear, or there is no other user's to swap it with; the message names the row.
        `ValueError`: There is no row, a row has no response, or some rows are conversations and others have a prompt and a completion.
    """
    token_bytes = TokenBytes(tokenizer)
    joins = bool(tokenizer.chat_template) and not takes_parts(tokenizer)
    prompts: list[Prompt] = []
    first_kind = None
    for index, row in enumerate(rows):
        try:
            kind = _kind(row)
            first_kind = first_kind or kind
            if kind != first_kind:
                raise ValueError(f"it has {kind}, and row 0 has {first_kind}. Write the same columns in all rows.")
            prompts.append(_make_prompt(index, row, tokenizer, token_bytes, joins, args))
        except ValueError as error:
            raise type(error)(f"row {index}: {error}") from error
    if not prompts:
        raise ValueError("The dataset is empty. Give it at least one row.")
    if swap_persona:
        prompts = _with_swapped_personas(prompts)
    if args.guidance_scale != 1:
        for prompt in prompts:
            if not prompt.counterfactual_ids:
                raise PersonaError(
                    f"row {prompt.row}: `guidance_scale` needs a prompt without its persona, and nothing but the persona is "
                    "there. Write a question into the prompt, or set `guidance_scale` to 1."
                )
    return _trimmed(prompts, args)


def split_conversation(row: dict[str, Any]) -> dict[str, Any]:
    """
    A conversation as a prompt and the reply to it: the last message is the completion, all before it are the prompt. Other columns, such
    as `persona` and `tools`, stay.

    Args:
        row (`dict[str, Any]`): A row of any of TRL's types.

    Returns:
        `dict[str, Any]`: A new row; the given one if it is no conversation, or has a `prompt` already.

    Raises:
        `PersonaError`: The last message is not the assistant's, or nothing stands before it.
    """
    chat = maybe_convert_to_chatml(copy.deepcopy(row))
    if not is_messages(chat):
        return row
    *before, last = chat["messages"]
    if ROLES.get(str(last["role"]).strip().lower()) != "assistant":
        raise PersonaError(
            f"the conversation ends with a message of {last['role']!r}, so that there is no reply to compare a prediction with. Remove "
            "what stands behind the assistant's last message, or write its reply at the end."
        )
    if not before:
        raise PersonaError(
            "the conversation has one message, the assistant's, and nothing that it replies to. Write the user's message before it, or "
            "remove the row."
        )
    rest = {name: value for name, value in chat.items() if name != "messages"}
    return {**rest, "prompt": before, "completion": [last]}


def other_rows(users: Sequence[str | None], personas: Sequence[str]) -> list[int]:
    """
    For each row, one with another user's persona ([`~uptake.other_personas`]).

    Args:
        users (`Sequence[str | None]`): User of each row. Rows without one are told apart by their personas.
        personas (`Sequence[str]`): Persona of each row, empty if it has none.

    Returns:
        `list[int]`: An index for each row.

    Raises:
        `PersonaError`: There is no other user with a persona.
    """
    try:
        others = other_personas(personas, [user or persona for user, persona in zip(users, personas, strict=True)])
    except ValueError as error:
        raise PersonaError(f"`swap_persona` needs rows of several users. {error}") from error
    rows = {persona: row for row, persona in enumerate(personas)}
    return [rows[other] for other in others]


def user_of(row: Mapping[str, Any]) -> str:
    """Whose row it is: by name, else by the persona's text; empty where neither stands in a column."""
    user = row.get("user")
    return str(user) if user is not None else str(row.get("persona") or "")


def choose_rows(users: Sequence[str], number: int | None, seed: int = 0) -> list[int]:
    """
    Rows of as many users as possible: one of each user in an order drawn at random, then a second one of each, and so on.

    Args:
        users (`Sequence[str]`): The user of each row. An empty one stands for a user of its own.
        number (`int`, *optional*): How many rows. All, if `None` or if there are fewer.
        seed (`int`, *optional*, defaults to `0`): Of the order.

    Returns:
        `list[int]`: Indices of rows, ascending.
    """
    drawn = random.Random(seed).sample(range(len(users)), len(users))
    rounds: Counter[str] = Counter()
    keys = []
    for place, row in enumerate(drawn):
        keys.append((rounds[users[row]] if users[row] else 0, place, row))
        rounds[users[row]] += 1
    return sorted(row for _, _, row in sorted(keys)[:number])


def take_rows(rows: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """So many rows, or all, of as many users as possible ([`choose_rows`])."""
    return [rows[index] for index in choose_rows([user_of(row) for row in rows], number)]


def to_prediction(
    prompt: Prompt, tokens: list[int], stop: frozenset[int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """
    A line of `predictions.jsonl`.

    Args:
        prompt ([`Prompt`]): What was asked.
        tokens (`list[int]`): Generated tokens; what stands behind the first end token is ignored.
        stop (`frozenset[int]`): Tokens that end a text.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Their tokenizer.

    Returns:
        `dict[str, Any]`: `row`, `id`, `user`, `persona`, `query`, `prediction` (without special tokens, white space at its ends and a
            reasoning model's thought, and so empty where the thought has no end), `reference`, `num_tokens` (generated, thought included,
            without the end token) and `finished` (whether there was an end token). Where there was a thought also `raw`, the whole text.
    """
    length = length_of_text(tokens, stop)
    raw = tokenizer.decode(tokens[:length])  # some models' marks of a thought are special tokens
    reply = split_thought(raw, opens_thought(tokenizer.decode(prompt.input_ids[-_PROMPT_END:])))
    if reply.thought is None:
        text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
    else:
        text = _without_special_tokens(reply.answer, tokenizer)
    line = {
        "row": prompt.row,
        "id": prompt.id,
        "user": prompt.user,
        "persona": prompt.persona,
        "query": prompt.query,
        "prediction": text.strip(),
        "reference": prompt.reference,
        "num_tokens": length,
        "finished": length < len(tokens),
    }
    return line | {"raw": raw} if reply.thought or reply.is_cut else line


def _without_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, "")
    return text


def length_of_text(tokens: Sequence[int], stop: Collection[int]) -> int:
    """How many generated tokens stand before the first that ends a text."""
    return next((position for position, token in enumerate(tokens) if token in stop), len(tokens))


def stop_tokens(tokenizer: PreTrainedTokenizerBase, generation_config=None) -> frozenset[int]:
    """
    The tokens that end an answer: the tokenizer's end of text, those of the model's generation configuration, and the one that the
    chat template writes behind an assistant's message.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        generation_config ([`~transformers.GenerationConfig`], *optional*): The model's.

    Returns:
        `frozenset[int]`: Token ids.
    """
    own = getattr(generation_config, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), _turn_end(tokenizer)}
    return frozenset(found - {None})


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    if tokenizer.chat_template is None:
        return None
    answer = "answer"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:  # it wants messages of another kind
        return None
    behind = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    return behind[0] if behind and behind[0] in tokenizer.all_special_ids else None


def _make_prompt(index: int, row: dict[str, Any], tokenizer, token_bytes: TokenBytes, joins: bool, args) -> Prompt:
    example, spans = mark_persona(
        copy.deepcopy(row),
        args.dataset_text_field,
        args.persona_start_marker,
        args.persona_end_marker,
        args.chat_template_kwargs,
    )
    if joins:
        spans = join_parts(example, spans)
    earlier_replies = 0
    if is_messages(example):
        earlier_replies = sum(message["role"] == "assistant" for message in example["messages"]) - 1
        example = split_conversation(example)
        spans = [span._replace(column="prompt") for span in spans]
    outside = [span for span in spans if span.column != "prompt"]
    if outside:
        raise PersonaError(f"the persona is in {outside[0].column!r}. Move it to the prompt.")
    persona, query = describe(example, spans, args.dataset_text_field)
    chat = is_conversational({"prompt": example["prompt"]})
    # The prompt by itself, as the trainer would see a text without a response
    column = "messages" if chat else args.dataset_text_field
    alone = {column: example["prompt"], "tools": example.get("tools")}
    alone["chat_template_kwargs"] = {**(example.get("chat_template_kwargs") or {}), "add_generation_prompt": True}
    text, char_spans = render(
        alone, [span._replace(column=column) for span in spans], tokenizer, text_field=args.dataset_text_field
    )
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    mask = mask_tokens(ids, text, char_spans, token_bytes) if char_spans else None
    return Prompt(
        row=index,
        id=_text(row.get("id")),
        user=_text(row.get("user")),
        persona=persona,
        query=query,
        conversation=_conversation(example, spans) if chat else query,
        reference=_reference(example, alone, tokenizer),
        input_ids=ids,
        persona_mask=mask or [0] * len(ids),
        earlier_replies=earlier_replies,
    )


def _conversation(example: dict[str, Any], spans: list[Span]) -> str:
    said = []
    for index, message in enumerate(example["prompt"]):
        if message["role"] not in ("system", "developer"):
            own = [span._replace(message=0) for span in spans if span.message == index]
            said.append(describe({"prompt": [message], "completion": example["completion"]}, own)[1])
    return "\n".join(said)


def _kind(row: dict[str, Any]) -> str:
    """The columns of a row that hold its text, in words."""
    if row.get("prompt") is not None and row.get("completion") is not None:
        return "'prompt' and 'completion'"
    for column in ("messages", "conversations"):
        if row.get("prompt") is None and row.get(column):
            return repr(column)
    raise ValueError(
        "evaluation needs the columns 'prompt' and 'completion' (what the user wrote, which the answer is compared with), or 'messages' "
        f"that end with the assistant's; it has {', '.join(map(repr, row))}."
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _reference(example: dict[str, Any], alone: dict[str, Any], tokenizer) -> str:
    completion = example["completion"]
    if isinstance(completion, str):
        return completion
    if len(completion) != 1:
        raise ValueError(
            f"'completion' has {len(completion)} messages, and one prediction is compared with one. Keep the first answer and "
            "move what stands before it to 'prompt'."
        )
    content = completion[0].get("content")
    if not content:  # a tool is called: what the model would write for it
        prompt = render_messages(alone, example["prompt"], tokenizer)
        whole = render_messages(example, example["prompt"] + completion, tokenizer)
        call = split_thought(whole[len(os.path.commonprefix([prompt, whole])) :]).answer
        return _without_special_tokens(call, tokenizer).strip()
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _with_swapped_personas(prompts: list[Prompt]) -> list[Prompt]:
    others = other_rows([prompt.user for prompt in prompts], [prompt.persona for prompt in prompts])
    swapped = []
    for prompt, other in zip(prompts, others, strict=True):
        if not any(prompt.persona_mask):
            swapped.append(prompt)
            continue
        stretches = persona_stretches(prompts[other].input_ids, prompts[other].persona_mask)
        ids, labels = swap_persona(prompt.input_ids, [0] * len(prompt.input_ids), prompt.persona_mask, stretches)
        mask = [int(label == -100) for label in labels]  # which is what it marks the other's tokens with
        swapped.append(replace(prompt, persona=prompts[other].persona, input_ids=ids, persona_mask=mask))
    return swapped


def _trimmed(prompts: list[Prompt], args) -> list[Prompt]:
    if args.max_length is None:
        return prompts
    room, kept = args.max_length - args.max_new_tokens, []
    for prompt in prompts:
        keep = trim_persona(prompt.persona_mask, room) if args.truncate_persona else range(len(prompt.input_ids))
        if len(keep) <= room:
            ids, mask = ([values[position] for position in keep] for values in (prompt.input_ids, prompt.persona_mask))
            trimmed = len(prompt.input_ids) - len(ids)
            kept.append(replace(prompt, input_ids=ids, persona_mask=mask, trimmed=trimmed))
    fits = f"to fit into `max_length={args.max_length}` with `max_new_tokens={args.max_new_tokens}`"
    losses = [prompt.trimmed for prompt in kept if prompt.trimmed]
    if losses:
        logger.warning(
            f"Trimmed the persona of {len(losses)} of {len(prompts)} prompts, by {sum(losses)} tokens in all, {fits}."
        )
    if len(kept) < len(prompts):
        why = "without their persona" if args.truncate_persona else "(`truncate_persona` is off)"
        logger.warning(
            f"Left out {len(prompts) - len(kept)} of {len(prompts)} prompts, which are too long {fits} {why}."
        )
    if not kept:
        raise ValueError(f"No prompt is short enough {fits}. Raise `max_length`, or lower `max_new_tokens`.")
    return kept
