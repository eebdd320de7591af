"""Holds a tag against the version that the files name: `python .ci/version.py v1.2.3`."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def check(tag: str) -> None:
    """Raises SystemExit with a sentence if package, project, citation, changelog and tag do not name one version."""
    named = {
        "the tag": tag.removeprefix("v"),
        "pyproject.toml": tomllib.loads(read("pyproject.toml"))["project"]["version"],
        "src/arcflow/__init__.py": found(r'^__version__ = "(.+)"$', read("src/arcflow/__init__.py")),
        "CITATION.cff": found(r"^version: (.+)$", read("CITATION.cff")),
        "CHANGELOG.md": found(r"^## (\d\S*)$", read("CHANGELOG.md")),
    }
    if len(set(named.values())) > 1:
        told = ", ".join(f"{where} says {version or 'nothing'}" for where, version in named.items())
        raise SystemExit(f"{told}: expected one version; put it right and tag again")


def found(pattern: str, text: str) -> str:
    """The first group of the first match; empty if there is none."""
    match = re.search(pattern, text, re.MULTILINE)
    return match[1] if match else ""


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


if __name__ == "__main__":
    check(sys.argv[1])
