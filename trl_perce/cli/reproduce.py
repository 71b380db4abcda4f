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
`trl-perce reproduce`: the paper's tables from one command.

    trl-perce reproduce --config recipes/reproduce/local.yaml
"""

import argparse


HELP = "Train and evaluate a grid of methods, and print the paper's tables"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-perce reproduce", description=HELP)
    parser.add_argument("--config", required=True, help="YAML file of the grid, such as recipes/reproduce/local.yaml")
    parser.add_argument("--output_dir", help="folder of all outputs, instead of the file's")
    return parser


def run(argv: list[str]) -> int:
    """
    Run a grid. What is done already stays done.

    Args:
        argv (`list[str]`): Arguments after `trl-perce reproduce`.

    Returns:
        `int`: Exit code: 0, 1 if a step failed, 2 if the arguments or the file are wrong.
    """
    parser = make_parser()
    args = parser.parse_args(argv)

    from ..reproduce.grid import run_steps
    from ..reproduce.settings import load_settings
    from ..reproduce.steps import Steps

    changes = {"output_dir": args.output_dir} if args.output_dir else {}
    settings = load_settings(args.config, **changes)
    steps = Steps(settings)
    all_steps = [*steps.data.values(), *(steps.train(cell) for cell in settings.cells())]
    failed = run_steps(all_steps, lambda step: print(step.folder, step.kind, step.state, step.seconds, flush=True))
    return 1 if failed else 0
