"""One HTML file that shows a training: its curves, its held-out images, its settings, and what to do next.

It is made of what the run folder holds, so it can be made again, and of a run that is still at work.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from arcflow import config
from arcflow.reports.page import write_page
from arcflow.reports.side_by_side import LogLine, curves_figure
from arcflow.reports.table import Line, Table
from arcflow.system import files
from arcflow.system.packages import about

CURVES = "curves.png"

MEASURED = 24
"""Lines of a table at most: of more, every so many."""


def write_training(folder: Path) -> Path | None:
    """Write report.html into a run folder, and curves.png where matplotlib is; None if nothing was measured yet."""
    log = files.read_lines(folder / "log.jsonl")
    settings = json.loads((folder / "run.json").read_text("utf-8"))
    measured = [line for line in log if line.get("distance") is not None]
    if not measured:
        return None
    curves = drawn_curves(log)
    if curves:
        files.write_bytes(folder / CURVES, curves)
    first = measured[0]
    last = measured[-1]
    euler = {int(name.removeprefix("euler_")): level for name, level in first.items() if name.startswith("euler_")}
    pictures = sorted((folder / "pictures").glob("*.png"))
    made = about(command=f"arcflow train --config {shlex.quote(str(folder / 'run.json'))}")
    return write_page(
        folder / "report.html",
        "training.html",
        about=made,
        name=folder.name,
        iterations=settings["optim"]["iterations"],
        done=max(line["step"] for line in log),
        steps=settings["distill"]["steps"],
        begun=f"{first['distance']:.3g}",
        distance=f"{last['distance']:.3g}",
        best=f"{min(line['distance'] for line in measured):.3g}",
        beaten=beaten(last["distance"], euler),
        skipped=max((line.get("skipped") or 0 for line in log), default=0),
        curves=curves,
        pictures=_picture(pictures[-1]) if pictures else None,
        prompts=_prompts(folder, settings),
        numbers=measured_table(measured),
        settings=Table(["setting", "value"], [Line.of(name, value) for name, value in _flat(settings).items()]),
        adapter=folder / "adapter" if (folder / "adapter").is_dir() else None,
        model=settings["model"]["base"],
    )


def drawn_curves(log: Sequence[LogLine]) -> bytes | None:
    """Loss and distance as PNG; None without matplotlib, which a training does not need."""
    return curves_figure(log) if find_spec("matplotlib") else None


def beaten(distance: float, euler: Mapping[int, float]) -> str:
    """Which of plain Euler's steps the student is nearer than."""
    known = sorted(euler)
    behind = [calls for calls in known if distance < euler[calls]]
    if not known:
        return ""
    if not behind:
        return f"farther than plain Euler in {known[0]} calls"
    return f"nearer than plain Euler in {behind[-1]} calls"


def measured_table(measured: Sequence[LogLine]) -> Table:
    """What was measured on the held-out prompts, line by line."""
    names = [name for name in measured[-1] if name.startswith("distance")]
    every = max(1, -(-len(measured) // MEASURED))
    shown = [*measured[:-1:every], measured[-1]]
    lines = [Line.of(line["step"], *(f"{line.get(name) or 0:.4g}" for name in names)) for line in shown]
    return Table(["iteration", *(name.replace("_", ", steps ") for name in names)], lines)


def _picture(path: Path) -> bytes:
    Image.open(path).verify()
    return path.read_bytes()


def _prompts(folder: Path, settings: dict[str, Any]) -> list[str]:
    """The prompts of the images, from left to right."""
    column = settings["data"]["column"]
    lines = files.read_lines(folder / "held_out.jsonl")
    return [str(line.get(column, "")) for line in lines[: settings.get("pictures", 0)]]


def _flat(settings: dict[str, Any]) -> dict[str, object]:
    told = {name: value for name, value in settings.items() if name != config.CONTENTS}
    return {name: value for name, value in config.flat(told).items() if name != "out"}
