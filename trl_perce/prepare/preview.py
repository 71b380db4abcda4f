# SPDX-License-Identifier: Apache-2.0

"""A few rows as a model will see them: what is persona, what is trained."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from ..persona.marks import mark_persona


# Style in a terminal, and marks elsewhere
_STYLES = {"persona": "black on #f2c14e", "trained": "bold underline green", "": ""}
# Characters of a piece that are shown: from its beginning, from its end
_HEAD, _TAIL = 400, 150

Piece = tuple[str, str]  # text, and "persona", "trained" or ""


def message_pieces(example: dict[str, Any]) -> list[Piece]:
    """
    The messages of a row, without a tokenizer.

    Args:
        example (`dict[str, Any]`): `persona`, `prompt`, `completion`.

    Returns:
        `list[tuple[str, str]]`: Texts in order, and whether each is `"persona"`, `"trained"` or neither (`""`).
    """
    marked, spans = mark_persona({**example, "prompt": [dict(message) for message in example["prompt"]]})
    pieces: list[Piece] = []
    for index, message in enumerate(marked["prompt"]):
        pieces.append((f"[{message['role']}] ", ""))
        position, text = 0, message["content"]
        for span in spans:
            if span.message == index:
                pieces += [(text[position : span.start], ""), (text[span.start : span.end], "persona")]
                position = span.end
        pieces.append((text[position:] + "\n", ""))
    return [*pieces, ("[assistant] ", ""), (marked["completion"][0]["content"], "trained")]


def token_pieces(examples: list[dict[str, Any]], tokenizer_name: str) -> Iterator[tuple[list[Piece], str]]:
    """
    The tokens of rows as training prepares them.

    Args:
        examples (`list[dict[str, Any]]`): As for [`message_pieces`].
        tokenizer_name (`str`): Name or folder of a model with a tokenizer.

    Yields:
        `tuple[list[tuple[str, str]], str]`: As [`message_pieces`], special tokens too; and the numbers of tokens.

    Raises:
        `OSError`: There is no such tokenizer.
        `PersonaError`: Its chat template does not take a row.
    """
    from datasets import Dataset

    from ..config import PerContrastConfig
    from ..scoring.loading import load_scoring_tokenizer
    from ..scoring.preparation import Preparation

    args = PerContrastConfig(max_length=None, use_cpu=True)
    try:
        tokenizer = load_scoring_tokenizer(tokenizer_name, None, args)
    except OSError as error:
        raise OSError(f"`tokenizer`: there is none to load for {tokenizer_name!r}. {error}") from error
    prepared = Preparation(tokenizer, args)(Dataset.from_list(examples), "train", needs_persona=True)
    for rows, _ in prepared.blocks():
        for row in rows:
            kinds = [
                "persona" if is_persona else "trained" if label != -100 else ""
                for is_persona, label in zip(row["persona_mask"], row["labels"], strict=True)
            ]
            runs = groupby(zip(row["input_ids"], kinds, strict=True), key=lambda pair: pair[1])
            pieces = [(tokenizer.decode([token for token, _ in run]), kind) for kind, run in runs]
            counts = f"{len(kinds):,} tokens: {kinds.count('persona'):,} persona, {kinds.count('trained'):,} trained"
            yield pieces, counts


def print_weights(examples: list[dict[str, Any]], model_name: str, console) -> None:
    """
    Print the PIR of the tokens that are trained, and their mean weight, by a model that is loaded for it.

    Args:
        examples (`list[dict[str, Any]]`): As for [`message_pieces`].
        model_name (`str`): Name or folder of the model.
        console ([`~rich.console.Console`]): Where to print.

    Raises:
        `OSError`: There is no such model.
        `PersonaError`: Its chat template does not take a row.
    """
    import numpy as np

    from ..config import PerContrastConfig
    from ..scoring.heatmap.terminal import print_heatmap
    from ..scoring.percontrast import PerContrast

    args = PerContrastConfig(max_length=None)
    scorer = PerContrast(model_name, args=args)
    scores = [*scorer.iterate(scorer.prepare(examples))]
    print_heatmap(scores, console, num_rows=len(scores))
    weights = np.concatenate([row.weights for row in scores])
    bounds = f"PIR, {args.weight_clip_min:g} … {args.weight_clip_max:g}"
    console.print(
        f"Weights of trained tokens ({bounds}): {weights.mean():.2f} in the mean, {weights.max():.2f} at most.\n"
    )


def print_row(title: str, pieces: list[Piece], console) -> None:
    """
    Print a row: with colours in a terminal, with marks where there are none (a pipe, a file, `NO_COLOR`).

    Args:
        title (`str`): Goes before it.
        pieces (`list[tuple[str, str]]`): From [`message_pieces`] or [`token_pieces`].
        console ([`~rich.console.Console`]): Where to print.
    """
    from rich.text import Text

    has_colours = _has_colours(console)
    console.print(Text(title, style="bold" if has_colours else ""))
    line = Text()
    for text, kind in pieces:
        text = _shortened(text)
        line.append(
            text if has_colours or not kind else f"<{kind}>{text}</{kind}>", _STYLES[kind] if has_colours else ""
        )
    console.print(line, highlight=False)
    console.print()


def print_legend(console) -> None:
    """Say what the colours of [`print_row`] mean. Marks say it themselves."""
    from rich.text import Text

    if _has_colours(console):
        console.print(Text.assemble(("persona", _STYLES["persona"]), "  ", ("trained", _STYLES["trained"]), "\n"))


def _has_colours(console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


def _shortened(text: str) -> str:
    left_out = len(text) - _HEAD - _TAIL
    return text if left_out <= 50 else f"{text[:_HEAD]} … {left_out:,} characters … {text[-_TAIL:]}"
