"""Progressive Distillation: a step of the student lands where two steps of its teacher land, stage after stage.

The teacher's Euler walk of 32 steps or more is halved to 16, 8, ... down to the wanted number. In the first stage the
teacher is the frozen one; in each later one the average of what the stage before has learned, asked at the steps it
was trained for. With x the start of the student's step, x'' the end of the two, h the noise level between them,

    loss = mean (u_net(x, sigma) - (x - x'') / h)^2

An image is off by sigma times what the velocity is off by, so on images the weight is 1 / sigma^2: once to twice the
paper's SNR + 1, which is an error of velocities too.

Unlike in the paper, there are no images to noise: noise is walked through the stage by the stage's teacher, and
every point where it lands is trained on, with the same weight. All of its calls are targets, none is spent on the way
alone. The walk starts at 32 steps, not at 1000 and more; the rate does not fall within a stage; network and optimizer
go on from stage to stage. Source: arXiv 2202.00512, algorithm 2.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.config import Distill
from arcflow.distillation.method import Method, Objective, Training, Turn
from arcflow.distillation.objective import Part
from arcflow.distillation.pairs import as_target
from arcflow.distillation.policy import Student, Teacher, level
from arcflow.distillation.walk import euler
from arcflow.families.conditioning import Cond
from arcflow.path import shift_sigma, tau_grid
from arcflow.runs.ema import Ema

START = 32
"""Euler steps of the first stage's teacher, at least: on the small FLUX it is then within 1e-4 of 50 steps, with 16
within 5e-2."""

LONG = 2
"""A stage of a student of so many steps or fewer is twice as long as others, as in the paper."""


def stages(steps: int) -> list[int]:
    """Steps of the student in each stage; the teacher takes twice as many."""
    counts = [steps]
    while 2 * counts[0] < START:
        counts.insert(0, 2 * counts[0])
    return counts


def stage_at(done: float, counts: list[int]) -> int:
    """The stage that trains when a share `done` of the budget is spent."""
    lengths = [2 if steps <= LONG else 1 for steps in counts]
    ends = [sum(lengths[: i + 1]) / sum(lengths) for i in range(len(lengths))]
    return min(sum(done >= end for end in ends), len(counts) - 1)


def fine_grid(parts: int, config: Distill) -> Float[Tensor, " points"]:
    """Noise levels of the sampler's steps, each in so many equal parts of raw time."""
    tau = tau_grid(config.steps, config.final_step_scale)
    inner = torch.lerp(tau[:-1, None], tau[1:, None], torch.arange(parts, dtype=tau.dtype) / parts)
    return shift_sigma(torch.cat([inner.flatten(), tau[-1:]]).float(), config.shift)


def progressive(config: Distill, training: Training) -> Objective:
    """Halving, from the teacher's many steps to `config.steps`."""
    counts, average = stages(config.steps), training.average
    stage, before = 0, Ema({})

    def objective(student: Student, teacher: Teacher, x: Tensor, cond: Cond, turn: Turn) -> Iterator[Part]:
        nonlocal stage, before
        if stage_at(turn.done, counts) > stage:
            stage += 1
            with average.applied():
                before = Ema(average.parameters)

        def two_steps(x: Tensor, sigmas: Tensor) -> Tensor:
            if stage == 0:
                return euler(teacher, x, cond, sigmas)
            with as_target(training.net, before):
                return euler(lambda x, sigma, cond: student(x, sigma, cond).velocity(0.0), x, cond, sigmas)

        steps = counts[stage]
        sigmas = fine_grid(2 * steps // config.steps, config)
        for i in range(0, 2 * steps, 2):
            here, there = float(sigmas[i]), float(sigmas[i + 2])
            end = two_steps(x, sigmas[i : i + 3])
            u = student(x, level(here, x), cond).velocity(0.0)
            error = (u - (x - end) / (here - there)).square().mean()
            loss = error / steps
            yield Part(loss, {"loss": loss.detach(), "distance": error.detach()})
            x = end

    return objective


METHOD = Method(
    name="progressive",
    title="Progressive Distillation",
    paper="2202.00512",
    modes=1,
    objective=progressive,
)
