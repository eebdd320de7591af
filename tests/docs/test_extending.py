"""docs/extending.md, done to the letter in a copy of the package: each addition works by the page alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = ("A recipe", "A method", "A metric", "A benchmark", "A model family")


def blocks(section: str) -> list[tuple[str, str, str]]:
    """(language, file, text) of the blocks under a heading."""
    page = (ROOT / "docs/extending.md").read_text("utf-8")
    text = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r'```(\w+) title="([^"]+)"\n(.*?)```', text, re.DOTALL)


def edited(text: str, diff: str) -> str:
    """A file after an edit: added lines stand behind, or before, the line that the page shows beside them."""
    lines, place = text.splitlines(), 0
    shown = [(line[:1], line[1:]) for line in diff.splitlines()]
    for number, (mark, line) in enumerate(shown):
        if mark != "+":
            place = lines.index(line, place)
            if mark == "-":
                lines.pop(place)
            else:
                place += 1
        else:
            if number == 0:  # the next line that is shown is there already
                place = lines.index(next(line for mark, line in shown if mark == " "))
            lines.insert(place, line)
            place += 1
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """The package with one of each added."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "src/arcflow", root / "src/arcflow", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (root / "src/arcflow/assets").symlink_to(ROOT / "src/arcflow/assets")
    shutil.copy(ROOT / "pyproject.toml", root)
    for section in SECTIONS:
        for language, name, text in blocks(section):
            file = root / name
            assert file.exists() == (language == "diff"), name
            file.write_text(edited(file.read_text("utf-8"), text) if language == "diff" else text, "utf-8")
    return root


def run(copied: Path, *command: str) -> str:
    path = os.pathsep.join([str(copied / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": path}, cwd=copied, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("section", SECTIONS)
def test_each_takes_one_file_of_its_own_and_one_place_elsewhere(section):
    kinds = [language for language, _, _ in blocks(section)]
    assert kinds == (["diff"] if section == "A recipe" else ["python", "diff"])


def test_the_additions_are_in_the_house_style_and_in_their_rooms(copied):
    run(copied, "-m", "ruff", "format", "--check", "src")
    run(copied, "-m", "ruff", "check", "src")
    run(copied, "-c", "from importlinter.cli import lint_imports_command as lint; lint()")


TRIED = """
import sys, tempfile
from pathlib import Path
import numpy, torch, tyro
import arcflow
from arcflow import cli, families, recipes, student
assert Path(arcflow.__file__).is_relative_to(Path.cwd())

# the recipe
assert cli.did_you_mean(["train", "narrow"]) is None and recipes.RECIPES["narrow"]().model.modes == 4

# the method, on a teacher whose paths are known
from arcflow.comparison.config import Plan
from arcflow.comparison.jobs import jobs
from arcflow.config import Distill
from arcflow.distillation.walk import arcs
from arcflow.path import step_grid
from tests.support import gaussian
assert jobs(Plan(only=("knowledge",), seeds=1, calls=(1,)))[-1].entrant == "knowledge"
from arcflow.methods.knowledge import METHOD
net, eps = gaussian.learn(METHOD, Distill(steps=1), iterations=60), gaussian.noise(64, seed=99)
missed = lambda net: float((arcs(net, eps, {}, step_grid(1)) - gaussian.end(eps)).square().mean())
assert missed(net) < missed(gaussian.Affine()) / 50

# the benchmark
from arcflow.evaluation.request import Request
from arcflow.sampling.options import Drawing
from arcflow.evaluation.suites import SUITES
from arcflow.evaluation.suites.suite import read_items
assert tyro.cli(Request, args=["--suite", "lines"]).suite == "lines"
prompts = Path(tempfile.mkdtemp()) / "prompts.txt"
prompts.write_text("a red cube\\na blue ball\\na green ring\\n")
assert [item.prompt for item in read_items(SUITES["lines"], prompts)][2] == "a green ring"

# the family: FLUX under another name
from diffusers import FluxTransformer2DModel
from tests.support.pipelines import SIDE, flux_pipeline
from arcflow.families import network
FluxTransformer2DModel.__name__ = "MyTransformer2DModel"
pipe = flux_pipeline()
assert families.family_of(pipe.transformer).name == "mine"
cond = network.encode_prompts(pipe, ["a red cube"], height=SIDE, width=SIDE)
x = network.noise(pipe, [0], SIDE, SIDE)
base = network.call(pipe.transformer, x, 0.5, cond)
student.build(pipe.transformer, modes=4, rank=2)
with student.teacher(pipe.transformer):
    assert torch.equal(network.call(pipe.transformer, x, 0.5, cond), base)
assert network.decode(pipe, x, SIDE, SIDE).shape == (1, SIDE, SIDE, 3)

# the metric, in an evaluation of the benchmark
from arcflow.evaluation import suite_run
from arcflow.system.packages import About
FluxTransformer2DModel.__name__ = "FluxTransformer2DModel"
asked = Request(suite="lines", prompts=prompts, out=prompts.parent / "out", drawing=Drawing(steps=1))
plan = suite_run.plan(asked, (0, 1), "", height=SIDE, width=SIDE, guidance=None, version="0")
plan.draw(flux_pipeline)
plan.score()
about = About(versions={}, python="3", device="x", threads=1, command="a test")
found = plan.results(about).metrics["sharpness"]
assert found.prompts == 3 and 0 < found.value < 1 and found.better == "higher"
"""


@pytest.mark.slow
def test_one_of_each_works(copied):
    run(copied, "-c", TRIED)
