# SPDX-License-Identifier: Apache-2.0

"""What the commands share: the data that is loaded, and arguments that are checked before it."""

import dataclasses
import difflib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from ..utils.files import find_shipped, is_disk_error, read_yaml
from ..utils.screen import fit_warnings, say


# Suffix of a data file → builder of `datasets`
_BUILDERS = {
    **{".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"},
    **{".parquet": "parquet", ".arrow": "arrow", ".txt": "text"},
}
# Settings of TRL's `ModelConfig` that results depend on
MODEL_SETTINGS = [
    *("model_revision", "dtype", "attn_implementation", "load_in_4bit", "load_in_8bit"),
    *("bnb_4bit_quant_type", "use_bnb_nested_quant"),
]
# What other tools and earlier versions call it → our key, or what to write
_ALIASES = {
    **{"torch_dtype": "dtype", "revision": "model_revision"},
    **dict.fromkeys(
        ("base_model", "model", "model_name", "model_id", "model_path", "model_name_or_id"), "model_name_or_path"
    ),
    **dict.fromkeys(("dataset", "dataset_path", "data_path", "train_file", "data", "data_files"), "dataset_name"),
    **dict.fromkeys(("sequence_len", "max_seq_length", "max_seq_len", "cutoff_len", "model_max_length"), "max_length"),
    **dict.fromkeys(("micro_batch_size", "train_batch_size", "batch_size"), "per_device_train_batch_size"),
    "eval_batch_size": "per_device_eval_batch_size",
    **dict.fromkeys(("num_epochs", "epochs", "n_epochs"), "num_train_epochs"),
    "lr": "learning_rate",
    **dict.fromkeys(("grad_accum", "grad_accumulation_steps"), "gradient_accumulation_steps"),
    "optimizer": "optim",
    **dict.fromkeys(("lr_scheduler", "scheduler"), "lr_scheduler_type"),
    **{"warmup": "warmup_steps", "evaluation_strategy": "eval_strategy"},
    **{"val_set_size": "test_split_size", "sample_packing": "packing"},
    **{"lora_rank": "lora_r", "lora_target": "lora_target_modules", "target_modules": "lora_target_modules"},
    **{"out_dir": "output_dir", "wandb_project": "env: {WANDB_PROJECT: …}"},
    **{"chat_template": "chat_template_path", "flash_attention": "attn_implementation: flash_attention_2"},
    **{"adapter": "use_peft: true", "finetuning_type": "use_peft: true", "train_on_inputs": "completion_only_loss"},
    **{"quantization_bit": "load_in_4bit: true", "use_qlora": "load_in_4bit: true"},
}
# What Accelerate's configurations may do to a model, as its environment variables call it
_SHARDING = ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"]
# Seconds within which a launcher ends the other processes of one that has failed
_PATIENCE = 5
# How the stop of a command ends that writes row by row
KEPT = "What is done is kept: the same command goes on from there."


class Terminated(KeyboardInterrupt):
    """SIGTERM, which then unwinds as Ctrl-C does."""


@contextmanager
def explain_stops(program: str, next_step: Callable[[], str]) -> Iterator[None]:
    """
    Around the work of a command: Ctrl-C, SIGTERM and a disk that takes no more end it with a line and not with a traceback.

    Args:
        program (`str`): Begins the line, as in "trl-perce score".
        next_step (`Callable[[], str]`): Gives its end: what is kept, and how to go on.

    Raises:
        `SystemExit`: With 130 (Ctrl-C), 143 (SIGTERM) or 1 (disk).
    """

    def terminate(signum, frame):
        raise Terminated

    is_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    before = signal.signal(signal.SIGTERM, terminate) if is_main else None
    try:
        with _main_process_first():
            yield
    except KeyboardInterrupt as stop:
        what, code = ("SIGTERM", 143) if isinstance(stop, Terminated) else ("Ctrl-C", 130)
        if is_main_process():  # else every process of a run would say so
            print(f"\n{program}: stopped by {what}. {next_step()}", file=sys.stderr)
        raise SystemExit(code) from None
    except OSError as error:
        if not is_disk_error(error):
            raise
        print(f"{program}: error: {error}. {next_step()}", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """
    Have Linux kill this process when the one that started it ends. A worker whose launcher was killed would go on alone, and write
    into the folder of the run that is started anew. Elsewhere nothing happens.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_main_process() -> bool:
    """Whether this process speaks for all. Known from the start, when Accelerate's state may not be set up yet."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _main_process_first() -> Iterator[None]:
    """
    An error waits where another process has to do with it, until the launcher ends this one: an error of another process than the main
    one may only be that the main one has ended, which has said why; that a connection broke, that the other process was killed.
    """
    try:
        yield
    except Exception as error:
        if not is_main_process() or _is_broken_connection(error):
            time.sleep(_PATIENCE)
        raise


def _is_broken_connection(error: Exception) -> bool:
    """Whether an error is of the processes' talk with each other. Gloo has no class for it."""
    if not is_worker():
        return False
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def say_error(program: str, error: object) -> None:
    """
    Say why a command ends. Where several processes meet the same, the main one says it: the launcher then ends the others, which wait here.

    Args:
        program (`str`): Begins the line, as in "trl-perce score".
        error (`object`): What is wrong.
    """
    if not is_main_process():
        time.sleep(_PATIENCE)
    print(f"{program}: error: {error}", file=sys.stderr)


def fail(program: str, error: object, code: int) -> NoReturn:
    """Say why a command ends ([`say_error`]) and end it: `SystemExit` with the code."""
    say_error(program, error)
    raise SystemExit(code)


def parse_with_launch(parser, argv: list[str]) -> tuple[tuple[Any, ...], list[str], list[str]]:
    """
    Parse a command's arguments, with those of `accelerate launch` among them.

    Args:
        parser ([`~trl.TrlParser`]): Of the command.
        argv (`list[str]`): Its arguments. They may have `--config`, and `--accelerate_config` with a file or the name of one of TRL's.

    Returns:
        `tuple[tuple, list[str], list[str]]`: The parser's dataclasses; the arguments of `accelerate launch`, those of the YAML file first;
        and `argv` without them.

    Raises:
        `ValueError`: A key or argument is known to neither, or a value is wrong.
    """
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.commands.training import _subtract_subsequence

    check_config_keys(parser, argv)
    *parsed, of_config, of_command_line = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    # Each by itself: of two configurations, the command line's counts
    launch_args = [arg for args in (of_config, of_command_line) for arg in resolve_accelerate_config_argument(args)]
    check_rest(parser, launch_args)
    return tuple(parsed), launch_args, _subtract_subsequence(argv, of_command_line)


def is_worker() -> bool:
    """Whether a launcher has started this process."""
    return "LOCAL_RANK" in os.environ


def starts_one_process(launch_args: list[str], use_cpu: bool) -> bool:
    """
    Whether a command does its work where it is: `accelerate launch` would start one process without any of its arguments, and with
    nothing configured.

    Args:
        launch_args (`list[str]`): What was given for `accelerate launch`.
        use_cpu (`bool`): Whether the command leaves the GPUs alone.

    Returns:
        `bool`: Whether it does.
    """
    import torch
    from accelerate.commands.config import default_config_file

    if launch_args or os.path.isfile(default_config_file):
        return False
    return use_cpu or torch.accelerator.device_count() <= 1


def number_of_processes(launch_args: list[str]) -> int | None:
    """What `--num_processes` says, if it is there."""
    return _launch_namespace(launch_args, "", []).num_processes


def launch(command: str, argv: list[str], launch_args: list[str], use_cpu: bool) -> int:
    """
    Run a command's module through `accelerate launch`, and wait for it. The processes say what there is to say, but for those that were
    killed.

    Args:
        command (`str`): Name of the command; its module takes `argv` as `__main__`.
        argv (`list[str]`): Arguments of the command.
        launch_args (`list[str]`): Arguments of `accelerate launch`.
        use_cpu (`bool`): Whether the processes leave the GPUs alone.

    Returns:
        `int`: Exit code: 130 after Ctrl-C, 143 after SIGTERM, else that of the process which failed first.
    """
    import logging
    import subprocess

    import torch
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = _launch_namespace(launch_args, f"trl_perce.cli.{command}", argv)
    use_cpu = use_cpu or not torch.accelerator.is_available()
    if use_cpu and args.config_file is None and (args.num_processes or 1) > 1:
        args.multi_gpu = True  # `accelerate launch` starts several processes on CPU by torchrun only under this name
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(args)
    except KeyboardInterrupt as stop:
        return 143 if isinstance(stop, Terminated) else 130
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _exit_code(command, failure.exitcode, rank)
    except subprocess.CalledProcessError as error:
        return _exit_code(command, error.returncode, 0)
    return 0


def _launch_namespace(launch_args: list[str], module: str, argv: list[str]):
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser().parse_args([*launch_args, "--module", module, *argv])


def _exit_code(command: str, code: int, rank: int) -> int:
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    print(f"trl-perce {command}: error: process {rank} was ended by {name}, and the others with it.", file=sys.stderr)
    return 128 - code


def begin_worker(needs_whole_model: bool) -> None:
    """
    What a process does first that a launcher has started.

    Args:
        needs_whole_model (`bool`): Whether each process must hold all of the model ([`keep_model_whole`]).
    """
    end_with_parent()
    fit_warnings()
    if not is_main_process():
        disable_progress_bars()
    if needs_whole_model:
        keep_model_whole()


def keep_model_whole() -> None:
    """Leave alone what Accelerate's configuration says of sharding (FSDP, DeepSpeed, …), which is for training, and say so."""
    found = [name for name in _SHARDING if os.environ.pop(f"ACCELERATE_USE_{name}", "false").lower() == "true"]
    if found and is_main_process():
        print(f"Not sharded ({', '.join(found)}): each process holds the whole model.", file=sys.stderr)


def end_processes() -> None:
    """Take leave of the other processes, the last thing that a process does."""
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes > 1:
        state.destroy_process_group()
        # Gloo's thread needs the GIL to drop its last tensors. If the group's destructor, which waits for that thread
        # and holds the GIL, came first, both would wait forever (torch 2.13): let the thread go ahead.
        time.sleep(1)


# ── arguments and data ───────────────────────────────────────────────────────────────────────────────────────────────


def check_writable(folder: str | Path) -> None:
    """
    Raise if nothing can be written to `output_dir`. Makes nothing.

    Raises:
        `OSError`: It, or what would hold it, is no folder or is read-only.
    """
    existing = Path(folder).expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"`output_dir` is {str(folder)!r}, but {existing} is a file.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"`output_dir` is {str(folder)!r}, but {existing} may not be written to.")


def load_data(script_args, dataset_args):
    """
    Load the splits of a dataset: of a mixture (`datasets`), from local files, or from the Hub.

    Args:
        script_args ([`~trl.ScriptArguments`]): `dataset_name` is a data file (JSON lines, JSON, CSV, Parquet, Arrow or
            text), a folder of such files (`train.jsonl`, `test.jsonl`), a folder from `save_to_disk`, or a Hub name.
        dataset_args ([`~trl.DatasetMixtureConfig`]): Goes first where both are given.

    Returns:
        [`~datasets.DatasetDict`] or [`~datasets.IterableDatasetDict`]: Splits by name.

    Raises:
        `ValueError`: A data file cannot be read; the message names the line if it is one of JSON lines.
    """
    from trl import get_dataset

    if dataset_args.datasets:
        if script_args.dataset_name:
            print("Both `datasets` and `dataset_name` are given: `dataset_name` is ignored.", file=sys.stderr)
        # TRL would split without a seed, in each process in another way
        splits = get_dataset(dataclasses.replace(dataset_args, test_split_size=None))
    else:
        splits = _load_splits(script_args)
    if dataset_args.test_split_size is not None:
        return _split_off(splits, dataset_args.test_split_size, script_args)
    return splits


def _split_off(splits, size: float, script_args):
    """Take a share of the training split for evaluation, the same in each process and run."""
    from datasets import Dataset, DatasetDict

    train, test = script_args.dataset_train_split, script_args.dataset_test_split
    if test in splits:
        raise ValueError(
            f"`test_split_size` is given, and the dataset has a split {test!r}. Leave out the one or the other."
        )
    if not isinstance(splits.get(train), Dataset) or not 0 < size < 1:
        raise ValueError(
            f"`test_split_size` is {size}. It takes a share between 0 and 1 of the split {train!r}, of a dataset that is not streamed."
        )
    parts = splits[train].train_test_split(test_size=size, seed=0)
    if is_main_process():
        print(
            f"Split off: {len(parts['test'])} of {len(splits[train])} rows are {test!r} (`test_split_size`).",
            file=sys.stderr,
        )
    return DatasetDict({**splits, train: parts["train"], test: parts["test"]})


def _load_splits(script_args):
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    name, streaming = find_shipped(script_args.dataset_name), script_args.dataset_streaming
    path = Path(name).expanduser()
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        dataset = load_from_disk(path)
        return dataset if isinstance(dataset, DatasetDict) else DatasetDict(train=dataset)
    _check_encoding(path)
    try:
        if path.is_file():
            kwargs = {"delimiter": "\t"} if ".tsv" in path.suffixes else {}
            return load_dataset(_builder(path), data_files=str(path), streaming=streaming, **kwargs)
        return load_dataset(str(path) if path.is_dir() else name, name=script_args.dataset_config, streaming=streaming)
    except (DatasetGenerationError, ValueError) as error:  # `ValueError`: of a line that is cut, with `datasets` 4.7
        raise ValueError(f"`dataset_name`: {_why_unreadable(path, error)}") from error


def _check_encoding(path: Path) -> None:
    from trl_perce.persona.rows import find_bad_encoding

    for file in [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else ():
        if file.suffix in (".json", ".jsonl", ".csv", ".tsv", ".txt") and (found := find_bad_encoding(file)):
            raise ValueError(f"`dataset_name`: {file} cannot be read. {found}")


def _why_unreadable(path: Path, error: Exception) -> str:
    """What is wrong with a data file, or with one in a folder; Arrow's own words where the line cannot be told."""
    from trl_perce.persona.rows import find_bad_line

    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if _builder(file) == "json" and file.suffix != ".gz" and (found := find_bad_line(file)):
            return f"{file} cannot be read. {found}"
    return f"{path} cannot be read: {error.__cause__ or error}"


def load_split(script_args, dataset_args, default: str, or_only: bool = False):
    """
    Load the rows that a command is about.

    Args:
        script_args ([`~trl.ScriptArguments`]): As for [`load_data`], with `dataset_split` and `max_rows`.
        dataset_args ([`~trl.DatasetMixtureConfig`]): As for [`load_data`].
        default (`str`): Name of the split where `dataset_split` is not given.
        or_only (`bool`, *optional*, defaults to `False`): Instead of the default, take the only split that there is: one data file
            has one, which `datasets` calls "train".

    Returns:
        `tuple`: The first `max_rows` rows, or all, and the name of the split.

    Raises:
        `ValueError`: There is no such split; the message names those that there are.
    """
    from datasets import Dataset

    splits = load_data(script_args, dataset_args)
    split = script_args.dataset_split or default
    if or_only and split not in splits and script_args.dataset_split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise ValueError(
            f"The dataset has no split {split!r}; it has {', '.join(map(repr, splits))}. Set `dataset_split`."
        )
    dataset, rows = splits[split], script_args.max_rows
    if rows is not None:
        # `datasets` 4.7 takes no more rows from a table than there are
        dataset = dataset.take(min(rows, len(dataset)) if isinstance(dataset, Dataset) else rows)
    return dataset, split


def _builder(path: Path) -> str | None:
    return next((_BUILDERS[suffix] for suffix in path.suffixes if suffix in _BUILDERS), None)


def check_script_args(script_args, model_args, dataset_args) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing. Write a folder with a model, or a name on the Hub.")
    model = model_args.model_name_or_path
    if _is_path(model) and not Path(model).expanduser().exists():
        raise FileNotFoundError(f"`model_name_or_path`: there is no folder {model!r} (seen from {os.getcwd()}).")
    name = script_args.dataset_name
    if dataset_args.datasets:
        return
    if name is None:
        raise ValueError(
            "`dataset_name` (or `datasets`) is missing. Write a data file, a folder, or a name on the Hub."
        )
    name = find_shipped(name)
    path = Path(name).expanduser()
    if (_is_path(name) or _builder(path) is not None) and not path.exists():
        raise FileNotFoundError(f"`dataset_name`: there is no file or folder {name!r} (seen from {os.getcwd()}).")
    if path.is_file() and _builder(path) is None:
        raise ValueError(
            f"`dataset_name`: {name!r} is not one of the known kinds of data file: {', '.join(_BUILDERS)}."
        )


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1


def check_config_keys(parser, argv: list[str]) -> None:
    """Raise on an unknown key of the YAML file. Ahead of the parser, which would first complain of the values."""
    if "--config" not in argv[:-1]:
        return
    config = read_yaml(argv[argv.index("--config") + 1])
    if isinstance(config, dict):  # else the parser says so
        check_known(parser, config.keys() - {"env"})
        _check_mixture(config.get("datasets"))


def _check_mixture(datasets: Any) -> None:
    """Raise on a `datasets` of another form than TRL's, such as Axolotl's."""
    from trl.scripts.utils import DatasetConfig

    if datasets is None:
        return
    if not isinstance(datasets, list) or not all(isinstance(dataset, dict) for dataset in datasets):
        raise ValueError(
            f"`datasets` is {datasets!r}. Write `dataset_name: …` for one dataset, and for several a list whose lines begin with "
            "`- path: …`."
        )
    known = DatasetConfig.__dataclass_fields__
    for index, dataset in enumerate(datasets):
        if unknown := [key for key in dataset if key not in known]:
            raise ValueError(
                f"`datasets`, entry {index}: unknown key `{unknown[0]}`. There are {', '.join(known)}. The columns say what a row is: "
                "'prompt' and 'completion', 'messages' or 'text'."
            )
        path = str(dataset.get("path"))
        if "path" not in dataset or Path(path).expanduser().is_file():
            kind = _builder(Path(path)) or "json"
            raise ValueError(
                f"`datasets`, entry {index}: write a file as `path: {kind}` and `data_files: {path if 'path' in dataset else '…'}`, "
                "with `split: train`; else `path` is a folder or a name on the Hub."
            )


def check_rest(parser, rest: list[str], launch: bool = True) -> None:
    """Raise on arguments that the parser left over and that are none of `accelerate launch` either ([`check_known`])."""
    check_known(parser, {arg.split("=")[0].lstrip("-") for arg in rest if arg.startswith("--")}, launch)


def check_known(parser, names: set[str], launch: bool = True) -> None:
    """Raise on a name that is neither ours nor, with `launch`, one of `accelerate launch`, with the nearest right one."""
    from accelerate.commands.launch import launch_command_parser

    parsers = (parser, launch_command_parser()) if launch else (parser,)
    known = {option.lstrip("-") for p in parsers for option in p._option_string_actions}
    for name in sorted(names - known - ({"accelerate_config"} if launch else set())):
        alias = _ALIASES.get(name.replace("-", "_"))
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean `{nearest[0]}`?" if nearest else f"See `{parser.prog} --help`."
        if alias is not None and alias.split(":")[0] in {*known, "env"}:
            hint = f"It is called `{alias}` here."
        raise ValueError(f"unknown key or argument `{name}`. {hint}")


def given_arguments(argv: list[str]) -> set[str]:
    """Names of the arguments that stand on a command line, without dashes."""
    return {arg.split("=")[0].lstrip("-").replace("-", "_") for arg in argv if arg.startswith("--")}


def take_run_settings(args, argv: list[str], saved: str) -> None:
    """
    Take what `trl_perce.json` keeps (`max_length`, `chat_template_kwargs`, the persona's markers, …) from the training of what is loaded,
    where it is not given, and say which value was taken from where.

    Args:
        args ([`PerContrastConfig`]): Gets them.
        argv (`list[str]`): Arguments of the command. What stands there or in its YAML file, or is not the default, counts as given.
        saved (`str`): Folder or name of the adapter, or of the model where there is none.
    """
    from trl_perce.hub.run_settings import NAME, read_run_settings

    given = given_arguments(argv)
    if "--config" in argv[:-1]:
        given |= (read_yaml(argv[argv.index("--config") + 1]) or {}).keys()
    taken = {}
    for name, value in read_run_settings(saved).items():
        if name in given or getattr(args, name) != type(args).__dataclass_fields__[name].default:
            continue
        room = getattr(args, "max_new_tokens", 0)
        if name == "max_length" and value is not None and value <= room:
            if is_main_process():
                say(f"`max_length` is {args.max_length}: the training's {value} has no room for `max_new_tokens`.")
            continue
        if name == "max_length" or value != getattr(args, name):
            taken[name] = value
            setattr(args, name, value)
    if taken and is_main_process():
        values = ", ".join(f"{name} {value}" for name, value in taken.items())
        say(f"As in the training: {values} ({saved.rstrip('/')}/{NAME})")


def model_init_kwargs(model_args, args) -> dict[str, Any]:
    """What `from_pretrained` gets of the arguments, as in `trl/scripts/sft.py`; `model_init_kwargs` goes first."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }


def disable_progress_bars() -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
