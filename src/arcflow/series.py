"""Paths that are known by their mean velocities, and series: velocities with fixed shapes of time over a step.

Over a step that leaves the noise level L behind,

    velocity       u(s)       = sum_k c_k f_k(s)             f_0 = 1                                    (10)
    mean velocity  ubar(a, b) = sum_k c_k m_k(a, b)          m_k: mean of f_k from a to b               (11)

Means are exact, so that a displacement is additive; over an empty interval they are the values. For Legendre
polynomials, f_k(s) = P_k(2 s / L - 1), all but the first have mean 0 over the whole step: **c_0 is the mean velocity
over the step**, and c_1, c_2, ... only bend the path on its way to the same end (docs/math.md, "The path in
coefficients"). With c_k = 0 from k = 1 on a step is Euler's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.path import column
from arcflow.system.seeds import Draws


class ByMeans:
    """A policy that is known by its mean velocities: velocity and displacement follow."""

    def mean_velocity(self, a: float | Tensor, b: float | Tensor) -> Tensor:
        """Displacement over b - a, without the division: over an empty interval it is the velocity."""
        raise NotImplementedError

    def detach(self) -> "ByMeans":
        """The same path, cut from the graph."""
        raise NotImplementedError

    def at(self, x: Tensor) -> "ByMeans":
        """The same path: it was laid down at the call. One that steers says here what it does from `x` on."""
        return self

    def velocity(self, s: float | Tensor) -> Float[Tensor, "*batch width"]:
        """Velocity after the noise level has fallen by `s` since the call."""
        return self.mean_velocity(s, s)

    def drop_modes(self, p: float, generator: Draws | None = None) -> "ByMeans":
        """The same path, which is not made of modes."""
        return self

    def displacement(self, a: float | Tensor, b: float | Tensor) -> Float[Tensor, "*batch width"]:
        """Path traveled from `a` to `b`."""
        span, moved = b - a, self.mean_velocity(a, b)
        return moved * (column(span.to(moved), moved) if isinstance(span, Tensor) else span)


def float64_ends(a: float | Tensor, b: float | Tensor, like: Float[Tensor, " samples"]) -> list[Tensor]:
    """The ends of an interval, one of each a sample, in float64 on the CPU."""
    return [torch.as_tensor(end, dtype=torch.float64, device="cpu").expand_as(like) for end in (a, b)]


Means = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(number of shapes, lengths of steps, a, b) -> mean of each shape from `a` to `b`, one row a sample; all float64."""


def legendre_means(
    count: int, length: Float[Tensor, " samples"], a: Float[Tensor, " samples"], b: Float[Tensor, " samples"]
) -> Float[Tensor, "samples count"]:
    """Means of P_0 ... P_(count-1) on [0, length], by a Gauss rule that is exact for them: the difference of neighbors
    (P_(k+1) - P_(k-1)) / (2 k + 1) at the two ends over b - a, without that division."""
    nodes, weights = gauss((count + 1) // 2)
    z = (a + b)[:, None] / length[:, None] + (b - a)[:, None] / length[:, None] * nodes - 1
    values = [torch.ones_like(z), z]
    for k in range(1, count - 1):
        values.append(((2 * k + 1) * z * values[k] - k * values[k - 1]) / (k + 1))
    return torch.stack(values[:count], -2) @ weights


def interpolation(count: int, length: Float[Tensor, ""], means: Means) -> Float[Tensor, "count count"]:
    """Matrix from the values at the Gauss points of a step to the weights of the shapes."""
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
