"""Latent consistency: one image all along a path, and a sampler whose images are those of the data."""

import pytest
import torch

from arcflow.config import Distill
from arcflow.distillation.method import Turn
from arcflow.distillation.renoise import clean, sample_renoised
from arcflow.distillation.walk import euler
from arcflow.methods.consistency import INTERVALS, KEEP, METHOD
from arcflow.path import column, step_grid
from tests.support import gaussian

CONFIG = Distill()


def turn(done=0.0, seed=0):
    return Turn(done, torch.Generator().manual_seed(seed))


def exact(x, sigma, cond):
    """The student that sees the end of the teacher's exact path."""
    sigma = column(sigma, x)
    image = gaussian.end((x - (1 - sigma) * gaussian.MEAN) / gaussian.width(sigma))
    return gaussian.policy((x - image) / sigma)


def test_an_image_without_noise_is_seen_as_it_is():
    x = gaussian.noise(4)
    assert torch.equal(clean(gaussian.Affine(), x, torch.zeros(4, dtype=x.dtype), {}), x)


def test_along_straight_paths_the_teacher_is_consistent_already():
    def line(x, sigma, cond):
        return gaussian.policy(gaussian.straight(x, sigma, cond))

    objective = METHOD.objective(CONFIG, gaussian.training(gaussian.Affine()))
    (part,) = objective(line, gaussian.straight, gaussian.noise(), {}, turn())
    assert part.logs["distance"] < 1e-12
    (part,) = objective(line, gaussian.teacher, gaussian.noise(), {}, turn())
    assert part.logs["distance"] > 1e-6


def test_along_curved_paths_what_is_left_of_the_exact_student_is_the_solvers_error(monkeypatch):
    """Of order two in one step: twice the intervals divide the squared error by sixteen."""

    def left(intervals):
        monkeypatch.setattr("arcflow.methods.consistency.INTERVALS", intervals)
        objective = METHOD.objective(CONFIG, gaussian.training(gaussian.Affine()))

        def safe(x, sigma, cond):  # at sigma 0 every velocity gives the same image
            return exact(x, sigma.clamp(min=1e-9), cond)

        (part,) = objective(safe, gaussian.teacher, gaussian.noise(4096), {}, turn())
        return float(part.logs["distance"])

    assert left(50) < 1e-3
    assert left(50) / left(100) == pytest.approx(16, rel=0.15)


def test_the_target_is_a_slow_average_one_step_further_on():
    net, calls = gaussian.Affine(), []
    about = gaussian.training(net)
    objective = METHOD.objective(CONFIG, about)
    before = net.table.detach().clone()
    with torch.no_grad():
        net.table.add_(1.0)
    now = net.table.detach().clone()

    def student(x, sigma, cond):
        calls.append((torch.is_grad_enabled(), sigma, net.table.detach().clone()))
        return net(x, sigma, cond)

    for part in objective(student, gaussian.teacher, gaussian.noise(), {}, turn()):
        part.loss.backward()
    (no_grad, there, target), (grad, here, trained) = calls
    assert (no_grad, grad) == (False, True)
    torch.testing.assert_close(target, KEEP * before + (1 - KEEP) * now)
    assert torch.equal(trained, now) and torch.equal(net.table, now)
    grid = step_grid(INTERVALS).to(here)
    assert all(there[i] == grid[1:][grid[:-1] == here[i]] for i in range(len(here)))


@pytest.mark.slow
def test_from_everywhere_on_its_walk_the_student_sees_where_the_teacher_ends(monkeypatch):
    monkeypatch.setattr("arcflow.methods.consistency.INTERVALS", 8)
    net, eps, grid = gaussian.learn(METHOD, CONFIG, iterations=200), gaussian.noise(64, seed=99), step_grid(8)
    walk = euler(gaussian.teacher, eps, {}, grid, trace=True)
    with torch.no_grad():
        for x, level in zip(walk[:-1], grid[:-1], strict=True):
            missed = clean(net, x, level.expand(64).to(x), {}) - walk[-1]
            assert missed.square().mean() < 3e-3
        untrained = clean(gaussian.Affine(), eps, torch.ones(64, dtype=eps.dtype), {})
    assert (untrained - walk[-1]).square().mean() > 1


def test_one_call_of_the_exact_student_is_the_end_of_the_teachers_path():
    eps = gaussian.noise(64)
    torch.testing.assert_close(sample_renoised(exact, eps, {}, 1, CONFIG, torch.Generator()), gaussian.end(eps))


@pytest.mark.parametrize("steps", [2, 4])
def test_many_calls_give_the_data_s_mean_and_spread_and_forget_the_noise(steps):
    eps = gaussian.noise(20000)
    x = sample_renoised(exact, eps, {}, steps, CONFIG, torch.Generator().manual_seed(1))
    assert float(x.mean()) == pytest.approx(gaussian.MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(gaussian.SPREAD, rel=0.01)
    assert not torch.allclose(x, gaussian.end(eps), atol=0.1)
    assert torch.equal(x, sample_renoised(exact, eps, {}, steps, CONFIG, torch.Generator().manual_seed(1)))


def test_the_student_is_called_so_many_times_on_the_samplers_grid():
    seen = []

    def student(x, sigma, cond):
        seen.append(float(sigma[0]))
        return exact(x, sigma, cond)

    config = Distill(steps=3, final_step_scale=0.5)
    sample_renoised(student, gaussian.noise(4), {}, 3, config, torch.Generator())
    assert seen == gaussian.levels(3, config)[:-1].tolist()
