"""What a run remembers: averaged weights, checkpoints, the log.

A checkpoint is one safetensors file with the trained weights, their average and the optimizer's moments, and a few
numbers in its metadata; nothing is unpickled. It is written under a temporary name, synced and renamed, so a file
with the right name is whole. Random numbers need no saving: those of iteration n are a function of the seed and n.
The log is JSON lines without clock times; on resuming it is cut back to the checkpoint, so the log of an interrupted
run equals that of an uninterrupted one byte for byte.

Average (EMA): a plain copy at first, then from iteration `start` on w <- beta w + (1 - beta) net, beta = (1 -
1/t)^power, t = 1, 2, ...
"""

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Parameters = Mapping[str, nn.Parameter]


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
        weights, nets = list(self.weights.values()), [p.detach() for p in self.parameters.values()]
        if beta == 0:
            torch._foreach_copy_(weights, nets)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_lerp_(weights, nets, 1 - beta)  # pyright: ignore[reportPrivateImportUsage]

    def swap(self) -> None:
        """Exchange the network's weights and the average. Nothing is copied."""
        for name, p in self.parameters.items():
            p.data, self.weights[name] = self.weights[name], p.data

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


@runtime_checkable
class Memory(Protocol):
    """Tensors beside the weights that a run cannot go on without."""

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: dict[str, Tensor]) -> None: ...


def save_checkpoint(
    folder: Path,
    progress: Progress,
    parameters: Parameters,
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    keep: int = 2,
    memory: Memory | None = None,
) -> Path:
    """Write a checkpoint, whole or not at all, and remove all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"weight.{name}": p.detach() for name, p in parameters.items()}
    tensors |= {f"ema.{name}": w for name, w in ema.weights.items()}
    for name, p in parameters.items():
        tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state[p].items()}
    tensors |= {f"memory.{name}": value for name, value in (memory.state() if memory else {}).items()}
    path = folder / f"{progress.step:08d}.safetensors"
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    metadata = {"progress": json.dumps(vars(progress))}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))
    for old in sorted(folder.glob("*.safetensors"))[:-keep]:
        old.unlink()
    return path


def restore(
    folder: Path,
    parameters: Parameters,
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    log: Callable[[str], None] = print,
    memory: Memory | None = None,
) -> Progress:
    """Put the newest whole checkpoint in place, if there is one. Broken files are named and passed over."""
    for leftover in [*folder.glob("*.tmp"), *folder.glob(".tmp*")]:  # ours, and those of safetensors itself
        log(f"removing {leftover}: a checkpoint that was not finished")
        leftover.unlink()
    for path in sorted(folder.glob("*.safetensors"), reverse=True):
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                progress = Progress(**json.loads(file.metadata()["progress"]))
        except (SafetensorError, OSError) as error:
            log(f"skipping {path}: not a whole checkpoint ({error})")
            continue
        _put(tensors, parameters, ema, optimizer, path)
        if memory:
            kept = {name: value for name, value in tensors.items() if name.startswith("memory.")}
            memory.load({name.removeprefix("memory."): value for name, value in kept.items()})
        return progress
    return Progress()


@torch.no_grad()
def _put(
    tensors: dict[str, Tensor], parameters: Parameters, ema: Ema, optimizer: torch.optim.Optimizer, path: Path
) -> None:
    saved = {name.removeprefix("weight."): value.shape for name, value in tensors.items() if name.startswith("weight.")}
    wrong = sorted(saved.items() ^ {name: p.shape for name, p in parameters.items()}.items())
    if wrong:
        raise ValueError(
            f"{path} does not fit this student ({', '.join(f'{n} {tuple(s)}' for n, s in wrong[:4])}, ...): "
            f"expected the tensors of the same model and rank; choose another run folder"
        )
    states = {}
    for i, (name, p) in enumerate(parameters.items()):
        p.copy_(tensors[f"weight.{name}"])
        ema.weights[name].copy_(tensors[f"ema.{name}"])
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in tensors]
        states[i] = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
    order = {id(p): i for i, p in enumerate(parameters.values())}
    groups = [{**group, "params": [order[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": {i: s for i, s in states.items() if s}, "param_groups": groups})


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then sync and rename it: after a crash it is old or new, never half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what this user's umask gives; safetensors would leave it to the owner alone
        write(temporary)
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Log:
    """`log.jsonl`, one JSON object per line with the `step` it belongs to, and the same curves for TensorBoard."""

    def __init__(self, folder: Path, step: int, log: Callable[[str], None] = print) -> None:
        """Open the log and cut off what comes after the checkpoint at `step`: at 0 there is none, and all is cut."""
        path = folder / "log.jsonl"
        if path.exists():
            kept = "".join(f"{line}\n" for line in _whole_lines(path) if step and json.loads(line)["step"] <= step)
            write_atomic(path, lambda temporary: temporary.write_text(kept, "utf-8"))
        self.folder, self.file = folder, path.open("a", encoding="utf-8")
        self.curves = _tensorboard(folder / "tensorboard", step, log)

    def write(self, step: int, **values: float | int | None) -> None:
        """Append a line; numbers that are not finite become null."""
        finite = {name: v if v is None or math.isfinite(v) else None for name, v in values.items()}
        self.file.write(json.dumps({"step": step} | finite) + "\n")
        for name, value in finite.items():
            if self.curves and value is not None:
                self.curves.add_scalar(name, value, step)

    def picture(self, step: int, picture: np.ndarray) -> None:
        """A picture (rows, columns, 3) of uint8: `pictures/` in the run folder, and TensorBoard."""
        path = self.folder / "pictures" / f"{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, lambda temporary: Image.fromarray(picture).save(temporary, "png"))
        if self.curves:
            self.curves.add_image("held out, teacher above student", picture, step, dataformats="HWC")

    def sync(self) -> None:
        """All lines so far are on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        if self.curves:
            self.curves.close()


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
