"""What is in the package, and what is found in it."""

import re
import tomllib
from pathlib import Path

import pytest

from conftest import ROOT
from trl_perce.files import find_shipped


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


def test_every_module_has_the_license():
    for path in [*ROOT.glob("trl_perce/**/*.py"), *ROOT.glob("examples/**/*.py")]:
        assert not path.stat().st_size or path.read_text().startswith(
            "# Licensed under the Apache License, Version 2.0"
        ), path


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
