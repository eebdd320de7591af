"""The file list is the theory: every file imports only from files above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import arcflow

ROOT = Path(arcflow.__file__).parent
ORDER = """
    config recipes rules signals parallel path momentum backbone head basis series student scheduler state checkpoint
    hub adapter pipeline
    world.scene world.render world.check world.text world.autoencoder world.teacher world.pretrain
    prompts data rollout objective baselines.method baselines.arcflow baselines.linear baselines.piflow baselines.bases
    baselines.solvers baselines.target baselines.pairs baselines.progressive baselines.reflow baselines.consistency
    baselines.dmd baselines.twinflow optim gauge cache loading feed speed train together
    lab ideal sample features streaming metrics evaluate page report publish memory doctor world.commands
    suites.official suites.table suites.scorers suites.measure suites.assess suites.run
    contest studies compare ranking claims
    commands.sampling commands.judging commands.training commands.comparing commands.suites cli
""".split()
TORCH_FREE = (
    "config",
    "recipes",
    "rules",
    "world.scene",
    "world.commands",
    "commands.sampling",
    "commands.judging",
    "commands.training",
    "commands.comparing",
    "commands.suites",
    "cli",
)
"""What `arcflow --help` imports, and the grammar."""


def modules() -> list[str]:
    files = [path.relative_to(ROOT).with_suffix("") for path in sorted(ROOT.rglob("*.py"))]
    return [".".join(file.parts) for file in files if file.name != "__init__"]


def imports(name: str, *, everywhere: bool = True) -> Iterator[str]:
    """What a file imports; without `everywhere` only what it imports when it is imported itself."""
    tree = ast.parse((ROOT / (name.replace(".", "/") + ".py")).read_text("utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_its_place_in_the_order() -> None:
    assert sorted(ORDER) == modules()


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_files_above_it(name: str) -> None:
    above = ORDER[: ORDER.index(name)]
    ours = {module.removeprefix("arcflow.") for module in imports(name) if module.startswith("arcflow.")}
    assert {module for module in ours if module in ORDER} <= set(above)


def test_shapes_are_checked_wherever_they_are_annotated(pytestconfig: pytest.Config) -> None:
    annotated = [f"arcflow.{name}" for name in modules() if "jaxtyping" in imports(name)]
    assert pytestconfig.option.jaxtyping_packages.split(",") == [*annotated, "beartype.beartype"]


@pytest.mark.parametrize("name", TORCH_FREE)
def test_help_does_not_wait_for_torch(name: str) -> None:
    heavy = {"torch", "diffusers", "transformers", "peft", "matplotlib", "scipy"}
    assert not {module.split(".")[0] for module in imports(name, everywhere=False)} & heavy
