"""The published numbers are those that the package takes where nothing else is said."""

import subprocess
import sys

from arcflow import paper, portable
from arcflow.config import Model
from arcflow.student.head import start_gains


def test_what_the_integrations_copy_has_the_published_shift():
    assert portable.SHIFT == paper.SHIFT


def test_a_new_head_has_as_many_modes_as_gains():
    assert Model().modes == len(start_gains(paper.MODES)) + 1


def test_numbers_alone_import_nothing():
    code = "import sys; before = set(sys.modules); from arcflow import paper; print(*(set(sys.modules) - before))"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names == {"arcflow"}
