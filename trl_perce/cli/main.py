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

import argparse
import sys
from itertools import pairwise

from ..files import find_shipped
from . import aloe, evaluate, reproduce, score, train
from .common import KEPT, explain_stops


# One module a command, with `HELP` and `run(argv)`
COMMANDS = {"train": train, "score": score, "evaluate": evaluate, "aloe": aloe, "reproduce": reproduce}


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line `trl-perce`.

    Args:
        argv (`list[str]`, *optional*): Arguments without the program's name. Defaults to those of the process.

    Returns:
        `int`: Exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="trl-perce", description="Fine-tune language models to be personal.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.HELP, add_help=False)
    command = parser.parse_args(argv[:1]).command
    argv = [
        find_shipped(arg) if before in ("--config", "--accelerate_config") else arg
        for before, arg in pairwise(["", *argv])
    ]
    if command == "train":  # which may do its work in other processes
        return train.run(argv[1:])
    with explain_stops(f"trl-perce {command}", lambda: KEPT):
        return COMMANDS[command].run(argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
