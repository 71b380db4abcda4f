# SPDX-License-Identifier: Apache-2.0

"""
`trl-perce compare`: does PerCE make a model more personal on your data than plain fine-tuning, and is anything lost?

    trl-perce compare --config recipe.yaml --dataset_name data --output_dir outputs/compare
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..utils.files import read_yaml, write_json
from ..utils.screen import say
from .common import (
    check_script_args,
    check_writable,
    disable_progress_bars,
    given_arguments,
    load_data,
    parse_with_launch,
)


HELP = "Train CE and PerCE on your data, and find out on held-out users what is gained and lost: one page"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-perce compare",
        usage="%(prog)s --config FILE --dataset_name DATA --output_dir FOLDER [--option value ...]",
        description=f"{HELP}. Takes a training recipe with --config and all arguments of `trl-perce train`; the dataset needs a "
        "split of users that are not trained on, as `trl-perce prepare` makes it. Writes report.html, report.md and report.json to "
        "--output_dir. What is done stays done: a comparison that was stopped goes on.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--methods", nargs="+", default=["ce", "perce"], help="ce and what is compared with it (default: ce perce)")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="seeds of training (default: 0). Two or more tell of new runs",
    )
    add("--test_rows", type=int, default=500, help="held-out rows, of as many users as possible (default: 500)")
    add("--prediction_rows", type=int, default=100, help="of these, rows that get answers (default: 100)")
    add("--answers", type=int, default=12, help="prompts whose answers are shown side by side (default: 12)")
    add(
        "--irrelevant_questions",
        type=int,
        default=100,
        help="questions to which the persona does not matter (default: 100; 0 asks none)",
    )
    add("--temperature", type=float, default=0.0, help="of the answers (default: 0, greedy)")
    add("--max_new_tokens", type=int, default=128, help="tokens of an answer (default: 128)")
    add("--dry_run", action="store_true", help="run nothing; show what is done and what is to be done")
    return parser


def run(argv: list[str]) -> int:
    """
    Train, evaluate and report.

    Args:
        argv (`list[str]`): Arguments after `trl-perce compare`.

    Returns:
        `int`: Exit code: 0, 1 if a step failed, 2 if arguments, data or model are wrong, or earlier outputs have other settings.
    """
    from .reproduce import make_console, print_plan, run_all, say_failures

    parser = make_parser()
    own, rest = parser.parse_known_args(argv)
    disable_progress_bars()  # each step has a log of its own
    console = make_console()
    try:
        steps, args, settings, notes = _read(own, rest)
        for note in notes:
            say(note)
        if own.dry_run:
            print_plan(steps, console)
            return 0
        failed = run_all(steps, console)
        if failed:
            say_failures(failed, console)
            return 1
        _report(steps, args, settings, notes)
    except (ValueError, TypeError, OSError) as error:
        parser.exit(2, f"trl-perce compare: error: {error}\n")
    return 0


def _read(own: argparse.Namespace, rest: list[str]):
    """The steps of the comparison. All that is wrong with arguments and data is found here."""
    from trl_perce.cli import evaluate, score, train
    from trl_perce.compare.settings import CompareArguments, make_rows, make_settings
    from trl_perce.reproduce.steps import Command, Steps

    args = CompareArguments(**{field.name: getattr(own, field.name) for field in dataclasses.fields(CompareArguments)})
    if "output_dir" not in given_arguments(rest):
        raise ValueError("`--output_dir` is missing: the folder of the comparison, not that of the recipe.")
    parsed, launch_args, train_args = parse_with_launch(train.make_parser(), rest)
    script_args, training_args, model_args, dataset_args = parsed
    check_script_args(script_args, model_args, dataset_args)
    check_writable(training_args.output_dir)
    splits = load_data(script_args, dataset_args)
    rows, notes = make_rows(
        *_splits(splits, script_args), args, (training_args.persona_start_marker, training_args.persona_end_marker)
    )
    config = read_yaml(train_args[train_args.index("--config") + 1]) if "--config" in train_args else {}
    recipe = _given(parsed, config, given_arguments(train_args))
    steps = Steps(
        make_settings(
            recipe,
            _pairs(launch_args),
            training_args.learning_rate,
            (training_args.weight_clip_min, training_args.weight_clip_max),
            training_args.output_dir,
            rows,
            args,
        ),
        {
            name: Command(module.run, module.make_parser())
            for name, module in {"train": train, "evaluate": evaluate, "score": score}.items()
        },
        rows,
    )
    for step in steps.all():
        step.read()
    dataset = script_args.dataset_name or [mixed.path for mixed in dataset_args.datasets]
    settings = [
        ("model", str(model_args.model_name_or_path)),
        ("data", str(dataset)),
        ("methods", ", ".join(args.methods)),
        ("seeds", ", ".join(map(str, args.seeds))),
        ("learning rate", f"{training_args.learning_rate:g}"),
        ("epochs", f"{training_args.num_train_epochs:g}"),
        ("answers", f"temperature {args.temperature:g}, at most {args.max_new_tokens} tokens"),
    ]
    return steps, args, settings, notes


def _splits(splits, script_args) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows to train on and those of held-out users."""
    names = (script_args.dataset_train_split, script_args.dataset_test_split)
    for name, what in zip(names, ("train", "test"), strict=True):
        if name not in splits:
            raise ValueError(
                f"The dataset has no split {name!r}; it has {', '.join(map(repr, splits))}. `trl-perce prepare` makes splits by users; "
                f"or name another with --dataset_{what}_split."
            )
    if script_args.dataset_streaming:
        raise ValueError("`dataset_streaming` does not go with a comparison, which keeps its rows. Leave it out.")
    train, test = (splits[name].to_list() for name in names)
    return train, test


def _given(parsed: tuple[Any, ...], config: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The arguments of a training that were given, in the file or on the command line, as YAML takes them."""
    fields = {field.name: args for args in parsed for field in dataclasses.fields(args)}
    recipe = {key: value for key, value in config.items() if key in fields}
    for name in names:
        known = name.removeprefix("no_") if name.startswith("no_") and name not in fields else name
        if known in fields:
            value = getattr(fields[known], known)
            recipe[known] = value.value if hasattr(value, "value") else value
    return recipe


def _pairs(launch_args: list[str]) -> dict[str, Any]:
    """Arguments of `accelerate launch` as a grid takes them."""
    pairs: dict[str, Any] = {}
    for arg, value in zip(launch_args, [*launch_args, ""][1:], strict=True):
        if arg.startswith("--"):
            pairs[arg.lstrip("-")] = value
    return pairs


def _report(steps, args, settings, notes) -> None:
    """Score the answers, write the report, and print it."""
    from rich.console import Console

    from trl_perce.compare.answers import RULE, answers_step, read_answers
    from trl_perce.compare.findings import make_findings
    from trl_perce.compare.page import write_html
    from trl_perce.compare.text import print_findings, write_markdown

    step = answers_step(steps, args.answers)
    if not step.read():
        step.do()
    findings = make_findings(steps, settings, notes, read_answers(steps, step, args.answers), RULE)
    folder = Path(steps.settings.output_dir)
    write_json(folder / "report.json", findings, indent=1)
    write_markdown(findings, folder / "report.md")
    write_html(findings, folder / "report.html")
    print_findings(findings, Console(highlight=False))
    say(f"Written to {folder}: report.html, report.md, report.json")
