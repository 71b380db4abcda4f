# SPDX-License-Identifier: Apache-2.0

"""
The grid of a comparison: a user's recipe and rows, trained with each method and evaluated on three kinds of rows.

    own/          the held-out users' rows
    seen/         some of the training rows, without a persona: what an adapter answers from memory
    irrelevant/   held-out users' personas, with questions to which they do not matter
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..benchmarks.irrelevant import ask_irrelevant
from ..benchmarks.reading import Skips
from ..evaluation.predictions import take_rows, user_of
from ..persona.marks import PersonaError
from ..reproduce.settings import DERIVED_ROWS, IRRELEVANT, METHODS, OWN, SEEN, Settings, Task
from ..utils.files import fingerprint


BASELINE = "ce"
# What a recipe says of one run, and a comparison says itself or does not do
_NOT_OF_A_GRID = (
    *("output_dir", "learning_rate", "seed", "token_weighting", "weight_clip_min", "weight_clip_max"),
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming", "datasets"),
    *(
        "test_split_size",
        "streaming",
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "resume_from_checkpoint",
        "run_name",
    ),
    *("do_train", "do_eval", "eval_strategy", "eval_steps", "eval_on_start", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better"),
)


@dataclass
class CompareArguments:
    """
    What is compared, beside the arguments of a training.

    Parameters:
        methods (`Sequence[str]`, *optional*, defaults to `("ce", "perce")`): Names of [`~trl_perce.reproduce.settings.METHODS`], `"ce"`
            among them: the others are compared with it.
        seeds (`Sequence[int]`, *optional*, defaults to `(0,)`): Seeds of training. With two or more, intervals are for new seeds, too.
        test_rows (`int`, *optional*, defaults to `500`): Held-out rows, at most, of as many users as possible.
        prediction_rows (`int`, *optional*, defaults to `100`): How many of them get answers; likelihoods are of all.
        answers (`int`, *optional*, defaults to `12`): Prompts whose answers are shown side by side.
        irrelevant_questions (`int`, *optional*, defaults to `100`): Questions to which the persona does not matter, of 100; 0 asks none.
        temperature (`float`, *optional*, defaults to `0.0`): Of the answers; 0 is greedy.
        max_new_tokens (`int`, *optional*, defaults to `128`): Tokens of an answer.

    Raises:
        `ValueError`: A value is out of its range; the message says which and what to write instead.
    """

    methods: Sequence[str] = (BASELINE, "perce")
    seeds: Sequence[int] = (0,)
    test_rows: int = 500
    prediction_rows: int = 100
    answers: int = 12
    irrelevant_questions: int = 100
    temperature: float = 0.0
    max_new_tokens: int = 128

    def __post_init__(self):
        self.methods, self.seeds = [*dict.fromkeys(self.methods)], [*dict.fromkeys(self.seeds)]
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"`methods`: {unknown[0]!r} is not known. Write some of {', '.join(METHODS)}.")
        if BASELINE not in self.methods or len(self.methods) < 2:
            raise ValueError(f"`methods` must hold {BASELINE!r}, which the others are compared with, and one more.")
        for name, least in (
            *(("test_rows", 2), ("prediction_rows", 1), ("answers", 1), ("max_new_tokens", 1)),
            *(("irrelevant_questions", 0), ("temperature", 0)),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}. Write {least} or more.")


def make_rows(
    train: list[dict[str, Any]], test: list[dict[str, Any]], args: CompareArguments, markers: tuple[str, str]
) -> tuple[dict[str, dict[str, list]], list[str]]:
    """
    The rows of a comparison.

    Args:
        train (`list[dict]`): Rows to train on.
        test (`list[dict]`): Rows of held-out users.
        args ([`CompareArguments`]): Says how many are taken.
        markers (`tuple[str, str]`): What opens and closes a persona in a text.

    Returns:
        `tuple[dict[str, dict[str, list]], list[str]]`: Rows by task and split; and lines about what is left out or doubtful.
    """
    notes = []
    kept = take_rows(test, args.test_rows)
    if len(kept) < len(test):
        notes.append(
            f"{len(kept)} of {len(test)} held-out rows are taken (`test_rows`), of as many users as possible."
        )
    for what, of in (("users", user_of), ("personas", lambda row: str(row.get("persona") or ""))):
        trained = {of(row) for row in train} - {""}
        if both := ({of(row) for row in kept} - {""}) & trained:
            notes.append(
                f"{len(both)} of the held-out {what}, such as {min(both)[:40]!r}, are in the training data, too: their figures are not "
                "those of new users."
            )
            break
    rows = {OWN: {"train": train, "test": kept}, SEEN: {"test": take_rows(train, DERIVED_ROWS)}}
    if args.irrelevant_questions:
        skips = Skips()
        try:
            asked = ask_irrelevant(kept, 0, args.irrelevant_questions, *markers, skips)
        except PersonaError as error:
            notes.append(f"No irrelevant questions are asked. {error}")
        else:
            rows[IRRELEVANT] = {"test": asked}
            notes += [
                f"{count} held-out rows lend no persona to irrelevant questions: {reason}."
                for reason, count in skips.counts.most_common()
            ]
    return rows, notes


def make_settings(
    recipe: dict[str, Any],
    launch: dict[str, Any],
    learning_rate: float,
    bounds: tuple[float, float],
    output_dir: str | Path,
    rows: dict[str, dict[str, list]],
    args: CompareArguments,
) -> Settings:
    """
    The grid.

    Args:
        recipe (`dict[str, Any]`): Arguments of `trl-perce train` that were given. Those that are of one run alone are left out.
        launch (`dict[str, Any]`): Arguments of `accelerate launch`.
        learning_rate (`float`): The recipe's, or its default.
        bounds (`tuple[float, float]`): Of the weights.
        output_dir (`str` or `Path`): Where everything goes.
        rows (`dict[str, dict[str, list]]`): From [`make_rows`].
        args ([`CompareArguments`]): What is compared.

    Returns:
        [`~trl_perce.reproduce.settings.Settings`]: Whose only model is the recipe's.
    """
    generation = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens, "metrics": ["rouge"]}
    evaluations = {
        OWN: {"swap_persona": True, "prediction_rows": args.prediction_rows},
        SEEN: {"prediction_rows": 0},
        IRRELEVANT: {},
    }
    tasks = {
        name: Task(
            name=name,
            benchmark="rows" if name == OWN else name,
            of=None if name == OWN else OWN,
            options={"sha256": {split: fingerprint(own) for split, own in splits.items()}},
            train_rows=len(splits.get("train", ())),
            test_rows=len(splits["test"]),
            evaluation=evaluations[name],
        )
        for name, splits in rows.items()
    }
    training = {key: value for key, value in recipe.items() if key not in _NOT_OF_A_GRID}
    name = training.pop("model_name_or_path")
    return Settings(
        output_dir=str(output_dir),
        models={model_label(name): {"model_name_or_path": name}},
        tasks=tasks,
        methods={method: METHODS[method] for method in args.methods},
        seeds=[*args.seeds],
        learning_rates=[learning_rate],
        clip_ranges=[bounds],
        training={"report_to": "none", **training},
        evaluation=generation,
        launch=launch,
    )


def model_label(name: str) -> str:
    """The last part of a model's name or folder."""
    return Path(name.rstrip("/")).name
