"""ArcFlow distillation: the student's arcs are matched to the teacher's velocities, segment by segment.

A segment is the piece of the path that one network call has to cover. The student is called at its start and gives a
whole arc; a copy without gradient, some modes left out, walks to N random states; the teacher is asked there; and the
arc's mean velocity over a short window after each state is pulled to the answer: loss = L / N sum_i 30 * 0.5 * mean
(ubar_i - u_i)^2, L the length of the segment in raw time. The next segment starts where the copy ends (or the arc, see
`handover`). No gradient crosses a segment, so each one is yielded as a `Part` for a backward pass of its own, which
frees its graph before the next call. Source: arXiv 2602.09014, Algorithm 1, with the window of the released code.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from arcflow.backbone import Cond
from arcflow.config import Distill
from arcflow.path import segments, shift_sigma
from arcflow.rollout import Arc, Schedule, Student, Teacher, left_behind, schedule, visit

LOSS_SCALE = 30.0
SUBSTEPS = 128


@dataclass(frozen=True)
class Part:
    """The loss of one segment, ready for `backward()`, and numbers for the log that hold no graph."""

    loss: Float[Tensor, ""]
    logs: dict[str, Tensor]


class Droppable(Arc, Protocol):
    """A policy made of modes. One without them is distilled with `mode_dropout` 0."""

    def drop_modes(self, p: float, generator: Generator | None = None) -> Arc: ...


def teacher_ratio(iteration: int, decay: int) -> float:
    """The teacher's share in the walk to the states: from 1 to 0 over the first `decay` iterations."""
    return 1.0 - min(iteration, decay) / decay if decay else 0.0


def distill(
    student: Student,
    teacher: Teacher,
    x: Float[Tensor, "batch *rest"],
    cond: Cond,
    *,
    config: Distill,
    ratio: float,
    generator: Generator,
) -> Iterator[Part]:
    """One part per segment, from noise `x` at sigma 1. Call `backward` on a part before asking for the next.

    Logs: `loss` as it is and `distance`, the mean squared error of the velocity without any weight.
    """
    window = config.window / SUBSTEPS
    for segment in segments(config.steps, config.final_step_scale):
        sigma_src = float(shift_sigma(segment.tau_src, config.shift))
        arc = student(x, torch.full((len(x),), sigma_src, dtype=x.dtype, device=x.device), cond)
        roll = arc.detach()
        if config.mode_dropout:
            roll = cast(Droppable, roll).drop_modes(config.mode_dropout, generator)
        times = schedule(
            segment,
            len(x),
            states=config.states,
            window=window,
            ratio=ratio,
            generator=generator,
            spread=config.spread,
        )
        start = x
        targets, x = visit(roll, teacher, x, cond, times, config.shift, config.solver)
        if config.handover == "student":
            x = start - arc.detach().displacement(0.0, sigma_src - float(shift_sigma(segment.tau_dst, config.shift)))
        error = velocity_error(arc, targets, times, window=window, shift=config.shift)
        loss = segment.length * LOSS_SCALE * 0.5 * error
        del arc  # the caller's backward pass must be able to free it
        yield Part(loss, {"loss": loss.detach(), "distance": error.detach()})


def velocity_error(
    arc: Arc, targets: Float[Tensor, "states batch *rest"], times: Schedule, *, window: float, shift: float
) -> Float[Tensor, ""]:
    """Mean squared difference of the arc's mean velocities after the states and the teacher's at them."""
    a = left_behind(times.tau, times, shift).to(targets)
    b = left_behind(matching_end(times, window), times, shift).to(targets)
    errors = [(arc.mean_velocity(a[i], b[i]) - target).square().mean() for i, target in enumerate(targets)]
    return torch.stack(errors).mean()


def matching_end(times: Schedule, window: float) -> Float[Tensor, "states batch"]:
    """Raw time at which the matching interval of each state ends, never beyond the segment.

    An interval of less than two sub-steps is made empty: the mean velocity over it is then the instantaneous one.
    """
    end = (times.tau_next - window).clamp(min=times.segment.tau_dst)
    short = torch.round((times.tau - end) * SUBSTEPS) < 2
    return torch.where(short, times.tau, end)
