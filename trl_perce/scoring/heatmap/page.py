# SPDX-License-Identifier: Apache-2.0

"""The heatmap as a page to look through, which holds all it needs (HTML)."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable
from importlib.resources import files
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.files import write_text
from ..scores import TokenScores, WordScore
from .palette import EXPONENT, PALETTE, SCALE
from .pieces import Unit, check_positive, units_of


def write_html(
    scores: Iterable[TokenScores], path: str | Path, settings: dict[str, Any], max_rows: int = 1000
) -> None:
    """
    Write one page that holds all it needs: it opens from a disk, loads nothing and runs no script but its own.

    Args:
        scores (`Iterable[TokenScores]`): Scores of the rows, also of those that are skipped or have no persona.
        path (`str` or `Path`): File to write.
        settings (`dict[str, Any]`): How they were made: `"model"`, `"adapter"` (`None` if there is none), `"dataset"`,
            `"counterfactual"`, `"weight_clip_min"` and `"weight_clip_max"`.
        max_rows (`int`, *optional*, defaults to `1000`): Rows that the page holds. It says how many more there are. A row
            takes some 26 bytes a token and the bytes of its texts.

    Raises:
        `ValueError`: `max_rows` is not positive.
    """
    check_positive("max_rows", max_rows)
    scores = iter(scores)
    kept = list(islice(scores, max_rows))
    data = {
        "settings": _settings_lines(settings),
        "threshold": kept[0].threshold if kept else 1.0,
        "palette": PALETTE,
        "scale": SCALE,
        "exponent": EXPONENT,
        "rows": [_row_data(row) for row in kept],
        "total": len(kept) + sum(1 for _ in scores),
    }
    template = files(__package__).joinpath("heatmap.html").read_text(encoding="utf-8")
    for tag in ("style", "script"):
        content = template.split(f"<{tag}>", 1)[1].rsplit(f"</{tag}>", 1)[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        template = template.replace(f"{{{{{tag}_hash}}}}", digest)
    # The data last: what it holds is looked through for nothing
    before, after = template.split("{{data}}")
    write_text(path, before + _json_for_script(data) + after)


def _settings_lines(settings: dict[str, Any]) -> dict[str, str]:
    adapter = {} if settings["adapter"] is None else {"adapter": str(settings["adapter"])}
    return {
        "model": str(settings["model"]),
        **adapter,
        "dataset": str(settings["dataset"]),
        **{name: str(settings[name]) for name in ("counterfactual", "precision") if name in settings},
        "weight": f"PIR clipped to [{settings['weight_clip_min']:g}, {settings['weight_clip_max']:g}]",
    }


def _row_data(scores: TokenScores) -> dict[str, Any]:
    """A row as the page reads it: JavaScript's indices, and numbers as the bytes of float32, which are exact and short."""
    # JavaScript counts UTF-16 units: two for a character beyond U+FFFF
    position = list(accumulate((1 + (character > "\uffff") for character in scores.response), initial=0))
    units = units_of(scores)
    tokens: dict[str, Any] = {"special": [index for index, unit in enumerate(units) if unit.is_special]}
    if len(units) < len(scores.tokens):
        tokens |= {"spans": _flat(units, position), "pir": _floats([unit.pir for unit in units])}
    special = [unit for unit in units if unit.is_special]
    words: list[WordScore | Unit] = sorted([*scores.words, *special], key=lambda word: word.start)
    return {
        "row": scores.row,
        "persona": scores.persona,
        "query": scores.query,
        "response": scores.response,
        "skipped": scores.skipped,
        "spans": _flat([Unit(*offset, math.nan, False) for offset in scores.offsets], position),
        "pir": _floats(scores.pir),
        "log_probs": _floats(scores.log_probs),
        "weights": _floats(scores.weights),
        "tokens": tokens,
        "words": {
            "spans": _flat(words, position),
            "pir": _floats([word.pir for word in words]),
            "special": [index for index, word in enumerate(words) if isinstance(word, Unit)],
        },
    }


def _flat(pieces: list, position: list[int]) -> list[int]:
    """`[gap, length, gap, length, …]`: short numbers. A gap is negative where pieces share a character."""
    flat, end = [], 0
    for piece in pieces:
        flat += [position[piece.start] - end, position[piece.end] - position[piece.start]]
        end = position[piece.end]
    return flat


def _floats(values) -> str:
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()


def _json_for_script(data: dict[str, Any]) -> str:
    """JSON that no text in it can end as a script element, and that every encoding has room for."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Half a surrogate pair cannot be written as UTF-8; the line ends U+2028 and U+2029 are for old parsers
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
