"""What a run remembers: averaged weights, its numbers, the log.

The log is JSON lines without clock times; on resuming it is cut back to the checkpoint, so the log of an interrupted
run equals that of an uninterrupted one byte for byte. Files are written under a temporary name, synced and renamed: a
file with the right name is whole.

Average (EMA): a plain copy at first, then from iteration `start` on w <- beta w + (1 - beta) net, beta = (1 -
1/t)^power, t = 1, 2, ...
"""

import hashlib
import importlib
import importlib.util
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from arcflow.parallel import local

Parameters = Mapping[str, nn.Parameter]
HELD_OUT = "held out, teacher above student"


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed for one purpose, the same on every machine: `seed_of(run seed, "noise", sample)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def ema_beta(iteration: int, start: int = 100, power: float = 8.0) -> float:
    """Share of the old average kept after the step of `iteration` (counted from 0); 0 copies the weights."""
    t = iteration + 1 - start
    return (1 - 1 / t) ** power if t > 0 else 0.0


class Ema:
    """Running average of the trained weights, and only of them."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.weights = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, beta: float) -> None:
        weights = [local(w) for w in self.weights.values()]
        nets = [local(p.detach()) for p in self.parameters.values()]
        if beta == 0:
            torch._foreach_copy_(weights, nets)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_lerp_(weights, nets, 1 - beta)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the network's weights and the average. Values move, not tensors: FSDP knows these by their place."""
        for name, p in self.parameters.items():
            net, average = local(p.detach()), local(self.weights[name])
            kept = net.clone()
            net.copy_(average)
            average.copy_(kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averaged weights while the block runs."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


@dataclass
class Progress:
    """The numbers of a run that are not tensors."""

    step: int = 0
    """Iterations done."""
    samples: int = 0
    """Samples seen."""
    skipped: int = 0
    """Iterations without an optimizer step because the gradient was not finite, or a spike."""
    in_a_row: int = 0
    """How many of them the last iterations were."""
    usual_norm: float = 0.0
    """Running geometric mean of the gradient norm; 0 before the first step."""
    seconds: float = 0.0
    """Time spent, over all the starts of the run."""
    distance: float | None = None
    """The last measured distance to the teacher."""
    data: dict[str, Any] = field(default_factory=dict)
    """Where a streamed data set stands."""


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then sync and rename it: after a crash it is old or new, never half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what this user's umask gives; safetensors would leave it to the owner alone
        write(temporary)
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """What was written to a file or folder is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Tracker:
    """A run of Weights & Biases or trackio, whose interfaces are alike. `tracker.txt` in the run folder has a name for
    it that no other run has, so that it is taken up with the folder."""

    def __init__(self, name: str, folder: Path, settings: dict[str, Any]) -> None:
        try:
            self.library = importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"tracker = {name!r}: expected it to be installed ({error}); pip install {name}, or leave the setting "
                f"out"
            ) from error
        kept = folder / "tracker.txt"
        if not kept.exists():
            write_atomic(kept, lambda temporary: temporary.write_text(f"{folder.name}-{secrets.token_hex(4)}"))
        own = kept.read_text()
        found = {"id": own} if name == "wandb" else {}  # trackio goes by the name
        self.run = self.library.init(project="arcflow", name=own, config=settings, resume="allow", **found)

    def log(self, step: int, values: dict[str, float | int]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, picture: np.ndarray) -> None:
        self.run.log({HELD_OUT: self.library.Image(picture)}, step=step)

    def finish(self) -> None:
        self.run.finish()


class Log:
    """`log.jsonl`, one JSON object per line with the `step` it belongs to, and the same curves for TensorBoard."""

    def __init__(
        self, folder: Path, step: int, log: Callable[[str], None] = print, tracker: Tracker | None = None
    ) -> None:
        """Open the log and cut off what comes after the checkpoint at `step`: at 0 there is none, and all is cut.
        `tracker` gets the curves and pictures too."""
        path = folder / "log.jsonl"
        for old in (path, folder / "speed.jsonl"):
            if old.exists():
                kept = "".join(f"{line}\n" for line in _whole_lines(old) if step and json.loads(line)["step"] <= step)
                write_atomic(old, lambda temporary, kept=kept: temporary.write_text(kept, "utf-8"))
        self.folder, self.file, self.clock = folder, _append(path), _append(folder / "speed.jsonl")
        self.curves, self.tracker = _tensorboard(folder / "tensorboard", step, log), tracker

    def write(self, step: int, **values: float | int | None) -> None:
        """Append a line; numbers that are not finite become null."""
        finite = {name: v if v is None or math.isfinite(v) else None for name, v in values.items()}
        self.file.write(json.dumps({"step": step} | finite) + "\n")
        self._draw(step, {name: value for name, value in finite.items() if value is not None})

    def speed(self, step: int, **values: float) -> None:
        """A line of `speed.jsonl`: clock times, which no two runs share."""
        self.clock.write(json.dumps({"step": step} | values) + "\n")
        self._draw(step, {f"speed/{name}": value for name, value in values.items()})

    def _draw(self, step: int, values: dict[str, float | int]) -> None:
        for name, value in values.items():
            if self.curves:
                self.curves.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.log(step, values)

    def picture(self, step: int, picture: np.ndarray) -> None:
        """A picture (rows, columns, 3) of uint8: `pictures/` in the run folder, TensorBoard and tracker."""
        path = self.folder / "pictures" / f"{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, lambda temporary: Image.fromarray(picture).save(temporary, "png"))
        if self.curves:
            self.curves.add_image(HELD_OUT, picture, step, dataformats="HWC")
        if self.tracker:
            self.tracker.picture(step, picture)

    def sync(self) -> None:
        """All lines so far are on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        self.clock.close()
        if self.curves:
            self.curves.close()
        if self.tracker:
            self.tracker.finish()


def _append(path: Path) -> IO[str]:
    return path.open("a", encoding="utf-8")


def _tensorboard(folder: Path, step: int, log: Callable[[str], None]) -> Any | None:
    if importlib.util.find_spec("tensorboard") is None:
        log('no TensorBoard here, curves go to log.jsonl only: pip install "arcflow[tensorboard]" to have them')
        return None
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and an extra

    return SummaryWriter(folder, purge_step=step + 1)


def _whole_lines(path: Path) -> list[str]:
    *lines, _ = path.read_text("utf-8", errors="replace").split("\n")
    return lines


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; an unfinished last one is left out."""
    return [json.loads(line) for line in _whole_lines(path)]
