"""The ComfyUI nodes: their copy of the formulas, and their own tests in a process with a real ComfyUI in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from integrations import copy_portable
from integrations.comfyui.tests import host

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("copy", copy_portable.copies(), ids=lambda path: path.parent.name)
def test_copies_are_the_original(copy: Path) -> None:
    assert copy.read_text("utf-8") == copy_portable.copies()[copy], "run `python integrations/copy_portable.py`"


@pytest.mark.slow
def test_they_are_loaded_by_nothing_but_torch(tmp_path: Path) -> None:
    code = "import sys, portable; print(any(name.split('.')[0] in {'arcflow', 'jaxtyping'} for name in sys.modules))"
    run = [sys.executable, "-c", code]
    told = subprocess.run(run, cwd=ROOT / "integrations" / "comfyui", capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


@pytest.mark.slow
@pytest.mark.skipif(
    host.folder() is None,
    reason="no ComfyUI: name its folder in COMFYUI_PATH, or make one: python integrations/comfyui/tests/get.py",
)
def test_the_nodes_in_comfyui() -> None:
    """In a process of its own, since ComfyUI sets up torch and the command line for itself."""
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-c", os.devnull, f"--rootdir={ROOT}"]
    more = ["--import-mode=importlib", "-p", "no:cacheprovider", "integrations/comfyui/tests"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    run = subprocess.run([*tests, *more], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:]
    assert " passed" in run.stdout
