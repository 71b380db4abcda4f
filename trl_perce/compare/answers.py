# SPDX-License-Identifier: Apache-2.0

"""Answers of all arms to the same prompts, side by side, with the PIR of their words to the untrained model."""

from pathlib import Path
from typing import Any

from ..evaluation.options import with_response
from ..evaluation.predictions import choose_rows, split_conversation
from ..reproduce.grid import Step
from ..reproduce.settings import OWN
from ..reproduce.steps import Steps, run_command
from ..scoring.heatmap.pieces import pieces_of
from ..scoring.score_file import read_scores
from ..scoring.scores import TokenScores
from ..utils.files import fingerprint, read_lines, write_json_lines
from .findings import UNTRAINED, first_seed


RULE = "one prompt each of as many held-out users, drawn with seed 0 among those that were answered; of several seeds the first"


def answers_step(steps: Steps, number: int) -> Step:
    """
    The step that scores the answers with the untrained model, once those are there.

    Args:
        steps ([`~trl_perce.reproduce.steps.Steps`]): Of the grid, with the command `"score"`.
        number (`int`): Prompts that are shown.

    Returns:
        [`~trl_perce.reproduce.grid.Step`]: Its folder has `rows.jsonl`, prompt by prompt and arm by arm, and their `scores`.
    """
    folder = steps.folder / "answers"
    (model,) = steps.settings.models
    lines = _chosen(steps, number)
    digest = fingerprint([line["prediction"] for _, own in lines for line in own.values()])
    config = steps.model_arguments(model) | {
        "model_name_or_path": steps.settings.models[model]["model_name_or_path"],
        "dataset_name": str(folder / "rows.jsonl"),
    }

    def run() -> dict[str, Any]:
        tests = [*read_lines(steps.folder / "data" / OWN / "test.jsonl")]
        rows = [
            with_response(split_conversation(tests[row]), line["prediction"])
            for row, own in lines
            for line in own.values()
            if line["prediction"]
        ]
        write_json_lines(folder / "rows.jsonl", rows)
        arguments = ["--output_dir", str(folder / "scores"), "--overwrite", "true"]
        run_command(steps.commands["score"].run, config, folder / "score", arguments)
        return {"rows": len(rows)}

    return Step(folder, "answers", {"config": config, "sha256": digest}, run)


def read_answers(steps: Steps, step: Step, number: int) -> list[dict[str, Any]]:
    """
    What the report shows of the answers.

    Args:
        steps ([`~trl_perce.reproduce.steps.Steps`]): Of the grid.
        step ([`~trl_perce.reproduce.grid.Step`]): From [`answers_step`], done.
        number (`int`): As there.

    Returns:
        `list[dict]`: `"row"`, `"user"`, `"persona"`, `"query"`, `"reference"` and `"answers"`: by arm `"text"` and `"pieces"`, pairs of a text
            and its PIR in nats (`None` where it has none).
    """
    scores = read_scores(step.folder / "scores")
    shown = []
    for _, own in _chosen(steps, number):
        first = own[UNTRAINED]
        shown.append(
            {
                **{name: first[name] for name in ("row", "user", "persona", "query", "reference")},
                "answers": {
                    arm: {
                        "text": line["prediction"],
                        "pieces": _pieces(next(scores), line["prediction"]) if line["prediction"] else [],
                    }
                    for arm, line in own.items()
                },
            }
        )
    return shown


def _chosen(steps: Steps, number: int) -> list[tuple[int, dict[str, dict[str, Any]]]]:
    """Rows that are shown, each with the line of its prediction by arm."""
    (untrained,) = [parts[0].folder for (_, task), parts in steps.untrained.items() if task == OWN]
    folders: dict[str, Path] = {UNTRAINED: untrained}
    folders |= {method: steps.evaluate[(cell, OWN)][0].folder for method, cell in first_seed(steps).items()}
    lines = {
        arm: {line["row"]: line for line in read_lines(folder / "predictions.jsonl")}
        for arm, folder in folders.items()
    }
    rows = sorted(lines[UNTRAINED])
    users = [lines[UNTRAINED][row]["user"] or lines[UNTRAINED][row]["persona"] for row in rows]
    return [
        (rows[index], {arm: own[rows[index]] for arm, own in lines.items()}) for index in choose_rows(users, number)
    ]


def _pieces(scores: TokenScores, answer: str) -> list[tuple[str, float | None]]:
    """The answer cut into texts with their PIR; the end token, which is no text, is left out."""
    if scores.skipped is not None:
        return [(answer, None)]
    return [
        (text, None if unit is None or unit.pir != unit.pir else round(unit.pir, 3))
        for text, unit in pieces_of(scores)
        if text and not (unit is not None and unit.is_special)
    ]
