"""The laws of the path in coefficients: the first is the mean over the step, the others bend the way there."""

import pytest
import torch

from arcflow.distillation.policy import Policy
from arcflow.distillation.walk import arcs, euler
from arcflow.path import step_grid
from arcflow.portable import bend_means
from arcflow.series import Series, gauss, legendre_means

LENGTH = 0.7
MODES = pytest.mark.parametrize("modes", [1, 2, 4, 8])


def path(modes=4, batch=3, length=LENGTH, dtype=torch.float64):
    c = torch.randn(batch, 2, modes, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Series(c.to(dtype), torch.full((batch,), length, dtype=dtype), legendre_means)


@MODES
def test_the_first_coefficient_is_the_mean_velocity_over_the_step(modes):
    one = path(modes)
    torch.testing.assert_close(one.mean_velocity(0.0, LENGTH), one.c[..., 0, :], rtol=0, atol=1e-12)
    torch.testing.assert_close(one.displacement(0.0, LENGTH), LENGTH * one.c[..., 0, :])
    assert isinstance(one, Policy)


def test_the_mean_over_the_step_is_the_quadrature_of_the_velocities():
    one, (nodes, weights) = path(), gauss(8)
    points = LENGTH * (nodes + 1) / 2
    mean = sum(w * one.velocity(s) for w, s in zip(weights.tolist(), points.tolist(), strict=True))
    torch.testing.assert_close(mean, one.c[..., 0, :])


@pytest.mark.parametrize("cuts", [(0.0, 0.2, 0.7), (0.1, 0.11, 0.5), (0.0, 1e-6, 0.7)])
def test_pieces_of_the_way_add_up(cuts):
    a, between, b = cuts
    one = path()
    torch.testing.assert_close(
        one.displacement(a, between) + one.displacement(between, b), one.displacement(a, b), rtol=1e-12, atol=1e-12
    )


@MODES
def test_the_form_in_coefficients_is_the_form_in_velocities_at_gauss_points(modes):
    """`Series.of` takes the velocities at K points of the step: of a path these give the same path back."""
    one = path(modes)
    points = (LENGTH * (gauss(modes)[0] + 1) / 2).tolist()
    nodal = Series.of(torch.stack([one.velocity(s) for s in points], -2), one.length, legendre_means)
    torch.testing.assert_close(nodal.c, one.c)
    torch.testing.assert_close(nodal.mean_velocity(0.1, 0.6), one.mean_velocity(0.1, 0.6))


@MODES
def test_without_bends_every_part_of_the_way_is_eulers(modes):
    one = path(modes, dtype=torch.float32)
    one.c[..., 1:, :] = 0
    for a, b in ((0.0, LENGTH), (0.0, 0.3), (0.2, 0.2), (0.4, 0.6)):
        assert torch.equal(one.mean_velocity(a, b), one.c[..., 0, :])


def test_a_student_without_bends_walks_as_its_teacher_does():
    """To the last bit, on a grid finer than its own too."""

    def teacher(x, sigma, cond):
        return torch.sin(x) * sigma[:, None]

    def student(x, sigma, cond):
        c = torch.stack([teacher(x, sigma, cond), *[torch.zeros_like(x)] * 3], -2)
        return Series(c, sigma, legendre_means)

    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    for steps in (1, 2, 7):
        grid = step_grid(steps)
        torch.testing.assert_close(arcs(student, x, {}, grid), euler(teacher, x, {}, grid), rtol=0, atol=1e-7)


@MODES
def test_means_over_the_first_share_of_a_step_have_a_form_for_networks(modes):
    share = torch.tensor([1e-6, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    length = torch.full_like(share, LENGTH)
    wanted = legendre_means(modes, length, torch.zeros_like(share), share * LENGTH)[:, 1:]
    torch.testing.assert_close(bend_means(modes, share), wanted, rtol=0, atol=1e-11)
    assert not bend_means(modes, torch.ones(())).any()
    # over next to nothing they are the values at the start, which alternate
    signs = torch.tensor([(-1.0) ** k for k in range(1, modes)])
    torch.testing.assert_close(bend_means(modes, torch.zeros(())), signs)


def test_bends_do_not_move_the_end_and_are_learned_only_on_the_way():
    c = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    one = Series(c, torch.full((2,), LENGTH, dtype=torch.float64), legendre_means)
    one.mean_velocity(0.0, LENGTH).square().sum().backward()
    assert c.grad is not None and c.grad[:, 1:].abs().max() < 1e-12 < c.grad[:, 0].abs().min()
    c.grad = None
    one.mean_velocity(0.1, 0.3).square().sum().backward()
    assert (c.grad.abs().amax((0, 2)) > 1e-3).all()
