"""Rooms: what the package's files may touch is held by import-linter; here is what it cannot see."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import arcflow

ROOT = Path(arcflow.__file__).parent
HEAVY = {"torch", "diffusers", "transformers", "peft", "matplotlib", "scipy"}


def modules() -> dict[str, Path]:
    """Every file of the package by the name it is imported by."""
    files = {path.relative_to(ROOT).with_suffix(""): path for path in sorted(ROOT.rglob("*.py"))}
    return {".".join(("arcflow", *file.parts)).removesuffix(".__init__"): path for file, path in files.items()}


def imports(path: Path) -> Iterator[str]:
    """What a file imports when it is imported itself."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reached(name: str) -> Iterator[str]:
    """What importing a module brings along, ours and others'."""
    files = modules()
    waiting = [name]
    seen = set[str]()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield module
        if module in files:
            waiting += imports(files[module])
            waiting.append(module.rpartition(".")[0])


def test_the_root_shows_the_theory_and_rooms() -> None:
    files = [path.name for path in ROOT.glob("*.py") if not path.name.startswith("__")]
    rooms = [path for path in ROOT.iterdir() if (path / "__init__.py").exists()]
    assert len(files) <= 8 and len(rooms) <= 22


@pytest.mark.parametrize(
    "name", ["arcflow", "arcflow.cli", "arcflow.config", "arcflow.recipes", "arcflow.evaluation.suites"]
)
def test_help_does_not_wait_for_torch(name: str) -> None:
    assert not {module.split(".")[0] for module in reached(name)} & HEAVY
