"""Walks that are kept, and learned from again.

Asking the teacher is most of what an iteration costs. As long as its share of the walk is 1, what it says along a
segment does not depend on the student, so a walk can teach again: of `distill.reuse` iterations one asks the teacher,
and the others draw one of the `distill.kept` newest batches. How often pays depends on how many samples a training
has in all; used too often, walks are learned by heart (docs/log.md).

A training that is taken up needs the walks it had: they are tensors of its checkpoints, under names that say whose
they are and where they stand.
"""

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arcflow.config import Distill
from arcflow.distillation.objective import Part, Walk, rehearse
from arcflow.distillation.policy import Student
from arcflow.distillation.walk import Schedule
from arcflow.families.conditioning import Cond, shared
from arcflow.path import segments
from arcflow.system.seeds import Draws, uniform

PREFIX = "walk."
"""Beginning of the names that tensors of walks have in a checkpoint."""

TENSORS = ("x", "targets", "states", "end")
"""Fields of a `Walk` that are tensors; those of its `times` are beside them."""

TIMES = ("tau", "tau_next")

FLAG = ":bool"
"""End of the name of a tensor of truth values, which checkpoints hold as numbers."""


@dataclass(frozen=True)
class Kept:
    """The walks of a micro-batch, one a segment, and its conditioning."""

    walks: list[Walk]
    cond: Cond

    def to(self, device: torch.device | str) -> "Kept":
        """The same on another device."""
        # Times stay on the CPU.
        walks = [replace(walk, **{name: getattr(walk, name).to(device) for name in TENSORS}) for walk in self.walks]
        return Kept(walks, {name: value.to(device) for name, value in self.cond.items()})

    def parts(self, student: Student, config: Distill) -> Iterator[Part]:
        """The loss of each segment, for a backward pass of its own before the next is asked for."""
        for walk in self.walks:
            yield from rehearse(student, [walk], self.cond, config=config)


def keeping(parts: Iterable[Part], cond: Cond, made: list[Kept]) -> Iterator[Part]:
    """The same parts; once they are through, their walks are in `made`."""
    walks = list[Walk]()
    for part in parts:
        walks += [part.walk] if part.walk else []
        yield part
    made.append(Kept(walks, cond))


def asks(step: int, config: Distill) -> bool:
    """Whether iteration `step` asks the teacher, and does not draw a kept walk."""
    return step % config.reuse == 0 or step >= led_until(config)


def asked_before(step: int, config: Distill) -> int:
    """How many iterations before `step` ask the teacher."""
    led = int(min(step, led_until(config)))
    return -(-led // config.reuse) + step - led


def led_until(config: Distill) -> float:
    """The first iteration in which the teacher's share may not be 1 in every segment; infinite if there is none."""
    whole = not config.also_steps and config.led == config.steps
    return math.inf if whole else float(config.hold)


class Walks:
    """The newest batches of walks, each as the micro-batches in which it was made. They lie in the CPU's memory."""

    def __init__(self, config: Distill, name: str = "") -> None:
        """`name` tells those of one process from those of another."""
        self.config, self.prefix = config, f"{PREFIX}{name}."
        self.batches = deque[list[Kept]](maxlen=config.kept)

    def add(self, batch: list[Kept]) -> None:
        """Keep a batch; the oldest goes."""
        self.batches.append([piece.to("cpu") for piece in batch])

    def draw(self, draws: Draws) -> list[Kept]:
        """One of the batches, each as likely as another."""
        return self.batches[int(uniform((1,), draws)[0] * len(self.batches))]

    def size(self, x: Tensor, cond: Cond, batch: int) -> int:
        """Bytes of all that will be kept, of batches of this size; `x` and `cond` are those of some samples."""
        config = self.config
        walk = x[0].nbytes * (2 * config.states + 2)
        text = sum(value[0].nbytes for name, value in cond.items() if not shared(name))
        return config.kept * batch * (max(config.all_steps) * walk + text)

    def tensors(self) -> dict[str, Tensor]:
        """All walks, as tensors of a checkpoint."""
        return {
            f"{self.prefix}{number:05d}.{place:03d}.{name}": value.contiguous()
            for number, batch in enumerate(self.batches)
            for place, piece in enumerate(batch)
            for name, value in _named(piece)
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up the walks of a checkpoint, which are all that begins with `prefix`."""
        found = defaultdict[str, defaultdict[str, dict[str, Tensor]]](lambda: defaultdict(dict))
        for name, value in tensors.items():
            number, place, field = name.removeprefix(self.prefix).split(".", 2)
            found[number][place][field] = value
        self.batches.clear()
        for _, batch in sorted(found.items()):
            self.batches.append([_read(piece, self.config) for _, piece in sorted(batch.items())])


def _named(piece: Kept) -> Iterator[tuple[str, Tensor]]:
    for i, walk in enumerate(piece.walks):
        of = f"{i}-{len(piece.walks)}"
        yield from ((f"{of}.{name}", getattr(walk, name)) for name in TENSORS)
        yield from ((f"{of}.{name}", getattr(walk.times, name)) for name in TIMES)
    for name, value in piece.cond.items():
        yield (f"cond.{name}{FLAG}", value.to(torch.uint8)) if value.dtype == torch.bool else (f"cond.{name}", value)


def _read(tensors: dict[str, Tensor], config: Distill) -> Kept:
    cond: Cond = {}
    by_segment = defaultdict[str, dict[str, Tensor]](dict)
    for name, value in tensors.items():
        group, _, field = name.partition(".")
        if group == "cond":
            cond[field.removesuffix(FLAG)] = value.bool() if field.endswith(FLAG) else value
        else:
            by_segment[group][field] = value
    walks = []
    for group, values in sorted(by_segment.items()):
        i, _, of = group.partition("-")
        segment = segments(int(of), config.final_step_scale)[int(i)]
        times = Schedule(segment, *(values[name] for name in TIMES))
        walks.append(Walk(times=times, **{name: values[name] for name in TENSORS}))
    return Kept(walks, cond)
