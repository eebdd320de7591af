"""Reflow: straight lines are its fixed point, and what it makes of a curved teacher is known."""

import pytest
import torch

from arcflow.config import Distill
from arcflow.distillation import pairs
from arcflow.distillation.method import Turn
from arcflow.distillation.walk import arcs, euler
from arcflow.methods.reflow import METHOD
from arcflow.path import step_grid, unshift_sigma
from tests.support import gaussian

CONFIG = Distill()


def turn(done=0.0, seed=0):
    return Turn(done, torch.Generator().manual_seed(seed))


def line(x, sigma, cond):
    return gaussian.policy(gaussian.straight(x, sigma, cond))


@pytest.mark.parametrize("done", [0.0, 0.9])
def test_a_straight_teacher_is_its_own_student(done):
    objective = METHOD.objective(CONFIG, gaussian.training(gaussian.Affine()))
    (part,) = objective(line, gaussian.straight, gaussian.noise(), {}, turn(done))
    assert part.loss < 1e-10
    (part,) = objective(gaussian.Affine(), gaussian.straight, gaussian.noise(), {}, turn(done))
    assert part.loss > 1e-2


def levels(done, count=4000):
    """Noise levels that are trained on, in raw time."""
    seen = []

    def student(x, sigma, cond):
        seen.append(sigma)
        return line(x, sigma, cond)

    objective = METHOD.objective(CONFIG, gaussian.training(gaussian.Affine()))
    list(objective(student, gaussian.straight, gaussian.noise(count), {}, turn(done)))
    return unshift_sigma(seen[0], CONFIG.shift)


def test_noise_levels_are_uniform_in_raw_time():
    tau = levels(0.0).sort().values
    assert (tau - torch.linspace(0, 1, len(tau))).abs().max() < 0.03


def test_towards_the_end_half_of_the_samples_are_noise():
    assert float((levels(0.8) == 1).double().mean()) == pytest.approx(0.5, abs=0.03)


def test_the_student_of_a_curved_teacher_goes_straight_to_where_it_ends(monkeypatch):
    monkeypatch.setattr(pairs, "CALLS", 32)
    net, eps = gaussian.learn(METHOD, CONFIG, lr=0.05), gaussian.noise(64, seed=99)
    with torch.no_grad():
        for level in (1.0, 0.9, 0.6, 0.3, 0.1):
            sigma = torch.full((64,), level, dtype=torch.float64)
            x = (1 - level) * gaussian.end(eps) + level * eps
            missed = net(x, sigma, {}).velocity(0.0) - gaussian.straight(x, sigma, {})
            assert missed.square().mean() < 1e-3
        for steps in (1, 2, 4):
            grid = step_grid(steps)
            missed = (arcs(net, eps, {}, grid) - gaussian.end(eps)).square().mean()
            euler_missed = (euler(gaussian.teacher, eps, {}, grid) - gaussian.end(eps)).square().mean()
            assert missed < 1e-3 and missed < euler_missed / 300
