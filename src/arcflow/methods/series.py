"""Paths as series: velocities whose time functions are orthogonal on the step.

The mixture's exponentials are nearly the same function over a step, so that a bend of the path is a small difference of
large velocities (see `basis`). Here, over a step that leaves the noise level L behind,

    velocity       u(s)    = sum_k c_k f_k(s)                          f_0 = 1
    displacement   d(a, b) = (b - a) sum_k c_k m_k(a, b)               m_k: mean of f_k from a to b

with as many shapes as the head has velocities, and each of them of the same size. The f_k are Legendre polynomials
P_k(2 s / L - 1), or the mixture's own exponentials at their start, made orthogonal over [0, L]. Their means are exact,
so that a displacement is additive; over an empty interval they are the values. The head's velocities v_j are those at
the K Gauss points of the step: the series is the one that takes them. They start equal, so that a new student is the
teacher's Euler step, and each has its own part of the step to answer for. Gates and momentum factors go unused.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.config import Distill
from arcflow.distillation.matching import along, matching
from arcflow.distillation.method import Method
from arcflow.distillation.policy import ByMeans, float64_ends
from arcflow.distillation.walk import sampler_grid
from arcflow.momentum import Mixture, phi
from arcflow.path import step_end
from arcflow.student.head import start_gains

NODES = 32
"""Points at which the exponentials are made orthogonal: their products are integrated to the last bit."""

Means = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(number of shapes, lengths of steps, a, b) -> mean of each shape from `a` to `b`, one row a sample; all float64."""


def legendre_means(
    count: int, length: Float[Tensor, " samples"], a: Float[Tensor, " samples"], b: Float[Tensor, " samples"]
) -> Float[Tensor, "samples count"]:
    """Of P_0 ... P_(count-1) on [0, length], by a Gauss rule that is exact for them: the difference of neighbors
    (P_(k+1) - P_(k-1)) / (2 k + 1) at the two ends over b - a, without that division."""
    nodes, weights = gauss((count + 1) // 2)
    z = (a + b)[:, None] / length[:, None] + (b - a)[:, None] / length[:, None] * nodes - 1
    values = [torch.ones_like(z), z]
    for k in range(1, count - 1):
        values.append(((2 * k + 1) * z * values[k] - k * values[k - 1]) / (k + 1))
    return torch.stack(values[:count], -2) @ weights


def exponential_means(
    count: int, length: Float[Tensor, " samples"], a: Float[Tensor, " samples"], b: Float[Tensor, " samples"]
) -> Float[Tensor, "samples count"]:
    """Of the exponentials that a mixture of `count` modes starts with, the constant first, made orthogonal on
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


def interpolation(count: int, length: Float[Tensor, ""], means: Means) -> Float[Tensor, "count count"]:
    """From the values at the Gauss points of a step to the weights of the shapes."""
    s = length * (gauss(count)[0] + 1) / 2
    return torch.linalg.inv(means(count, length.expand(count), s, s))


def gauss(count: int) -> tuple[Float[Tensor, " count"], Float[Tensor, " count"]]:
    """Points in [-1, 1] and weights of a mean that is exact for polynomials of degree 2 count - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / 2)


@dataclass(frozen=True)
class Series(ByMeans):
    """A velocity that is a sum of fixed shapes of time over a step."""

    c: Float[Tensor, "*batch modes width"]
    length: Float[Tensor, " samples"]
    """Noise level that the step leaves behind."""
    means: Means

    @classmethod
    def of(cls, v: Float[Tensor, "*batch modes width"], length: Float[Tensor, " samples"], means: Means) -> "Series":
        """The series that takes the head's velocities at the Gauss points of the step."""
        lengths, which = length.detach().cpu().double().unique(return_inverse=True)
        solved = torch.stack([interpolation(v.shape[-2], one, means) for one in lengths])[which]
        solved = solved.to(v.device, torch.promote_types(v.dtype, torch.float32))
        between = [1] * (v.ndim - 3)
        return cls(solved.view(len(solved), *between, *solved.shape[1:]) @ v.to(solved), length, means)

    def mean_velocity(self, a: float | Tensor, b: float | Tensor) -> Float[Tensor, "*batch width"]:
        """Displacement over b - a, without the division: over an empty interval it is the velocity."""
        length = self.length.detach().cpu().double()
        c = self.c.to(torch.promote_types(self.c.dtype, torch.float32))
        w = self.means(c.shape[-2], length, *float64_ends(a, b, length)).to(c)
        return (w.view(len(w), *[1] * (c.ndim - 3), w.shape[-1], 1) * c).sum(-2)

    def detach(self) -> "Series":
        """The same path, cut from the graph."""
        return replace(self, c=self.c.detach())

    def at(self, x: Tensor) -> "Series":
        """The same path: it was laid down at the call."""
        return self


def laid_over(mixture: Mixture, x: Tensor, sigma: Tensor, config: Distill, *, means: Means) -> Series:
    """The head's velocities as a series over the step that starts at `sigma`."""
    end = step_end(sigma, sampler_grid(config.steps, config))
    return Series.of(mixture.v, sigma - end, means)


def _method(name: str, title: str, means: Means) -> Method:
    lay = partial(laid_over, means=means)
    objective = partial(matching, lay=lay, modes_drop=False)
    return Method(name=name, title=title, paper="", modes=4, objective=objective, sample=along(lay))


LEGENDRE = _method("legendre", "Legendre polynomials", legendre_means)

ORTHOGONAL = _method("orthogonal", "ArcFlow, exponentials made orthogonal", exponential_means)
