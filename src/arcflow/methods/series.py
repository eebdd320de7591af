"""Paths as series: velocities whose time functions are orthogonal on the step.

The mixture's exponentials are nearly the same function over a step, so that a bend of the path is a small difference of
large velocities (see `basis`). Here, over a step that leaves the noise level L behind,

    velocity       u(s)    = sum_k c_k f_k(s)                          f_0 = 1

(eqs. 10 and 11, `arcflow.series`) with as many shapes as the head has velocities, and each of them of the same size.
The f_k are Legendre polynomials P_k(2 s / L - 1), or the mixture's own exponentials at their start, made orthogonal
over [0, L]. The head's velocities v_j are those at the K Gauss points of the step: the series is the one that takes
them. They start equal, so that a new student is the teacher's Euler step, and each has its own part of the step to
answer for. Gates and momentum factors go unused.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.config import Distill
from arcflow.distillation.matching import along, matching
from arcflow.distillation.method import Method
from arcflow.distillation.walk import sampler_grid
from arcflow.momentum import Mixture
from arcflow.path import step_end
from arcflow.portable import phi
from arcflow.series import Means, Series, gauss, legendre_means
from arcflow.student.head import start_gains

NODES = 32
"""Points at which the exponentials are made orthogonal: their products are integrated to the last bit."""


def exponential_means(
    count: int, length: Float[Tensor, " samples"], a: Float[Tensor, " samples"], b: Float[Tensor, " samples"]
) -> Float[Tensor, "samples count"]:
    """Means of the exponentials that a mixture of `count` modes starts with, the constant first, made orthogonal on
    [0, length]: each a fixed combination of them."""
    lengths, which = length.unique(return_inverse=True)
    combined = torch.stack([combination(count, one) for one in lengths.tolist()])[which]
    g = gains(count)
    means = torch.exp(g * a[:, None]) * phi(g * (b - a)[:, None])
    return (means[:, None] @ combined).squeeze(-2)


def gains(count: int) -> Float[Tensor, " count"]:
    """Momentum factors g_k of a new head as they stand in its exponentials exp(g_k s)."""
    return torch.cat([torch.zeros(1), start_gains(count).log()]).double()


def combination(count: int, length: float) -> Float[Tensor, "count count"]:
    """Columns: the weights of the exponentials in each shape, of mean square 1 on [0, length]. By QR in float64: over
    the first of two steps the exponentials' condition number is 3e5 for four of them, and 1e14 for eight."""
    nodes, weights = gauss(NODES)
    curves = torch.exp(gains(count) * length * (nodes[:, None] + 1) / 2) * weights[:, None].sqrt()
    upper = torch.linalg.qr(curves).R
    upper = upper * upper.diagonal().sign()[:, None]
    return torch.linalg.solve_triangular(upper, torch.eye(count, dtype=upper.dtype), upper=True)


def laid_over(mixture: Mixture, x: Tensor, sigma: Tensor, config: Distill, *, means: Means) -> Series:
    """The head's velocities as a series over the step that starts at `sigma`."""
    end = step_end(sigma, sampler_grid(config.steps, config))
    return Series.of(mixture.v, sigma - end, means)


def _method(name: str, title: str, means: Means) -> Method:
    lay = partial(laid_over, means=means)
    objective = partial(matching, lay=lay, modes_drop=False)
    return Method(name=name, title=title, paper="", modes=4, objective=objective, sample=along(lay))


LEGENDRE = _method("legendre", "Legendre polynomials", legendre_means)

COEFFICIENTS = Method(
    name="coefficients",
    title="ArcFlow in coefficients (ours)",
    paper="",
    modes=4,
    objective=partial(matching, modes_drop=False),
)
"""The path in the coefficients that an adapter of `model.form = "coefficients"` has: its network says the series
itself, the mean velocity by the base's own last layer, the bends by a head of their own."""

ORTHOGONAL = _method("orthogonal", "ArcFlow, exponentials made orthogonal", exponential_means)
