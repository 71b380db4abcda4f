# SPDX-License-Identifier: Apache-2.0

"""
`trl-perce evaluate`: how well, and how personally, does a model answer a dataset's prompts?

    trl-perce evaluate --model_name_or_path outputs/adapter --dataset_name ./data/product_review --output_dir evaluation
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.screen import say
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
    number_of_processes,
    parse_with_launch,
    starts_one_process,
    take_run_settings,
)


HELP = "Generate predictions and measure overlap with the references, use of the persona and likelihood"


def make_parser():
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from trl_perce.evaluation.arguments import EvaluationArguments, GenerationArguments

    from .parser import GroupedParser, titles_of_recipe

    @dataclass
    class EvaluateArguments(ScriptArguments):
        """Which rows of which dataset, and which adapter. The rest is in the other dataclasses."""

        adapter: str | None = field(
            default=None,
            metadata={"help": "Folder or name of a PEFT adapter to put on the model. Or give it as the model itself."},
        )
        dataset_split: str | None = field(
            default=None,
            metadata={"help": "Split to evaluate on. Defaults to `dataset_test_split`, a recipe's 'test'."},
        )
        max_rows: int | None = field(default=None, metadata={"help": "Evaluate on the first so many rows only."})
        update_model_card: bool = field(
            default=False,
            metadata={
                "help": "Write the results into README.md, the model card, in the model's or adapter's folder, too."
            },
        )

    return GroupedParser(
        (EvaluateArguments, EvaluationArguments, GenerationArguments, ModelConfig, DatasetMixtureConfig),
        {
            EvaluationArguments: "evaluation",
            EvaluateArguments: "rows, adapter and model card",
            GenerationArguments: "generation",
            **titles_of_recipe(),
        },
        prog="trl-perce evaluate",
        description=f"{HELP}. Takes a training recipe with --config, whose arguments that do not matter here are ignored: give "
        "the trained model or adapter beside it. Writes predictions.jsonl, metrics.jsonl, metrics.json and report.md to "
        "--output_dir. Called again, it goes on where it stopped. Arguments of `accelerate launch` (--num_processes …) and "
        "--accelerate_config (a file, or the name of one of TRL's) choose the processes, which share the rows.",
    )


def run(argv: list[str]) -> int:
    """
    Evaluate a model on a dataset, and print the results: in this process if there is one device at most, else through
    `accelerate launch`.

    Args:
        argv (`list[str]`): Arguments after `trl-perce evaluate`.

    Returns:
        `int`: Exit code. Arguments or rows that are wrong exit with 2, before a model loads; an endpoint that fails exits with 1.
    """
    launched = __name__ == "__main__" or is_worker()
    if launched:
        begin_worker(needs_whole_model=True)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        (script_args, options, args, model_args, dataset_args), launch_args, own = parse_with_launch(
            make_parser(), argv
        )
        check_script_args(script_args, model_args, dataset_args)
        if "output_dir" not in given_arguments(argv):
            args.output_dir = f"{args.output_dir.rstrip('/')}-evaluation"  # a recipe's is that of the training
        check_writable(args.output_dir)
        if not launched and not _starts_one_process(launch_args, args.use_cpu, options.use_vllm):
            return launch("evaluate", own, launch_args, args.use_cpu)
        evaluation = _make_evaluation(script_args, options, args, model_args, dataset_args, own)
    except (ValueError, TypeError, OSError, ImportError) as error:  # `OSError`: there is no such file, or model
        fail("trl-perce evaluate", error, 2)
    _run(evaluation, script_args.update_model_card)
    return 0


def _starts_one_process(launch_args: list[str], use_cpu: bool, use_vllm: bool) -> bool:
    if use_vllm:
        from trl_perce.evaluation.evaluate import check_vllm_processes

        check_vllm_processes(
            number_of_processes(launch_args) or 1
        )  # an `--accelerate_config` tells the processes only
        return not launch_args
    return starts_one_process(launch_args, use_cpu)


def _make_evaluation(script_args, options, args, model_args, dataset_args, argv):
    from trl import get_quantization_config

    from trl_perce.evaluation.card import find_card
    from trl_perce.evaluation.evaluate import Evaluation
    from trl_perce.scoring.loading import find_adapter

    if script_args.max_rows is not None and script_args.max_rows < 1:
        raise ValueError(f"`max_rows` is {script_args.max_rows}. Write a positive number of rows, or leave it out.")
    args.model_init_kwargs = model_init_kwargs(model_args, args)
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        args.model_init_kwargs["quantization_config"] = quantization
    rows, split = load_split(script_args, dataset_args, script_args.dataset_test_split, or_only=True)
    base, adapter = find_adapter(model_args.model_name_or_path, script_args.adapter)
    take_run_settings(args, argv, adapter or base)
    if script_args.update_model_card:
        find_card(adapter or base)
    settings = {
        "model": base,
        "adapter": adapter,
        "dataset": script_args.dataset_name or [mixed.path for mixed in dataset_args.datasets],
        "split": split,
        **{name: getattr(model_args, name) for name in MODEL_SETTINGS},
    }
    return Evaluation(base, None, rows, args.output_dir, args, options, settings, adapter, say=say)


def _run(evaluation, updates_card: bool) -> None:
    from trl_perce import PersonaError
    from trl_perce.evaluation.endpoint import EndpointError
    from trl_perce.scoring.loading import AdapterError
    from trl_perce.training.model_check import ModelCheckError

    try:
        result = evaluation.run()
    except (PersonaError, AdapterError, ModelCheckError) as error:
        fail("trl-perce evaluate", error, 2)
    except (EndpointError, FloatingPointError) as error:
        fail("trl-perce evaluate", error, 1)
    if is_main_process():
        _show(evaluation, result, updates_card)
    end_processes()


def _show(evaluation, result, updates_card: bool) -> None:
    from rich.console import Console

    from trl_perce.evaluation.card import find_card, update_model_card
    from trl_perce.evaluation.report import print_result

    print_result(result, Console(highlight=False))
    names = ["predictions.jsonl", "metrics.jsonl", "metrics.json", "report.md"]
    folder = Path(evaluation.folder)
    say(f"Written to {folder}: {', '.join(names)}")
    if result["baseline"] is None:
        say(f"To compare another model, evaluate it with --baseline {shlex.quote(str(folder))}")
    if updates_card:
        card = find_card(evaluation.adapter or evaluation.base)
        update_model_card(card, result)
        print(f"Model card: {card}")


if __name__ == "__main__":  # started by `accelerate launch`
    with explain_stops("trl-perce evaluate", lambda: KEPT):
        raise SystemExit(run(sys.argv[1:]))
