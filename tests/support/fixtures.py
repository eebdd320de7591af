"""Fixtures of all tests: stock pipelines of each family, made once, whose transformer and scheduler may change."""

from collections.abc import Iterator
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from diffusers import FluxPipeline

from arcflow.families import network
from tests.support.pipelines import PIPELINES, SIDE, fresh


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tests run side by side, and a thread each is fastest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pristine() -> dict:
    """One pipeline per family, made once; tests get theirs from `fresh`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {name: make() for name, make in PIPELINES.items()}


@pytest.fixture(params=[name if name == "flux" else pytest.param(name, marks=pytest.mark.slow) for name in PIPELINES])
def pipe(request, pristine):
    """A stock pipeline of each family, whose transformer and scheduler may change. FLUX alone is in the fast part."""
    return fresh(pristine[request.param])


@pytest.fixture
def flux(pristine) -> FluxPipeline:
    """A stock FluxPipeline, whose transformer and scheduler may change."""
    return fresh(pristine["flux"])


@pytest.fixture
def net(pipe):
    """A stock transformer of each family, free to change."""
    return pipe.transformer


@pytest.fixture
def inputs(pipe) -> SimpleNamespace:
    """Latents and conditioning for two samples."""
    cond = network.encode_prompts(pipe, ["a red cube", "a blue ball"], height=SIDE, width=SIDE, max_sequence_length=8)
    return SimpleNamespace(x=network.noise(pipe, [0, 1], SIDE, SIDE), sigma=0.7, cond=cond)


@pytest.fixture
def unchecked():
    """Shapes unchecked, as for users: our own errors speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
