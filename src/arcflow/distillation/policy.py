"""The two callables everything above the model sees, `teacher` and `student`, and the path a student call returns."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.families.conditioning import Cond
from arcflow.system.seeds import Draws


@runtime_checkable
class Policy(Protocol):
    """What one student call returns: a path over the coming step. Intervals count from the call.

    Paths like the mixture's are laid down at the call and do not look at the state again. One that steers does: what it
    says from a state on is `at(x)`. One that is not made of modes is whole without any of them: `drop_modes` gives it
    back.
    """

    def velocity(self, s: float | Tensor) -> Tensor: ...
    def displacement(self, a: float | Tensor, b: float | Tensor) -> Tensor: ...
    def mean_velocity(self, a: float | Tensor, b: float | Tensor) -> Tensor: ...
    def detach(self) -> "Policy": ...
    def drop_modes(self, p: float, generator: Draws | None = None) -> "Policy": ...
    def at(self, x: Tensor) -> "Policy": ...


Teacher = Callable[[Tensor, Tensor, Cond], Tensor]

Student = Callable[[Tensor, Tensor, Cond], Policy]


def level(sigma: float, x: Tensor) -> Float[Tensor, " batch"]:
    """One noise level for all samples of `x`."""
    return torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
