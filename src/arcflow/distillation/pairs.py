"""Kept pairs of noise and image, and the network as it was as a target for the network as it is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from arcflow.distillation.policy import Policy, Student, Teacher
from arcflow.distillation.solvers import by_dpmpp
from arcflow.families.conditioning import Cond, rows, shared
from arcflow.runs.ema import Ema
from arcflow.student.state import at_rest
from arcflow.system.seeds import Draws, uniform

CALLS = 16
"""Calls of the teacher that make a pair, by DPM-Solver++. On the small FLUX 3e-4 of squared distance remain to 50 Euler
steps; 24 Euler steps would leave 1e-2."""

REUSE = 8
"""How many iterations share the cost of a batch of pairs: each pair is drawn as many times on average."""

KEPT = 2048
"""Pairs that are remembered."""


class Pairs:
    """The newest pairs, with the conditioning of each."""

    def __init__(self, shift: float) -> None:
        self.shift = shift
        self.iterations = 0
        self.columns: dict[str, Tensor] = {}

    def draw(
        self, teacher: Teacher, eps: Float[Tensor, "batch *rest"], cond: Cond, draws: Draws
    ) -> tuple[Float[Tensor, "batch *rest"], Float[Tensor, "batch *rest"], Cond]:
        """A batch of random pairs, noise and image, and their conditioning. In one iteration of `REUSE` those of
        `eps` and `cond` are made first."""
        if self.iterations % REUSE == 0:
            x0 = by_dpmpp(teacher, eps, cond, CALLS, self.shift)
            new = {"eps": eps, "x0": x0} | {name: value for name, value in cond.items() if not shared(name)}
            old = self.columns or {name: value[:0] for name, value in new.items()}
            self.columns = {name: torch.cat([old[name], value])[-KEPT:] for name, value in new.items()}
        self.iterations += 1
        chosen = (uniform((len(eps),), draws) * len(self.columns["eps"])).long().tolist()
        drawn = rows(self.columns, chosen)
        noise, x0 = drawn.pop("eps"), drawn.pop("x0")
        return noise, x0, {name: value for name, value in cond.items() if shared(name)} | drawn


def averaged(net: nn.Module, average: Ema, student: Student) -> Student:
    """The student with its averaged weights, as samplers have it."""

    def walker(x: Tensor, sigma: Tensor, cond: Cond) -> Policy:
        with as_target(net, average):
            return student(x, sigma, cond)

    return walker


@contextmanager
def as_target(net: nn.Module, weights: Ema) -> Iterator[None]:
    """The network has these weights, and neither dropout nor gradient, while the block runs. Ask the target before the
    student: weights that move after a call with gradient spoil its backward pass."""
    with at_rest(net), weights.applied():
        yield
