"""Progressive Distillation: two steps become one, stage after stage, and the last student ends where the walk ends."""

import pytest
import torch

from arcflow.config import Distill
from arcflow.distillation.method import Turn
from arcflow.distillation.walk import arcs, euler
from arcflow.methods.progressive import METHOD, START, fine_grid, stage_at, stages
from arcflow.path import step_grid, tau_grid, unshift_sigma
from tests.support import gaussian

TWO = Distill(steps=2)


def turn(done=0.0):
    return Turn(done, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("steps", "counts"), [(1, [16, 8, 4, 2, 1]), (2, [16, 8, 4, 2]), (3, [24, 12, 6, 3]), (40, [40])]
)
def test_every_stage_has_half_the_steps_of_the_one_before(steps, counts):
    assert stages(steps) == counts
    assert 2 * counts[0] >= START


def test_stages_follow_each_other_and_the_shortest_walks_have_the_longest():
    shares = [sum(stage_at(i / 1000, stages(2)) == stage for i in range(1000)) for stage in range(4)]
    assert shares == [200, 200, 200, 400]
    assert stage_at(1.0, stages(2)) == 3


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_fine_grid_goes_through_the_samplers_points_in_equal_steps_of_raw_time(scale):
    config = Distill(steps=4, final_step_scale=scale)
    grid = fine_grid(8, config)
    assert torch.equal(grid[::8], step_grid(4, 3.2, scale))
    tau = unshift_sigma(grid.double(), 3.2)
    wanted = (tau_grid(4, scale).diff() / 8).repeat_interleave(8)
    torch.testing.assert_close(tau.diff(), wanted, rtol=1e-4, atol=1e-6)


def test_a_student_that_lands_where_two_steps_land_has_nothing_to_learn():
    grid = fine_grid(16, TWO)

    def student(x, sigma, cond):
        (i,) = (grid - sigma[0]).abs().argmin(keepdim=True).tolist()
        end = euler(gaussian.teacher, x, cond, grid[i : i + 3])
        return gaussian.policy((x - end) / (grid[i] - grid[i + 2]))

    net = gaussian.Affine()
    parts = list(METHOD.objective(TWO, gaussian.training(net))(student, gaussian.teacher, gaussian.noise(), {}, turn()))
    assert len(parts) == 16 and all(part.logs["distance"] < 1e-12 for part in parts)
    parts = list(METHOD.objective(TWO, gaussian.training(net))(net, gaussian.teacher, gaussian.noise(), {}, turn()))
    assert all(part.logs["distance"] > 1e-5 for part in parts)


def test_the_whole_walk_is_trained_on_and_every_call_of_the_teacher_is_a_target():
    seen, calls, net = [], [], gaussian.Affine()

    def student(x, sigma, cond):
        seen.append(x)
        return net(x, sigma, cond)

    def teacher(x, sigma, cond):
        calls.append(len(x))
        return gaussian.teacher(x, sigma, cond)

    eps = gaussian.noise(8)
    list(METHOD.objective(TWO, gaussian.training(net))(student, teacher, eps, {}, turn()))
    walk = euler(gaussian.teacher, eps, {}, step_grid(32), trace=True)
    assert calls == [8] * 32
    torch.testing.assert_close(torch.stack(seen), walk[:-1:2])


def test_later_stages_follow_the_average_as_it_was_when_they_began():
    net, eps = gaussian.Affine(), gaussian.noise(8)
    about = gaussian.training(net)
    objective = METHOD.objective(TWO, about)
    list(objective(net, gaussian.teacher, eps, {}, turn(0.1)))

    def never(x, sigma, cond):
        raise AssertionError("the frozen teacher has had its stage")

    about.average.weights["table"].mul_(1.1)
    list(objective(net, never, eps, {}, turn(0.2)))
    with about.average.applied():
        walk = euler(lambda *call: net(*call).velocity(0.0), eps, {}, step_grid(16), trace=True)
    about.average.weights["table"].mul_(2.0)
    seen = []

    def student(x, sigma, cond):
        if torch.is_grad_enabled():
            seen.append(x)
        return net(x, sigma, cond)

    for part in objective(student, never, eps, {}, turn(0.3)):
        part.loss.backward()
    torch.testing.assert_close(torch.stack(seen), walk[:-1:2].detach())


@pytest.mark.slow
@pytest.mark.parametrize("config", [Distill(steps=1), Distill(steps=2, shift=1.0)])
def test_the_student_ends_in_few_calls_where_the_teacher_ends_in_many(config, monkeypatch):
    """Affine maps: two steps in one are exactly learnable, so what is left is what training leaves."""
    monkeypatch.setattr("arcflow.methods.progressive.START", 8)
    net = gaussian.learn(METHOD, config, iterations=160, lr=0.12)
    eps, grid = gaussian.noise(64, seed=99), gaussian.levels(config.steps, config)
    wanted = euler(gaussian.teacher, eps, {}, step_grid(8, config.shift))
    with torch.no_grad():
        missed = (arcs(net, eps, {}, grid) - wanted).square().mean()
    euler_missed = (euler(gaussian.teacher, eps, {}, grid) - wanted).square().mean()
    assert missed < euler_missed / 1000
