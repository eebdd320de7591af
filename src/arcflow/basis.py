"""Directions in which the head's velocities are learned.

Over a segment the K exponentials exp(g_k s) are nearly the same function: of the sixteen at the start, over the
first of two steps, the second independent shape is 11 times and the third 300 times smaller than the first. A
gradient step on v_k learns the constant part of the velocity at once and its bend hardly at all. Here the optimizer
sees other coordinates, v = T r, whose columns are the principal shapes of those exponentials, each with the same
effect on the path (up to `MOST`). The network, its output and an adapter on disk stay what they are; only the
direction of a step changes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.head import start_gains
from arcflow.parallel import shared_like, whole

COUNT = 4
"""Shapes that are brought to equal effect; the rest is rounding."""
MOST = 60.0
"""The most that a shape is enlarged."""


def directions(modes: int, span: float) -> Float[Tensor, "modes modes"]:
    """T, for the momentum factors gamma that a head starts with and noise levels 0 to `span` left behind; float64.

    The shapes are those of exp(gamma s), which bend more than the mixture's exp(log gamma s): several times worse for
    a bend of second order, several times better for one of first order (docs/log.md, 2026-11-25)."""
    s = torch.linspace(0, span, 256, dtype=torch.float64)
    curves = torch.exp(torch.cat([torch.zeros(1), start_gains(modes)]).double() * s[:, None]) / modes
    _, size, shapes = torch.linalg.svd(curves, full_matrices=False)
    scale = torch.ones(modes, dtype=torch.float64)
    scale[:COUNT] = (size[0] / size[:COUNT]).clamp(max=MOST)
    return shapes.T * scale


@contextmanager
def along(mix: Float[Tensor, "modes modes"], parameters: Sequence[Tensor]) -> Iterator[None]:
    """The optimizer's step inside moves the head's means by T r instead of r: gradients are turned before it, the move
    after it. Weight decay would decay the move, so there must be none."""

    def turned(by: Tensor, value: Tensor) -> Tensor:
        rows = whole(value).reshape(len(by), -1)
        return shared_like((by.to(rows) @ rows).reshape(value.shape), value)

    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = turned(mix.T, parameter.grad)
            parameter.zero_()
        yield
        for parameter, kept in zip(parameters, before, strict=True):
            parameter.copy_(kept + turned(mix, parameter))
