"""Matching a path to the teacher's velocities: what ArcFlow shares with its rivals of this kind.

They differ in one thing: what path a call describes. That path may span the step, so objective and sampler, who know
the step grid, make it of what the head said (`laid`). Source: arXiv 2602.09014."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import cast

import torch
from torch import Tensor

from arcflow.config import Distill
from arcflow.distillation.kept import Kept, Walks, keeping
from arcflow.distillation.method import Objective, Sampler, Training, Turn, along_arcs
from arcflow.distillation.objective import Part, distill, rehearse, teacher_ratio
from arcflow.distillation.pairs import averaged
from arcflow.distillation.policy import Policy, Student, Teacher
from arcflow.families.conditioning import Cond
from arcflow.momentum import Mixture

Lay = Callable[[Mixture, Tensor, Tensor, Distill], Policy]
"""(what the head said, state, noise level, step grid) -> the path over the step."""


def unchanged(mixture: Mixture, x: Tensor, sigma: Tensor, config: Distill) -> Policy:
    """The mixture is a path already."""
    return mixture


def matching(config: Distill, training: Training, *, lay: Lay = unchanged, modes_drop: bool = True) -> Objective:
    """ArcFlow's objective for the path that `lay` makes of the head's output. Without `modes_drop` the copy that walks
    to the states is whole, for paths that are not made of modes. The teacher's share follows `config.hold` and
    `config.decay`, in parts of the budget."""
    config = replace(config, mode_dropout=config.mode_dropout if modes_drop else 0.0)
    kept = Walks(config)
    turns = count()

    def objective(student: Student, teacher: Teacher, x: Tensor, cond: Cond, turn: Turn) -> Iterator[Part]:
        ratio = teacher_ratio(turn.part, config.decay, config.hold)
        walker = laid(student, lay, config)
        if ratio == 1 and next(turns) % config.reuse:
            for piece in kept.draw(turn.generator):
                piece = piece.to(x.device)
                parts = rehearse(walker, piece.walks, piece.cond, config=config)
                logs = {name: torch.stack([part.logs[name] for part in parts]).sum() for name in parts[0].logs}
                yield Part(torch.stack([part.loss for part in parts]).sum(), logs)
            return

        average = averaged(training.net, training.average, walker)
        made = list[Kept]()
        parts = distill(walker, teacher, x, cond, config=config, ratio=ratio, generator=turn.generator, average=average)
        yield from keeping(parts, cond, made)
        if ratio == 1 and config.reuse > 1:
            kept.add(made)

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
