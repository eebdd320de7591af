"""The notebook: every cell runs, in order, as it stands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "arcflow.ipynb"

SHOWN = """
import sys, types
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].version_info = (9, 0, 0)  # matplotlib asks
sys.modules["IPython.display"] = types.ModuleType("IPython.display")
sys.modules["IPython.display"].display = lambda shown: print("shown:", shown.size)
"""
"""What stands in for a notebook's own display."""


def cells() -> list[dict]:
    """The notebook's, in order."""
    content = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    return content["cells"]


def test_it_is_committed_without_outputs_and_holds_no_magic():
    for cell in cells():
        assert cell["cell_type"] == "markdown" or not (cell["outputs"] or cell["execution_count"])
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), cell["id"], "exec")
    assert len({cell["id"] for cell in cells()}) == len(cells())


@pytest.mark.slow
def test_its_cells_run_one_after_the_other(tmp_path):
    """In a fresh process and folder, with the short recipe; FLUX is drawn where a GPU is, and not here."""
    code = "\n\n".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code")
    assert code.count("quick = False") == 1
    script = tmp_path / "notebook.py"
    script.write_text(SHOWN + code.replace("quick = False", "quick = True").replace("enough = ", "enough = False and "))
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # the other cores are at other tests
    run = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=500, env=alone
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "distance" in run.stdout and "shown: (768, 384)" in run.stdout and "FLUX.1-dev was not drawn" in run.stdout
    assert (tmp_path / "out" / "notebook" / "side_by_side.png").is_file()
