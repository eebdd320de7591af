"""ComfyUI and a student of each family beside it, tiny and random, of the real classes."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[3]))
import host  # noqa: E402

COMFYUI = host.folder()
if COMFYUI is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    host.start(COMFYUI)
    host.nodes()

    import torch
    from cases import CASES, Case, made

    torch.set_num_threads(1)

    @pytest.fixture(scope="session", params=CASES)
    def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
        """A model of ComfyUI, an adapter file, and what our own path draws with both."""
        return made(request.param, tmp_path_factory.mktemp(request.param))

    @pytest.fixture(scope="session", params=CASES)
    def coefficients(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
        """A student in coefficients of each family."""
        return made(request.param, tmp_path_factory.mktemp(f"{request.param}-coefficients"), "coefficients")

    @pytest.fixture(scope="session")
    def flux(tmp_path_factory: pytest.TempPathFactory) -> Case:
        """FLUX.1 alone."""
        return made("flux", tmp_path_factory.mktemp("flux-alone"))
