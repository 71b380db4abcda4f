# SPDX-License-Identifier: Apache-2.0

"""
`trl-perce score`: how personal is each token of a dataset's responses, to a model?

    trl-perce score --model_name_or_path Qwen/Qwen3-0.6B --dataset_name ./data/product_review --output_dir scores
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.files import read_yaml
from ..utils.screen import say, to_copy
from .common import (
    KEPT,
    MODEL_SETTINGS,
    begin_worker,
    check_script_args,
    check_writable,
    disable_progress_bars,
    end_processes,
    explain_stops,
    fail,
    given_arguments,
    is_main_process,
    is_worker,
    launch,
    load_split,
    model_init_kwargs,
    parse_with_launch,
    starts_one_process,
    take_run_settings,
)


HELP = "Score how personal each token of a dataset's responses is, and report whether the data is worth PerCE"
# Rows with their weights, a dataset of its own
_WEIGHTED = "token_weights/train.parquet"
# Settings that the scores depend on
_SETTINGS = [
    *("counterfactual", "weight_clip_min", "weight_clip_max", "personal_threshold", "max_length", "truncate_persona"),
    *(
        "truncation_mode",
        "completion_only_loss",
        "assistant_only_loss",
        "answer_only_loss",
        "chat_template_path",
        "chat_template_kwargs",
        "eos_token",
        "bf16",
        "fp16",
    ),
    *("persona_start_marker", "persona_end_marker", "dataset_text_field"),
]


def make_parser():
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from trl_perce import PerContrastConfig

    from .parser import GroupedParser, titles_of_recipe

    @dataclass
    class ScoreArguments(ScriptArguments):
        """Arguments of `trl-perce score` beside those of a training recipe."""

        adapter: str | None = field(
            default=None, metadata={"help": "Folder or name of a PEFT adapter to put on the model, on in both passes."}
        )
        dataset_split: str | None = field(
            default=None, metadata={"help": "Split to score. By default `dataset_train_split`."}
        )
        max_rows: int | None = field(default=None, metadata={"help": "Score the first so many rows only."})
        heatmap_rows: int = field(default=1000, metadata={"help": "Rows of heatmap.html: the first so many."})
        png_rows: int = field(
            default=4,
            metadata={"help": "Personas in heatmap.png and in the terminal, each with its most personal row."},
        )
        token_weights: bool = field(
            default=False,
            metadata={
                "help": "Also write token_weights/train.parquet: the rows, tokenized, with the weight of each token, for "
                "`trl-perce train --token_weighting given`."
            },
        )
        overwrite: bool = field(
            default=False, metadata={"help": "Remove earlier scores from `output_dir` instead of going on with them."}
        )

    return GroupedParser(
        (ScoreArguments, PerContrastConfig, ModelConfig, DatasetMixtureConfig),
        {ScoreArguments: "scoring", **titles_of_recipe()},
        prog="trl-perce score",
        description=f"{HELP}. Takes a training recipe with --config, whose arguments that do not matter here are ignored; one with "
        "`bf16: true` is scored under autocast, as it trains, and otherwise the model runs in its own dtype. "
        "Writes scores.jsonl, heatmap.html, heatmap.png, report.md and report.json to --output_dir, and with --token_weights the rows "
        "with their weights. Called again, it goes on "
        "where it stopped. Arguments of `accelerate launch` (--num_processes …) and --accelerate_config (a file, or the name of one "
        "of TRL's) choose the processes, which share the rows.",
    )


def run(argv: list[str]) -> int:
    """
    Score a dataset and write what there is to see of it: in this process if there is one device at most, else through
    `accelerate launch`.

    Args:
        argv (`list[str]`): Arguments after `trl-perce score`.

    Returns:
        `int`: Exit code. Arguments or rows that are wrong exit with 2, before a model loads.
    """
    from trl_perce import PersonaError
    from trl_perce.scoring.loading import AdapterError
    from trl_perce.training.model_check import ModelCheckError

    launched = __name__ == "__main__" or is_worker()
    if launched:
        begin_worker(needs_whole_model=True)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        (script_args, args, model_args, dataset_args), launch_args, own = parse_with_launch(make_parser(), argv)
        check_script_args(script_args, model_args, dataset_args)
        if "output_dir" not in given_arguments(argv):
            args.output_dir = f"{args.output_dir.rstrip('/')}-scores"  # a recipe's is that of the training
        check_writable(args.output_dir)
        if not (launched or starts_one_process(launch_args, args.use_cpu)):
            return launch("score", own, launch_args, args.use_cpu)
        run = ScoreRun(script_args, args, model_args, dataset_args, own)
    except (ValueError, TypeError, OSError) as error:  # `OSError`: there is no such file, or model
        fail("trl-perce score", error, 2)
    try:
        run.score()
    except (PersonaError, AdapterError, ModelCheckError) as error:
        fail("trl-perce score", error, 2)
    except FloatingPointError as error:
        fail("trl-perce score", error, 1)
    if is_main_process():
        run.show()
    end_processes()
    return 0


class ScoreRun:
    """
    One run of the command. What can be wrong with arguments, rows and earlier scores is found here, before the model loads.

    Args:
        script_args (`ScoreArguments`): Says which dataset and adapter.
        args ([`PerContrastConfig`]): Configuration of the scores.
        model_args ([`~trl.ModelConfig`]): Says which model and quantization.
        dataset_args ([`~trl.DatasetMixtureConfig`]): Says which mixture of datasets, if any.
        argv (`list[str]`): Arguments that were given: what is not among them is taken from the adapter's training.

    Raises:
        `ValueError`: Arguments, rows or earlier scores do not fit; the message says what to write instead.
    """

    def __init__(self, script_args, args, model_args, dataset_args, argv):
        from trl_perce.scoring.loading import find_adapter, load_scoring_tokenizer
        from trl_perce.scoring.preparation import Preparation
        from trl_perce.scoring.score_file import ScoreFile, remove_scores

        self.script_args, self.args, self.model_args = script_args, args, model_args
        for name in ("max_rows", "heatmap_rows", "png_rows"):
            value = getattr(script_args, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}. Write a positive number of rows, or leave it out.")
        args.model_init_kwargs = model_init_kwargs(model_args, args)
        dataset, split = load_split(script_args, dataset_args, script_args.dataset_train_split)
        self.base, self.adapter = find_adapter(model_args.model_name_or_path, script_args.adapter)
        take_run_settings(args, argv, self.adapter or self.base)
        try:
            self.tokenizer = load_scoring_tokenizer(self.base, self.adapter, args)
        except OSError as error:
            raise OSError(f"`model_name_or_path`: there is no tokenizer to load for {self.base!r}. {error}") from error
        self.prepared = Preparation(self.tokenizer, args)(dataset, split, needs_persona=True)
        self.settings = {
            "model": self.base,
            "adapter": self.adapter,
            "dataset": script_args.dataset_name or [mixed.path for mixed in dataset_args.datasets],
            "split": split,
            "rows": script_args.max_rows,
            "fingerprint": _fingerprint(dataset),
            **{name: getattr(args, name) for name in _SETTINGS},
            **{name: getattr(model_args, name) for name in MODEL_SETTINGS},
        }
        if script_args.overwrite:
            remove_scores(args.output_dir)
            if is_main_process():
                (Path(args.output_dir) / _WEIGHTED).unlink(missing_ok=True)
        self.file = ScoreFile(args.output_dir, self.settings)
        self.training = [] if self.adapter is not None else self._training_command(argv)

    def _training_command(self, argv: list[str]) -> list[str]:
        """Trains with the recipe that was scored, if one was; with the weights, if they are written."""
        if "--config" not in argv[:-1]:
            return []
        config = argv[argv.index("--config") + 1]
        recipe, command = read_yaml(config) or {}, ["trl-perce", "train", "--config", config]
        wanted = {
            "model_name_or_path": self.model_args.model_name_or_path,
            "dataset_name": self.script_args.dataset_name,
        }
        if self.script_args.token_weights:
            if "datasets" in recipe:  # which would go before `dataset_name`
                return []
            folder = (Path(self.args.output_dir) / _WEIGHTED).parent
            wanted |= {"dataset_name": f"./{folder}" if not folder.is_absolute() else str(folder)}
            wanted |= {"token_weighting": "given", "output_dir": f"{recipe.get('output_dir', 'outputs')}-given"}
            if self.script_args.dataset_train_split != "train":
                wanted["dataset_train_split"] = "train"
            if recipe.get("eval_strategy", "no") not in ("no", False):  # there is no other split
                wanted["eval_strategy"] = "no"
        for name, value in wanted.items():
            if value != recipe.get(name):
                command += [f"--{name}", value]
        return command

    def score(self) -> None:
        """Score the rows that are not yet scored."""
        from trl import get_quantization_config

        from trl_perce import PerContrast
        from trl_perce.scoring.loading import load_model

        done = len(self.file.done)
        is_missing = self.prepared.num_rows != done
        if is_missing:
            if done and is_main_process():
                print(f"{done} rows are scored already.")
            model = load_model(self.base, self.adapter, self.args, get_quantization_config(self.model_args))
            scorer, started = PerContrast(model, self.tokenizer, self.args), time.time()
            self.file.append(scorer.iterate(self.prepared, frozenset(self.file.done), self.file.share()))
        self.file.finish()
        if is_missing and is_main_process():
            print(f"Scored {len(self.file.done) - done} rows in {time.time() - started:.1f} s.")

    def show(self) -> None:
        """Write the report and the heatmaps, and print the first of both."""
        from rich.console import Console

        from trl_perce.config import describe_precision
        from trl_perce.scoring.heatmap.page import write_html
        from trl_perce.scoring.heatmap.png import write_png
        from trl_perce.scoring.heatmap.terminal import print_heatmap
        from trl_perce.scoring.report import make_report, write_report
        from trl_perce.scoring.weighted_rows import write_weighted_rows

        folder, rows = Path(self.args.output_dir), self.script_args.png_rows
        precision = describe_precision(self.args, (self.args.model_init_kwargs or {}).get("dtype"))
        settings = self.settings | {"precision": precision}
        report = make_report(self.file, settings)
        write_report(report, folder)
        write_html(self.file, folder / "heatmap.html", settings, max_rows=self.script_args.heatmap_rows)
        write_png(self.file, folder / "heatmap.png", self.settings, num_rows=rows)
        console = Console(highlight=False)
        print_heatmap(self.file, console, num_rows=rows)
        verdict = report["verdict"]
        console.print(f"Worth PerCE? {verdict['answer']}. {verdict['text']}", markup=False)
        names = ("scores.jsonl", "heatmap.html", "heatmap.png", "report.md", "report.json")
        say(f"Written to {folder}: {', '.join(names)}")
        if self.script_args.token_weights:
            written, left_out = write_weighted_rows(self.file, self.prepared, folder / _WEIGHTED)
            reasons = "".join(f"; {count} left out ({reason})" for reason, count in left_out.items())
            say(f"{folder / _WEIGHTED}: {written} rows with their weights{reasons}")
        if verdict["answer"] == "yes" and self.training:
            print(f"Next: {to_copy(self.training)}")


def _fingerprint(dataset) -> str:
    """Tells a dataset from another one under the same name: by its size (if it is known), first and last row."""
    from datasets import Dataset
    from datasets.fingerprint import Hasher

    rows = [len(dataset), dataset[0], dataset[-1]] if isinstance(dataset, Dataset) else [next(iter(dataset), None)]
    return Hasher.hash(rows)


if __name__ == "__main__":  # started by `accelerate launch`
    with explain_stops("trl-perce score", lambda: KEPT):
        raise SystemExit(run(sys.argv[1:]))
