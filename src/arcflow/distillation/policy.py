"""The two callables everything above the model sees, `teacher` and `student`, and the path a student call returns."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.families.conditioning import Cond
from arcflow.path import column


@runtime_checkable
class Policy(Protocol):
    """What one student call returns: a path over the coming step. Intervals count from the call.

    Paths like the mixture's are laid down at the call and do not look at the state again. One that steers does: what it
    says from a state on is `at(x)`.
    """

    def velocity(self, s: float | Tensor) -> Tensor: ...
    def displacement(self, a: float | Tensor, b: float | Tensor) -> Tensor: ...
    def mean_velocity(self, a: float | Tensor, b: float | Tensor) -> Tensor: ...
    def detach(self) -> "Policy": ...
    def at(self, x: Tensor) -> "Policy": ...


class ByMeans:
    """A policy that is known by its mean velocities: velocity and displacement follow."""

    def mean_velocity(self, a: float | Tensor, b: float | Tensor) -> Tensor:
        """Displacement over b - a, without the division: over an empty interval it is the velocity."""
        raise NotImplementedError

    def velocity(self, s: float | Tensor) -> Float[Tensor, "*batch width"]:
        """Velocity after the noise level has fallen by `s` since the call."""
        return self.mean_velocity(s, s)

    def displacement(self, a: float | Tensor, b: float | Tensor) -> Float[Tensor, "*batch width"]:
        """Path traveled from `a` to `b`."""
        span, moved = b - a, self.mean_velocity(a, b)
        return moved * (column(span.to(moved), moved) if isinstance(span, Tensor) else span)


def float64_ends(a: float | Tensor, b: float | Tensor, like: Float[Tensor, " samples"]) -> list[Tensor]:
    """The ends of an interval, one of each a sample, in float64 on the CPU."""
    return [torch.as_tensor(end, dtype=torch.float64, device="cpu").expand_as(like) for end in (a, b)]


Teacher = Callable[[Tensor, Tensor, Cond], Tensor]

Student = Callable[[Tensor, Tensor, Cond], Policy]


def level(sigma: float, x: Tensor) -> Float[Tensor, " batch"]:
    """One noise level for all samples of `x`."""
    return torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
