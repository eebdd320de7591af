"""What a few-step method is, so that all of them can be trained and sampled by the same code.

A method says how many velocities the head has, what is learned in an iteration (`objective`)
and how the trained student samples (`sample`). Network, LoRA, prompts, optimizer, averaging and budget are the same for
all. Student and teacher are the two callables of `distillation.policy`, and count what they cost; the budget of a
training is in forward-equivalents, one sample once through the transformer. A backward pass counts two.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from arcflow.config import PARTS, Distill
from arcflow.distillation.objective import Part
from arcflow.distillation.policy import Student, Teacher
from arcflow.distillation.walk import arcs, sampler_grid
from arcflow.families.conditioning import Cond
from arcflow.runs.ema import Ema
from arcflow.system.seeds import Draws


@dataclass
class Cost:
    """Forward-equivalents spent: samples times 1 for a forward pass, times 3 with the backward pass behind it."""

    spent: int = 0

    def add(self, samples: int, *, backward: bool = False) -> None:
        self.spent += samples * (3 if backward else 1)


@dataclass(frozen=True)
class Training:
    """What a method may use of the training it is in."""

    net: nn.Module
    """The transformer, a student already: its base is frozen."""
    average: Ema
    """The average of the trained weights; `with average.applied()` the network has them."""
    cost: Cost
    """Where calls of networks other than student and teacher are to be counted."""


@dataclass(frozen=True)
class Turn:
    """Where in the training an iteration stands."""

    done: float
    """Share of the budget that is spent, 0 to 1."""
    generator: Draws
    """All randomness of the iteration; one generator, or one for each sample."""

    @property
    def part(self) -> float:
        """The same as `done`, in the unit of a budget's schedules."""
        return self.done * PARTS


@runtime_checkable
class Objective(Protocol):
    """One iteration on noise `x`: losses, each for a backward pass of its own before the next is asked for."""

    def __call__(self, student: Student, teacher: Teacher, x: Tensor, cond: Cond, turn: Turn) -> Iterator[Part]: ...


@runtime_checkable
class Sampler(Protocol):
    """Final latents from noise `x`, in `steps` calls of the student."""

    def __call__(
        self, student: Student, x: Tensor, cond: Cond, steps: int, config: Distill, generator: torch.Generator
    ) -> Tensor: ...


@torch.no_grad()
def along_arcs(
    student: Student, x: Tensor, cond: Cond, steps: int, config: Distill, generator: torch.Generator
) -> Tensor:
    """Every step to its end by the path that the student lays down at its start."""
    return arcs(student, x, cond, sampler_grid(steps, config))


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to few steps."""

    name: str
    """Name of the method on the command line and in file names."""
    title: str
    """Name of the method in tables and plots."""
    paper: str
    """arXiv number; empty for our own."""
    modes: int
    """K of the head; 1 is a plain velocity."""
    objective: Callable[[Distill, Training], Objective]
    """A fresh objective for one training; it may keep what it needs between iterations."""
    sample: Sampler = field(default=along_arcs)
    per_calls: bool = True
    """Whether a training is for one number of calls (`Distill.steps`); else the same student takes any."""
    second_network: bool = False
    """Whether it trains a network beside the student."""
