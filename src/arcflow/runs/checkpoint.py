"""Checkpoints: all that a run needs to go on to the same bits, written while it goes on.

A checkpoint is a folder named by its iteration. It holds the trained weights, their average and the optimizer's moments
as safetensors, one file for each process, written and read by PyTorch's distributed checkpointing, so that any number
of processes can take them up; and `progress.json`, written last, with the numbers of the run and the size and SHA-256
of every file. The tensors are copied, then a thread writes them beside the training.
Until it is whole the folder has another name; a broken one is named and passed over. Nothing is unpickled. Random
numbers need no saving: those of iteration n are a function of the seed and n.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from arcflow.runs.ema import Ema, Parameters
from arcflow.system import files
from arcflow.system.processes import Ranks


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


# One process that reads and writes alone is what `no_dist` asks for; the thread that writes would say it too.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)

RECORD = "progress.json"

EXTRA = "optimizer."


class Checkpoints:
    """The checkpoints of a run: the newest `keep`, and for good those of every `milestones`-th iteration."""

    def __init__(
        self,
        folder: Path,
        parameters: Parameters,
        ema: Ema,
        optimizer: torch.optim.Optimizer,
        *,
        keep: int = 2,
        milestones: int | None = None,
        ranks: Ranks | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.parameters, self.ema, self.optimizer = folder, parameters, ema, optimizer
        self.keep, self.milestones, self.ranks, self.log = keep, milestones, ranks or Ranks(), log
        self.alone = self.ranks.count == 1
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None

    def save(self, progress: Progress) -> None:
        """Copy everything and begin to write it. Raises what went wrong with the one before."""
        self.wait()
        draft = self.folder / f"{progress.step:08d}.tmp"
        if self.ranks.first:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        self.ranks.agree(lambda: None)
        storage = dcp.HuggingFaceStorageWriter(str(draft), save_distributed=True)
        group = self.ranks.files
        upload = dcp.async_save(self._tensors(), storage_writer=storage, process_group=group, no_dist=self.alone)
        assert isinstance(upload, Future)
        self.pending = self.writer.submit(self._seal, upload, draft, json.dumps(vars(progress)))

    def wait(self) -> None:
        """Until what was begun is on the disk."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()
        self.ranks.agree(lambda: None)

    def close(self) -> None:
        """Let the thread end what was begun. No process waits for another here: one may have failed."""
        self.writer.shutdown()
        if self.pending:
            self.pending.result()

    def restore(self) -> Progress:
        """Put the newest whole checkpoint in place, if there is one."""
        found = self.ranks.agree(self._newest)
        if found is None:
            return Progress()
        path = self.folder / found
        self._load(path)
        return Progress(**json.loads((path / RECORD).read_text("utf-8"))["progress"])

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"weight.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.weights.items()}
        for name, p in self.parameters.items():
            state = self.optimizer.state[p]
            tensors |= {f"optimizer.{key}.{name}": _with_axes(value) for key, value in state.items()}
        return tensors

    def _seal(self, upload: Future[Any], draft: Path, progress: str) -> None:
        """Wait for all files, note what they are, give the folder its name, and remove the oldest ones."""
        upload.result()
        if not self.ranks.first:
            return
        sums = {
            path.name: {"bytes": path.stat().st_size, "sha256": files.digest(path)} for path in sorted(draft.iterdir())
        }
        record = {"progress": json.loads(progress), "files": sums}
        files.write_json(draft / RECORD, record)
        final = draft.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(draft, final)
        files.sync(self.folder)
        for old in self._all()[: -self.keep]:
            if not (self.milestones and int(old.name) % self.milestones == 0):
                shutil.rmtree(old)

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("????????") if path.name.isdigit())

    def _newest(self) -> str | None:
        for leftover in self.folder.glob("*.tmp"):
            self.log(f"removing {leftover}: a checkpoint that was not finished")
            shutil.rmtree(leftover)
        for path in reversed(self._all()):
            fault = broken(path)
            if fault is None:
                return path.name
            self.log(f"skipping {path}: not a whole checkpoint ({fault})")
        return None

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        storage = dcp.HuggingFaceStorageReader(str(path))
        saved: Any = storage.read_metadata().state_dict_metadata
        there = {name.removeprefix("weight."): m.size for name, m in saved.items() if name.startswith("weight.")}
        wrong = sorted(there.items() ^ {name: p.shape for name, p in self.parameters.items()}.items())
        if wrong:
            raise ValueError(
                f"{path} does not fit this student ({', '.join(f'{n} {tuple(s)}' for n, s in wrong[:4])}, ...): "
                f"expected the tensors of the same model and rank; choose another run folder"
            )
        room = self._tensors() | {name: self._room(name, m) for name, m in saved.items() if name.startswith(EXTRA)}
        dcp.load(room, storage_reader=storage, process_group=self.ranks.files, no_dist=self.alone)
        self._hand_out({name: value for name, value in room.items() if name.startswith(EXTRA)})

    def _room(self, name: str, saved: Any) -> Tensor:
        """An empty tensor for what only the checkpoint knows of."""
        p = self.parameters[name.split(".", 2)[-1]]
        if saved.size == p.shape:
            return torch.empty_like(p, dtype=saved.properties.dtype)
        return torch.empty(saved.size, dtype=saved.properties.dtype)

    def _hand_out(self, extra: dict[str, Tensor]) -> None:
        fused = bool(self.optimizer.param_groups[0].get("fused"))
        for name, value in extra.items():
            _, key, parameter = name.split(".", 2)
            p = self.parameters[parameter]
            moved = value if key == "step" and not fused else value.to(p.device)
            self.optimizer.state[p][key] = _number(moved) if key == "step" else moved


def _with_axes(value: Tensor | int) -> Tensor:
    """A number as a tensor of one: the readers know none without axes."""
    value = torch.as_tensor(value)
    return value if value.ndim else value.reshape(1)


def _number(value: Tensor) -> Tensor | int:
    """The way back; bitsandbytes counts steps in integers."""
    return value.reshape(()) if value.is_floating_point() else int(value)


def broken(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    try:
        recorded = json.loads((path / RECORD).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{RECORD}: {error}"
    for name, expected in recorded.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (size := (path / name).stat().st_size) != expected["bytes"]:
            return f"{name} has {size} bytes, expected {expected['bytes']}"
        if files.digest(path / name) != expected["sha256"]:
            return f"{name} is not what was written: its SHA-256 differs"
    return None
