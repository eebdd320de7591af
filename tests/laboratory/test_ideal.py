"""The ideal student: what K modes can say of a path, found without a network."""

from itertools import pairwise

import pytest
import torch

from arcflow.distillation.objective import velocity_error
from arcflow.distillation.walk import euler
from arcflow.laboratory import plane
from arcflow.laboratory.ideal import Errors, fit_mixture, ideal_errors, noise_level, raw_time
from arcflow.momentum import Mixture
from arcflow.path import step_grid, unshift_sigma
from arcflow.student.head import start_gains

SIGMAS = step_grid(48).double()
SHAPE = (3, 2)
WIDTH, PIXELS = 8, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(modes, gains=None, pixels=PIXELS):
    """Any velocities and gates, momentum factors of a new head unless given."""
    g = start_gains(modes).log().double() if gains is None else torch.tensor(gains, dtype=torch.float64)
    return Mixture(
        draw(*SHAPE, modes, WIDTH), draw(*SHAPE, modes, pixels), g[:, None].expand(*SHAPE, modes - 1, pixels)
    )


def path_of(arc):
    """The path that a mixture lays down from noise to image."""
    x = draw(*SHAPE, WIDTH, seed=1)
    return torch.stack([x - arc.displacement(0.0, 1 - float(sigma)) for sigma in SIGMAS])


@pytest.fixture(scope="module")
def curved():
    """Paths of the laboratory's teacher, which are no mixture."""
    return plane.exact(plane.circle(), plane.starting_points(20, torch.Generator().manual_seed(0)), SIGMAS, trace=True)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("measure", [raw_time, noise_level])
def test_k_modes_fit_a_path_of_k_exponentials_exactly(steps, measure):
    path = path_of(mixture(4))
    errors = ideal_errors(path, SIGMAS, modes=4, steps=steps, pixels=PIXELS, measure=measure, cutoff=1e-13)
    assert max(*errors.velocity, *errors.end, errors.walked) < 1e-16
    assert errors.directions == [4] * steps
    assert min(ideal_errors(path, SIGMAS, modes=2, steps=steps, measure=measure).velocity) > 1e-8


def test_the_fit_is_the_mixture_that_made_the_path():
    arc, s = mixture(3), 1 - SIGMAS
    u = torch.stack([arc.mean_velocity(a, b) for a, b in pairwise(s.tolist())])
    found = fit_mixture(u, s, raw_time(SIGMAS, 3.2), modes=3, pixels=PIXELS, cutoff=1e-13)
    for at in (0.0, 0.3, 1.0):
        torch.testing.assert_close(found.velocity(at), arc.velocity(at), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_velocity_is_said_better_the_more_modes_there_are(curved, steps):
    """The momentum factors of a new head with K = 2, 4, 8 are nested. What is beyond them is float32 rounding."""
    errors = [ideal_errors(curved, SIGMAS, modes=k, steps=steps, cutoff=1e-13).velocity for k in (1, 2, 4, 8)]
    for fewer, more in pairwise(errors):
        assert all(b < a for a, b in zip(fewer, more, strict=True))
    assert all(four < one / 5 for one, four in zip(errors[0], errors[2], strict=True))
    eight, many = (ideal_errors(curved, SIGMAS, modes=k, steps=steps).velocity for k in (8, 32))
    assert many == pytest.approx(eight, rel=0.02)


@pytest.mark.parametrize("modes", [1, 2, 8])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_matched_over_noise_level_the_end_is_exact_for_every_number_of_modes(curved, modes, steps):
    errors = ideal_errors(curved, SIGMAS, modes=modes, steps=steps, measure=noise_level)
    assert max(*errors.end, errors.walked) < 1e-14 < min(errors.velocity)


def test_a_straight_line_that_minimizes_the_matching_objective_misses_the_end(curved):
    """It is the mean velocity over raw time, and the way to the end is the mean over noise level."""
    errors = ideal_errors(curved, SIGMAS, modes=1, steps=1)
    u = curved.diff(dim=0) / SIGMAS.diff().view(-1, 1, 1, 1)
    by_time = u.mean(0)  # the grid is uniform in raw time
    missed = (curved[0] - by_time - curved[-1]).square().mean()
    assert errors.end[0] == pytest.approx(float(missed), rel=1e-4) and errors.walked == pytest.approx(errors.end[0])
    assert errors.velocity[0] == pytest.approx(float((u - by_time).square().mean()), rel=1e-4)
    assert missed > 0.01


def test_four_modes_that_minimize_the_matching_objective_arrive(curved):
    """dsigma/dtau is a quadratic in s, which they can say: what they leave of the velocity has no weight at the end."""
    one, four = (ideal_errors(curved, SIGMAS, modes=k, steps=1) for k in (1, 4))
    assert four.velocity[0] > one.velocity[0] / 1e3 and four.end[0] < one.end[0] / 1e6


def test_the_weights_are_the_lengths_of_the_intervals():
    assert torch.allclose(raw_time(SIGMAS, 3.2), torch.full((48,), 1 / 48, dtype=torch.float64), atol=1e-6)
    assert float(noise_level(SIGMAS, 3.2).sum()) == pytest.approx(1.0)
    assert unshift_sigma(float(SIGMAS[1])) == pytest.approx(1 - 1 / 48, abs=1e-6)


def test_nothing_is_left_to_learn_at_the_fit(curved):
    """It is a minimum of the loss that trains students: no slope, and higher wherever one moves."""
    s, modes = 1 - SIGMAS, 4
    u = -curved.diff(dim=0) / s.diff().view(-1, 1, 1, 1)
    found = fit_mixture(u, s, raw_time(SIGMAS, 3.2), modes=modes, cutoff=1e-13)
    a, b = (ends[:, None].expand(-1, curved.shape[1]) for ends in (s[:-1], s[1:]))

    def loss(v):
        return velocity_error([Mixture(v, found.logits, found.log_gamma)] * len(u), u, a, b).mean()

    v = found.v.clone().requires_grad_(True)
    least = loss(v)
    least.backward()
    assert v.grad.abs().max() < 1e-5 * u.abs().max()
    for seed in range(5):
        assert loss(found.v + 0.01 * draw(*found.v.shape, seed=seed)) > least


def test_refined_momentum_factors_fit_what_those_of_the_start_do_not():
    path = path_of(mixture(2, gains=[-3.0]))
    before = ideal_errors(path, SIGMAS, modes=2, steps=1, pixels=PIXELS)
    after = ideal_errors(path, SIGMAS, modes=2, steps=1, pixels=PIXELS, refine=60)
    assert after.velocity[0] < before.velocity[0] / 100


def test_a_few_refining_steps_never_make_it_worse(curved):
    before, after = (ideal_errors(curved, SIGMAS, modes=3, steps=2, refine=n) for n in (0, 3))
    assert all(b <= a for a, b in zip(before.velocity, after.velocity, strict=True))


def test_pixels_share_the_momentum_factors_of_the_start():
    path = draw(49, *SHAPE, WIDTH)
    one, four = (ideal_errors(path, SIGMAS, modes=4, steps=2, pixels=pixels) for pixels in (1, 4))
    assert one.velocity == pytest.approx(four.velocity) and one.walked == pytest.approx(four.walked)


def test_what_float32_cannot_tell_apart_is_no_direction(curved):
    errors = ideal_errors(curved, SIGMAS, modes=32, steps=2)
    assert 3 < errors.directions[0] < errors.directions[1] < 8


def test_euler_paths_and_their_velocities_are_taken_as_they_are():
    """The slope of a chord is the velocity that the teacher said there."""

    def growth(x, sigma, cond):
        return -x  # dx/dsigma: x grows by a factor e on its way, in s = 1 - sigma as exp(s)

    x, said = draw(2, 3), []
    path = euler(lambda *call: said.append(growth(*call)) or said[-1], x, {}, SIGMAS, trace=True)
    slopes = path.diff(dim=0) / SIGMAS.diff().view(-1, 1, 1)
    torch.testing.assert_close(slopes, torch.stack(said))
    assert isinstance(ideal_errors(path, SIGMAS, modes=2, steps=4), Errors)


def test_a_path_without_the_segments_ends_is_refused(curved):
    with pytest.raises(ValueError, match="walk it in a multiple of 5 steps with shift 3.2"):
        ideal_errors(curved, SIGMAS, modes=1, steps=5)
    with pytest.raises(ValueError, match="expected 1.0000, 0.6667, 0.0000"):
        ideal_errors(curved, SIGMAS, modes=1, steps=2, shift=2.0)


@pytest.mark.long
def test_on_the_small_flux_the_class_of_paths_is_not_what_keeps_students_from_the_teacher():
    """A straight line that knew each path would end closer than Euler does, and four modes nearly right."""
    from benchmarks.ideal import teacher_paths

    path, sigmas, pixels, plain = teacher_paths(2, 12, [2])
    one, four = (ideal_errors(path, sigmas, modes=k, steps=2, pixels=pixels) for k in (1, 4))
    assert four.walked < one.walked / 100 and one.walked < plain[2] / 10
    assert all(b < a / 2 for a, b in zip(one.velocity, four.velocity, strict=True))
