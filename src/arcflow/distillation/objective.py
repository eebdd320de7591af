"""ArcFlow distillation: the student's arcs are matched to the teacher's velocities, segment by segment.

A segment is the piece of the path that one network call has to cover. The student is called at its start and gives a
whole arc; a copy without gradient, some modes left out, walks to N random states; the teacher is asked there; and the
arc's mean velocity over a short window after each state is pulled to the answer: loss = L / N sum_i 30 * 0.5 * mean
(ubar_i - u_i)^2, L the length of the segment in raw time. The next segment starts where the copy ends (or the arc, see
`handover`). No gradient crosses a segment, so each one is yielded as a `Part` for a backward pass of its own, which
frees its graph before the next call. Source: arXiv 2602.09014, Algorithm 1, with the window of the released code.

With `config.end`, as long as the teacher leads, a share of the loss is the squared difference of the mean velocities
over the whole step, that of the student and that of the walk: where a step ends is what a sampler sees of it, and no
velocities along the way say it as well. Later segments may start where the averaged student arrives (`handover`),
which is where a sampler starts them.

The teacher's walk costs more than the student's call. A part therefore carries its `Walk`, and `rehearse` trains on
kept walks without asking the teacher: with the teacher's share at 1 its velocities do not depend on the student.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow import paper
from arcflow.config import Distill
from arcflow.distillation.policy import Policy, Student, Teacher, level
from arcflow.distillation.walk import Schedule, left_behind, schedule, span, visit
from arcflow.families.conditioning import Cond, repeat
from arcflow.path import column, noised, segments, shift_sigma
from arcflow.system.seeds import Draws

LOSS_SCALE = 30.0

SUBSTEPS = paper.SUBSTEPS


@dataclass(frozen=True)
class Walk:
    """What the teacher said along a segment: from `x`, its velocities at the states of `times`, and these states."""

    x: Float[Tensor, "batch *rest"]
    times: Schedule
    targets: Float[Tensor, "states batch *rest"]
    states: Float[Tensor, "states batch *rest"]
    end: Float[Tensor, "batch *rest"]
    """Where the walk arrives."""


@dataclass(frozen=True)
class Part:
    """The loss of one segment, ready for `backward()`, graph-free numbers for the log, and the walk if there is one."""

    loss: Float[Tensor, ""]
    logs: dict[str, Tensor]
    walk: Walk | None = None


def teacher_ratio(iteration: int | float, decay: int, hold: int = 0) -> float:
    """The teacher's share in the walk to the states: 1 for `hold` iterations, then falling to 0 over `decay`."""
    after = min(max(iteration - hold, 0), decay)
    return 1.0 - after / decay if decay else float(iteration < hold)


def distill(
    student: Student,
    teacher: Teacher,
    x: Float[Tensor, "batch *rest"],
    cond: Cond,
    *,
    config: Distill,
    ratio: float,
    generator: Draws,
    clean: Float[Tensor, "batch *rest"] | None = None,
    average: Student | None = None,
) -> Iterator[Part]:
    """One part per segment, from noise `x` at sigma 1. Call `backward` on a part before asking for the next. With
    `clean` images (data-dependent training) every segment starts from these, noised, not where the last one ended.
    `average` is the student with averaged weights, for the handover of that name; it is called between two parts.

    Logs: `loss` as it is and `distance`, the mean squared error of the velocity without any weight.
    """
    if config.handover == "average" and average is None:
        raise ValueError('distill.handover = "average" needs the averaged student: expected one; pass `average`')
    window, eps = config.window / SUBSTEPS, x
    for i, segment in enumerate(segments(config.steps, config.final_step_scale)):
        sigma_src = float(shift_sigma(segment.tau_src, config.shift))
        x = x if clean is None else noised(clean, eps, sigma_src)
        arc = student(x, level(sigma_src, x), cond)
        roll = arc.detach()
        if config.mode_dropout:
            roll = roll.drop_modes(config.mode_dropout, generator)
        share = 1.0 if i < config.led else ratio
        end = config.end if share == 1 else 0.0
        times = schedule(
            segment,
            len(x),
            states=config.states,
            window=0.0 if end else window,  # the walk is the teacher's to its end
            ratio=share,
            generator=generator,
            spread=config.spread,
        )
        start = x
        states, targets, x = visit(roll, teacher, x, cond, times, config.shift, config.solver)
        walk = Walk(start, times, targets, states, x)
        length = span(times, config.shift)
        if config.handover == "student":
            x = start - arc.detach().at(start).displacement(0.0, length)
        a, b = (ends.to(targets) for ends in matched(times, window=window, shift=config.shift))
        error = velocity_error([arc.at(state) for state in states], targets, a, b).mean()
        missed = end_error(arc.at(start), start, walk.end, level(length, start)).mean() if end else None
        del arc  # the caller's backward pass must be able to free it
        yield _part(error, missed, walk, end)
        if average and config.handover == "average" and i + 1 < config.steps:
            with torch.no_grad():
                x = start - average(start, level(sigma_src, start), cond).at(start).displacement(0.0, length)


def rehearse(student: Student, walks: Sequence[Walk], cond: Cond, *, config: Distill) -> list[Part]:
    """The parts of walks that are known already, one walk per segment, from a single call of the student. Their graph
    is one: sum the losses before `backward`. `cond` is that of one walk's batch."""
    sigmas = [torch.full_like(w.times.tau[0], shift_sigma(w.times.segment.tau_src, config.shift)) for w in walks]
    x, targets = torch.cat([w.x for w in walks]), torch.cat([w.targets for w in walks], 1)
    arc = student(x, torch.cat(sigmas).to(x), repeat(cond, len(walks)))
    between = [matched(w.times, window=config.window / SUBSTEPS, shift=config.shift) for w in walks]
    a, b = (torch.cat(ends, 1).to(targets) for ends in zip(*between, strict=True))
    arcs = [arc.at(state) for state in torch.cat([w.states for w in walks], 1)]
    sizes = [len(w.x) for w in walks]
    errors = velocity_error(arcs, targets, a, b).split(sizes)
    if not config.end:
        return [_part(error.mean(), None, walk, 0.0) for error, walk in zip(errors, walks, strict=True)]
    lengths = torch.cat([level(span(w.times, config.shift), w.x) for w in walks])
    missed = end_error(arc.at(x), x, torch.cat([w.end for w in walks]), lengths).split(sizes)
    parts = zip(errors, missed, walks, strict=True)
    return [_part(error.mean(), miss.mean(), walk, config.end) for error, miss, walk in parts]


def _part(error: Float[Tensor, ""], missed: Float[Tensor, ""] | None, walk: Walk, end: float) -> Part:
    whole = error if missed is None else torch.lerp(error, missed, end)
    loss = walk.times.segment.length * LOSS_SCALE * 0.5 * whole
    return Part(loss, {"loss": loss.detach(), "distance": error.detach()}, walk)


def end_error(
    arc: Policy,
    start: Float[Tensor, "batch *rest"],
    end: Float[Tensor, "batch *rest"],
    length: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Mean squared difference, per sample, of the mean velocities over the whole step: that of the arc, and that of the
    walk from `start` to `end`."""
    walked = (start - end) / column(length, start)
    return (arc.mean_velocity(torch.zeros_like(length), length) - walked).square().flatten(1).mean(1)


def velocity_error(
    arcs: Sequence[Policy],
    targets: Float[Tensor, "states batch *rest"],
    a: Float[Tensor, "states batch"],
    b: Float[Tensor, "states batch"],
) -> Float[Tensor, " batch"]:
    """Mean squared difference, per sample, of the arcs' mean velocities from `a` to `b` and the teacher's at `a`: for
    each state the arc that goes on from there."""
    matches = zip(arcs, targets, a, b, strict=True)
    errors = [(arc.mean_velocity(*ends) - target).square().flatten(1).mean(1) for arc, target, *ends in matches]
    return torch.stack(errors).mean(0)


def matched(
    times: Schedule, *, window: float, shift: float
) -> tuple[Float[Tensor, "states batch"], Float[Tensor, "states batch"]]:
    """The intervals of the matched mean velocities, in noise level left behind since the call."""
    return left_behind(times.tau, times, shift), left_behind(matching_end(times, window), times, shift)


def matching_end(times: Schedule, window: float) -> Float[Tensor, "states batch"]:
    """Raw time at which the matching interval of each state ends, never beyond the segment.

    An interval of less than two sub-steps is made empty: the mean velocity over it is then the instantaneous one.
    """
    end = (times.tau_next - window).clamp(min=times.segment.tau_dst)
    short = torch.round((times.tau - end) * SUBSTEPS) < 2
    return torch.where(short, times.tau, end)
