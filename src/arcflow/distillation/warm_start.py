"""A warm start: before it has learned anything, the student hears better noise levels than it is told.

A step of a new student follows the teacher's velocity at its start. What it has to cover is the mean velocity over the
step, and to that the teacher is nearer if it is told, at the same state, a noise level further down (as the midpoint
rule asks in the middle of a step). Which one is fitted on a batch, step by step (`nearest_levels`).

A network hears its noise level through one Linear, the first of its time embedding. For n noise levels with inputs E
(a row each) and outputs Y of that Linear, and outputs Z at the levels that it is to hear instead,

    D E^T = (Z - Y)^T,        D = (Z - Y)^T (E^T)^+

is a change of rank n, so a LoRA takes it as it is, exactly, and nothing at sampling knows of it: the student is still
the base with a LoRA, under the same scheduler (docs/math.md, eqs. 16 and 17).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from arcflow.config import Distill
from arcflow.distillation.policy import Student, Teacher, level
from arcflow.distillation.walk import legs, sampler_grid
from arcflow.families.conditioning import Cond
from arcflow.families.weights import compute_dtype
from arcflow.student.layers import LowRank
from arcflow.student.state import lora_layers, state_of
from arcflow.system.processes import Ranks, local, shared_like, whole
from arcflow.system.seeds import Draws

SHARES = torch.linspace(0.0, 0.5, 9, dtype=torch.float64)
"""Where levels are tried: shares of the step, from its start to its middle."""

CLOSE = 0.1
"""How much of the change a rewritten network may miss, beside its dtype's rounding. What misses more hears the time
elsewhere too."""

Levels = list[tuple[float, float]]
"""Of each step, the noise level at its start and the one to hear instead."""


def tried(config: Distill) -> Float[Tensor, "steps tried"]:
    """The noise levels that are tried, a row for each step of the student, the level at its start first."""
    grid = sampler_grid(config.steps, config).double()
    return grid[:-1, None] - (grid[:-1] - grid[1:])[:, None] * SHARES


@dataclass(frozen=True)
class Piece:
    """Samples that a start is fitted on."""

    share: float
    """Of all that it is fitted on."""
    x: Float[Tensor, "batch *rest"]
    """Noise."""
    cond: Cond
    draws: Draws


@torch.no_grad()
def nearest_levels(
    student: Student, teacher: Teacher, pieces: Sequence[Piece], config: Distill, ranks: Ranks | None = None
) -> Levels:
    """For each step, at the states that the steps before have led to, the noise level at which the student's velocity
    has the least mean squared difference to the way to where the teacher's walk is at the end of the step: so a step
    sets right what those before it missed.

    Processes fit on all that they have. It costs one walk of the teacher's, and ten calls of the student a step.
    """
    walks = [legs(teacher, piece.x, piece.cond, config, piece.draws) for piece in pieces]
    states = [piece.x for piece in pieces]
    found: Levels = []
    for levels in tried(config).tolist():
        errors = dict.fromkeys(map(str, levels), 0.0)
        length = 0.0
        for piece, x, walk in zip(pieces, states, walks, strict=True):
            end, length = next(walk)
            way = (x - end) / length
            for one in levels:
                said = student(x, level(one, x), piece.cond).velocity(0.0)
                errors[str(one)] += piece.share * float((said - way).square().mean())
        if ranks:
            errors = ranks.mean(errors)
        heard = lowest(levels, list(errors.values()))
        found.append((levels[0], heard))
        states = [
            x - length * student(x, level(heard, x), piece.cond).velocity(0.0)
            for piece, x in zip(pieces, states, strict=True)
        ]
    return found


def lowest(points: Sequence[float], values: Sequence[float]) -> float:
    """Where the parabola through the least of evenly spaced values and its two neighbors is lowest; at an end of the
    row the end itself."""
    i = min(range(len(values)), key=values.__getitem__)
    if i in (0, len(values) - 1):
        return points[i]
    before, least, after = values[i - 1 : i + 2]
    bend = before - 2 * least + after
    return points[i] + (points[i + 1] - points[i]) * (before - after) / (2 * bend) if bend > 0 else points[i]


@torch.no_grad()
def tell(net: nn.Module, student: Student, x: Float[Tensor, "batch *rest"], cond: Cond, levels: Levels) -> None:
    """Rewrite a LoRA of the new student on `net` so that at the first level of each pair it hears the second. One
    sample is enough; neither dropout nor gradient may be at work.

    Raises:
        ValueError: no LoRA can do that; the student is as it was.
    """
    starts, heard = ([pair[i] for pair in levels] for i in (0, 1))
    if starts == heard:
        return

    def velocities(row: list[float]) -> Tensor:
        return torch.stack([student(x, level(one, x), cond).velocity(0.0) for one in row])

    with calls_of(net, _outside_blocks(net)) as calls:
        before, wanted = velocities(starts), velocities(heard)
    name = _hears_time(calls, 2 * len(levels))
    if name is None or len(lora_layers(net)[name].down) < len(levels):
        raise ValueError(_elsewhere(net, "hears its noise level in no Linear with a LoRA of enough rank"))

    low = lora_layers(net)[name]
    kept = [local(p.detach()).clone() for p in (low.down, low.up)]
    _write(low, calls[name][: len(levels)], calls[name][len(levels) :])
    rounding = torch.finfo(compute_dtype(net, state_of(net).family)).eps * wanted.norm()
    if not (velocities(starts) - wanted).norm() <= CLOSE * (wanted - before).norm() + rounding:
        for parameter, value in zip((low.down, low.up), kept, strict=True):
            local(parameter.detach()).copy_(value)
        raise ValueError(_elsewhere(net, f"hears its noise level elsewhere than in {name} too"))


@dataclass(frozen=True)
class LinearCall:
    """What a Linear was given, and what it gave: the row that all rows are."""

    given: Float[Tensor, " features"]
    gave: Float[Tensor, " width"]
    alike: bool
    """Whether all rows are that one."""


def _write(low: LowRank, at: Sequence[LinearCall], instead: Sequence[LinearCall]) -> None:
    """The change of the module's formula, shared out evenly between the two factors of the LoRA's first rows."""
    given = torch.stack([call.given for call in at])
    moved = torch.stack([there.gave - here.gave for here, there in zip(at, instead, strict=True)])
    u, s, v = torch.linalg.svd(moved.T @ torch.linalg.pinv(given.T), full_matrices=False)
    count = len(at)
    sides = s[:count].sqrt()
    # A process may hold its part of each factor alone.
    down, up = low.down.detach(), low.up.detach()
    new_down, new_up = whole(down).clone(), whole(up).clone()
    new_down[:count] = (sides[:, None] * v[:count]).to(new_down)
    new_up[:, :count] = (u[:, :count] * sides / low.scale).to(new_up)
    local(down).copy_(local(shared_like(new_down, down)))
    local(up).copy_(local(shared_like(new_up, up)))


@contextmanager
def calls_of(net: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[LinearCall]]]:
    """The calls of Linears, a user's LoRA on them included, in the order in which they are made first."""
    calls: dict[str, list[LinearCall]] = {}

    def note(name: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        given, gave = (rows.detach().flatten(0, -2).double().cpu() for rows in (arguments[0], output))
        calls.setdefault(name, []).append(LinearCall(given[0], gave[0], bool((given == given[0]).all())))

    hooks = [net.get_submodule(name).register_forward_hook(partial(note, name)) for name in names]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _outside_blocks(net: nn.Module) -> list[str]:
    """Linears with a LoRA that are in none of the repeated blocks."""
    tops = {name: net.get_submodule(name.partition(".")[0]) for name in lora_layers(net)}
    return [name for name, top in tops.items() if not isinstance(top, nn.ModuleList)]


def _hears_time(calls: dict[str, list[LinearCall]], count: int) -> str | None:
    """The first Linear whose input depends on the noise level, and on nothing that differs from sample to sample."""
    for name, made in calls.items():
        depends = any((call.given != made[0].given).any() for call in made)
        if len(made) == count and depends and all(call.alike for call in made):
            return name
    return None


def _elsewhere(net: nn.Module, where: str) -> str:
    return (
        f"this {type(net).__name__} {where}, so the student cannot start warm: expected a LoRA on the time embedding's "
        f"first Linear (model.targets) of a rank of distill.steps or more; or set distill.warm_start to False"
    )
