"""Walking: the teacher by Euler steps, the student along its arcs, and both in turn to the training states.

Everything above the model sees two callables, `teacher(x, sigma, cond) -> u` and `student(x, sigma, cond) -> Policy`,
so every function here runs on an analytic toy as well as on a 12 B transformer. The state moves against the velocity:
sigma falls from 1 (noise) to 0 (image), so x(b) = x(a) + (sigma_b - sigma_a) u for Euler and x(b) = x(a) -
displacement(a, b) for a policy. Raw time tau is uniform; a schedule is drawn in tau and turned into sigma once, in
float64. Source: arXiv 2602.09014, section 4 and the code released with it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.config import Distill, Solver, Spread
from arcflow.distillation.policy import Policy, Student, Teacher, level
from arcflow.families.conditioning import Cond, against, beside, repeat
from arcflow.path import Segment, column, segments, shift_sigma, step_grid
from arcflow.system.seeds import Draws, uniform


def sampler_grid(steps: int, config: Distill) -> Float[Tensor, " points"]:
    """Noise levels that a student of this configuration visits in this number of calls."""
    return step_grid(steps, config.shift, config.final_step_scale)


def guided(teacher: Teacher, negative: Cond, scale: float | Tensor) -> Teacher:
    """The teacher under true guidance, u = n + scale (p - n), in float32; `negative` is a batch of one, whatever the
    size of its image and its guidance, and gives way to what samples have of their own (`conditioning.against`). Both
    prompts go through the network in one call where their texts are equally long; padding would cost a mask, which
    fused attention does not like."""

    def velocity(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        own = {name: value for name, value in cond.items() if name.startswith("img_") or name == "guidance"}
        empty = (against(cond) or repeat(negative, len(x))) | own
        if all(empty[name].shape == value.shape for name, value in cond.items()):
            both = teacher(torch.cat([x, x]), torch.cat([sigma, sigma]), beside(empty, cond))
            without, wanted = both.float().chunk(2)
        else:
            without, wanted = teacher(x, sigma, empty).float(), teacher(x, sigma, cond).float()
        return torch.lerp(without, wanted, scale)

    return velocity


@torch.no_grad()
def euler(
    teacher: Teacher,
    x: Float[Tensor, "batch *rest"],
    cond: Cond,
    sigmas: Float[Tensor, " points"],
    trace: bool = False,
) -> Float[Tensor, "*trace_batch_rest"]:
    """End of the teacher's Euler path over `sigmas`; with `trace` every point of it, the start included."""
    return _walk(lambda x, here, there: x + (there - here) * teacher(x, level(here, x), cond), x, sigmas, trace)


@torch.no_grad()
def arcs(
    student: Student,
    x: Float[Tensor, "batch *rest"],
    cond: Cond,
    sigmas: Float[Tensor, " points"],
    trace: bool = False,
) -> Float[Tensor, "*trace_batch_rest"]:
    """End of the student's path over `sigmas`, one call per step, each walked in closed form."""

    def step(x: Tensor, here: float, there: float) -> Tensor:
        return x - student(x, level(here, x), cond).at(x).displacement(0.0, here - there)

    return _walk(step, x, sigmas, trace)


def _walk(step: Callable[[Tensor, float, float], Tensor], x: Tensor, sigmas: Tensor, trace: bool) -> Tensor:
    points = [x]
    for here, there in pairwise(sigmas.tolist()):
        x = step(x, here, there)
        if trace:
            points.append(x)
    return torch.stack(points) if trace else x


@dataclass(frozen=True)
class Schedule:
    """When the teacher is asked (`tau`) and until when its velocity is followed (`tau_next`); float64 on the CPU."""

    segment: Segment
    tau: Float[Tensor, "states batch"]
    tau_next: Float[Tensor, "states batch"]


def schedule(
    segment: Segment,
    batch: int,
    *,
    states: int,
    window: float,
    ratio: float,
    generator: Draws,
    spread: Spread = "uniform",
) -> Schedule:
    """Random times of a segment's states: a share `ratio` of the way is the teacher's, the last `window` is free.

    Between sorted uniform times lie long steps, and the teacher's Euler path over them is not its own; `stratified`
    times are one in each of as many equal parts, `systematic` ones all at the same place in theirs."""

    def uniforms(count: int, parts: int) -> Float[Tensor, "batch count"]:
        drawn = uniform((batch, count), generator).cpu().double()
        if spread == "uniform":
            return drawn.sort(-1).values
        if spread == "systematic":
            drawn = drawn[:, :1]
        centers = (torch.arange(count, dtype=torch.float64) + (parts - count + 1) / 2) / parts
        return centers + (drawn - 0.5) / parts

    room = max(segment.length - window, 0.0)
    zeros, ones = torch.zeros(batch, 1, dtype=torch.float64), torch.ones(batch, 1, dtype=torch.float64)
    by_student = (1 - ratio) * room * torch.cat([zeros, uniforms(states, states)], -1)
    by_teacher = ratio * room * torch.cat([zeros, uniforms(states - 1, states), ones], -1)
    return Schedule(
        segment=segment,
        tau=(segment.tau_src - by_student[:, 1:] - by_teacher[:, :-1]).T,
        tau_next=(segment.tau_src - by_student[:, 1:] - by_teacher[:, 1:]).T,
    )


@torch.no_grad()
def visit(
    roll: Policy | None,
    teacher: Teacher,
    x: Float[Tensor, "batch *rest"],
    cond: Cond,
    times: Schedule,
    shift: float,
    solver: Solver = "euler",
) -> tuple[Float[Tensor, "states batch *rest"], Float[Tensor, "states batch *rest"], Float[Tensor, "batch *rest"]]:
    """The states of a segment, the teacher's velocity at every one, and where the walk arrives at the segment's end.

    Between two states the walk follows `roll` and then the teacher, from its second velocity on with their slope if
    the solver is "adams" (two-step Adams-Bashforth). If the teacher has no share in the walk, all states are known at
    once, and it is asked for half of them in a call: the student's graph stands beside that, and all in one would hold
    more at a time than the backward pass. `roll` is None where all of the walk is the teacher's.
    """
    sigma = shift_sigma(times.tau, shift).to(x)
    starts, ends = (s.to(x) for s in (left_behind(times.tau, times, shift), left_behind(times.tau_next, times, shift)))
    last = span(times, shift)
    if roll is not None and torch.equal(times.tau, times.tau_next):
        path = roll.at(x)
        states = torch.stack([x - path.displacement(0.0, start) for start in starts])
        halves = zip(states.chunk(2), sigma.chunk(2), strict=True)
        targets = [teacher(z.flatten(0, 1), s.flatten(), repeat(cond, len(s))).unflatten(0, s.shape) for z, s in halves]
        return states, torch.cat(targets), x - path.displacement(0.0, last)
    states, targets, here = [], [], torch.zeros_like(starts[0])
    for i in range(len(sigma)):
        x = _along(roll, x, here, starts[i])
        u = teacher(x, sigma[i], cond)
        states.append(x)
        step = column(ends[i] - starts[i], x)
        x = x - step * u
        if solver == "adams" and i:
            x = x - step.square() / 2 * (u - targets[-1]) / column(starts[i] - starts[i - 1], x)
        targets.append(u)
        here = ends[i]
    return torch.stack(states), torch.stack(targets), _along(roll, x, here, last)


def _along(roll: Policy | None, x: Tensor, a: Tensor, b: float | Tensor) -> Tensor:
    return x if roll is None else x - roll.at(x).displacement(a, b)


def legs(
    teacher: Teacher, x: Float[Tensor, "batch *rest"], cond: Cond, config: Distill, generator: Draws
) -> Iterator[tuple[Float[Tensor, "batch *rest"], float]]:
    """The teacher's walk of a training from noise `x`, every segment walked to its end by the teacher alone: of each
    the state where it ends, and the noise level that it leaves behind."""
    for segment in segments(config.steps, config.final_step_scale):
        times = schedule(
            segment,
            len(x),
            states=config.states,
            window=0.0,
            ratio=1.0,
            generator=generator,
            spread=config.spread,
        )
        *_, x = visit(None, teacher, x, cond, times, config.shift, config.solver)
        yield x, span(times, config.shift)


def walked(
    teacher: Teacher, x: Float[Tensor, "batch *rest"], cond: Cond, config: Distill, generator: Draws
) -> Float[Tensor, "batch *rest"]:
    """Where the teacher's walk of a training arrives from noise `x`. A student that learns from this walk comes no
    nearer to the teacher's many steps than it does."""
    *_, (end, _) = legs(teacher, x, cond, config, generator)
    return end


def left_behind(tau: Float[Tensor, "*any"], times: Schedule, shift: float) -> Float[Tensor, "*any"]:
    """Noise level left behind since the call, `s`, at raw times of a segment."""
    return shift_sigma(times.segment.tau_src, shift) - shift_sigma(tau, shift)


def span(times: Schedule, shift: float) -> float:
    """The noise level that a segment's step leaves behind."""
    return float(left_behind(torch.tensor(times.segment.tau_dst, dtype=times.tau.dtype), times, shift))
