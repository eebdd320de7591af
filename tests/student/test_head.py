"""The head starts as its teacher."""

import pytest
import torch
from torch import nn

from arcflow.momentum import unpack
from arcflow.student.head import MomentumHead


@pytest.mark.parametrize("bias", [True, False])
def test_every_mode_starts_as_the_base_but_for_a_constant_per_channel(bias):
    base, x = nn.Linear(12, 8, bias=bias), torch.randn(5, 3, 12)
    m = unpack(MomentumHead.from_linear(base, 4, generator=torch.Generator().manual_seed(0))(x), 4)
    apart = (m.v - base(x).unsqueeze(-2)).unflatten(-1, (2, 4))
    torch.testing.assert_close(apart, apart[:1, :1, :, :, :1].expand_as(apart), rtol=0, atol=1e-6)
    assert 0.01 < apart.std() < 0.2
    assert not m.logits.any()


def test_momentum_factors_start_spread_from_a_fifth_to_four():
    head = MomentumHead.from_linear(nn.Linear(12, 8), 16)
    g = unpack(head(torch.randn(12)), 16).log_gamma
    assert torch.equal(g, g[:, :1].expand_as(g))
    factors = g[:, 0].exp()
    torch.testing.assert_close(factors[[0, -1]], torch.tensor([0.2, 4.0]))
    ratios = factors[1:] / factors[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


@pytest.mark.parametrize("modes", [1, 2, 4])
def test_one_product_gives_the_same_as_three(modes):
    head, x = MomentumHead.from_linear(nn.Linear(12, 8), modes), torch.randn(5, 12)
    assert head(x).shape[-1] == modes * 8 + (2 * modes - 1) * 4
    torch.testing.assert_close(head.packed()(x), head(x))
    span = torch.tensor(0.4)
    torch.testing.assert_close(head.packed().mean_velocity(x, span), head.mean_velocity(x, span))


def test_equal_velocities_come_out_of_one_product_to_the_last_bit():
    base, x = nn.Linear(12, 8), torch.randn(2, 5, 12)
    head = MomentumHead.from_linear(base, 4)
    with torch.no_grad():
        head.means.bias.copy_(base.bias.repeat(4))
        head.loggamma.bias.zero_()
        packed = head.packed()
        assert torch.equal(packed.mean_velocity(x, torch.tensor(0.4)), packed(x)[..., :8])


def test_a_generator_decides_the_start_and_the_global_one_is_left_alone():
    base, state = nn.Linear(12, 8), torch.get_rng_state()
    heads = [MomentumHead.from_linear(base, 4, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(heads[0].means.bias, heads[1].means.bias)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_head_over_a_half_precision_base_is_float32():
    head = MomentumHead.from_linear(nn.Linear(12, 8).bfloat16(), 4)
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}


def test_nonsense_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match="at least 1 mode"):
        MomentumHead.from_linear(nn.Linear(12, 8), 0)
    with pytest.raises(ValueError, match="do not divide the output width 9"):
        MomentumHead.from_linear(nn.Linear(12, 9), 4)
