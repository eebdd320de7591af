"""Latent consistency distillation: from everywhere on a path of the teacher the network sees the same image.

f(x, sigma) = x - sigma u_net(x, sigma) is the image at the end of the path through x; f(x, 0) = x whatever the
network. It is the same at both ends of a piece of the path, here one of `INTERVALS` Euler steps of the teacher:

    x_there = x_here + (sigma_there - sigma_here) u_teacher(x_here)
    loss    = mean h(f(x_here, sigma_here) - f_target(x_there, sigma_there)),    h(e) = sqrt(e^2 + c^2) - c

The target is a running average of the network. A sampler asks for the image, noises it afresh to the next level,
and asks again: with two calls and more it ends where the fresh noise takes it, not where the teacher's path ends.

Differs from the paper: x_here are images that the teacher made of noise, noised afresh, not given ones; guidance is
the teacher's own, not a range that the student is told; f needs no skip weights to have its boundary, since the network
tells a velocity. Sources: arXiv 2310.04378, algorithm 1; 2303.01469, algorithm 1 (sampler).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from arcflow.config import Distill
from arcflow.distillation.method import Method, Objective, Training, Turn
from arcflow.distillation.objective import Part
from arcflow.distillation.pairs import Pairs, as_target
from arcflow.distillation.policy import Student, Teacher
from arcflow.distillation.renoise import clean, sample_renoised
from arcflow.families.conditioning import Cond
from arcflow.path import column, step_grid
from arcflow.runs.ema import Ema
from arcflow.system.seeds import uniform

INTERVALS = 50
"""Steps of the solver from noise to image: the paper's 20 out of 1000 in one."""

KEEP = 0.95
"""Share of the target that an iteration keeps, as in the paper; the trainer's average is too slow to be a target."""

HUBER = 1e-3
"""c, below which an error counts squared, as in the authors' training: all but an absolute error."""


def consistency(config: Distill, training: Training) -> Objective:
    """The same image before and after a step of the teacher."""
    pairs, target = Pairs(config.shift), Ema(training.average.parameters)
    sigmas = step_grid(INTERVALS, config.shift)

    def objective(student: Student, teacher: Teacher, x: Tensor, cond: Cond, turn: Turn) -> Iterator[Part]:
        target.update(KEEP)
        _, x0, cond = pairs.draw(teacher, x, cond, turn.generator)
        place = (uniform((len(x),), turn.generator) * INTERVALS).long().cpu()
        here, there = sigmas[place].to(x), sigmas[place + 1].to(x)
        noisy = torch.lerp(x0, x, column(here, x))  # the iteration's noise is fresh to these images
        onward = noisy - column(here - there, x) * teacher(noisy, here, cond)
        with as_target(training.net, target):
            wanted = clean(student, onward, there, cond)
        error = clean(student, noisy, here, cond) - wanted
        loss = ((error.square() + HUBER**2).sqrt() - HUBER).mean()
        yield Part(loss, {"loss": loss.detach(), "distance": error.detach().square().mean()})

    return objective


METHOD = Method(
    name="consistency",
    title="Latent consistency (LCM)",
    paper="2310.04378",
    modes=1,
    objective=consistency,
    sample=sample_renoised,
    per_calls=False,
)
