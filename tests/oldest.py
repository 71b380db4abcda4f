"""The lowest versions that pyproject.toml allows, as pip's constraints: `python tests/oldest.py > oldest.txt`."""

import re
import tomllib
from pathlib import Path


def oldest() -> list[str]:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    found = [re.match(r"([\w-]+)>=([\w.]+)", requirement) for requirement in project["dependencies"]]
    return [f"{match[1]}=={match[2]}" for match in found]


if __name__ == "__main__":
    print("\n".join(oldest()))
