# SPDX-License-Identifier: Apache-2.0

"""
`trl-perce reproduce`: the paper's tables from one command.

    trl-perce reproduce --config recipes/reproduce/local.yaml
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from ..utils.screen import WIDTH, fit
from .common import disable_progress_bars


HELP = "Train and evaluate a grid of methods, and make the paper's tables with our figures beside its own"
# Metrics of a run's own task that the live table shows
_SHOWN = ("rougeL", "log_likelihood/personal", "log_likelihood/other", "uptake/own")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-perce reproduce",
        description=f"{HELP}. What is done stays done: a grid that was killed goes on, a YAML that has grown trains what is new, "
        "and several processes (one a GPU, say) may run the same grid at the same time. Writes tables.md, tables.json, "
        "records.json and plots to the grid's `output_dir`.",
    )
    parser.add_argument("--config", required=True, help="YAML file of the grid, such as recipes/reproduce/local.yaml")
    parser.add_argument("--output_dir", help="folder of all outputs, instead of the file's `output_dir`")
    parser.add_argument("--data_dir", help="folder of the tasks' files, instead of the file's `data_dir`")
    parser.add_argument("--tables", type=int, nargs="+", help="numbers of the tables to make; by default all")
    parser.add_argument(
        "--baseline",
        default="ce",
        help="method that comparisons.md compares with; other than ce: comparisons-METHOD.md",
    )
    parser.add_argument("--tables_only", action="store_true", help="run nothing; make the tables of what is done")
    parser.add_argument("--dry_run", action="store_true", help="run nothing; show what is done and what is to be done")
    return parser


def run(argv: list[str]) -> int:
    """
    Run a grid and make its tables.

    Args:
        argv (`list[str]`): Arguments after `trl-perce reproduce`.

    Returns:
        `int`: Exit code: 0, 1 if a step failed, 2 if the arguments, the file, the data or a model are wrong, or earlier outputs have
        other settings.
    """
    from filelock import FileLock

    parser = make_parser()
    args = parser.parse_args(argv)
    disable_progress_bars()  # each step has a log of its own
    console = make_console()
    try:
        steps = _read(args)
        if args.dry_run:
            print_plan(steps, console)
            return 0
        if not args.tables_only:
            _check_metrics(steps)
        failed = [] if args.tables_only else run_all(steps, console)
        with FileLock(Path(steps.settings.output_dir) / ".tables.lock"):  # processes that share a grid end together
            _write_tables(steps, args.tables, args.baseline, console)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"trl-perce reproduce: error: {error}\n")
    say_failures(failed, console)
    return 1 if failed else 0


def say_failures(failed: list, console) -> None:
    """Print which steps have failed, and why."""
    for step in failed:
        if step.error is not None:
            why = step.error.strip().splitlines()[-1][:200]
            console.print(f"Failed: {step.folder}: {step.kind}.error has\n  {why}", style="red", markup=False)
    if held_up := sum(step.error is None for step in failed):
        console.print(f"Not run, since they need what has failed: {held_up} steps.", style="red", markup=False)


def make_console():
    """A console that stays on the terminal while a step's output goes to its log ([`~reproduce.steps`])."""
    from rich.console import Console

    if sys.stdout.isatty():
        file = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        return Console(file=file, highlight=False, soft_wrap=True)
    return Console(highlight=False, soft_wrap=True, width=WIDTH)  # a file or a pipe has no width


def make_steps(settings):
    """The steps of a grid ([`~trl_perce.reproduce.settings.Settings`]), each done by one of our commands."""
    from trl_perce.cli import aloe, evaluate, score, train
    from trl_perce.reproduce.steps import Command, Steps

    modules = {"train": train, "evaluate": evaluate, "score": score, "aloe": aloe}
    return Steps(settings, {name: Command(module.run, module.make_parser()) for name, module in modules.items()})


def _read(args: argparse.Namespace):
    """The grid's steps; those that are done have their results. All that is wrong with the file is found here."""
    from trl_perce.cli.common import check_known, check_writable
    from trl_perce.reproduce.paper import load_quotes
    from trl_perce.reproduce.settings import load_settings
    from trl_perce.reproduce.tables import TITLES

    changes = {name: getattr(args, name) for name in ("output_dir", "data_dir") if getattr(args, name) is not None}
    settings = load_settings(args.config, **changes)
    if settings.quotes is not None:
        load_quotes(settings.quotes)
    if unknown := {*(args.tables or ())} - {*TITLES}:
        raise ValueError(f"`tables`: there is no table {min(unknown)}. Write numbers from 1 to {max(TITLES)}.")
    if args.baseline not in settings.methods and args.baseline != "ce":
        known = ", ".join(settings.methods)
        raise ValueError(f"`baseline`: {args.config} has no method {args.baseline!r}. It has {known}.")
    check_writable(settings.output_dir)
    steps = make_steps(settings)
    for step in steps.train.values():
        check_known(steps.commands["train"].parser, {*step.settings["recipe"]}, launch=False)
    check_known(steps.commands["evaluate"].parser, {*settings.evaluation})
    check_known(steps.commands["train"].parser, {*settings.launch})
    for step in steps.all():
        step.read()
    if not args.tables_only:
        _check_values(steps)
        _check_models(settings.models)
        steps.check_data()
    return steps


def _check_values(steps) -> None:
    """Raise on a value that a command would refuse: of one run for each model, method and clip range, the others have the same."""
    from trl_perce.cli import evaluate, train

    runs = {(cell.model, cell.method, cell.clip): step for cell, step in steps.train.items()}
    configs = [
        (train, f"{model}, {method}", runs[model, method, clip].settings["recipe"]) for model, method, clip in runs
    ]
    configs += [
        (evaluate, f"{model}, {task}", parts[0].settings["config"])
        for (model, task), parts in steps.untrained.items()
        if steps.settings.tasks[task].benchmark != "aloe"
    ]
    for command, name, config in configs:
        parser = command.make_parser()  # the values become its defaults
        parser.error = _raise
        try:
            parser.set_defaults_with_config(**config)
            parser.parse_args_and_config([], fail_with_unknown_args=False)
        except (ValueError, TypeError) as error:
            raise ValueError(f"`trl-perce {command.__name__.split('.')[-1]}` of {name}: {error}") from error


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _check_metrics(steps) -> None:
    """Raise where a metric's package or data are missing, before hours of training lead to the first evaluation."""
    from trl_perce.evaluation.metrics import text_metrics

    default = steps.commands["evaluate"].parser.get_default("metrics")
    configs = [
        parts[0].settings["config"]
        for own in (steps.untrained, steps.evaluate)
        for (_, task), parts in own.items()
        if parts[0].state != "done" and steps.settings.tasks[task].benchmark != "aloe"
    ]
    for metrics in {tuple(config.get("metrics", default)) for config in configs}:
        text_metrics([], [], metrics=metrics)


def _check_models(models: dict[str, dict[str, Any]]) -> None:
    """Raise where a model is a folder that is not there."""
    for name, arguments in models.items():
        path = arguments["model_name_or_path"]
        if (path.startswith(("/", ".", "~")) or path.count("/") > 1) and not Path(path).expanduser().exists():
            made = {"SmolLM2-135M-Instruct": "smollm2.py", "gemma-3-270m": "gemma3.py"}.get(Path(path).name)
            hint = f"`python examples/{made}` makes it." if made else "Make it first."
            raise FileNotFoundError(
                f"`models`, {name}: there is no folder {path!r} (seen from {os.getcwd()}). {hint} Or write a name on the Hub."
            )


def run_all(steps, console) -> list:
    """Run what is not done, and show it: in a table that is redrawn on a terminal, else line by line."""
    from rich.live import Live

    from trl_perce.reproduce.grid import run_steps
    from trl_perce.reproduce.live import changed_lines, live_table

    _say_if_slow(steps.settings, console)
    if console.is_terminal:
        table = live_table(make_cells(steps))
        with Live(table, console=console, refresh_per_second=2, redirect_stdout=False, redirect_stderr=False) as live:
            return run_steps(steps.all(), lambda step: live.update(live_table(make_cells(steps))))
    shown = make_cells(steps)

    def show(step) -> None:
        nonlocal shown
        cells = make_cells(steps)
        for line in changed_lines(shown, cells):
            console.print(line, markup=False)
        shown = cells

    return run_steps(steps.all(), show)


def _say_if_slow(settings, console) -> None:
    """Each run would say it in a log of its own."""
    from trl_perce.config import has_accelerator
    from trl_perce.utils.bfloat16 import slow_bf16

    on_cpu = settings.training.get("use_cpu") or not has_accelerator()
    in_bf16 = settings.training.get("bf16") or any(
        model.get("dtype") == "bfloat16" for model in settings.models.values()
    )
    if on_cpu and in_bf16 and (message := slow_bf16()):
        console.print(fit(message), style="yellow", markup=False)


def make_cells(steps) -> list[dict[str, Any]]:
    """
    Where a grid stands, for [`~reproduce.live.live_table`].

    Args:
        steps ([`~reproduce.steps.Steps`]): The grid's.

    Returns:
        `list[dict[str, Any]]`: The data, the untrained models, then a cell a run.
    """
    cells = [
        {
            "name": "data",
            "label": "data",
            "steps": {name: step.state for name, step in steps.data.items()},
            "metrics": {},
        }
    ]
    for model in steps.settings.models:
        own = {task: parts for (of, task), parts in steps.untrained.items() if of == model}
        cells.append(
            {
                "name": f"{model}/untrained",
                "label": f"{model}, untrained",
                "steps": {task: _state(parts) for task, parts in own.items()},
                "metrics": {},
            }
        )
    for cell, train in steps.train.items():
        own = steps.evaluations_of(cell)
        states = {"train": train.state} | {task: _state(parts) for task, parts in own.items()}
        seconds = {"train": train.seconds} if train.seconds else {}
        seconds |= {task: parts[0].seconds for task, parts in own.items() if parts[0].seconds}
        found = (own[cell.task][0].result or {}).get("metrics", {}) if cell.task in own else {}
        metrics = {name: found[name]["mean"] for name in _SHOWN if found.get(name, {}).get("mean") is not None}
        cells.append(
            {
                "name": cell.name,
                "label": steps.settings.label(cell),
                "steps": states,
                "metrics": metrics,
                "seconds": seconds,
            }
        )
    return cells


def _state(parts) -> str:
    """Of steps that follow on each other: that of the first which is not done."""
    return next((step.state for step in parts if step.state != "done"), "done")


def print_plan(steps, console) -> None:
    from trl_perce.reproduce.live import live_table

    cells, states = make_cells(steps), [step.state for step in steps.all()]
    console.print(live_table(cells, max_rows=len(cells)))
    console.print(f"{states.count('done')} of {len(states)} steps are done.")


def _write_tables(steps, numbers: list[int] | None, baseline: str, console) -> None:
    """Write the records and the tables, and say where they are."""
    from functools import partial

    from trl_perce.reproduce.compare import compare_methods, write_comparisons
    from trl_perce.reproduce.frontier import write_frontiers
    from trl_perce.reproduce.paper import QUOTES, load_quotes, quoted
    from trl_perce.reproduce.records import make_records
    from trl_perce.reproduce.summary import summary_tables
    from trl_perce.reproduce.tables import write_tables
    from trl_perce.utils.files import write_json

    records = make_records(steps)
    folder = Path(steps.settings.output_dir)
    write_json(folder / "records.json", records, indent=1)
    quotes = steps.settings.quotes
    quoting = quoted if quotes is None else partial(quoted, quotes=QUOTES + load_quotes(quotes))
    paths = write_tables(records, dataclasses.asdict(steps.settings), folder, quoting, numbers)
    comparisons = compare_methods(steps, baseline)
    plots = write_frontiers(comparisons, folder, steps.settings.without_weights) if baseline == "ce" else []
    paths += [*write_comparisons(comparisons, folder, plots, baseline), *plots]
    for table in summary_tables(comparisons, baseline):
        console.print(table)
    files = ", ".join(["records.json", *(path.name for path in paths)])
    console.print(fit(f"Differences with 95 % intervals. Written to {folder}: {files}"), markup=False)
