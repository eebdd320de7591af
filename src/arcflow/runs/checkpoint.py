"""Checkpoints: all that a run needs to go on to the same bits, written while it goes on.

A checkpoint is a folder named by its iteration. It holds the trained weights, their average and the optimizer's moments
as safetensors, one file for each process, written and read by PyTorch's distributed checkpointing, so that any number
of processes can take them up; and `progress.json`, written last, with the numbers of the run and the size and SHA-256
of every file. The tensors are copied, then a thread writes them beside the training.
Until it is whole the folder has another name; a broken one is named and passed over. Nothing is unpickled. Random
numbers need no saving: those of iteration n are a function of the seed and n.

A write that fails ends nothing: it is told, and tried again with the state of that moment, at once and then at growing
intervals. `progress.json` carries its own SHA-256, so that no number in it is believed that was not written.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from arcflow.runs.ema import Ema, Parameters
from arcflow.system import files
from arcflow.system.errors import first_line, on_full_disk
from arcflow.system.processes import OnAll, Ranks
from arcflow.system.text import shown


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

PAUSES = (0.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds between a write that failed and the next, while the run goes on; the last one for all that follow."""

LAST_PAUSES = (0.0, 1.0, 5.0)
"""The same where a run ends."""


@runtime_checkable
class More(Protocol):
    """What else a run keeps in its checkpoints. Tensors of another process are there too, and are left alone."""

    prefix: str
    """Beginning of the names of its own tensors."""

    def tensors(self) -> dict[str, Tensor]: ...

    def load(self, tensors: dict[str, Tensor]) -> None: ...


Mark = Callable[[], dict[str, Any] | None]


def nothing() -> None:
    """No mark."""


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
        more: More | None = None,
    ) -> None:
        self.folder = folder
        self.parameters = parameters
        self.ema = ema
        self.optimizer = optimizer
        self.keep = keep
        self.milestones = milestones
        self.ranks = ranks or Ranks()
        self.log = log
        self.more = more
        self.alone = self.ranks.count == 1
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None
        self.begun = 0
        """Iteration of the last write."""
        self.newest = 0
        """Iteration of the newest whole checkpoint; 0 for none."""
        self.failure: str | None = None
        """What went wrong with the last write."""
        self.failures, self.again = 0, 0.0
        self.damaged: set[str] = set()
        self.mark: dict[str, Any] | None = None
        """What `save` was given to keep beside the progress, in the checkpoint that was restored."""

    def save(self, progress: Progress, mark: Mark = nothing) -> None:
        """Copy everything and begin to write it, and beside it what `mark` gives on the first process: the state of
        what else is on the disk by then. What goes wrong is told, and `due` from then on."""
        self.settle()
        self.begun = progress.step
        draft = self.folder / f"{progress.step:08d}.tmp"
        try:
            kept = {"progress": dict(vars(progress)), "mark": self.ranks.agree(lambda: _begin(draft, mark))}
            storage = dcp.HuggingFaceStorageWriter(str(draft), save_distributed=True)
            tensors = self._tensors() | (self.more.tensors() if self.more else {})
            shapes = {name: tuple(value.shape) for name, value in tensors.items()}
            group = self.ranks.files
            upload = dcp.async_save(tensors, storage_writer=storage, process_group=group, no_dist=self.alone)
        except (Exception, CheckpointException) as error:
            if not (self.alone or isinstance(error, OnAll)):
                raise  # the others are somewhere else
            self._note(error)
            return
        assert isinstance(upload, Future)
        self.pending = self.writer.submit(self._seal, upload, draft, json.dumps(kept), shapes)

    def due(self) -> bool:
        """Whether the last write has failed and it is time to try again."""
        if self.pending and self.pending.done():
            self._end()
        return self.failure is not None and self.pending is None and time.monotonic() >= self.again

    def settle(self) -> None:
        """Until what was begun is on the disk, or has failed, which is told."""
        self._end()
        self.ranks.agree(lambda: None)

    def finish(self, progress: Progress, mark: Mark = nothing) -> None:
        """Until this progress is on the disk.

        Raises:
            ValueError: the disk does not take it, not even after some seconds.
        """
        if self.begun != progress.step:
            self.save(progress, mark)
        self.settle()
        for pause in LAST_PAUSES:
            (failed,) = self.ranks.any(self.failure is not None)
            if not failed:
                return
            time.sleep(pause)
            self.save(progress, mark)
            self.settle()
        (failed,) = self.ranks.any(self.failure is not None)
        if failed:
            why = self.failure or "another process failed"
            self.failure = None
            raise ValueError(
                f"iteration {progress.step} could not be saved in {self.folder} ({why}); {self._there()}. Free some "
                f"space or mend the disk, then the same command goes on from there"
            )

    def close(self) -> None:
        """Let the thread end what was begun. No process waits for another here: one may have failed.

        Raises:
            ValueError: the last write has failed.
        """
        self.writer.shutdown()
        self._end()
        if self.failure:
            raise ValueError(f"iteration {self.begun} could not be saved in {self.folder} ({self.failure})")

    def restore(self) -> Progress:
        """Put the newest whole checkpoint in place, if there is one."""
        found = self.ranks.agree(self._newest)
        if found is None:
            return Progress()
        path, content = found
        self._load(self.folder / path, content["files"])
        self.mark = content.get("mark")
        progress = Progress(**content["progress"])
        self.newest = self.begun = progress.step
        return progress

    def _end(self) -> None:
        """Wait for what was begun, and note how it ended."""
        pending = self.pending
        self.pending = None
        if pending:
            self._note(pending.exception())

    def _note(self, error: BaseException | None) -> None:
        if error is None:
            self.newest = self.begun
            self.failure = None
            self.failures = 0
            return
        pause = PAUSES[min(self.failures, len(PAUSES) - 1)]
        self.failure = _why(error)
        self.failures += 1
        self.again = time.monotonic() + pause
        when = f"in {pause:.0f} s" if pause else "now"
        self.log(
            f"could not write the checkpoint of iteration {self.begun} in {self.folder} ({self.failure}); "
            f"{self._there()}. The run goes on, and tries again {when}"
        )

    def _there(self) -> str:
        return f"the newest whole one is of iteration {self.newest}" if self.newest else "there is none yet"

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"weight.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.weights.items()}
        for name, p in self.parameters.items():
            state = self.optimizer.state[p]
            tensors |= {f"optimizer.{key}.{name}": _with_axes(value) for key, value in state.items()}
        return tensors

    def _seal(self, upload: Future[Any], draft: Path, kept: str, shapes: dict[str, tuple[int, ...]]) -> None:
        """Wait for all files, note what they are, give the folder its name, and remove the oldest ones."""
        try:
            upload.result()
            if not self.ranks.first:
                return
            _check_whole(draft, shapes)
            sums = {
                path.name: {"bytes": path.stat().st_size, "sha256": files.digest(path)}
                for path in sorted(draft.glob("*.safetensors"))
            }
            record = json.loads(kept) | {"files": sums}
            files.write_json(draft / RECORD, record | {"sha256": files.text_digest(record)})
            final = draft.with_suffix("")
            _clear(final)
            os.replace(draft, final)
            files.sync(self.folder)
        except BaseException:
            if self.ranks.first:
                shutil.rmtree(draft, ignore_errors=True)  # room for the next
            raise
        for old in self._outlived(int(final.name)):
            shutil.rmtree(old, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*") if re.fullmatch("[0-9]{8}", path.name) and path.is_dir())

    def _outlived(self, step: int) -> list[Path]:
        """What may go once `step` is there. Damaged ones count for nothing, nor do later ones, which are damaged too:
        they are written anew when the run comes to them."""
        before = [path for path in self._all() if int(path.name) < step]
        whole = [path for path in before if path.name not in self.damaged]
        kept = {path.name for path in whole[max(0, len(whole) - (self.keep - 1)) :]}
        return [path for path in before if path.name not in kept and not self._milestone(int(path.name))]

    def _milestone(self, step: int) -> bool:
        return self.milestones is not None and step % self.milestones == 0

    def _newest(self) -> tuple[str, dict[str, Any]] | None:
        """The name of the newest whole checkpoint and what its record says."""
        for leftover in self.folder.glob("*.tmp"):
            if re.fullmatch(r"[0-9]{8}\.tmp", leftover.name) and leftover.is_dir():
                self.log(f"removing {leftover}: a checkpoint that was not finished")
                shutil.rmtree(leftover, ignore_errors=True)
        for path in reversed(self._all()):
            fault = broken(path)
            if fault is None:
                return path.name, read_record(path)
            self.damaged.add(path.name)
            self.log(f"skipping {path}: not a whole checkpoint ({fault})")
        return None

    @torch.no_grad()
    def _load(self, path: Path, known: Mapping[str, Any]) -> None:
        storage = dcp.HuggingFaceStorageReader(str(path))
        # Files that the record does not know are none of ours: a Finder leaves `._x.safetensors`.
        storage.fs.ls = lambda _: [str(path / name) for name in known]  # type: ignore[method-assign]
        saved: Any = storage.read_metadata().state_dict_metadata
        there = {name.removeprefix("weight."): m.size for name, m in saved.items() if name.startswith("weight.")}
        wrong = sorted(there.items() ^ {name: p.shape for name, p in self.parameters.items()}.items())
        if wrong:
            raise ValueError(
                f"{path} does not fit this student ({', '.join(f'{n} {tuple(s)}' for n, s in wrong[:4])}, ...): "
                f"expected the tensors of the same model and rank; choose another run folder"
            )
        room = self._tensors() | {name: self._room(name, m) for name, m in saved.items() if name.startswith(EXTRA)}
        if self.more:
            own = self.more.prefix
            room |= {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in saved.items() if n.startswith(own)}
        dcp.load(room, storage_reader=storage, process_group=self.ranks.files, no_dist=self.alone)
        self._hand_out({name: value for name, value in room.items() if name.startswith(EXTRA)})
        if self.more:
            self.more.load({name: value for name, value in room.items() if name.startswith(self.more.prefix)})

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


def _begin(draft: Path, mark: Mark) -> dict[str, Any] | None:
    """Make the folder of a checkpoint that is to be written, with nothing in it."""
    _clear(draft)
    draft.mkdir(parents=True)
    return mark()


def _clear(path: Path) -> None:
    """Nothing is there any more: no folder, no file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_whole(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a folder in which some numbers of these tensors are not: their process has written them elsewhere."""
    saved: Any = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    there = {name: sum(math.prod(chunk.sizes) for chunk in one.chunks) for name, one in saved.items()}
    lacking = [name for name, shape in shapes.items() if there.get(name, 0) < math.prod(shape)]
    if lacking:
        raise ValueError(
            f"{len(lacking)} of {len(shapes)} tensors are not or not all there, the first {lacking[0]}: expected what "
            f"all processes write in one folder; the run folder must be on a disk that all of them see"
        )


def _why(error: BaseException) -> str:
    """What went wrong with a write, in words."""
    if isinstance(error, CheckpointException):
        for cause, _ in error.failures.values():
            return _why(cause)
    if on_full_disk(error):
        return "no space left on the disk"
    return str(error) if isinstance(error, ValueError) else first_line(error)


def broken(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is."""
    try:
        recorded = read_record(path)["files"]
        for name, expected in recorded.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (size := (path / name).stat().st_size) != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}"
            if files.digest(path / name) != expected["sha256"]:
                return f"{name} is not what was written: its SHA-256 differs"
    except (OSError, ValueError) as error:
        return f"{RECORD}: {error}" if RECORD not in str(error) else str(error)
    return None


def read_record(path: Path) -> dict[str, Any]:
    """What a checkpoint's record says, every field checked: `progress`, `files`, and the `mark` if there is one.

    Records of before had no digest of their own and no mark.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is damaged, or written by a newer arcflow.
    """
    try:
        content = json.loads((path / RECORD).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{RECORD} is not JSON ({shown(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{RECORD} holds a {type(content).__name__}, expected an object")
    digest = content.pop("sha256", None)
    if digest is not None and digest != files.text_digest(content):
        raise ValueError(f"{RECORD} is not what was written: its SHA-256 differs")
    if unknown := sorted(set(content) - {"progress", "mark", "files"}):
        raise ValueError(f"{RECORD} has unknown entries {shown(unknown)}: was it written by a newer arcflow?")
    _check_progress(content.get("progress"), path)
    if not isinstance(content.get("mark"), (dict, type(None))):
        raise ValueError(f"{RECORD}: mark is no object")
    recorded = content.get("files")
    if not isinstance(recorded, dict) or not recorded:
        raise ValueError(f"{RECORD} lists no files")
    for name, entry in recorded.items():
        plain = name == Path(name).name and name.endswith(".safetensors")
        known = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
        if not (plain and known):
            said = f"{shown(name, 60)}: {shown(entry, 60)}"
            raise ValueError(f"{RECORD} says of a file {said}, expected its name, size and SHA-256")
    return content


def _check_progress(content: object, path: Path) -> None:
    """Every number of the right type and in its range, and the iteration that the folder is named by."""
    if not isinstance(content, dict):
        raise ValueError(f"{RECORD} has no progress")
    if unknown := sorted(set(content) - {one.name for one in dataclasses.fields(Progress)}):
        raise ValueError(f"{RECORD} has unknown progress {shown(unknown)}: was it written by a newer arcflow?")
    for name, value in content.items():
        if not _FITS[name](value):
            raise ValueError(f"{RECORD} says {name} = {shown(repr(value), 60)}, which cannot be")
    if content.get("step") != int(path.name.removesuffix(".tmp")):
        raise ValueError(f"{RECORD} says iteration {content.get('step')}, but the folder is named {path.name}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 60


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 60)


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and _is_number(value) and math.isfinite(value) and value >= 0


_FITS: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("step", "samples", "skipped", "in_a_row"), _is_count),
    **dict.fromkeys(("usual_norm", "seconds"), _is_amount),
    "distance": lambda value: value is None or _is_number(value),
    "data": lambda value: isinstance(value, dict),
}
"""What each number of a progress can be."""
