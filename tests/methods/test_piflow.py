"""The policies of pi-Flow: what they say is the posterior's velocity, and a moving image's."""

import dataclasses

import pytest
import torch

from arcflow.config import Distill
from arcflow.methods.piflow import (
    RANGE,
    SPREAD,
    DenoisedCurve,
    GaussianMixture,
    denoised_curve,
    gaussian_mixture,
    pull_weights,
)
from arcflow.momentum import Mixture, unpack
from arcflow.path import shift_sigma, step_grid
from arcflow.student.head import MomentumHead

BATCH, TOKENS, MODES, WIDTH, PIXELS = 3, 2, 4, 8, 4
STEP = (1.0, 3.2 / 4.2)
"""The first of two steps."""


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def level(value, batch=BATCH, dtype=torch.float64):
    return torch.full((batch,), value, dtype=dtype)


def head_output(modes=MODES, seed=0, dtype=torch.float64, gain=0.3):
    shapes = (modes, WIDTH), (modes, PIXELS), (modes - 1, PIXELS)
    v, logits, log_gamma = (draw(BATCH, TOKENS, *shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes))
    return Mixture(v, logits, gain * log_gamma)


def gaussians(sigma=0.8, std=0.3, modes=MODES, dtype=torch.float64):
    means, logits = draw(BATCH, TOKENS, modes, WIDTH, dtype=dtype), draw(BATCH, TOKENS, modes, PIXELS, seed=1).to(dtype)
    x = draw(BATCH, TOKENS, WIDTH, seed=2, dtype=dtype)
    return GaussianMixture(means, logits, level(std, dtype=dtype), x, level(sigma, dtype=dtype), x)


def curve(modes=5, step=STEP, x=None):
    x0 = draw(BATCH, TOKENS, modes, WIDTH)
    x = draw(BATCH, TOKENS, WIDTH, seed=2) if x is None else x
    return DenoisedCurve(x0, level(step[0]), level(step[1]), x)


def by_grid(pi, means, std, source, sigma, x, r):
    """Velocity in one dimension from the posterior on a fine grid of images; nothing of the package."""
    x0 = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    prior = (pi[:, None] * torch.exp(-0.5 * ((x0 - means[:, None]) / std) ** 2)).sum(0).log()
    seen, before = (-0.5 * ((y - (1 - s) * x0) / s) ** 2 for y, s in ((x, r), (source, sigma)))
    return (x - ((prior + seen - before).softmax(0) * x0).sum()) / r


@pytest.mark.parametrize("sigma", [1.0, 0.76, 0.2])
@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_a_later_state_has_the_velocity_of_the_posterior(sigma, share):
    pi, means = torch.tensor([0.5, 0.2, 0.3]).double(), torch.tensor([-1.5, 0.4, 2.0]).double()
    source, x = draw(1, 1), draw(1, 1, seed=1)
    policy = GaussianMixture(means[None, :, None], pi.log()[None, :, None], level(0.4, 1), source, level(sigma, 1), x)
    wanted = by_grid(pi, means, 0.4, source.item(), sigma, x.item(), sigma * (1 - share))
    assert policy.velocity(sigma * share).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_at_the_call_it_is_the_mean_of_the_mixture_and_at_the_image_the_image():
    policy = gaussians()
    pi = policy.logits.softmax(-2)[..., None, :]
    mean = (pi * policy.means.unflatten(-1, (-1, PIXELS))).sum(-3).flatten(-2)
    torch.testing.assert_close(policy.velocity(0.0), (policy.x - mean) / 0.8)
    torch.testing.assert_close(policy.velocity(0.8), -policy.x)


def test_without_spread_one_gaussian_is_a_straight_line_to_its_mean():
    policy = gaussians(std=1e-6, modes=1)
    goal = policy.means.squeeze(-2)
    for r in (0.8, 0.4, 0.1):
        state = goal + r / 0.8 * (policy.x - goal)
        torch.testing.assert_close(policy.at(state).velocity(0.8 - r), (policy.x - goal) / 0.8, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(policy.displacement(0.0, 0.8), policy.x - goal, rtol=1e-4, atol=1e-6)


def test_with_a_wide_spread_only_the_states_tell_where_the_image_is():
    """The image is then where the ratio of the two likelihoods is centered."""
    policy, x, r, sigma = gaussians(std=1e4), draw(BATCH, TOKENS, WIDTH, seed=5), 0.5, 0.8
    precision = ((1 - r) / r) ** 2 - ((1 - sigma) / sigma) ** 2
    image = ((1 - r) / r**2 * x - (1 - sigma) / sigma**2 * policy.source) / precision
    torch.testing.assert_close(policy.at(x).velocity(sigma - r), (x - image) / r, rtol=1e-6, atol=1e-6)


def test_a_pixel_is_a_vector_over_its_channels():
    """Gates know all channels of their pixel and nothing of another pixel: entry c P + p is channel c of pixel p."""
    policy = gaussians()
    x = draw(BATCH, TOKENS, WIDTH, seed=5)
    parts = [
        GaussianMixture(
            policy.means[..., p::PIXELS],
            policy.logits[..., p : p + 1],
            policy.std,
            policy.source[..., p::PIXELS],
            policy.sigma,
            x[..., p::PIXELS],
        ).mean_velocity(0.1, 0.5)
        for p in range(PIXELS)
    ]
    torch.testing.assert_close(policy.at(x).mean_velocity(0.1, 0.5), torch.stack(parts, -1).flatten(-2))


@pytest.mark.parametrize("sigma", [1.0, 0.7])
def test_one_gaussian_is_exact_for_a_gaussian_teacher(sigma):
    """The teacher's posterior at the call is Gaussian, and with it the policy knows the teacher everywhere."""
    mean, spread = 0.5, 0.6

    def denoised(x, s):
        gain = (1 - s) * spread**2 / ((1 - s) ** 2 * spread**2 + s**2)
        return mean + gain * (x - (1 - s) * mean)

    x, seen = draw(BATCH, TOKENS, WIDTH), draw(BATCH, TOKENS, WIDTH, seed=3)
    std = spread * sigma / ((1 - sigma) ** 2 * spread**2 + sigma**2) ** 0.5
    logits = torch.zeros(BATCH, TOKENS, 1, PIXELS, dtype=torch.float64)
    policy = GaussianMixture(denoised(x, sigma).unsqueeze(-2), logits, level(std), x, level(sigma), seen)
    for s in (0.1, 0.4, 0.6):
        r = sigma - s
        torch.testing.assert_close(policy.velocity(s), (seen - denoised(seen, r)) / r)
    scale = ((1 - sigma) ** 2 * spread**2 + sigma**2) ** 0.5
    end = mean + spread * (x - (1 - sigma) * mean) / scale  # of the teacher's path
    torch.testing.assert_close(x - policy.at(x).displacement(0.0, sigma), end, rtol=0, atol=0.06)  # 128 Euler steps


@pytest.mark.slow
def test_substeps_are_128_over_raw_time_and_of_first_order():
    policy = gaussians(sigma=1.0)
    lengths, shares, *_ = policy._substeps(0.0, 1 - STEP[1], policy.x)
    assert len(lengths) == 64
    torch.testing.assert_close(lengths.sum(0).flatten(), level(1 - STEP[1]))
    torch.testing.assert_close(shares.sum(0).flatten(), level(1.0))

    def end(parts):
        x, taus = policy.x, torch.linspace(1, 0.5, parts + 1, dtype=torch.float64)
        grid = (1 - shift_sigma(taus)).tolist()
        for a, b in zip(grid[:-1], grid[1:], strict=True):
            x = x - policy.at(x).displacement(a, b)
        return x

    coarse, middle, fine = (end(parts) for parts in (64, 128, 256))
    assert ((coarse - middle).norm() / (middle - fine).norm()).item() == pytest.approx(2, rel=0.1)
    own = policy.x - policy.displacement(0.0, 1 - STEP[1])
    torch.testing.assert_close(own, coarse)


@pytest.mark.parametrize("policy", [gaussians(), curve()], ids=["gm", "dx"])
def test_times_may_differ_by_sample(policy):
    a, b = torch.tensor([0.0, 0.1, 0.15]).double(), torch.tensor([0.2, 0.1, 0.17]).double()
    for i in range(BATCH):
        one = dataclasses.replace(
            policy,
            **{
                f.name: v[i : i + 1]
                for f in dataclasses.fields(policy)
                if f.name != "shift"
                for v in [getattr(policy, f.name)]
            },
        )
        wanted = one.displacement(a[i].item(), b[i].item())[0]
        torch.testing.assert_close(policy.displacement(a, b)[i], wanted, rtol=0.05, atol=1e-3)
        torch.testing.assert_close(policy.velocity(a)[i], one.velocity(a[i].item())[0])
    assert not policy.displacement(a, b)[1].any()


@pytest.mark.parametrize("policy", [gaussians(), curve()], ids=["gm", "dx"])
def test_the_mean_velocity_is_the_velocity_where_the_interval_is_empty(policy):
    torch.testing.assert_close(policy.mean_velocity(0.1, 0.1), policy.velocity(0.1))
    torch.testing.assert_close(policy.mean_velocity(0.1, 0.1 + 1e-7), policy.velocity(0.1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(policy.mean_velocity(0.05, 0.2) * 0.15, policy.displacement(0.05, 0.2))


def test_float32_is_enough():
    for sigma, std in ((1.0, 0.1), (0.76, 0.01), (0.3, 1.0)):
        exact, single = (gaussians(sigma, std, dtype=dtype) for dtype in (torch.float64, torch.float32))
        single = dataclasses.replace(single, means=exact.means.float(), source=exact.source.float(), x=exact.x.float())
        for s in (0.0, 1e-6, 0.5 * sigma, sigma):
            torch.testing.assert_close(single.velocity(s).double(), exact.velocity(s), rtol=1e-3, atol=1e-3)
            assert single.velocity(s).dtype == torch.float32


@pytest.mark.parametrize("modes", [2, 5, 10])
def test_the_image_passes_through_the_grids_points_and_is_linear_between(modes):
    policy = curve(modes)
    levels = torch.linspace(*STEP, modes, dtype=torch.float64)
    for k, r in enumerate(levels.tolist()):
        torch.testing.assert_close(policy.velocity(1 - r), (policy.x - policy.x0[..., k, :]) / r)
    middle = float(levels[:2].mean())
    torch.testing.assert_close(policy.velocity(1 - middle), (policy.x - policy.x0[..., :2, :].mean(-2)) / middle)


def test_a_known_curve_is_walked_to_its_end():
    """x0(r) = 2 + 3 r is on every grid; du/dr = (x - x0) / r is solved by hand."""
    x = draw(BATCH, TOKENS, WIDTH)
    for start, end, modes in ((1.0, 0.76, 2), (0.76, 0.0, 7), (1.0, 0.0, 10)):
        levels = torch.linspace(start, end, modes, dtype=torch.float64)
        x0 = (2 + 3 * levels)[:, None].expand(BATCH, TOKENS, modes, WIDTH)
        policy = DenoisedCurve(x0, level(start), level(end), x)
        below = start - 0.7 * (start - end)
        moved = x - below / start * x - 2 * (1 - below / start) - 3 * below * torch.tensor(start / below).double().log()
        torch.testing.assert_close(policy.displacement(0.0, start - below), moved)
        if end == 0:
            torch.testing.assert_close(policy.displacement(0.0, start), x - 2)


@pytest.mark.slow
def test_a_curves_path_is_the_solution_of_its_equation_and_additive():
    policy, x = curve(), curve().x
    grid = torch.linspace(0, 1 - STEP[1], 401, dtype=torch.float64).tolist()
    for a, b in zip(grid[:-1], grid[1:], strict=True):
        middle = policy.at(x - (b - a) / 2 * policy.at(x).velocity(a)).velocity((a + b) / 2)
        x = x - (b - a) * middle
    torch.testing.assert_close(policy.displacement(0.0, 1 - STEP[1]), policy.x - x, rtol=1e-4, atol=1e-4)
    first = policy.displacement(0.0, 0.1)
    rest = policy.at(policy.x - first).displacement(0.1, 0.2)
    torch.testing.assert_close(first + rest, policy.displacement(0.0, 0.2))


def test_the_pull_of_a_whole_step_is_what_the_state_loses():
    levels = torch.tensor([[0.9, 0.6, 0.3, 0.0]]).double()
    for end, lost in ((0.3, 2 / 3), (0.0, 1.0)):
        weights = pull_weights(levels, torch.tensor([0.9]).double(), torch.tensor([end]).double()) * (0.9 - end)
        assert weights.sum().item() == pytest.approx(lost)
        assert (weights >= 0).all()


@pytest.mark.parametrize("lay", [gaussian_mixture, denoised_curve])
@pytest.mark.parametrize("step", [0, 1])
def test_a_new_student_is_the_teachers_euler_step_but_for_its_spread(lay, step):
    torch.manual_seed(0)
    base, features = torch.nn.Linear(12, WIDTH), torch.randn(BATCH, TOKENS, 12)
    grid = step_grid(2).tolist()
    sigma, length, x = grid[step], grid[step] - grid[step + 1], torch.randn(BATCH, TOKENS, WIDTH)
    with torch.no_grad():
        said = unpack(MomentumHead.from_linear(base, 8)(features), 8)
        policy = lay(said, x, level(sigma, dtype=torch.float32), Distill())
        difference = policy.displacement(0.0, length) - length * base(features)
    assert difference.std() < 0.05 * length + SPREAD * (lay is gaussian_mixture)


def test_the_spread_starts_at_a_tenth_and_stays_within_bounds():
    x, sigma = draw(BATCH, TOKENS, WIDTH), level(0.8)
    said = unpack(MomentumHead.from_linear(torch.nn.Linear(12, WIDTH), 8)(torch.zeros(BATCH, TOKENS, 12)), 8)
    torch.testing.assert_close(
        gaussian_mixture(said, x.float(), sigma.float(), Distill()).std, level(SPREAD, dtype=torch.float32)
    )
    for gain, bound in ((-100.0, SPREAD / RANGE), (100.0, SPREAD * RANGE)):
        gains = torch.full((BATCH, TOKENS, MODES - 1, PIXELS), gain).double()
        policy = gaussian_mixture(dataclasses.replace(head_output(), log_gamma=gains), x, sigma, Distill())
        torch.testing.assert_close(policy.std, level(bound))
    one = gaussian_mixture(head_output(1), x, sigma, Distill())
    torch.testing.assert_close(one.std, level(SPREAD))


@pytest.mark.parametrize("lay", [gaussian_mixture, denoised_curve])
def test_gradients_are_those_of_finite_differences(lay):
    said, x = head_output(modes=2), draw(BATCH, TOKENS, WIDTH, seed=7).requires_grad_()
    leaves = [part.detach().requires_grad_() for part in (said.v, said.logits, said.log_gamma)]

    def moved(x, *parts):
        return lay(Mixture(*parts), x, level(STEP[1]), Distill()).at(x + 0.1).mean_velocity(0.2, 0.24)

    assert torch.autograd.gradcheck(moved, (x, *leaves), fast_mode=True)


@pytest.mark.parametrize("lay", [gaussian_mixture, denoised_curve])
def test_detached_is_cut_from_the_graph(lay):
    said = head_output()
    said.v.requires_grad_()
    policy = lay(said, draw(BATCH, TOKENS, WIDTH), level(1.0), Distill())
    assert policy.velocity(0.1).requires_grad and not policy.detach().velocity(0.1).requires_grad


def test_a_dropped_gaussian_is_no_longer_drawn_to():
    policy = gaussians()
    dropped = policy.drop_modes(0.6, torch.Generator().manual_seed(0))
    far = dataclasses.replace(dropped, means=policy.means + 1e3 * dropped.logits.isinf().any(-1, keepdim=True))
    assert dropped.logits.isinf().any()
    torch.testing.assert_close(far.velocity(0.2), dropped.velocity(0.2))


def test_one_image_is_no_curve():
    with pytest.raises(ValueError, match="2 or more modes"):
        denoised_curve(head_output(1), draw(BATCH, TOKENS, WIDTH), level(1.0), Distill())
