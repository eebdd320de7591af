"""The laws of the momentum mixture."""

import mpmath
import pytest
import torch

from arcflow import Mixture
from arcflow.momentum import pack, unpack
from arcflow.portable import BLOCK, phi
from tests.support.mixtures import mixture


def exact_velocity(m: Mixture, s, channel: int, pixel: int):
    """Eq. 1 for one latent pixel, in 50 digits."""
    logits = [mpmath.mpf(float(value)) for value in m.logits[:, pixel]]
    gains = [mpmath.mpf(0), *(mpmath.mpf(float(value)) for value in m.log_gamma[:, pixel])]
    v = [mpmath.mpf(float(value)) for value in m.v.unflatten(-1, (-1, m.logits.shape[-1]))[:, channel, pixel]]
    total = sum(map(mpmath.exp, logits))
    return sum(mpmath.exp(z) / total * u * mpmath.exp(g * s) for z, u, g in zip(logits, v, gains, strict=True))


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.25), (0.1, 0.9), (0.0, 1.0), (0.3, 0.3 + 1e-9)])
@pytest.mark.parametrize("gain", [0.0, 1e-9, 1e-4, 3.0])
def test_closed_form_is_the_integral_of_the_velocity(a, b, gain):
    m = mixture(gain=gain)
    moved = m.displacement(a, b).unflatten(-1, (2, 4))
    with mpmath.workdps(50):
        for channel, pixel in [(0, 0), (0, 3), (1, 2)]:
            wanted = mpmath.quad(lambda s, at=(channel, pixel): exact_velocity(m, s, *at), [a, b])
            assert float(moved[channel, pixel]) == pytest.approx(float(wanted), rel=1e-12, abs=1e-24)


def test_velocity_is_equation_1():
    m = mixture()
    with mpmath.workdps(50):
        wanted = [[float(exact_velocity(m, 0.4, c, p)) for p in range(4)] for c in range(2)]
    torch.testing.assert_close(m.velocity(0.4), torch.tensor(wanted, dtype=torch.float64).flatten())


def test_displacement_is_additive():
    m = mixture(2, 3)
    torch.testing.assert_close(m.displacement(0.1, 0.4) + m.displacement(0.4, 0.9), m.displacement(0.1, 0.9))


def test_mean_velocity_is_displacement_over_the_interval_and_velocity_where_that_is_empty():
    m = mixture(2, 3)
    torch.testing.assert_close(m.mean_velocity(0.2, 0.7) * 0.5, m.displacement(0.2, 0.7))
    assert torch.equal(m.mean_velocity(0.3, 0.3), m.velocity(0.3))
    assert not m.displacement(0.3, 0.3).any()


@pytest.mark.parametrize("modes", [1, 3, 4, 16])
def test_no_gain_is_euler_to_the_last_bit(modes):
    u = torch.randn(5, 7, 8)
    same = u.unsqueeze(-2).expand(5, 7, modes, 8)
    logits = torch.zeros(5, 7, modes, 4) if modes & (modes - 1) == 0 else torch.full((5, 7, modes, 4), -torch.inf)
    logits[..., 0, :] = 0
    m = Mixture(same, logits, torch.zeros(5, 7, modes - 1, 4))
    assert torch.equal(m.displacement(0.0, 0.238), 0.238 * u)
    assert torch.equal(m.velocity(0.5), u)


def test_one_mode_is_a_straight_line():
    m = mixture(3, modes=1)
    assert torch.equal(m.velocity(0.0), m.velocity(0.9))
    torch.testing.assert_close(m.displacement(0.2, 0.6), 0.4 * m.v.squeeze(-2))


def test_pixels_share_gates_over_channels():
    """A token is channel-major: pixel p of channel c is entry c P + p."""
    m = mixture(modes=2, width=12, pixels=4)
    parts = [
        Mixture(m.v[:, p::4], m.logits[:, p : p + 1], m.log_gamma[:, p : p + 1]).displacement(0.1, 0.6)
        for p in range(4)
    ]
    torch.testing.assert_close(m.displacement(0.1, 0.6), torch.stack(parts, -1).flatten())


def test_times_may_differ_by_sample():
    m = mixture(3, 5)
    a, b = torch.tensor([0.0, 0.1, 0.5]), torch.tensor([0.2, 0.1, 0.9])
    for i in range(3):
        one = Mixture(m.v[i], m.logits[i], m.log_gamma[i])
        torch.testing.assert_close(m.displacement(a, b)[i], one.displacement(a[i].item(), b[i].item()))
        torch.testing.assert_close(m.velocity(a)[i], one.velocity(a[i].item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_phi_is_exact_with_its_gradient(dtype):
    steps = torch.cat([torch.zeros(1, dtype=dtype), torch.logspace(-12, 1, 79, dtype=dtype)])
    z = torch.cat([steps, -steps, torch.tensor([0.25, -0.25], dtype=dtype)]).requires_grad_()
    value = phi(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    with mpmath.workdps(60):
        points = [mpmath.mpf(point) for point in z.tolist()]
        values = [float(mpmath.expm1(p) / p) if p else 1.0 for p in points]
        slopes = [float((p * mpmath.exp(p) - mpmath.expm1(p)) / p**2) if p else 0.5 for p in points]
    near = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 0.0}
    torch.testing.assert_close(value, torch.tensor(values, dtype=dtype), **near)
    torch.testing.assert_close(slope, torch.tensor(slopes, dtype=dtype), rtol=64 * torch.finfo(dtype).eps, atol=0.0)


def test_gradients_are_those_of_finite_differences_also_at_no_gain():
    for gain in (0.0, 1e-3, 2.0):
        m = mixture(modes=3, width=4, pixels=2, gain=gain)
        leaves = [part.clone().requires_grad_() for part in (m.v, m.logits, m.log_gamma)]
        assert torch.autograd.gradcheck(lambda *parts: Mixture(*parts).displacement(0.1, 0.8), leaves)
        assert torch.autograd.gradcheck(lambda *parts: Mixture(*parts).velocity(0.4), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_whatever_comes_in(dtype):
    m = mixture(2, 3, dtype=dtype)
    wide = Mixture(m.v.float(), m.logits.float(), m.log_gamma.float())
    assert m.displacement(0.1, 0.7).dtype == torch.float32
    assert torch.equal(m.displacement(0.1, 0.7), wide.displacement(0.1, 0.7))
    assert mixture(2).velocity(0.1).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_block_by_block_without_gradients_is_the_same_step(dtype):
    m = mixture(3, 7 + BLOCK // 2, modes=3, dtype=dtype)
    whole = m.displacement(0.0, 0.7)
    with torch.no_grad():
        torch.testing.assert_close(m.displacement(0.0, 0.7), whole)


def test_dropped_modes_are_gone_for_a_whole_sample_but_never_all():
    m = mixture(64, 3, modes=3)
    dropped = m.drop_modes(0.6, torch.Generator().manual_seed(0)).logits.isinf()
    assert torch.equal(dropped, dropped[:, :1, :, :1].expand_as(dropped))
    kept = (~dropped[:, 0, :, 0]).sum(-1)
    assert kept.min() == 1 and kept.max() == 3
    assert m.drop_modes(0.6, torch.Generator().manual_seed(0)).displacement(0.0, 1.0).isfinite().all()


def test_dropping_is_by_the_generator_alone():
    m = mixture(8, 3)
    draws = [m.drop_modes(0.5, torch.Generator().manual_seed(seed)).logits for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(m.drop_modes(0.0).logits, m.logits)


def test_packing_is_undone_by_unpacking():
    m = mixture(2, 3, modes=4, width=8)
    packed = pack(m)
    assert packed.shape[-1] == 4 * 8 + 4 * 4 + 3 * 4
    back = unpack(packed, 4)
    assert all(torch.equal(getattr(back, name), getattr(m, name)) for name in ("v", "logits", "log_gamma"))


def test_detached_is_cut_from_the_graph():
    m = mixture(2)
    live = Mixture(m.v.requires_grad_(), m.logits, m.log_gamma)
    assert live.velocity(0.1).requires_grad and not live.detach().velocity(0.1).requires_grad


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: Mixture(torch.ones(4, 8), torch.ones(3, 4), torch.ones(3, 4)), r"logits has shape \(3, 4\).*\(4, 4\)"),
        (lambda: Mixture(torch.ones(4, 8), torch.ones(4, 4), torch.ones(4, 4)), r"log_gamma .* expected \(3, 4\)"),
        (lambda: Mixture(torch.ones(4, 9), torch.ones(4, 4), torch.ones(3, 4)), "do not divide the width 9"),
        (lambda: unpack(torch.ones(2, 61), 4), "Is an adapter attached"),
        (lambda: mixture(3).velocity(torch.ones(2)), "leading batch size"),
        (lambda: mixture(3).drop_modes(1.0), "0 <= p < 1"),
    ],
)
def test_nonsense_is_refused_with_a_remedy(unchecked, make, remedy):
    with pytest.raises(ValueError, match=remedy):
        make()
