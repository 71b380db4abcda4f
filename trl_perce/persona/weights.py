# SPDX-License-Identifier: Apache-2.0

"""Weights that come with the rows: one a token (`token_weights` beside `input_ids`), or one a message (`weight`)."""

import math
from typing import Any

from trl import is_conversational

from .marks import PersonaError


def message_weights(example: dict[str, Any], whole: dict[str, bool]) -> list[tuple[int, float]]:
    """
    The weights of a conversation's messages, from their key `weight` (1 where there is none). As in OpenAI's format for fine-tuning, 0
    says that a message is not trained.

    Args:
        example (`dict[str, Any]`): A row from [`~trl_perce.persona.marks.mark_persona`].
        whole (`dict[str, bool]`): Whether all messages are trained: under `"prompt"` those of a prompt and its completion, which else
            are those of the completion; under `"messages"` those of `messages`, which else are the assistant's.

    Returns:
        `list[tuple[int, float]]`: Of each message that is trained its index in the conversation (prompt and completion together) and its
        weight, in order. Empty where no message has a weight.

    Raises:
        `PersonaError`: A weight is no finite number, negative, or another one than 0 and 1 of a message that is not trained; or all are 0.
    """
    if not is_conversational(example):
        return []
    columns = ("prompt", "completion") if "prompt" in example else ("messages",)
    messages = [(column, index, message) for column in columns for index, message in enumerate(example[column])]
    if not any(message.get("weight") is not None for _, _, message in messages):
        return []
    trained = []
    for position, (column, index, message) in enumerate(messages):
        weight = 1 if message.get("weight") is None else message["weight"]
        where = f"message {index} of {column!r} ({message['role']!r})"
        if not _is_weight(weight):
            raise PersonaError(f"{where} has the 'weight' {weight!r}. Write 0 (not trained) or a positive number.")
        if whole[columns[0]] or column == "completion" or (column == "messages" and message["role"] == "assistant"):
            trained.append((position, float(weight)))
        elif weight not in (0, 1):
            raise PersonaError(
                f"{where} has the 'weight' {weight!r}, and is not trained. Remove the weight; of `messages` the assistant's are "
                "trained, of `prompt` and `completion` the completion."
            )
    if trained and not any(weight for _, weight in trained):
        raise PersonaError(
            f"all that would be trained in {columns[-1]!r} has the 'weight' 0. Remove the row, or give a message another weight."
        )
    return trained


def check_token_weights(weights: Any, num_tokens: int) -> None:
    """
    Raise a `PersonaError` on a row's `token_weights` that do not fit.

    Args:
        weights (`Any`): What the column holds: a list of finite numbers that are not negative.
        num_tokens (`int`): Number of `input_ids`, which is to be theirs.
    """
    if not isinstance(weights, list) or len(weights) != num_tokens:
        raise PersonaError(
            f"'token_weights' must be a list of numbers as long as 'input_ids' ({num_tokens} tokens), got "
            f"{f'{len(weights)} values' if isinstance(weights, list) else f'a {type(weights).__name__}'}."
        )
    wrong = next((index for index, weight in enumerate(weights) if not _is_weight(weight)), None)
    if wrong is not None:
        raise PersonaError(
            f"'token_weights' has {weights[wrong]!r} at token {wrong}. Write a finite number that is not negative."
        )


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
