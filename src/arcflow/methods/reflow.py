"""Reflow: the straight line between a noise and the teacher's image of it.

The velocity of the line from eps to x0, u = eps - x0, is learned at every noise level on the way,

    loss = mean (u_net((1 - sigma) x0 + sigma eps, sigma) - (eps - x0))^2

with pairs (eps, x0) that the teacher made. Where lines cross, the mean is learned; what comes out is straighter than
the teacher, and a few Euler steps follow it. At sigma 1 no lines cross, and the loss is the distillation to one step
that follows in InstaFlow, in squared error: there x0 is a function of the input.

Differs from the papers: noise levels are uniform in raw time and shifted, as a sampler visits them, not uniform; the
distillation is no second training with LPIPS, but a part of the batches at sigma 1 towards the end, so that the student
still takes any number of calls; and there is one reflow. Sources: arXiv 2209.03003; 2309.06380.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from arcflow.config import Distill
from arcflow.distillation.method import Method, Objective, Training, Turn
from arcflow.distillation.objective import Part
from arcflow.distillation.pairs import Pairs
from arcflow.distillation.policy import Student, Teacher
from arcflow.families.conditioning import Cond
from arcflow.path import column, shift_sigma
from arcflow.system.seeds import uniform

ONE_STEP_FROM = 0.75
"""Share of the budget after which some samples are taken at sigma 1."""

ONE_STEP_SHARE = 0.5
"""How many of them."""


def reflow(config: Distill, training: Training) -> Objective:
    """Regression on the straight lines of kept pairs."""
    pairs = Pairs(config.shift)

    def objective(student: Student, teacher: Teacher, x: Tensor, cond: Cond, turn: Turn) -> Iterator[Part]:
        eps, x0, cond = pairs.draw(teacher, x, cond, turn.generator)
        sigma = shift_sigma(uniform((len(x),), turn.generator), config.shift)
        if turn.done >= ONE_STEP_FROM:
            sigma = torch.where(uniform((len(x),), turn.generator) < ONE_STEP_SHARE, 1.0, sigma)
        sigma = sigma.to(x)
        u = student(torch.lerp(x0, eps, column(sigma, x)), sigma, cond).velocity(0.0)
        error = (u - (eps - x0)).square().mean()
        yield Part(error, {"loss": error.detach(), "distance": error.detach()})

    return objective


METHOD = Method(
    name="reflow",
    title="InstaFlow (reflow)",
    paper="2309.06380",
    modes=1,
    objective=reflow,
    per_calls=False,
)
