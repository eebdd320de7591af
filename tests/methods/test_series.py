"""The laws of paths as series: exact integrals, the same size for every shape, the teacher's step at the start."""

import numpy as np
import pytest
import torch

from arcflow.config import Distill
from arcflow.distillation.policy import Policy
from arcflow.methods.series import exponential_means, laid_over
from arcflow.momentum import unpack
from arcflow.path import step_end, step_grid
from arcflow.series import Series, gauss, legendre_means
from arcflow.student.head import MomentumHead, start_gains

LENGTH = 0.7
ALL = pytest.mark.parametrize("means", [legendre_means, exponential_means])


def series(means, modes=4, batch=3, length=LENGTH, dtype=torch.float64, seed=0):
    v = torch.randn(batch, 2, modes, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Series(v.to(dtype), torch.full((batch,), length, dtype=dtype), means)


def values(means, modes, length, s):
    """Each shape at the points `s`, one row a point."""
    return means(modes, torch.full_like(s, length), s, s)


@ALL
@pytest.mark.parametrize(("a", "b"), [(0.0, LENGTH), (0.1, 0.55), (0.3, 0.3 + 1e-9)])
@pytest.mark.parametrize("modes", [1, 2, 3, 4, 5])
def test_displacement_is_the_integral_of_the_velocity(means, modes, a, b):
    path = series(means, modes)
    nodes, weights = gauss(20)
    points = a + (b - a) * (nodes + 1) / 2
    integral = (b - a) * sum(w * path.velocity(s) for w, s in zip(weights.tolist(), points.tolist(), strict=True))
    torch.testing.assert_close(path.displacement(a, b), integral, rtol=1e-9, atol=1e-9 * (b - a))


@ALL
def test_displacement_is_additive(means):
    path = series(means)
    torch.testing.assert_close(
        path.displacement(0.1, 0.4) + path.displacement(0.4, LENGTH), path.displacement(0.1, LENGTH)
    )


@ALL
def test_the_mean_velocity_over_an_empty_interval_is_the_velocity(means):
    path = series(means)
    assert torch.equal(path.mean_velocity(0.3, 0.3), path.velocity(0.3))
    assert not path.displacement(0.3, 0.3).any()
    torch.testing.assert_close(path.mean_velocity(0.3, 0.3 + 1e-12), path.velocity(0.3))
    torch.testing.assert_close(path.mean_velocity(0.2, 0.6) * 0.4, path.displacement(0.2, 0.6))


def test_polynomials_are_legendres_and_their_integrals_differences_of_neighbors():
    a, b = (torch.tensor([end], dtype=torch.float64) for end in (0.1, 0.6))
    length = torch.full_like(a, LENGTH)
    for k in range(6):
        p = np.polynomial.legendre.Legendre.basis(k)
        z = [2 * float(end) / LENGTH - 1 for end in (a, b)]
        assert values(legendre_means, 6, LENGTH, a)[0, k].item() == pytest.approx(p(z[0]))
        if k:
            above, below = (np.polynomial.legendre.Legendre.basis(k + i) for i in (1, -1))
            integral = LENGTH / 2 * (above(z[1]) - below(z[1]) - above(z[0]) + below(z[0])) / (2 * k + 1)
            mean = legendre_means(6, length, a, b)[0, k].item()
            assert mean * 0.5 == pytest.approx(integral, rel=1e-12)


@ALL
@pytest.mark.parametrize("length", [0.238, 0.762, 1.0])
def test_shapes_are_orthogonal_over_the_step_and_of_like_size(means, length):
    nodes, weights = gauss(40)
    shapes = values(means, 4, length, length * (nodes + 1) / 2)
    gram = shapes.T @ (weights[:, None] * shapes)
    sizes = [1 / (2 * k + 1) if means is legendre_means else 1.0 for k in range(4)]
    torch.testing.assert_close(gram, torch.tensor(sizes, dtype=torch.float64).diag(), rtol=0, atol=1e-9)
    torch.testing.assert_close(shapes[:, 0], torch.ones(40, dtype=torch.float64))


@pytest.mark.parametrize("length", [0.238, 1.0])
def test_the_exponentials_of_the_mixture_are_still_all_there(length):
    s = torch.linspace(0, length, 50, dtype=torch.float64)
    shapes = values(exponential_means, 4, length, s)
    for gain in (torch.zeros(1), *start_gains(4).log()):
        curve = torch.exp(gain.double() * s)
        fit = torch.linalg.lstsq(shapes, curve[:, None]).solution
        torch.testing.assert_close((shapes @ fit).squeeze(-1), curve, rtol=0, atol=1e-10)
        assert fit.abs().max() < 4  # not a difference of large numbers


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_velocity_that_is_a_polynomial_in_time_is_one_of_legendres_series(degree):
    """u(s) = s^degree: coefficients from its values at four points, then right everywhere."""
    points = torch.tensor([0.0, 0.2, 0.4, LENGTH], dtype=torch.float64)
    c = torch.linalg.solve(values(legendre_means, 4, LENGTH, points), points**degree)
    path = Series(c[None, :, None], torch.full((1,), LENGTH, dtype=torch.float64), legendre_means)
    for a, b in ((0.05, 0.6), (0.0, LENGTH)):
        assert path.velocity(b).item() == pytest.approx(b**degree)
        moved = (b ** (degree + 1) - a ** (degree + 1)) / (degree + 1)
        assert path.displacement(a, b).item() == pytest.approx(moved)


@ALL
def test_times_and_lengths_may_differ_by_sample(means):
    c, length = series(means).c, torch.tensor([0.3, 0.7, 0.5]).double()
    a, b = torch.tensor([0.0, 0.1, 0.4]).double(), torch.tensor([0.2, 0.1, 0.5]).double()
    path = Series(c, length, means)
    for i in range(3):
        one, ends = Series(c[i : i + 1], length[i : i + 1], means), (a[i].item(), b[i].item())
        torch.testing.assert_close(path.displacement(a, b)[i], one.displacement(*ends)[0])
        torch.testing.assert_close(path.velocity(a)[i], one.velocity(ends[0])[0])


@ALL
def test_gradients_are_those_of_finite_differences(means):
    v = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    length = torch.full((2,), LENGTH, dtype=torch.float64)
    for ends in ((0.1, 0.6), (0.2, 0.2)):
        assert torch.autograd.gradcheck(lambda v, ends=ends: Series.of(v, length, means).mean_velocity(*ends), v)
    live = Series.of(v, length, means)
    assert live.velocity(0.1).requires_grad and not live.detach().velocity(0.1).requires_grad


@ALL
@pytest.mark.parametrize("step", [0, 1])
def test_a_new_student_is_the_teachers_euler_step(means, step):
    """But for the constants that tell the head's velocities apart; without these to the last bit."""
    torch.manual_seed(0)
    base, x, grid = torch.nn.Linear(12, 8), torch.randn(3, 2, 12), step_grid(2)
    head, sigma = MomentumHead.from_linear(base, 4), grid[step].expand(3)
    length = float(grid[step] - grid[step + 1])
    with torch.no_grad():
        path = laid_over(unpack(head(x), 4), x, sigma, Distill(), means=means)
        assert (path.displacement(0.0, length) - length * base(x)).abs().max() < 0.3 * length
        head.means.bias.copy_(base.bias.repeat(4))
        same = laid_over(unpack(head(x), 4), x, sigma, Distill(), means=means)
        torch.testing.assert_close(same.displacement(0.0, length), length * base(x))
    assert isinstance(path, Policy)


@ALL
def test_arithmetic_is_float32_whatever_comes_in(means):
    assert series(means, dtype=torch.bfloat16).displacement(0.1, 0.6).dtype == torch.float32
    exact, single = series(means), series(means, dtype=torch.float32)
    torch.testing.assert_close(
        single.displacement(0.0, LENGTH).double(), exact.displacement(0.0, LENGTH), rtol=1e-5, atol=1e-6
    )


def test_a_step_ends_where_the_next_one_starts():
    grid = step_grid(3)
    assert torch.equal(step_end(grid[:-1], grid), grid[1:])
    assert torch.equal(step_end(grid[:-1] + 1e-6, grid), grid[1:])
    assert step_end(torch.ones(2), step_grid(1)).tolist() == [0.0, 0.0]
