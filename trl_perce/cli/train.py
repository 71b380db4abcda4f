# SPDX-License-Identifier: Apache-2.0

"""
`trl-perce train`: the PerCE counterpart of `trl sft`.

    trl-perce train --config recipes/SmolLM2-135M-Instruct/persona_qa/config_lora.yaml --learning_rate 1e-4
"""

import argparse
import sys
from typing import Any

from ..utils.files import is_disk_error, read_yaml
from ..utils.screen import fit, to_copy
from .common import (
    MODEL_SETTINGS,
    begin_worker,
    check_script_args,
    check_writable,
    disable_progress_bars,
    end_processes,
    explain_stops,
    fail,
    is_main_process,
    is_worker,
    launch,
    load_data,
    model_init_kwargs,
    parse_with_launch,
    say_error,
    starts_one_process,
)


HELP = "Fine-tune a model with PerCE, LossCE, EntCE or plain CE"
# With `use_peft`, for what is not given: the value, and why it is not TRL's
LORA_DEFAULTS = {
    "lora_dropout": (0.0, "dropout would make PIR noisy"),
    "lora_target_modules": ("all-linear", "all linear layers but the head"),
    "learning_rate": (1e-4, "LoRA takes more than full fine-tuning"),
    "dtype": ("bfloat16", "the frozen weights need half the memory"),
}
# What its evaluation needs to know, where neither the recipe nor the adapter's folder says it
_OF_EVALUATION = [
    *("dataset_name", "dataset_config", "dataset_streaming", "dataset_test_split", "test_split_size"),
    *("use_cpu", "trust_remote_code"),
    *MODEL_SETTINGS,
]


def make_parser():
    from transformers import TrainingArguments
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    from trl_perce import PerCEConfig

    from .parser import GroupedParser

    class TrainParser(GroupedParser):
        """Fills in what is not given, which depends on the rest, before the dataclasses see it."""

        def parse_known_args(self, args=None, namespace=None):
            parsed, rest = super().parse_known_args(args, namespace)
            self.filled_in = _fill_in(parsed, defaults)
            return parsed, rest

    parser = TrainParser(
        (ScriptArguments, PerCEConfig, ModelConfig, DatasetMixtureConfig),
        {
            PerCEConfig: "PerCE",
            ScriptArguments: "data",
            ModelConfig: "model, LoRA and quantization",
            SFTConfig: "training: TRL's SFT",
            TrainingArguments: "training: Transformers' trainer",
            DatasetMixtureConfig: "mixture of datasets",
        },
        prog="trl-perce train",
        description=f"{HELP}. Takes a YAML file with --config; arguments on the command line override it. Arguments of "
        "`accelerate launch` (--num_processes …) and --accelerate_config (a file, or the name of one of TRL's) choose the "
        "processes.",
    )
    defaults = {name: parser.get_default(name) for name in LORA_DEFAULTS}
    for action in parser._actions:
        if action.dest in LORA_DEFAULTS:
            value, _ = LORA_DEFAULTS[action.dest]
            default = value if action.dest.startswith("lora_") else f"{action.default}, with use_peft {value}"
            action.help = f"{action.help} (default: {default})"
            action.default = argparse.SUPPRESS  # what is not given is not in the namespace
    return parser


def _fill_in(parsed, defaults: dict[str, Any]) -> list[str]:
    """Give a namespace the values that are not in it; those of LoRA are told in lines, for the user."""
    from trl_perce.config import has_accelerator

    lora = dict(LORA_DEFAULTS) if parsed.use_peft else {}
    if parsed.lora_target_parameters:
        lora.pop("lora_target_modules", None)
    if parsed.use_cpu or parsed.fp16 or parsed.bf16 is False or not has_accelerator():
        lora.pop("dtype", None)
    lines = []
    for name, default in defaults.items():
        if not hasattr(parsed, name):
            value, why = lora.get(name, (default, None))
            setattr(parsed, name, value)
            if why:
                lines.append(f"{name}: {value} (not given; {why})")
    return lines


def run(argv: list[str]) -> int:
    """
    Check the arguments, then train: in this process if there is one device at most, else through `accelerate launch`.

    Args:
        argv (`list[str]`): Arguments after `trl-perce train`.

    Returns:
        `int`: Exit code. Arguments that are wrong exit with 2, before a model loads.
    """
    from trl_perce.training.checkpoints import check_whole

    parser = make_parser()
    try:
        (script_args, training_args, model_args, dataset_args), launch_args, own = parse_with_launch(parser, argv)
        check_script_args(script_args, model_args, dataset_args)
        check_writable(training_args.output_dir)
        if not _goes_on_by_itself(training_args) and training_args.resume_from_checkpoint:
            check_whole(training_args.resume_from_checkpoint)
    except (ValueError, TypeError, OSError) as error:
        fail("trl-perce train", error, 2)
    for line in parser.filled_in if is_main_process() else ():
        print(line, file=sys.stderr)

    if is_worker() or starts_one_process(launch_args, training_args.use_cpu):
        return _main_exit_code(argv, script_args, training_args, model_args, dataset_args)
    return launch("train", own, launch_args, training_args.use_cpu)


def main(script_args, training_args, model_args, dataset_args):
    """
    Train in this process, as `trl/scripts/sft.py` does.

    Args:
        script_args ([`~trl.ScriptArguments`]): Says which dataset.
        training_args ([`PerCEConfig`]): Configuration of the trainer.
        model_args ([`~trl.ModelConfig`]): Says which model, adapter and quantization.
        dataset_args ([`~trl.DatasetMixtureConfig`]): Says which mixture of datasets, if any.

    Returns:
        [`PerCETrainer`]: The trainer, done and saved.

    Raises:
        `SystemExit`: With 2: arguments, data or model do not fit, which is said.
    """
    return _train(script_args, training_args, model_args, dataset_args)[0]


def _train(script_args, training_args, model_args, dataset_args):
    """The trainer, done and saved, and the dataset's splits."""
    from huggingface_hub.constants import ENDPOINT

    from trl_perce.hub.upload import UploadError
    from trl_perce.training.checkpoints import CheckpointError, last_whole_checkpoint

    if not sys.stderr.isatty():
        disable_progress_bars()
        training_args.disable_tqdm = True
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    try:
        dataset = load_data(script_args, dataset_args)
        trainer = _make_trainer(dataset, script_args, training_args, model_args)
    except (ValueError, OSError, ImportError) as error:  # what the user wrote: a traceback would only hide the message
        if is_disk_error(error) or isinstance(error, (CheckpointError, UploadError)):
            raise
        fail("trl-perce train", error, 2)

    checkpoint = training_args.resume_from_checkpoint
    if _goes_on_by_itself(training_args):
        checkpoint, damages = last_whole_checkpoint(training_args.output_dir)
        trainer.accelerator.print(
            *(f"{damage}: it is passed over." for damage in damages),
            f"Resuming from {checkpoint}." if checkpoint else "No checkpoint yet: starting from the beginning.",
            sep="\n",
        )
    trainer.card_dataset = (
        None if dataset_args.datasets else script_args.dataset_name
    )  # for the checkpoints' cards, too
    trainer.train(resume_from_checkpoint=checkpoint)
    if training_args.eval_strategy == "epoch" and not any(
        "eval_loss" in log and log["step"] == trainer.state.global_step for log in trainer.state.log_history
    ):
        trainer.evaluate()  # the run was killed between its last checkpoint and the end of the epoch
    trainer.accelerator.print("✅ Training completed.")
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    what = "adapter" if model_args.use_peft else "model"
    trainer.accelerator.print(f"💾 The {what} is in {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub()
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in {ENDPOINT}/{trainer.hub_model_id}.")
    end(trainer)
    return trainer, dataset


def _make_trainer(dataset, script_args, training_args, model_args):
    """The trainer on its data."""
    from trl import get_peft_config, get_quantization_config

    from trl_perce import PerCETrainer

    evaluates = training_args.eval_strategy != "no"
    splits = [script_args.dataset_train_split] + ([script_args.dataset_test_split] if evaluates else [])
    for split in splits:
        if split not in dataset:
            raise ValueError(
                f"The dataset has no split {split!r}; it has {', '.join(map(repr, dataset))}. Set `dataset_train_split` "
                "and `dataset_test_split`, or `eval_strategy: 'no'`."
            )

    return PerCETrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluates else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def end(trainer) -> None:
    """Finish the trackers and the process group of a trainer, the last thing that a process does with it."""
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) >= Version("5.18.0"):
        trainer.end()
        end_processes()


def _goes_on_by_itself(training_args) -> bool:
    """Whether a run takes its last checkpoint, if it has one."""
    return str(training_args.resume_from_checkpoint).lower() == "true"


def _next_step(argv: list[str], dataset, script_args, training_args, *args) -> str:
    """The command that evaluates what was trained, to be copied; nothing where its rows are not for that."""
    from trl.data_utils import get_dataset_column_names

    from trl_perce.evaluation.arguments import GenerationArguments

    train, test = script_args.dataset_train_split, script_args.dataset_test_split
    split = next((name for name in (test, *dataset) if name in dataset and name != train), train)
    columns = {*get_dataset_column_names(dataset[split])}
    if not ({"prompt", "completion"} <= columns or {"messages", "conversations"} & columns):
        return ""
    config = argv[argv.index("--config") + 1] if "--config" in argv[:-1] else None
    recipe = {} if config is None else read_yaml(config) or {}
    folder = training_args.output_dir.rstrip("/")
    words = ["trl-perce", "evaluate", *(["--config", config] if config else []), "--model_name_or_path", folder]
    for given in (script_args, training_args, *args):
        fields = type(given).__dataclass_fields__
        for name in _OF_EVALUATION:
            if name in fields and (value := getattr(given, name)) != recipe.get(name, fields[name].default):
                words += [f"--{name}", str(value)]
    if split != test and len(dataset) > 1:
        words += ["--dataset_split", split]
    length = training_args.max_length
    if length is not None and length < 2 * GenerationArguments.max_new_tokens:  # half of it for the answer
        words += ["--max_new_tokens", str(length // 2)]
    words += ["--output_dir", f"{folder}-evaluation"]
    on = ", here on its training rows, as there are no others" if split == train else f" on the split {split!r}"
    return "\n" + fit(f"Next, evaluate it{on}:") + "\n\n" + to_copy(words)


def _main_exit_code(argv: list[str], script_args, training_args, *args) -> int:
    from trl_perce import PersonaError
    from trl_perce.hub.upload import UploadError
    from trl_perce.training.checkpoints import CheckpointError
    from trl_perce.training.model_check import ModelCheckError

    if __name__ == "__main__" or is_worker():
        begin_worker(needs_whole_model=False)
    try:
        with explain_stops("trl-perce train", lambda: _where_to_go_on(training_args)):
            _, dataset = _train(script_args, training_args, *args)
            if is_main_process():  # the last that is on the screen
                print(_next_step(argv, dataset, script_args, training_args, *args))
    # A traceback would only hide the message
    except (PersonaError, ModelCheckError) as error:
        say_error("trl-perce train", error)
        return 2
    except UploadError as error:
        say_error("trl-perce train", error)
        return 1
    except (CheckpointError, FloatingPointError) as error:
        say_error("trl-perce train", f"{error} {_where_to_go_on(training_args)}")
        return 1
    return 0


def _where_to_go_on(training_args) -> str:
    from trl_perce.training.checkpoints import last_whole_checkpoint

    checkpoint, _ = last_whole_checkpoint(training_args.output_dir)
    if checkpoint is None:
        return "There is no checkpoint to go on from (see `save_strategy` and `save_steps`)."
    return f"With `--resume_from_checkpoint true` the same command goes on from {checkpoint}."


if __name__ == "__main__":  # started by `accelerate launch`
    raise SystemExit(_main_exit_code(sys.argv[1:], *make_parser().parse_args_and_config(fail_with_unknown_args=False)))
