"""Wan 2.2: two networks, each for its range of noise levels, and a student on each."""

import copy

import pytest
import torch

import arcflow
from arcflow import student
from arcflow.families import network
from arcflow.student import adapter
from tests.support.families import FRAMES, loud, wan
from tests.support.pipelines import perturb


@pytest.fixture(scope="module")
def made():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = wan()
        loud(pipe.transformer)
        other = copy.deepcopy(pipe.transformer)
        for parameter in other.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        parts = {**pipe.components, "transformer_2": other}
    pipe = type(pipe)(**parts, boundary_ratio=0.875)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def two(made):
    pipe = copy.copy(made)
    for name in ("transformer", "transformer_2", "scheduler"):
        setattr(pipe, name, copy.deepcopy(getattr(made, name)))
    return pipe


@pytest.fixture
def adapters(made, tmp_path):
    """Of each network."""
    folders = []
    for name in ("transformer", "transformer_2"):
        net = student.build(copy.deepcopy(getattr(made, name)), modes=3, rank=2)
        perturb(net)
        folders.append(adapter.save_adapter(net, tmp_path / name))
    return folders


def draw(pipe):
    generator = torch.Generator("cpu").manual_seed(0)
    size = {"height": 32, "width": 32, "num_frames": FRAMES["wan"], "max_sequence_length": 16}
    how = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe(prompt="a red cube", generator=generator, **size, **how).frames


def test_each_takes_a_step_of_the_grid_with_its_own_student(two, adapters):
    """As walked by hand: the first step by the one, the second by the other."""
    before = draw(two)
    arcflow.attach(two, adapters[0])
    arcflow.attach(two, adapters[1], component="transformer_2")
    drawn = draw(two)

    size = {"height": 32, "width": 32, "frames": FRAMES["wan"]}
    x = network.noise(two, [0], **size)
    cond = network.encode_prompts(two, ["a red cube"], max_sequence_length=16, **size)
    grid = two.scheduler.sigmas.tolist()
    with torch.no_grad():
        for net, start, end in zip((two.transformer, two.transformer_2), grid, grid[1:], strict=False):
            x = x - student.predict(net, x, start, cond).displacement(0.0, start - end)
    torch.testing.assert_close(network.unfolded(drawn, (1, 2, 2)), x, rtol=1e-4, atol=1e-4)

    arcflow.detach(two)
    assert torch.equal(draw(two), before)


def test_an_adapter_for_the_other_network_is_told(two, adapters):
    before = draw(two)
    with pytest.raises(ValueError, match="for the pipeline's other network.*Give component='transformer_2'"):
        arcflow.attach(two, adapters[1])
    with pytest.raises(ValueError, match="component is 'vae'"):
        arcflow.attach(two, adapters[0], component="vae")
    assert torch.equal(draw(two), before)
