# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
`trl-perce train`: the PerCE counterpart of `trl sft`.

    trl-perce train --config recipes/SmolLM2-135M-Instruct/persona_qa/config_lora.yaml --learning_rate 1e-4
"""

import difflib
import os
import sys
import time
from pathlib import Path


HELP = "Fine-tune a model with PerCE, LossCE, EntCE or plain CE"
_MODULE = "trl_perce.cli.train"
# Suffix of a data file → builder of `datasets`
_BUILDERS = {
    **{".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"},
    **{".parquet": "parquet", ".arrow": "arrow", ".txt": "text"},
}


def make_parser():
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from trl_perce import PerCEConfig

    return TrlParser(
        (ScriptArguments, PerCEConfig, ModelConfig, DatasetMixtureConfig),
        prog="trl-perce train",
        description=f"{HELP}. Takes a YAML file with --config; arguments on the command line override it. Arguments of "
        "`accelerate launch` (--num_processes …) and --accelerate_config (a file, or the name of one of TRL's) choose the "
        "processes.",
    )


def run(argv: list[str]) -> int:
    """
    Check the arguments, then train: in this process if there is one device at most, else through `accelerate launch`.

    Args:
        argv (`list[str]`): Arguments after `trl-perce train`.

    Returns:
        `int`: Exit code. Arguments that are wrong exit with 2, before a model loads.
    """
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.commands.training import _subtract_subsequence

    parser = make_parser()
    try:
        _check_config_keys(parser, argv)
        script_args, training_args, model_args, dataset_args, of_config, of_command_line = (
            parser.parse_args_and_config(argv, return_remaining_strings=True, separate_remaining_strings=True)
        )
        launch_args = resolve_accelerate_config_argument(of_config + of_command_line)
        _check_launch_args(parser, launch_args)
        _check_script_args(script_args, model_args, dataset_args)
    except (ValueError, TypeError, FileNotFoundError) as error:
        parser.exit(2, f"trl-perce train: error: {error}\n")

    if "LOCAL_RANK" in os.environ or (not launch_args and _is_one_process()):
        return _main_exit_code(script_args, training_args, model_args, dataset_args)

    from accelerate.commands.launch import launch_command, launch_command_parser

    training_argv = _subtract_subsequence(argv, of_command_line)
    launch_command(launch_command_parser().parse_args(["--quiet", *launch_args, "--module", _MODULE, *training_argv]))
    return 0


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
    """
    import transformers
    from packaging.version import Version
    from transformers.trainer_utils import get_last_checkpoint
    from trl import get_peft_config, get_quantization_config

    from trl_perce import PerCETrainer

    if not sys.stderr.isatty():
        _disable_progress_bars()
        training_args.disable_tqdm = True
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    evaluates = training_args.eval_strategy != "no"
    dataset = load_data(script_args, dataset_args)
    splits = [script_args.dataset_train_split] + ([script_args.dataset_test_split] if evaluates else [])
    for split in splits:
        if split not in dataset:
            raise ValueError(
                f"The dataset has no split {split!r}; it has {', '.join(map(repr, dataset))}. Set `dataset_train_split` "
                "and `dataset_test_split`, or `eval_strategy: 'no'`."
            )

    trainer = PerCETrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluates else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    checkpoint = training_args.resume_from_checkpoint
    if str(checkpoint).lower() == "true":
        checkpoint = get_last_checkpoint(training_args.output_dir) if Path(training_args.output_dir).is_dir() else None
        trainer.accelerator.print(
            f"Resuming from {checkpoint}." if checkpoint else "No checkpoint yet: starting anew."
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.print("✅ Training completed.")
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(dataset_name=script_args.dataset_name)  # PEFT saves a blank one
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")
    if Version(transformers.__version__) >= Version("5.18.0"):
        trainer.end()  # finishes the trackers and the process group
        if trainer.accelerator.num_processes > 1:
            # Gloo's thread needs the GIL to drop its last tensors. If the group's destructor, which waits for that thread
            # and holds the GIL, came first, both would wait forever (torch 2.13): let the thread go ahead.
            time.sleep(1)
    return trainer


def load_data(script_args, dataset_args):
    """
    Load the splits of a dataset: of a mixture (`datasets`), from local files, or from the Hub.

    Args:
        script_args ([`~trl.ScriptArguments`]): `dataset_name` is a data file (JSON lines, JSON, CSV, Parquet, Arrow or
            text), a folder of such files (`train.jsonl`, `test.jsonl`), a folder from `save_to_disk`, or a Hub name.
        dataset_args ([`~trl.DatasetMixtureConfig`]): Goes first where both are given.

    Returns:
        [`~datasets.DatasetDict`] or [`~datasets.IterableDatasetDict`]: Splits by name.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from trl import get_dataset

    if dataset_args.datasets:
        if script_args.dataset_name:
            print("Both `datasets` and `dataset_name` are given: `dataset_name` is ignored.", file=sys.stderr)
        return get_dataset(dataset_args)
    name, streaming = script_args.dataset_name, script_args.dataset_streaming
    path = Path(name).expanduser()
    if path.is_file():
        kwargs = {"delimiter": "\t"} if ".tsv" in path.suffixes else {}
        return load_dataset(_builder(path), data_files=str(path), streaming=streaming, **kwargs)
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        dataset = load_from_disk(path)
        return dataset if isinstance(dataset, DatasetDict) else DatasetDict(train=dataset)
    return load_dataset(str(path) if path.is_dir() else name, name=script_args.dataset_config, streaming=streaming)


def _builder(path: Path) -> str | None:
    return next((_BUILDERS[suffix] for suffix in path.suffixes if suffix in _BUILDERS), None)


def _check_script_args(script_args, model_args, dataset_args) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing. Write a folder with a model, or a name on the Hub.")
    name = script_args.dataset_name
    if dataset_args.datasets:
        return
    if name is None:
        raise ValueError(
            "`dataset_name` (or `datasets`) is missing. Write a data file, a folder, or a name on the Hub."
        )
    path = Path(name).expanduser()
    is_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or _builder(path) is not None
    if is_path and not path.exists():
        raise FileNotFoundError(f"`dataset_name`: there is no file or folder {name!r} (seen from {os.getcwd()}).")
    if path.is_file() and _builder(path) is None:
        raise ValueError(
            f"`dataset_name`: {name!r} is not one of the known kinds of data file: {', '.join(_BUILDERS)}."
        )


def _check_config_keys(parser, argv: list[str]) -> None:
    """Raise on an unknown key of the YAML file. Ahead of the parser, which would first complain of the values."""
    import yaml

    if "--config" not in argv[:-1]:
        return
    config = yaml.safe_load(Path(argv[argv.index("--config") + 1]).read_text(encoding="utf-8"))
    if isinstance(config, dict):  # else the parser says so
        _check_known(parser, config.keys() - {"env"})


def _check_launch_args(parser, launch_args: list[str]) -> None:
    _check_known(parser, {arg.split("=")[0].lstrip("-") for arg in launch_args if arg.startswith("--")})


def _check_known(parser, names: set[str]) -> None:
    """Raise on a name that is neither ours nor one of `accelerate launch`, with the nearest right one."""
    from accelerate.commands.launch import launch_command_parser

    known = {option.lstrip("-") for p in (parser, launch_command_parser()) for option in p._option_string_actions}
    for name in sorted(names - known - {"accelerate_config"}):
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean `{nearest[0]}`?" if nearest else "See `trl-perce train --help`."
        raise ValueError(f"unknown key or argument `{name}`. {hint}")


def _is_one_process() -> bool:
    """Whether `accelerate launch` without arguments would start one process with nothing configured."""
    import torch
    from accelerate.commands.config import default_config_file

    return torch.accelerator.device_count() <= 1 and not os.path.isfile(default_config_file)


def _disable_progress_bars() -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _main_exit_code(*args) -> int:
    from trl_perce import PersonaError

    try:
        main(*args)
    except PersonaError as error:  # the data's fault: a traceback would only hide the message
        print(f"trl-perce train: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":  # started by `accelerate launch`
    raise SystemExit(_main_exit_code(*make_parser().parse_args_and_config(fail_with_unknown_args=False)))
