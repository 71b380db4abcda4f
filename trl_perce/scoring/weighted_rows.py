# SPDX-License-Identifier: Apache-2.0

"""Tokenized rows with the weights that they were scored with: PerCE whose weights are those of one model, computed once."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from ..utils.files import written_whole
from .preparation import PreparedRows
from .score_file import ScoreFile


_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "persona_mask": pa.list_(pa.int8()),
        "token_weights": pa.list_(pa.float32()),
    }
)


def write_weighted_rows(
    scores: ScoreFile, prepared: PreparedRows, path: str | Path
) -> tuple[int, Counter[str | None]]:
    """
    Write a Parquet file of rows as the trainer takes them with `token_weighting="given"`.

    Args:
        scores ([`ScoreFile`]): The scores of all rows, finished.
        prepared ([`PreparedRows`]): The rows that were scored.
        path (`str` or `Path`): Where to. The columns are `input_ids`, `labels`, `persona_mask` and `token_weights`, which are
            `clip(PIR, weight_clip_min, weight_clip_max)` on trained tokens, to the five decimals of the scores, and 1 on others.

    Returns:
        `tuple[int, Counter[str]]`: Number of rows that were written, and of those that were left out, by the reason.
    """
    written, scored = 0, iter(scores)
    left_out: Counter[str | None] = Counter()
    with written_whole(path) as part, parquet.ParquetWriter(part, _SCHEMA) as writer:
        for rows, _ in prepared.blocks():
            columns: dict[str, list] = {name: [] for name in _SCHEMA.names}
            for row in rows:
                # There is a line of each row, in order
                while (line := next(scored)).row != row["_row"]:
                    left_out[line.skipped] += 1
                if line.skipped is not None:
                    left_out[line.skipped] += 1
                    continue
                weights: np.ndarray = np.ones(len(row["labels"]), dtype=np.float32)
                weights[np.array(row["labels"]) != -100] = line.weights
                for name, column in columns.items():
                    column.append(weights if name == "token_weights" else row[name])
                written += 1
            writer.write_table(pa.table(columns, schema=_SCHEMA))
        left_out.update(line.skipped for line in scored)
    return written, left_out
