# SPDX-License-Identifier: Apache-2.0

"""Values of rows → means with intervals, and tests against another evaluation of the same rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.files import read_lines
from ..utils.statistics import bootstrap_interval, paired_test
from .predictions import Prompt


def summarise(values: dict[str, np.ndarray], groups: Sequence[str | None]) -> dict[str, dict[str, Any]]:
    """
    Means over rows.

    Args:
        values (`dict[str, np.ndarray]`): By name, an array of shape `(R,)`, NaN where a row has no value.
        groups (`Sequence[str | None]`): The user of each row, which is what the bootstrap draws: rows of one user are not
            independent. A row with `None` stands alone.

    Returns:
        `dict[str, dict]`: By name, `"mean"` (`None` without rows), `"interval"` (95 %, `[low, high]`, `None` for fewer than two users) and
            `"rows"`, the number of rows with a value.
    """
    summary = {}
    for name, own in values.items():
        where = np.isfinite(own)
        interval = bootstrap_interval(own[where], _groups(groups, where))
        summary[name] = {
            "mean": float(own[where].mean()) if where.any() else None,
            "interval": None if interval is None else list(interval),
            "rows": int(where.sum()),
        }
    return summary


def compare(
    values: dict[str, np.ndarray], baseline: dict[int, dict[str, Any]], groups: Sequence[str | None]
) -> dict[str, dict[str, Any]]:
    """
    Paired tests ([`~trl_perce.utils.statistics.paired_test`]) on the rows that have a value in both evaluations.

    Args:
        values (`dict[str, np.ndarray]`): As in [`summarise`].
        baseline (`dict[int, dict]`): Lines of the other evaluation's `metrics.jsonl`, by row ([`read_baseline`]).
        groups (`Sequence[str | None]`): The user of each row.

    Returns:
        `dict[str, dict]`: By name, `"difference"` (these values minus the baseline's), `"interval"`, `"p_value"` and `"rows"`. Names
            that only one of both has are left out.
    """
    tests = {}
    for name, own in values.items():
        theirs = np.array([baseline.get(row, {}).get(name) for row in range(len(own))], dtype=float)
        where = np.isfinite(own) & np.isfinite(theirs)
        if where.any():
            tests[name] = {
                **paired_test(own[where], theirs[where], _groups(groups, where)),
                "rows": int(where.sum()),
            }
    return tests


def read_baseline(folder: str | Path, prompts: Sequence[Prompt]) -> dict[int, dict[str, Any]]:
    """
    The values of another evaluation's rows.

    Args:
        folder (`str` or `Path`): Its folder.
        prompts (`Sequence[Prompt]`): Of this evaluation, which the rows are compared with.

    Returns:
        `dict[int, dict]`: Lines of its `metrics.jsonl`, by row.

    Raises:
        `FileNotFoundError`: It is not there, or not finished.
        `ValueError`: It is of other rows.
    """
    folder = Path(folder)
    for name in ("predictions.jsonl", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"`baseline`: there is no {name!r} in {str(folder)!r}. Give the folder of an evaluation that is finished."
            )
    predictions = read_lines(folder / "predictions.jsonl")
    theirs = {line["row"]: (line["persona"], line["query"], line["reference"]) for line in predictions}
    ours = {prompt.row: (prompt.persona, prompt.query, prompt.reference) for prompt in prompts}
    differing = sorted(row for row in {*theirs, *ours} if theirs.get(row) != ours.get(row))
    if differing:
        raise ValueError(
            f"`baseline`: {str(folder)!r} is of other rows; {len(differing)} differ, first row {differing[0]}. Compare "
            "evaluations of the same dataset, with the same `max_rows`, `max_length` and `max_new_tokens`."
        )
    return {line["row"]: line for line in read_lines(folder / "metrics.jsonl")}


def _groups(groups: Sequence[str | None], where: np.ndarray) -> list[str]:
    return [groups[row] or f"row {row}" for row in np.flatnonzero(where).tolist()]
