# SPDX-License-Identifier: Apache-2.0

"""An evaluation's results in the model card."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..utils.files import write_text
from ..utils.markdown import code, escape
from .report import NOTES, interval_text, number_text


_BEGIN, _END = "<!-- trl-perce evaluate -->", "<!-- /trl-perce evaluate -->"
# How the predictions were made
_SHOWN = ("temperature", "top_p", "max_new_tokens", "max_length", "guidance_scale")


def find_card(folder: str | Path) -> Path:
    """
    The model card of a model or adapter.

    Args:
        folder (`str` or `Path`): Its folder.

    Returns:
        `Path`: Its `README.md`.

    Raises:
        `ValueError`: There is none.
    """
    path = Path(folder).expanduser() / "README.md"
    if not path.is_file():
        raise ValueError(
            f"`update_model_card`: there is no model card {str(path)!r}. Evaluate a local folder that `trl-perce train` has "
            "written, or leave it out."
        )
    return path


def update_model_card(path: str | Path, result: dict[str, Any]) -> None:
    """
    Put an evaluation into a model card: its means as metadata (`model-index`), which the Hub shows, and its table as a section.
    Those of an earlier evaluation are replaced. Neither texts of rows nor local paths go in.

    Args:
        path (`str` or `Path`): The card.
        result (`dict[str, Any]`): From [`~evaluate.evaluate`].
    """
    card = ModelCard.load(path)
    settings = result["settings"]
    dataset = settings.get("dataset")
    is_public = isinstance(dataset, str) and not Path(dataset).expanduser().exists()
    about = {
        "task_type": "text-generation",
        "dataset_type": dataset if is_public else "custom",
        "dataset_name": dataset if is_public else "own rows",
        "dataset_split": settings.get("split"),
    }
    new = [
        EvalResult(
            **about,
            metric_type=name,
            metric_name=NOTES.get(name.removeprefix("swapped/"), name),
            metric_value=round(entry["mean"], 4),
        )
        for name, entry in result["metrics"].items()
        if entry["mean"] is not None
    ]
    # What training has put there has no split
    card.data.eval_results = [old for old in card.data.eval_results or [] if old.dataset_split is None] + new
    section = _section(result, about)
    card.data.model_name = card.data.model_name or Path(path).absolute().parent.name  # goes with results
    text = re.sub(rf"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n\n", "", card.text, flags=re.DOTALL)
    before, privacy, after = text.partition("## Privacy\n")
    card.text = f"{before}{section}{privacy}{after}" if privacy else f"{text.rstrip()}\n\n{section}"
    write_text(path, card.content.rstrip() + "\n")


def _section(result: dict[str, Any], about: dict[str, Any]) -> str:
    settings = result["settings"]
    how = ", ".join(f"{name} {settings[name]:g}" for name in _SHOWN if isinstance(settings.get(name), (int, float)))
    lines = [
        f"| {code(name)} | {number_text(entry['mean'])} | {interval_text(entry['interval'])} | {entry['rows']} | "
        f"{escape(NOTES.get(name.removeprefix('swapped/'), ''))} |"
        for name, entry in result["metrics"].items()
    ]
    what = f"{result['rows']} rows"
    if about["dataset_type"] != "custom":
        what += f" of {escape(about['dataset_name'])}"
    if about["dataset_split"]:
        what += f" of the split {escape(about['dataset_split'])}"
    judge = result["judge"]["model"] if result["judge"] is not None else None
    parts = [
        _BEGIN,
        "## Evaluation of predictions",
        f"By `trl-perce evaluate` on {what} ({how}). Intervals over users, or rows."
        + (f" Judge: {escape(Path(judge).name if Path(judge).exists() else judge)}." if judge else ""),
        "\n".join(["| metric | mean | 95 % interval | rows | |", "|---|---:|---:|---:|---|", *lines]),
        _END,
    ]
    return "\n\n".join(parts) + "\n\n"
