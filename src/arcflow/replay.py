"""Walks that are trained on more than once.

The teacher is asked several times per segment, the student once, so an iteration's time is mostly the teacher's. While
the teacher's share is 1 its walk over the first segment does not depend on the student, and over the next ones only
through where they start: what it said stays nearly true for a while. The newest walks are kept by samples and drawn
at random. They are part of a checkpoint, so that a run goes on to the same bits.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from arcflow.objective import Walk
from arcflow.parallel import Ranks
from arcflow.path import Segment
from arcflow.rollout import Schedule

NAMES = ("x", "targets", "tau", "tau_next")


class Replay:
    """The walks of the last few batches; samples are known by their number in the run."""

    def __init__(self, batches: int, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self.batches: deque[dict[str, Tensor]] = deque(maxlen=batches)

    def keep(self, first: int, walks: Sequence[Sequence[Walk]], ranks: Ranks | None = None) -> None:
        """Remember a batch whose first sample has the number `first`: for each segment, the walks of its pieces.
        Every process remembers those of all."""
        new = dict[str, Tensor]()
        for i, pieces in enumerate(walks):
            new[f"x.{i}"] = torch.cat([walk.x for walk in pieces]).cpu()
            for name, part in (
                ("targets", [walk.targets for walk in pieces]),
                ("tau", [walk.times.tau for walk in pieces]),
                ("tau_next", [walk.times.tau_next for walk in pieces]),
            ):
                new[f"{name}.{i}"] = torch.cat(part, 1).transpose(0, 1).cpu()
        new = {name: (ranks or Ranks()).gather(value.contiguous()) for name, value in new.items()}
        self.batches.append(new | {"sample": first + torch.arange(len(new["x.0"]))})

    def draw(self, count: int, generator: Generator, device: torch.device) -> tuple[list[int], list[Walk]]:
        """Numbers of random samples, and their walks over each segment."""
        size = len(self.batches[0]["sample"])
        drawn = torch.randperm(len(self.batches) * size, generator=generator)[:count].tolist()
        rows = {name: torch.stack([self.batches[i // size][name][i % size] for i in drawn]) for name in self.batches[0]}
        walks = []
        for i, segment in enumerate(self.segments):
            x, targets, tau, tau_next = (rows[f"{name}.{i}"] for name in NAMES)
            times = Schedule(segment, tau.transpose(0, 1), tau_next.transpose(0, 1))
            walks.append(Walk(x.to(device), times, targets.transpose(0, 1).to(device)))
        return rows["sample"].tolist(), walks

    def state(self) -> dict[str, Tensor]:
        """Everything kept, for a checkpoint."""
        return {
            name: torch.stack([b[name] for b in self.batches]) for name in (self.batches[0] if self.batches else ())
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""
        self.batches.clear()
        for i in range(len(next(iter(state.values()))) if state else 0):
            self.batches.append({name: value[i] for name, value in state.items()})
