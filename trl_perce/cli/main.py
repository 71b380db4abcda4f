# SPDX-License-Identifier: Apache-2.0

"""`trl-perce`: which command, and what is said if there is none of that name."""

import argparse
import difflib
import gc
import sys
from itertools import pairwise
from typing import NoReturn

from .. import __version__
from ..utils.files import find_shipped
from ..utils.screen import fit_warnings
from . import aloe, compare, evaluate, prepare, reproduce, score, train
from .common import KEPT, explain_stops


# One module a command, with `HELP`, `make_parser()` and `run(argv)`
COMMANDS = {
    **{"prepare": prepare, "train": train, "score": score, "evaluate": evaluate},
    **{"compare": compare, "aloe": aloe, "reproduce": reproduce},
}


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line `trl-perce`.

    Args:
        argv (`list[str]`, *optional*): Arguments without the program's name. Defaults to those of the process.

    Returns:
        `int`: Exit code.
    """
    is_own_process = argv is None
    if is_own_process:
        fit_warnings()
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="trl-perce", description="Fine-tune language models to be personal.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.HELP, add_help=False)
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        nearest = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"Did you mean `{nearest[0]}`?" if nearest else f"There are: {', '.join(COMMANDS)}."
        parser.error(f"there is no command `{argv[0]}`. {hint}")
    command = parser.parse_args(argv[:1]).command
    if {"-h", "--help"} & {*argv[1:]}:
        _print_help(command, is_own_process)
    argv = [
        find_shipped(arg) if before in ("--config", "--accelerate_config") else arg
        for before, arg in pairwise(["", *argv])
    ]
    if command == "train":  # which may do its work in other processes
        return train.run(argv[1:])
    kept = "Start it again: each file is whole, or as it was." if command == "prepare" else KEPT
    with explain_stops(f"trl-perce {command}", lambda: kept):
        return COMMANDS[command].run(argv[1:])


def _print_help(command: str, is_own_process: bool) -> NoReturn:
    if is_own_process:
        # Transformers imports PEFT where it is there, and PEFT bitsandbytes. That takes more than half of the time, and a process
        # that ends with its help needs neither: `None` says that they are not there.
        sys.modules["peft"] = sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
        gc.disable()
    COMMANDS[command].make_parser().parse_args(["--help"])
    raise SystemExit(0)


if __name__ == "__main__":
    raise SystemExit(main())
