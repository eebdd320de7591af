"""The log of a run: JSON lines without clock times, and the same curves for a tracker.

On resuming the log is cut back to the checkpoint, so that the log of an interrupted run equals that of an uninterrupted
one byte for byte."""

import importlib.util
import json
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from arcflow.system import files
from arcflow.system.packages import need

HELD_OUT = "held out, teacher above student"


class Tracker:
    """A run of Weights & Biases or trackio, whose interfaces are alike. `tracker.txt` in the run folder has a name for
    it that no other run has, so that it is taken up with the folder."""

    def __init__(self, name: str, folder: Path, settings: dict[str, Any]) -> None:
        self.library = need(name, asked=f"tracker = {name!r}", install=name)
        kept = folder / "tracker.txt"
        if not kept.exists():
            files.write_text(kept, f"{folder.name}-{secrets.token_hex(4)}")
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
                kept = "".join(
                    f"{line}\n" for line in files.whole_lines(old) if step and json.loads(line)["step"] <= step
                )
                files.write_text(old, kept)
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
        files.write_atomic(path, lambda temporary: Image.fromarray(picture).save(temporary, "png"))
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
