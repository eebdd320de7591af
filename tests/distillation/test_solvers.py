"""The teacher in few calls: every rule has its order, its cost, and the paths it follows exactly."""

import pytest
import torch

from arcflow.distillation.solvers import SOLVERS, bends
from arcflow.distillation.walk import euler
from arcflow.path import step_grid
from tests.support import gaussian

EVERY = pytest.mark.parametrize("name", SOLVERS)


def error(name, calls):
    eps = gaussian.noise(8)
    return float((SOLVERS[name](gaussian.teacher, eps, {}, calls, 3.2) - gaussian.end(eps)).abs().max())


@pytest.mark.parametrize(("name", "least", "most"), [("euler", 1.9, 2.1), ("heun", 3.9, 4.1), ("dpmpp", 3.4, 4.1)])
def test_twice_the_calls_divide_the_error_by_two_or_by_four(name, least, most):
    """By four times log n / log 2n for DPM-Solver++."""
    assert least < error(name, 256) / error(name, 512) < most


@pytest.mark.parametrize("calls", [8, 16])
def test_the_better_rules_are_better_in_few_calls(calls):
    assert max(error("heun", calls), error("dpmpp", calls)) < 0.6 * error("euler", calls)


@EVERY
@pytest.mark.parametrize("calls", range(1, 10))
def test_the_teacher_is_asked_so_many_times_and_on_the_way_down(name, calls):
    seen, cond = [], {"text": torch.ones(3)}

    def counted(x, sigma, given):
        assert given is cond and sigma.shape == (3,) and (sigma == sigma[0]).all()
        seen.append(float(sigma[0]))
        return gaussian.teacher(x, sigma, given)

    SOLVERS[name](counted, gaussian.noise(3), cond, calls, 3.2)
    assert len(seen) == calls and seen[0] == 1
    assert seen == sorted(seen, reverse=True)


@EVERY
@pytest.mark.parametrize("calls", [1, 2, 5, 6])
def test_all_images_the_same_are_reached_exactly(name, calls):
    """Every path is straight, and goes on in the same direction at the image too."""
    eps, place = gaussian.noise(3), torch.randn(1, 4, dtype=torch.float64)
    u = SOLVERS[name](lambda x, sigma, cond: eps - place, eps, {}, calls, 3.2)
    torch.testing.assert_close(u, place.expand_as(eps), rtol=0, atol=1e-6)


def test_heun_is_exact_where_the_velocity_is_linear_in_the_noise_level():
    x = gaussian.noise(3)
    moved = SOLVERS["heun"](lambda x, sigma, cond: (1 + 2 * sigma)[:, None, None] + 0 * x, x, {}, 4, 3.2)
    torch.testing.assert_close(moved, x - 2, rtol=0, atol=1e-6)


@EVERY
def test_one_call_is_one_step_of_euler(name):
    x = gaussian.noise(3)
    torch.testing.assert_close(
        SOLVERS[name](gaussian.teacher, x, {}, 1, 3.2), x - gaussian.teacher(x, torch.ones(3), {})
    )


@pytest.mark.parametrize("calls", [2, 3])
def test_between_two_infinite_steps_nothing_bends(calls):
    x, grid = gaussian.noise(3), step_grid(calls)
    assert not bends(grid).any()
    walked = euler(gaussian.teacher, x, {}, grid)
    torch.testing.assert_close(SOLVERS["dpmpp"](gaussian.teacher, x, {}, calls, 3.2), walked, rtol=0, atol=1e-6)


def test_equal_gains_bend_by_a_half():
    gains = torch.linspace(-2, 2, 5, dtype=torch.float64)
    grid = torch.cat([torch.ones(1), 1 / (1 + gains.exp()), torch.zeros(1)])
    torch.testing.assert_close(bends(grid), torch.tensor([0, 0, 0.5, 0.5, 0.5, 0], dtype=torch.float64))


def test_float32_stays_float32():
    x = gaussian.noise(3).float()
    assert all(solver(gaussian.teacher, x, {}, 5, 3.2).dtype == torch.float32 for solver in SOLVERS.values())
