"""The bend of a path is learned as soon as its mean."""

import pytest
import torch
from torch import nn

from arcflow.momentum import unpack
from arcflow.student.head import MomentumHead, start_gains
from arcflow.training.optimizer import COUNT, MOST, directions, preconditioned


@pytest.mark.parametrize("span", [0.238, 0.762])
def test_each_direction_moves_the_path_as_much_as_the_first_and_none_moves_another(span):
    s = torch.linspace(0, span, 256, dtype=torch.float64)
    curves = torch.exp(torch.cat([torch.zeros(1), start_gains(16)]).double() * s[:, None]) @ directions(16, span)
    gram = curves.T @ curves
    off = gram - gram.diag().diag()
    assert off.abs().max() < 1e-8 * gram.max()
    sizes = gram.diag().sqrt()[:COUNT]
    assert (sizes <= sizes[0] * (1 + 1e-9)).all()
    torch.testing.assert_close(sizes[:2], sizes[:1].expand(2))  # beyond, `MOST` may stop it
    assert MOST > 1


def fit(turn: bool, steps: int = 60) -> float:
    """What is left of a velocity that doubles over the segment, after so many steps of Adam on the head alone."""
    torch.manual_seed(0)
    head, features = MomentumHead.from_linear(nn.Linear(8, 4), 16), torch.randn(32, 8)
    with torch.no_grad():
        start = unpack(head(features), 16).velocity(0.0)
    means = [head.means.weight, head.means.bias]
    optimizer = torch.optim.Adam(means, lr=1e-2)
    mix = directions(16, 0.5)
    for _ in range(steps):
        mixture = unpack(head(features), 16)
        loss = sum((mixture.velocity(s) - start * (1 + 2 * s)).square().mean() for s in (0.0, 0.25, 0.5))
        optimizer.zero_grad()
        loss.backward()
        if turn:
            with preconditioned(mix, means):
                optimizer.step()
        else:
            optimizer.step()
    return loss.item()


@pytest.mark.slow
def test_a_bend_is_learned_sooner():
    assert fit(turn=True) < 0.5 * fit(turn=False)


def test_with_the_identity_a_step_is_the_optimizers_own():
    steps = []
    for turn in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(8, 3))
        optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
        for _ in range(3):
            weight.square().sum().backward()
            if turn:
                with preconditioned(torch.eye(2, dtype=torch.float64), [weight]):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
        steps.append(weight.detach())
    torch.testing.assert_close(*steps)
