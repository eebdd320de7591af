"""ArcFlow itself, and what it shares with all who match a path to the teacher's velocities.

Its rivals of this kind differ in one thing: what path a call describes. Where that path spans the step, its reading
needs to know where the step ends, which `Method.read` is not told. Then the objective and the sampler, who know the
step grid, read it themselves (`laid`). Source: arXiv 2602.09014.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from arcflow.backbone import Cond
from arcflow.baselines.method import Method, Objective, Sampler, Training, Turn, along_arcs
from arcflow.config import Distill
from arcflow.momentum import Mixture, Policy
from arcflow.objective import Part, distill
from arcflow.rollout import Student, Teacher

LED = 0.2
"""Share of the budget in which the teacher's part of the walk falls from 1 to 0: 2000 of 10 000 iterations (FLUX)."""

Lay = Callable[[Mixture, Tensor, Tensor, Distill], Policy]
"""(what the head said, state, noise level, step grid) -> the path over the step."""


def as_it_is(mixture: Mixture, x: Tensor, sigma: Tensor, config: Distill) -> Policy:
    """The mixture is a path already."""
    return mixture


def matching(
    config: Distill, training: Training, *, lay: Lay = as_it_is, modes_drop: bool = True, led: float = LED
) -> Objective:
    """ArcFlow's objective for the path that `lay` makes of the head's output. Without `modes_drop` the copy that walks
    to the states is whole, for paths that are not made of modes."""
    config = replace(config, mode_dropout=config.mode_dropout if modes_drop else 0.0)

    def objective(student: Student, teacher: Teacher, x: Tensor, cond: Cond, turn: Turn) -> Iterator[Part]:
        ratio = max(0.0, 1 - turn.done / led)
        walker = laid(student, lay, config)
        return distill(walker, teacher, x, cond, config=config, ratio=ratio, generator=turn.generator)

    return objective


def laid(student: Student, lay: Lay, config: Distill) -> Student:
    """The student whose paths are those that `lay` makes of what the head said."""
    return lambda x, sigma, cond: lay(cast(Mixture, student(x, sigma, cond)), x, sigma, config)


def along(lay: Lay) -> Sampler:
    """Every step to its end by the path that `lay` makes of what the head said."""

    def sample(
        student: Student, x: Tensor, cond: Cond, steps: int, config: Distill, generator: torch.Generator
    ) -> Tensor:
        config = replace(config, steps=steps, also_steps=())
        return along_arcs(laid(student, lay, config), x, cond, steps, config, generator)

    return sample


METHOD = Method(name="arcflow", title="ArcFlow", paper="2602.09014", modes=16, objective=matching)
