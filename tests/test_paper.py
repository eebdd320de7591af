"""The published numbers are those that the package takes where nothing else is said."""

import subprocess
import sys

from arcflow import paper, portable, recipes
from arcflow.config import Distill, Model
from arcflow.student.head import start_gains


def test_what_the_integrations_copy_has_the_published_shift():
    assert portable.SHIFT == paper.SHIFT


def test_the_flux_recipe_is_the_published_one():
    run = recipes.flux()
    assert (run.model.modes, run.model.rank, run.model.dropout) == (16, 256, 0.05)
    assert (run.optim.iterations, run.optim.batch, run.distill.decay) == (10_000, 384, 2000)
    assert (Distill().states, Distill().window, Distill().mode_dropout, Distill().shift) == (4, 3, 0.1, 3.2)
    assert Model().modes == len(start_gains(paper.MODES)) + 1


def test_numbers_alone_import_nothing():
    code = "import sys; before = set(sys.modules); from arcflow import paper; print(*(set(sys.modules) - before))"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names == {"arcflow"}
