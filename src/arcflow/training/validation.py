"""The distance to the teacher while a run goes on.

Mean squared difference between the final latents of the student and those of the teacher's many Euler steps, from the
same noise, on held-out prompts. The teacher's ends are computed once and kept in the run folder, under a key of
everything they depend on.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor

from arcflow.config import Run
from arcflow.data.batches import Size, micro_batches
from arcflow.distillation.policy import Student, Teacher
from arcflow.distillation.walk import arcs, euler, sampler_grid, walked
from arcflow.families.conditioning import Cond, latent_frames, rows
from arcflow.families.network import decode
from arcflow.metrics.motion import motion, strip
from arcflow.path import step_grid
from arcflow.system import files
from arcflow.system.errors import first_line
from arcflow.system.processes import Ranks
from arcflow.system.seeds import seed_of

EULER_STEPS = (2, 4, 8)
"""Plain Euler runs of the teacher that put the distance into proportion."""


class DistanceToTeacher:
    """Distance to the teacher on held-out prompts: mean squared difference of final latents from the same noise."""

    def __init__(
        self,
        config: Run,
        teacher: Teacher,
        x: Tensor,
        cond: Cond,
        cache: Path,
        log: Callable[[str], None],
        ranks: Ranks | None = None,
        contents: str = "",
    ) -> None:
        """`contents` is a digest of the teacher's weights: its ends are never taken for those of another."""
        self.distill, self.ranks, self.count = config.distill, ranks or Ranks(), len(x)
        self.teacher = teacher
        key = _key(config, contents, x, cond)
        mine = self.ranks.share(len(x))  # every process walks its own, and all see all ends
        self.x, self.cond, self.rows = x[mine], rows(cond, mine), mine
        self.frames = latent_frames(cond)
        self.parts = list(micro_batches(len(mine), config.optim))
        known = self.ranks.agree(lambda: _cached(cache, key, log))
        if known is None:
            log(f"teacher: {len(x)} held-out images in {config.data.teacher_steps} steps (once)")
            known = self._teacher_end(teacher, config.data.teacher_steps)
            self.ranks.agree(lambda: _keep(cache, key, known, log))
        self.end = self.latest = known.to(x.device)

    def distance(self, walker: Student) -> dict[str, float]:
        """Distances of the student: `distance` at its own number of steps, `distance_n` at each other one it learns."""
        ends = {steps: self._student_end(walker, steps) for steps in self.distill.all_steps}
        self.latest = ends[self.distill.steps]
        others = {f"distance_{steps}": self._error(ends[steps]) for steps in self.distill.also_steps}
        moved = {"motion": motion(self.latest, self.end, self.frames)} if self.frames > 1 else {}
        return {"distance": self._error(self.latest)} | others | moved

    def known(self) -> dict[str, float]:
        """What puts the distance into proportion: those of plain Euler in few steps, and `walk`, that of the teacher's
        own walk as this training has it, which no student that learns from it can be expected to beat. All processes
        take part."""
        plain = {f"euler_{n}": self._error(self._teacher_end(self.teacher, n)) for n in EULER_STEPS}
        return plain | {"walk": self._error(self._walk_end(self.teacher))}

    def _student_end(self, walker: Student, steps: int) -> Tensor:
        sigmas = sampler_grid(steps, self.distill)
        return self._all([arcs(walker, self.x[p], rows(self.cond, p), sigmas) for p in self.parts])

    def images(self, pipe: DiffusionPipeline, count: int, size: Size) -> UInt8[np.ndarray, "rows columns 3"]:
        """The first held-out images side by side: the teacher's above, below them the student's as last measured. Of a
        video it is a strip of its frames."""
        pairs = [decode(pipe, end[:count], *size) for end in (self.end, self.latest)]
        drawn = [np.concatenate([strip(one) for one in images], 1) for images in pairs]
        return np.concatenate(drawn)

    def _error(self, x: Tensor) -> float:
        return float((x - self.end).square().mean())

    def _teacher_end(self, teacher: Teacher, steps: int) -> Tensor:
        sigmas = step_grid(steps, self.distill.shift)
        return self._all([euler(teacher, self.x[p], rows(self.cond, p), sigmas) for p in self.parts])

    def _walk_end(self, teacher: Teacher) -> Tensor:
        draws = [Generator().manual_seed(seed_of("walk", row)) for row in self.rows]
        return self._all([walked(teacher, self.x[p], rows(self.cond, p), self.distill, draws[p]) for p in self.parts])

    def _all(self, parts: list[Tensor]) -> Tensor:
        """The ends of all processes' walks."""
        return self.ranks.gather(torch.cat(parts))[: self.count]


def _key(config: Run, contents: str, x: Tensor, cond: Cond) -> str:
    """Everything the teacher's ends depend on, hashed."""
    model, distill = config.model, config.distill
    settings = (contents, model.dtype, config.data.teacher_steps, model.quantize, distill.shift, distill.teacher_cfg)
    digest = hashlib.sha256(repr(settings).encode())
    for value in (x, *(cond[name] for name in sorted(cond))):
        digest.update(value.cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _keep(path: Path, key: str, x: Tensor, log: Callable[[str], None]) -> None:
    """Write the ends; they can be made again, so that nothing ends if this fails."""
    try:
        ends = x.detach().cpu().contiguous()
        files.write_tensors(path, {"x": ends}, {"key": key, "sha256": _sum(ends)})
    except (OSError, SafetensorError) as error:
        log(f"could not write {path} ({first_line(error)}): the run goes on without it")


def _cached(path: Path, key: str, log: Callable[[str], None]) -> Tensor | None:
    """The ends of before, if they are of the same teacher and noise, and as they were written."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                return None
            x = file.get_tensor("x")
        if about.get("sha256") == _sum(x):
            return x
        why = "its SHA-256 differs"
    except (OSError, SafetensorError, RuntimeError) as error:
        why = first_line(error)
    log(f"{path} is damaged ({why}): the teacher's ends are made again")
    return None


def _sum(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
