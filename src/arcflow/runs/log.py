"""The log of a run: JSON lines without clock times, and the same curves for a tracker.

On resuming the log is cut back to the checkpoint, so that the log of an interrupted run equals that of an uninterrupted
one byte for byte. Nothing here ends a run: lines that the disk does not take wait in memory, and a tracker or a
TensorBoard that fails is told once and left out."""

import hashlib
import importlib.util
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from arcflow.system import files
from arcflow.system.errors import first_line
from arcflow.system.packages import need

HELD_OUT = "held out, teacher above student"

PAUSE = 10.0
"""Seconds between two tries to write to a disk that has refused a line."""


@runtime_checkable
class Curves(Protocol):
    """What a run uses of TensorBoard's writer."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def add_image(self, tag: str, img_tensor: np.ndarray, global_step: int, *, dataformats: str) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """A run of Weights & Biases or trackio, whose interfaces are alike. `tracker.txt` in the run folder has a name for
    it that no other run has, so that it is taken up with the folder."""

    def __init__(self, name: str, folder: Path, settings: dict[str, object]) -> None:
        self.name = name
        self.library = need(name, asked=f"tracker = {name!r}", install=name)
        kept = folder / "tracker.txt"
        own = _stored_name(kept)
        if own is None:
            own = f"{_plain(folder.name)}-{secrets.token_hex(4)}"
            files.write_text(kept, own)
        found = {"id": own} if name == "wandb" else {}  # trackio goes by the name
        try:
            self.run = self.library.init(project="arcflow", name=own, config=settings, resume="allow", **found)
        except Exception as error:
            raise ValueError(
                f"tracker = {name!r} could not begin ({first_line(error)}): check the connection and its login, or "
                f"leave it out with --tracker none; log.jsonl has the curves in any case"
            ) from error

    def log(self, step: int, values: dict[str, float | int]) -> None:
        self.run.log(values, step=step)

    def image(self, step: int, image: np.ndarray) -> None:
        self.run.log({HELD_OUT: self.library.Image(image)}, step=step)

    def finish(self) -> None:
        self.run.finish()


def _stored_name(path: Path) -> str | None:
    """The name that was given before; None if there is none, or none that was ours."""
    try:
        own = path.read_text("utf-8").strip()
    except (OSError, ValueError):
        return None
    return own if own and own == _plain(own) else None


def _plain(name: str) -> str:
    """A name without what trackers and encodings refuse."""
    return re.sub(r"[^\w .+=@-]", "-", name.encode("utf-8", "replace").decode().replace("?", "-"))[:64]


class Lines:
    """A file that lines are appended to. Those that the disk does not take wait, and go before the next ones."""

    def __init__(self, path: Path, kept: str, log: Callable[[str], None]) -> None:
        """The file holds `kept` at first."""
        self.path = path
        self.say = log
        self.waiting = b""
        self.told = False
        self.again = 0.0
        self.count = kept.count("\n")
        self.hash = hashlib.sha256(kept.encode())
        files.write_text(path, kept)
        self.handle = os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))

    def add(self, record: Mapping[str, object]) -> None:
        line = (json.dumps(record) + "\n").encode()
        self.count += 1
        self.hash.update(line)
        self.waiting += line
        if not self.told or time.monotonic() >= self.again:
            self.flush()

    def flush(self) -> OSError | None:
        """Hand over what waits; what the disk said if it did not take all."""
        try:
            while self.waiting:
                self.waiting = self.waiting[os.write(self.handle, self.waiting) :]
        except OSError as error:
            if not self.told:
                self.say(f"could not write to {self.path} ({first_line(error)}): the run goes on, its lines wait")
            self.told = True
            self.again = time.monotonic() + PAUSE
            return error
        self.told = False
        return None

    def sync(self) -> None:
        """All lines are on the disk. Raises OSError if it does not take them."""
        if error := self.flush():
            raise error
        os.fsync(self.handle)

    def close(self) -> None:
        if self.flush():
            self.say(f"{self.path} lacks its last lines: there was no room for them")
        os.close(self.handle)


class Log:
    """`log.jsonl`, one JSON object per line with the `step` it belongs to, and the same curves for TensorBoard."""

    def __init__(
        self,
        folder: Path,
        step: int,
        log: Callable[[str], None] = print,
        tracker: Tracker | None = None,
        mark: Mapping[str, object] | None = None,
    ) -> None:
        """Open the log and cut off what comes after the checkpoint at `step`: at 0 there is none, and all is cut.

        `tracker` gets the curves and images too. `mark` is what the log said of itself when the checkpoint was made;
        what it lacks or has changed since is told.
        """
        self.folder = folder
        self.say = log
        kept = _kept(folder / "log.jsonl", step)
        if step:
            _look(folder / "log.jsonl", kept, mark, log)
        self.before = [record for _, record in kept]
        self.file = Lines(folder / "log.jsonl", _text(kept), log)
        self.clock = Lines(folder / "speed.jsonl", _text(_kept(folder / "speed.jsonl", step)), log)
        self.curves = _tensorboard(folder / "tensorboard", step, log)
        self.tracker = tracker

    def measured(self, step: int) -> float | None:
        """The distance that the kept part of the log has for an iteration; None if it has none."""
        found = [line["distance"] for line in self.before if line["step"] == step and "distance" in line]
        return float(found[-1]) if found and isinstance(found[-1], (int, float)) else None

    def write(self, step: int, **values: float | int | None) -> None:
        """Append a line; numbers that are not finite become null."""
        finite = {name: v if v is None or math.isfinite(v) else None for name, v in values.items()}
        self.file.add({"step": step} | finite)
        self._draw(step, {name: value for name, value in finite.items() if value is not None})

    def speed(self, step: int, **values: float) -> None:
        """A line of `speed.jsonl`: clock times, which no two runs share."""
        self.clock.add({"step": step} | values)
        self._draw(step, {f"speed/{name}": value for name, value in values.items()})

    def _draw(self, step: int, values: dict[str, float | int]) -> None:
        def draw(curves: Curves) -> None:
            for name, value in values.items():
                curves.add_scalar(name, value, step)

        self._to_curves(draw)
        self._to_tracker(lambda tracker: tracker.log(step, values))

    def image(self, step: int, image: np.ndarray) -> None:
        """An image (rows, columns, 3) of uint8: `pictures/` in the run folder, TensorBoard and tracker."""
        path = self.folder / "pictures" / f"{step:06d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            files.write_image(path, Image.fromarray(image))
        except OSError as error:
            self.say(f"could not write {path} ({first_line(error)}): the run goes on without it")
        self._to_curves(lambda curves: curves.add_image(HELD_OUT, image, step, dataformats="HWC"))
        self._to_tracker(lambda tracker: tracker.image(step, image))

    def _to_curves(self, draw: Callable[[Curves], None]) -> None:
        if self.curves:
            try:
                draw(self.curves)
            except Exception as error:  # of a thread of its own, which writes: a full disk, and whatever else
                self.say(f"TensorBoard failed ({first_line(error)}): curves go to log.jsonl only from here on")
                self.curves = None

    def _to_tracker(self, tell: Callable[[Tracker], None]) -> None:
        if self.tracker:
            try:
                tell(self.tracker)
            except Exception as error:  # whatever its server or its library meets is no reason to end a run
                self.say(
                    f"tracker {self.tracker.name} failed ({first_line(error)}): curves go to log.jsonl only from here "
                    f"on; it is tried again when the run is started again"
                )
                self.tracker = None

    def sync(self) -> dict[str, int | str]:
        """What the log says of itself, once all lines so far are on the disk. Raises OSError if it takes them not."""
        self.file.sync()
        return {"lines": self.file.count, "sha256": self.file.hash.hexdigest()}

    def close(self) -> None:
        """The end of the log. The tracker may take its time to send what it has."""
        self.file.close()
        self.clock.close()
        self._to_curves(lambda curves: curves.close())
        self._to_tracker(lambda tracker: tracker.finish())

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


Kept = list[tuple[str, dict[str, Any]]]
"""Lines of a log, and what they say."""


def _kept(path: Path, step: int) -> Kept:
    """The lines up to an iteration. A power cut leaves NULs and halves of lines, which are left out."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: expected the log of a run; remove it and run the same command again")
    found = [(line, _record(line)) for line in files.whole_lines(path)] if step else []
    return [(line, record) for line, record in found if record is not None and record["step"] <= step]


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _text(kept: Kept) -> str:
    return "".join(f"{line}\n" for line, _ in kept)


def _look(path: Path, kept: Kept, mark: Mapping[str, object] | None, log: Callable[[str], None]) -> None:
    """Tell what a log lacks, or has changed, since the checkpoint was made."""
    if mark is None:
        lacking = not kept  # of before; that there are lines at all is all that is known
    else:
        count = mark.get("lines")
        known = _text(kept[:count]) if type(count) is int else ""
        lacking = hashlib.sha256(known.encode()).hexdigest() != mark.get("sha256")
    if lacking:
        of = f" of {mark.get('lines')}" if mark else ""
        log(
            f"{path} is not as it was when the checkpoint was made: {len(kept)}{of} lines are left, some are missing "
            f"or changed. The weights are whole and the run goes on; its curves have a gap"
        )


def _tensorboard(folder: Path, step: int, log: Callable[[str], None]) -> Curves | None:
    if importlib.util.find_spec("tensorboard") is None:
        log('no TensorBoard here, curves go to log.jsonl only: pip install "arcflow[tensorboard]" to have them')
        return None
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and an extra

    try:
        return SummaryWriter(folder, purge_step=step + 1)
    except (OSError, ValueError) as error:  # a full disk; a name that its writer cannot encode
        log(f"TensorBoard cannot write to {folder} ({first_line(error)}): curves go to log.jsonl only")
        return None
