"""A warm start: before it has learned anything, the student hears better noise levels than it is told.

A step of a new student follows the teacher's velocity at its start. What it has to cover is the mean velocity over the
step, and to that the teacher is nearer if it is told, at the same state, a noise level further down (as the midpoint
rule asks in the middle of a step). Which one is fitted on a batch (`nearest_levels`).

A network hears its noise level through one Linear, the first of its time embedding. For n noise levels with inputs E of
that Linear (a row each), and inputs T at the levels it is to hear instead,

    (W + D) E^T = W T^T,        D = W (T - E)^T (E^T)^+

is a change of rank n, so a LoRA takes it as it is, exactly, and nothing at sampling knows of it: the student is still
the base with a LoRA, under the same scheduler (docs/math.md, "A warm start").
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from arcflow.config import Distill
from arcflow.distillation.policy import Student, Teacher, level
from arcflow.distillation.walk import legs, span
from arcflow.families.conditioning import Cond, rows
from arcflow.families.weights import dense
from arcflow.path import shift_sigma
from arcflow.student.layers import LowRank
from arcflow.student.places import base_linear
from arcflow.student.state import at_rest, lora_layers
from arcflow.system.processes import Ranks, local, shared_like, whole
from arcflow.system.seeds import Draws

SHARES = torch.linspace(0.0, 0.5, 9, dtype=torch.float64)
"""Where levels are tried: shares of the step, from its start to its middle."""

CLOSE = 0.1
"""How much of the change a rewritten network may miss. It is exact but for the rounding of a short dtype; what misses
more hears the time elsewhere too."""

Levels = list[tuple[float, float]]
"""Of each step, the noise level at its start and the one to hear instead."""


def warm_start(
    net: nn.Module,
    student: Student,
    teacher: Teacher,
    x: Float[Tensor, "batch *rest"],
    cond: Cond,
    *,
    config: Distill,
    generator: Draws,
    ranks: Ranks | None = None,
) -> Levels:
    """Let a new student on `net`, in place, hear at the start of each of its steps the noise level that is best there.

    The levels are fitted on noise `x` with its conditioning; several processes fit on all that they have. It costs one
    walk of the teacher's and, for each step, nine calls of the student.

    Raises:
        ValueError: the network hears its noise level in no Linear that has a LoRA, or in more than one. Nothing has
            changed then.
    """
    with at_rest(net):
        levels = nearest_levels(student, teacher, x, cond, config=config, generator=generator, ranks=ranks)
        tell(net, student, x[:1], rows(cond, slice(1)), levels)
    return levels


def nearest_levels(
    student: Student,
    teacher: Teacher,
    x: Float[Tensor, "batch *rest"],
    cond: Cond,
    *,
    config: Distill,
    generator: Draws,
    ranks: Ranks | None = None,
) -> Levels:
    """For each step the noise level at which the student's velocity, at the state where the step starts, has the least
    mean squared difference to the mean velocity of the teacher's walk over the step."""
    found: Levels = []
    for times, start, end in legs(teacher, x, cond, config, generator):
        sigma, length = float(shift_sigma(times.segment.tau_src, config.shift)), span(times, config.shift)
        mean = (start - end) / length
        tried = (sigma - length * SHARES).tolist()
        said = (student(start, level(one, start), cond).velocity(0.0) for one in tried)
        errors = {str(i): float((velocity - mean).square().mean()) for i, velocity in enumerate(said)}
        errors = ranks.mean(errors) if ranks else errors
        found.append((sigma, lowest(tried, list(errors.values()))))
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


def tell(net: nn.Module, student: Student, x: Float[Tensor, "batch *rest"], cond: Cond, levels: Levels) -> None:
    """Rewrite a LoRA of the student on `net` so that at the first level of each pair it hears the second.

    Raises:
        ValueError: no LoRA can do that; the student is as it was.
    """
    starts, heard = zip(*levels, strict=True)
    if starts == heard:
        return
    with inputs_of(net, _outside_blocks(net)) as inputs:
        before, wanted = (
            torch.stack([student(x, level(one, x), cond).velocity(0.0) for one in row]) for row in (starts, heard)
        )
    name = _hears_time(inputs, len(levels))
    low = lora_layers(net)[name] if name else None
    if name is None or low is None or len(low.down) < len(levels):
        raise ValueError(_elsewhere(net, "hears its noise level in no Linear with a LoRA of enough rank"))

    kept = [local(p.detach()).clone() for p in (low.down, low.up)]
    said, told = torch.stack([row for row in inputs[name] if row is not None]).double().cpu().chunk(2)
    _write(low, dense(base_linear(net, name)).weight.double().cpu(), said, told)
    now = torch.stack([student(x, level(one, x), cond).velocity(0.0) for one in starts])
    if not (now - wanted).norm() <= CLOSE * (wanted - before).norm():
        for parameter, value in zip((low.down, low.up), kept, strict=True):
            local(parameter.detach()).copy_(value)
        raise ValueError(_elsewhere(net, f"hears its noise level elsewhere than in {name} too"))


def _write(low: LowRank, weight: Tensor, said: Float[Tensor, "levels width"], told: Tensor) -> None:
    """The change of the module's formula, shared out evenly between the two factors of the LoRA's first rows."""
    change = weight @ (told - said).T @ torch.linalg.pinv(said.T)
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    count = len(said)
    sides = s[:count].sqrt()
    down, up = low.down.detach(), low.up.detach()  # of which a process may hold its part alone
    new_down, new_up = (whole(p).clone() for p in (down, up))
    new_down[:count] = (sides[:, None] * v[:count]).to(new_down)
    new_up[:, :count] = (u[:, :count] * sides / low.scale).to(new_up)
    local(down).copy_(local(shared_like(new_down, down)))
    local(up).copy_(local(shared_like(new_up, up)))


@contextmanager
def inputs_of(net: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor | None]]]:
    """What Linears are given, call by call, in the order in which they are called first: the row that all rows are, or
    None where rows differ."""
    seen: dict[str, list[Tensor | None]] = {}

    def note(name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        lines = given[0].detach().flatten(0, -2)
        seen.setdefault(name, []).append(lines[0].clone() if (lines == lines[0]).all() else None)

    hooks = [base_linear(net, name).register_forward_pre_hook(partial(note, name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _outside_blocks(net: nn.Module) -> list[str]:
    """Linears with a LoRA that are in none of the repeated blocks."""
    return [
        name for name in lora_layers(net) if not isinstance(net.get_submodule(name.partition(".")[0]), nn.ModuleList)
    ]


def _hears_time(inputs: dict[str, list[Tensor | None]], levels: int) -> str | None:
    """The first Linear whose input depends on the noise level, and on nothing that differs from sample to sample."""
    for name, given in inputs.items():
        alike = [row for row in given if row is not None]
        if len(alike) == len(given) == 2 * levels and any((row != alike[0]).any() for row in alike):
            return name
    return None


def _elsewhere(net: nn.Module, where: str) -> str:
    return (
        f"this {type(net).__name__} {where}, so the student cannot start warm: expected a LoRA on the time embedding's "
        f"first Linear (model.targets) of a rank of distill.steps or more; or set distill.warm_start to False"
    )
