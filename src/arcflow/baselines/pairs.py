"""Noise and where the teacher takes it, kept and used again: the data of methods that were made for pictures.

A pair costs `CALLS` calls of the teacher and is good for as long as one likes, since the teacher never changes. So one
iteration in `REUSE` makes pairs of its noise and prompts, and every one trains on pairs drawn from the newest ones.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.backbone import Cond
from arcflow.baselines.solvers import by_dpmpp
from arcflow.data import rows, shared
from arcflow.momentum import Draws, uniform
from arcflow.rollout import Teacher

CALLS = 16
"""Of the teacher for a pair, by DPM-Solver++. On the small FLUX 3e-4 of squared distance remain to 50 Euler steps; 24
Euler steps would leave 1e-2."""
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
        """A batch of random pairs, noise and picture, and their conditioning. In one iteration of `REUSE` those of
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
