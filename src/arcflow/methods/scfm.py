"""SCFM: one velocity that is right for long steps too, since two half-steps of its own averages say what it should be.

At a random noise level, and for a step of random length from there,

    first   = u_teacher(x, sigma)  in a share of the samples, else  u_fast(x, sigma)
    second  = u_slow(x - h first, sigma - h)                                    h: the first half of the step
    loss    = mean (u_net(x, sigma) - (h first + h' second) / (h + h'))^2       h': its second half

The network is told no length, so all lengths have to agree on one velocity, which is that of a straight path: short
steps hold it to the teacher, long ones straighten it. `fast` and `slow` are two running averages of the network. There
is no walk; any number of Euler steps may be taken.

Else than in the paper: the images that are noised are the teacher's own, kept and drawn again, not given ones; lengths
are powers of two of 1/128 in raw time, whose halves become unequal in noise level by the shift, which the mean weights;
averages keep less, for budgets of a few hundred iterations. Source: arXiv 2510.17858 (NeurIPS 2025); the split of a
step is that of shortcut models, arXiv 2410.12557.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.config import Distill
from arcflow.distillation.method import Method, Objective, Training, Turn
from arcflow.distillation.objective import Part
from arcflow.distillation.pairs import Pairs, as_target
from arcflow.distillation.policy import Student, Teacher
from arcflow.families.conditioning import Cond, rows
from arcflow.path import column, shift_sigma
from arcflow.runs.ema import Ema
from arcflow.system.seeds import Draws, uniform

HALVINGS = 7
"""Steps are 1, 1/2, ... down to 1/64 of raw time, and their halves 1/2 down to 1/128."""

BY_TEACHER = 0.5
"""Share of the samples whose first half-step is the teacher's."""

FAST, SLOW = 0.9, 0.99
"""Shares of the two averages that an iteration keeps."""


def scfm(config: Distill, training: Training) -> Objective:
    """The mean of two half-steps, one by the teacher or the fast average, one by the slow average."""
    pairs = Pairs(config.shift)
    fast, slow = Ema(training.average.parameters), Ema(training.average.parameters)

    def objective(student: Student, teacher: Teacher, x: Tensor, cond: Cond, turn: Turn) -> Iterator[Part]:
        fast.update(FAST)
        slow.update(SLOW)
        _, x0, cond = pairs.draw(teacher, x, cond, turn.generator)
        here, middle, there = (shift_sigma(tau, config.shift).to(x) for tau in steps(len(x), turn.generator))
        noisy = torch.lerp(x0, x, column(here, x))  # the iteration's noise is fresh to these images

        taught = round(BY_TEACHER * len(x))
        parts = []
        if taught:
            parts.append(teacher(noisy[:taught], here[:taught], rows(cond, slice(taught))))
        if taught < len(x):
            with as_target(training.net, fast):
                own = student(noisy[taught:], here[taught:], rows(cond, slice(taught, len(x))))
                parts.append(own.velocity(0.0))
        first = torch.cat(parts)

        one, other = column(here - middle, x), column(middle - there, x)
        with as_target(training.net, slow):
            second = student(noisy - one * first, middle, cond).velocity(0.0)
        wanted = (one * first + other * second) / (one + other)

        error = (student(noisy, here, cond).velocity(0.0) - wanted).square().mean()
        yield Part(error, {"loss": error.detach(), "distance": error.detach()})

    return objective


def steps(count: int, draws: Draws) -> tuple[Float[Tensor, " count"], Float[Tensor, " count"], Float[Tensor, " count"]]:
    """Raw times of random steps: where each starts, its middle, and where it ends. Lengths are powers of two, and the
    starts are even over what leaves room for the step."""
    length = 0.5 ** (uniform((count,), draws) * HALVINGS).floor()
    start = length + (1 - length) * uniform((count,), draws)
    return start, start - length / 2, start - length


METHOD = Method(
    name="scfm",
    title="SCFM",
    paper="2510.17858",
    modes=1,
    objective=scfm,
    per_calls=False,
)
"""Shortcutting flow matching."""
