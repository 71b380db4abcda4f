"""What is in the package, and what is found in it."""

import ast
import dataclasses
import logging
import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from conftest import ROOT
from trl_perce import PerCEConfig
from trl_perce.cli.main import COMMANDS
from trl_perce.config import has_accelerator
from trl_perce.utils import noise
from trl_perce.utils.files import find_shipped
from trl_perce.utils.noise import keep_noise_off


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_all_packages_and_files_are_listed():
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("trl_perce/**/__init__.py")}
    assert {*setuptools["packages"]} == folders | {"trl_perce.recipes"}
    data = setuptools["package-data"]
    shipped = {path for pattern in data["trl_perce"] for path in (ROOT / "trl_perce").glob(pattern)}
    shipped |= {path for pattern in data["trl_perce.recipes"] for path in (ROOT / "recipes").glob(pattern)}
    others = {
        path
        for folder in ("trl_perce", "recipes")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert shipped == others


def test_every_module_says_its_licence_and_what_it_is_for():
    for path in [*ROOT.glob("trl_perce/**/*.py"), *ROOT.glob("examples/**/*.py")]:
        text = path.read_text()
        assert not text or text.startswith('# SPDX-License-Identifier: Apache-2.0\n\n"""'), path  # and what it is for


def test_the_version_is_one():
    import trl_perce

    assert PROJECT["project"]["version"] == trl_perce.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", trl_perce.__version__)


@pytest.mark.parametrize("path", ["recipes/reproduce/local.yaml", "trl_perce/benchmarks/data/persona_qa"])
def test_what_is_shipped_is_found_from_anywhere(monkeypatch, tmp_path, path):
    assert find_shipped(path) == path  # a file here goes first
    monkeypatch.chdir(tmp_path)
    assert Path(find_shipped(path)).resolve() == ROOT / path
    for other in (
        "recipes/none.yaml",
        "recipes",
        "trl_perce",
        "elsewhere/local.yaml",
        "/recipes/reproduce/local.yaml",
    ):
        assert find_shipped(other) == other


def test_what_needs_no_model_loads_no_library():
    program = (
        "import sys\n"
        "from trl_perce.cli.main import main\n"
        "for argv in (['--help'], ['--version'], ['trian'], ['xyz'], []):\n"
        "    try:\n"
        "        print('returned', main(argv))\n"
        "    except SystemExit as stop:\n"
        "        print('exited', stop.code)\n"
        "print({'torch', 'transformers', 'trl', 'peft', 'datasets', 'pandas', 'numpy', 'rich'} & {*sys.modules})\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "set()" and "Fine-tune a model with PerCE" in result.stdout
    assert re.findall(r"^exited \d|^returned \d", result.stdout, re.M) == ["exited 0"] * 2 + ["exited 2"] * 2 + [
        "returned 2"
    ]
    assert f"trl-perce {PROJECT['project']['version']}\n" in result.stdout
    assert "there is no command `trian`. Did you mean `train`?" in result.stderr
    assert "There are: prepare, train, score" in result.stderr
    assert result.stderr.count("Fine-tune a model with PerCE") == 1  # of no command at all


def test_the_help_shows_our_options_first_and_loads_little(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parsers = {command: module.make_parser() for command, module in COMMANDS.items()}
    groups = re.findall(r"^(\w.*):$", parsers["train"].format_help(), re.M)
    assert groups[:3] == ["options", "PerCE", "data"]
    assert re.findall(r"^(\w.*):$", parsers["evaluate"].format_help(), re.M)[1] == "evaluation"
    (perce,) = (group for group in parsers["train"]._action_groups if group.title == "PerCE")
    assert {action.dest for action in perce._group_actions} == {*vars(PerCEConfig)["__annotations__"]}
    for command in ("train", "score", "evaluate"):
        dests = [action.dest for action in parsers[command]._actions]
        fields = [
            field.name for cls in parsers[command].dataclass_types for field in dataclasses.fields(cls) if field.init
        ]
        assert {*dests} == {*fields, "help"}
        grouped = [action for group in parsers[command]._action_groups for action in group._group_actions]
        assert len(grouped) == len(parsers[command]._actions)  # in one group each

    # In a process of its own, without PEFT and bitsandbytes, it is the same
    program = (
        "import sys\n"
        "from trl_perce.cli.main import main\n"
        "sys.argv[1:] = ['train', '--help']\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print({'peft', 'bitsandbytes', 'datasets'} & {name for name, module in sys.modules.items() if module})\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == parsers["train"].format_help() + "set()\n" and not result.stderr


def test_noise_of_other_libraries_is_kept_off_and_nothing_else(caplog):
    keep_noise_off()  # pytest has filters of its own
    for name, start in noise.LOGGED.items():
        logging.getLogger(name).warning("%s, and how to install it", start)
        logging.getLogger(name).warning("Something else")
    assert [record.getMessage() for record in caplog.records] == ["Something else"]
    old = "`gradient_checkpointing` is deprecated and will be removed in v6."
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        keep_noise_off()
        for text, category in ((old, FutureWarning), (old, UserWarning), ("`dtype` is deprecated", FutureWarning)):
            warnings.warn(text, category)
    assert [warning.category for warning in shown] == [UserWarning, FutureWarning]


def test_the_readmes_snippet_says_nothing_but_what_is_for_the_user(tiny_model, tmp_path):
    """In a process of its own, where nothing filters but what users have."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)[1]
    result = subprocess.run(
        [sys.executable, "-c", snippet.replace("Qwen/Qwen3-0.6B", tiny_model)],
        **{"capture_output": True, "text": True, "cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}},
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip() and "%|" not in line]  # but for progress bars
    device = [] if has_accelerator() else ["No accelerator: training on the CPU in float32."]
    assert lines == device
    assert (tmp_path / "qwen3-perce" / "adapter_model.safetensors").is_file()


# Imports run one way: a room imports from rooms above it alone (CONTRIBUTING.md draws them)
ROOMS = (
    ("utils",),
    ("config",),
    ("persona",),
    ("training", "hub"),
    ("trainer", "scoring", "history"),
    ("evaluation",),
    ("benchmarks",),
    ("reproduce", "prepare"),
    ("compare",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def imports_of(path: Path) -> set[str]:
    """The rooms that a module of ours imports from, inside of functions too."""
    package, rooms = path.relative_to(ROOT).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names = [f"{module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("trl_perce.")}
    return rooms & LEVEL.keys()


def test_imports_run_one_way():
    modules = [path for path in (ROOT / "trl_perce").rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    for path in modules:
        room = path.relative_to(ROOT / "trl_perce").parts[0].removesuffix(".py")
        for other in imports_of(path) - {room}:
            assert LEVEL[other] < LEVEL[room], f"{path.relative_to(ROOT)} imports from {other}"
    assert {path.relative_to(ROOT / "trl_perce").parts[0].removesuffix(".py") for path in modules} == LEVEL.keys()


def test_an_import_that_runs_upward_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    module = tmp_path / "trl_perce" / "evaluation" / "x.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        "from ..cli import train\n\n\ndef f():\n    from trl_perce.reproduce.grid import Step\n    import trl_perce.hub.upload\n"
    )
    assert imports_of(module) == {"cli", "reproduce", "hub"}


def test_warnings_name_the_process_only_where_there_are_several():
    package = ROOT / "trl_perce"
    using = [
        path.name for path in package.rglob("*.py") if "from accelerate.logging" in path.read_text(encoding="utf-8")
    ]
    assert using == ["logger.py"]
