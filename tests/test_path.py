"""The shift between raw time and noise level, and the grid of a sampler."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from arcflow.path import segments, shift_sigma, step_grid, tau_grid, unshift_sigma


@pytest.mark.parametrize("shift", [1.0, 3.2, 7.0])
def test_the_shift_keeps_the_ends_and_can_be_undone(shift):
    tau = torch.linspace(0, 1, 101, dtype=torch.float64)
    sigma = shift_sigma(tau, shift)
    assert sigma[0] == 0 and sigma[-1] == 1 and (sigma.diff() > 0).all()
    torch.testing.assert_close(unshift_sigma(sigma, shift), tau)


def test_floats_and_tensors_agree():
    assert shift_sigma(0.5) == pytest.approx(1.6 / 2.1)
    assert float(shift_sigma(torch.tensor(0.5, dtype=torch.float64))) == shift_sigma(0.5)


def test_two_steps_of_the_published_adapters():
    torch.testing.assert_close(step_grid(2), torch.tensor([1, 16 / 21, 0]))


@pytest.mark.parametrize("steps", range(1, 51))
def test_equal_steps_are_the_stock_euler_grid_to_the_last_bit(steps):
    stock = FlowMatchEulerDiscreteScheduler(shift=3.2)
    stock.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    assert torch.equal(step_grid(steps), stock.sigmas)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_last_step_is_longer_or_shorter_by_its_scale(steps, scale):
    lengths = -tau_grid(steps, scale).diff()
    assert float(lengths.sum()) == pytest.approx(1)
    torch.testing.assert_close(lengths[:-1], lengths[-1:].expand(steps - 1) / scale)


def test_segments_cover_the_way_without_a_gap():
    parts = segments(4, 0.5)
    assert parts[0].tau_src == 1 and parts[-1].tau_dst == 0
    assert all(left.tau_dst == right.tau_src for left, right in zip(parts[:-1], parts[1:], strict=True))
    assert sum(part.length for part in parts) == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: step_grid(0), "at least 1 step"),
        (lambda: step_grid(2, shift=0.0), "above 0"),
        (lambda: step_grid(2, final_step_scale=-1.0), "above 0"),
    ],
)
def test_nonsense_is_refused_with_a_remedy(make, remedy):
    with pytest.raises(ValueError, match=remedy):
        make()
