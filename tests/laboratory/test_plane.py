"""The laboratory: an exact teacher, checked against what velocity means, and students that learn from it in seconds."""

import runpy
from pathlib import Path

import pytest
import torch

from arcflow.distillation.walk import arcs, euler
from arcflow.laboratory.plane import (
    Gaussians,
    Net,
    arrivals,
    circle,
    exact,
    mean_distance,
    starting_points,
    train_student,
)
from arcflow.momentum import Mixture
from arcflow.path import step_grid
from tests.support.pipelines import draws

EXAMPLE = Path(__file__).parents[2] / "examples" / "laboratory.py"
LEVELS = [0.2, 0.7, 0.95]


def places(spread=0.5):
    """Three places without symmetry."""
    return Gaussians(torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.5, -2.0]], dtype=torch.float64), spread)


def level(sigma, x):
    return torch.full((len(x),), sigma, dtype=x.dtype)


@pytest.mark.parametrize("sigma", LEVELS)
def test_the_velocity_is_the_mean_of_eps_less_x0_over_all_that_could_have_led_here(sigma):
    teacher, x = places(), 1.5 * starting_points(20, draws())
    line = torch.linspace(-6, 6, 301, dtype=torch.float64)
    x0 = torch.cartesian_prod(line, line)
    prior = torch.exp(-(x0[:, None] - teacher.means).square().sum(-1) / (2 * teacher.spread**2)).sum(-1)
    eps = (x - (1 - sigma) * x0) / sigma
    weight = prior * torch.exp(-eps.square().sum(-1) / 2)
    mean = ((eps - x0) * weight[..., None]).sum(1, keepdim=True) / weight.sum(1)[:, None, None]
    torch.testing.assert_close(teacher(x, level(sigma, x), {}), mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", LEVELS)
def test_the_velocity_follows_from_the_slope_of_the_log_density(sigma):
    """E[eps | x] = -sigma grad log p(x), by autograd."""
    teacher, x = places(), starting_points(20, draws()).requires_grad_(True)
    variance = ((1 - sigma) * teacher.spread) ** 2 + sigma**2
    log_density = (-(x - (1 - sigma) * teacher.means).square().sum(-1) / (2 * variance)).logsumexp(-1).sum()
    eps = -sigma * torch.autograd.grad(log_density, x)[0]
    x = x.detach()
    x0 = (x - sigma * eps) / (1 - sigma)
    torch.testing.assert_close(teacher(x, level(sigma, x), {}), eps - x0)


def test_the_velocity_holds_at_both_ends_and_far_out():
    teacher, x = places(), 100 * starting_points(20, draws())
    torch.testing.assert_close(teacher(x, level(1.0, x), {}), x - teacher.means.mean(0))
    torch.testing.assert_close(teacher(x, level(0.0, x), {}), -x)


def test_noise_becomes_one_round_gaussian_by_a_plain_stretch():
    teacher, x = Gaussians(torch.tensor([[2.0, -1.0]]), 0.3), starting_points(50, draws())
    torch.testing.assert_close(exact(teacher, x), teacher.means + 0.3 * x, rtol=1e-6, atol=1e-6)


def test_the_teacher_carries_noise_to_the_data():
    teacher, count = places(), 4000
    ends, data = (
        exact(teacher, starting_points(count, draws()), step_grid(32))[:, 0],
        teacher.draw(count, draws(1))[:, 0],
    )
    means, spread = teacher.means, teacher.spread
    wanted = torch.cov(means.T, correction=0) + spread**2 * torch.eye(2, dtype=torch.float64)
    for points in (ends, data):
        torch.testing.assert_close(points.mean(0), means.mean(0), rtol=0, atol=0.1)  # three standard errors
        torch.testing.assert_close(torch.cov(points.T), wanted, rtol=0.1, atol=0.1)
        shares = torch.cdist(points, means).argmin(1).bincount() / count
        torch.testing.assert_close(shares, torch.full((3,), 1 / 3), rtol=0, atol=0.03)


def test_the_exact_walk_is_of_order_four():
    teacher, x = places(), starting_points(50, draws())
    ends = exact(teacher, x, step_grid(256, 1.0))
    errors = [mean_distance(exact(teacher, x, step_grid(n, 1.0)), ends) for n in (16, 32)]
    assert 10 < errors[0] / errors[1] < 25
    points = exact(teacher, x, step_grid(8), trace=True)
    assert torch.equal(points[0], x) and torch.equal(points[-1], exact(teacher, x, step_grid(8)))


def test_a_circle_has_its_places_at_equal_distances():
    means = circle(6, radius=2.0).means
    torch.testing.assert_close(means.norm(dim=-1), torch.full((6,), 2.0, dtype=torch.float64))
    torch.testing.assert_close((means - means.roll(1, 0)).norm(dim=-1), torch.full((6,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("modes", [1, 4])
def test_a_student_is_a_mixture_of_so_many_modes(modes):
    mixture = Net(modes)(starting_points(3, draws()).float(), torch.ones(3), {})
    assert mixture.v.shape == (3, 1, modes, 2) and mixture.log_gamma.shape == (3, 1, modes - 1, 1)


@pytest.mark.parametrize("modes", [1, 4])
def test_the_same_seed_makes_the_same_student_and_leaves_other_draws_alone(modes):
    torch.manual_seed(5)
    expected, before = torch.rand(1), torch.manual_seed(5).get_state()
    one, two, other = (train_student(circle(), modes=modes, steps=2, iterations=3, batch=8, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(torch.rand(1), expected)
    x = starting_points(4, draws())
    assert torch.equal(arrivals(one, x, 2), arrivals(two, x, 2)) and not torch.equal(
        arrivals(one, x, 2), arrivals(other, x, 2)
    )


@pytest.mark.slow
def test_whoever_watches_is_told_every_loss():
    told = []
    train_student(circle(), modes=2, steps=1, iterations=40, batch=32, watch=lambda *news: told.append(news))
    assert [iteration for iteration, _ in told] == list(range(40))
    assert told[-1][1]["loss"] < told[0][1]["loss"]


def test_a_straight_student_that_says_what_the_teacher_says_is_euler():
    """`arrivals` and `euler` are of one scale: distances to the exact ends can be compared."""

    def straight(x, sigma, cond):
        v = circle()(x, sigma, cond)[:, :, None]
        return Mixture(v, torch.zeros(len(x), 1, 1, 1), torch.zeros(len(x), 1, 0, 1))

    x = starting_points(8, draws()).float()
    torch.testing.assert_close(arrivals(straight, x, 4), euler(circle(), x, {}, step_grid(4)))
    torch.testing.assert_close(arrivals(straight, x, 4), arcs(straight, x, {}, step_grid(4)))


@pytest.mark.long
def test_two_bent_steps_beat_two_straight_ones_and_those_of_the_teacher():
    teacher, x = circle(), starting_points(1000, draws(7))
    ends, more = exact(teacher, x, step_grid(64)), {"steps": 2, "iterations": 500, "batch": 256, "lr": 1e-2}
    errors = {
        modes: mean_distance(arrivals(train_student(teacher, modes=modes, **more), x, 2), ends) for modes in (1, 4)
    }
    plain = {steps: mean_distance(euler(teacher, x, {}, step_grid(steps)), ends) for steps in (2, 4)}
    assert errors[4] < errors[1] < plain[4] < plain[2]


@pytest.mark.slow
def test_the_example_runs_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["laboratory.py", "--out", str(tmp_path), "--iterations", "20"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert (tmp_path / "laboratory.png").read_bytes().startswith(b"\x89PNG")
