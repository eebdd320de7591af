"""The official scorers' side: where each of them looks for pictures, and what it leaves behind.

A suite's own pictures are PNG files of one shape, whatever the benchmark (`assess`). The functions `*_layout` show them
once more as the benchmark's scorer expects them: as hard links where it reads single PNG files, so that nothing is
stored twice, else as grids, WebP or JPEG, compressed as the benchmarks' own example scripts leave it to Pillow. The
functions `*_answers` read the file that a scorer writes, one number for each picture or prompt.

Checked against djghosh13/geneval, TencentQQGYLab/ELLA (dpg_bench), OneIG-Bench/OneIG-Benchmark and tgxs002/HPSv2.
"""

import csv
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from arcflow.state import write_atomic


@dataclass(frozen=True)
class Item:
    """One prompt of a suite."""

    number: int
    """Its place in the benchmark's own list, from 0, which the noise depends on."""
    id: str
    prompt: str
    category: str = ""
    """What the benchmark reports apart, a task or a style; empty where it has none."""
    more: dict[str, Any] = field(default_factory=dict, hash=False)
    """What its scorer needs to know besides the prompt."""

    def picture(self, draw: int) -> str:
        """The id of one of its pictures."""
        return f"{self.id}/{draw}"


def geneval_layout(item: Item, pictures: Sequence[Path], root: Path, model: str) -> None:
    """<00000>/metadata.jsonl, and samples/0000.png and on beside it."""
    folder = root / f"{item.number:05d}"
    _write(folder / "metadata.jsonl", lambda draft: draft.write_text(json.dumps(item.more) + "\n", "utf-8"))
    for draw, picture in enumerate(pictures):
        _link(picture, folder / "samples" / f"{draw:04d}.png")


def dpg_layout(item: Item, pictures: Sequence[Path], root: Path, model: str) -> None:
    """One PNG with the name of the prompt's file, its four pictures in two rows."""
    _write(root / f"{item.id}.png", lambda draft: _grid(pictures).save(draft, "PNG"))


def oneig_layout(item: Item, pictures: Sequence[Path], root: Path, model: str) -> None:
    """<class>/<model>/<id>.webp, four pictures in two rows."""
    folder, name = item.id.split("/")
    _write(root / folder / model / f"{name}.webp", lambda draft: _grid(pictures).save(draft, "WEBP"))


def hpsv2_layout(item: Item, pictures: Sequence[Path], root: Path, model: str) -> None:
    """<style>/<00000>.jpg, the first picture of each prompt."""
    _write(root / f"{item.id}.jpg", lambda draft: Image.open(pictures[0]).convert("RGB").save(draft, "JPEG"))


def flat_layout(item: Item, pictures: Sequence[Path], root: Path, model: str) -> None:
    """<id>.png, the first picture of each prompt: a folder that any program for Frechet distances reads."""
    _link(pictures[0], root / f"{item.id}.png")


def _write(path: Path, write: Any) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, write)


def _link(picture: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(picture, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        _write(path, lambda draft: shutil.copyfile(picture, draft))


def _grid(pictures: Sequence[Path]) -> Image.Image:
    """A square of pictures, row by row; one alone is itself."""
    side = math.isqrt(len(pictures))
    if side**2 != len(pictures):
        raise ValueError(f"{len(pictures)} pictures of a prompt make no square; the official grid takes --pictures 4")
    images = [Image.open(path).convert("RGB") for path in pictures]
    width, height = images[0].size
    grid = Image.new("RGB", (side * width, side * height))
    for place, image in enumerate(images):
        grid.paste(image, (place % side * width, place // side * height))
    return grid


def geneval_answers(path: Path, items: Sequence[Item], model: str) -> dict[str, float]:
    """Whether each picture is right, from the JSON lines of `evaluate_images.py`."""
    ids = {f"{item.number:05d}": item for item in items}
    found = {}
    for place, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        record = json.loads(line)
        where = re.search(r"(\d{5})[/\\]samples[/\\](\d+)\.png$", str(record.get("filename")))
        if not where or where[1] not in ids or not isinstance(record.get("correct"), bool):
            raise ValueError(f"line {place} tells of no picture of this suite whether it is correct")
        found[ids[where[1]].picture(int(where[2]))] = float(record["correct"])
    return found


def dpg_answers(path: Path, items: Sequence[Item], model: str) -> dict[str, float]:
    """The score of each picture, from the text file of `compute_dpg_bench.py`: path, scores, their mean; its summary
    by categories of questions is left out."""
    ids = {item.id: item for item in items}
    found = {}
    for place, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        numbers = re.search(r"((?:, [0-9.e+-]+){2,})$", line)
        if not numbers:
            continue
        name = re.split(r"[/\\]", line[: numbers.start()])[-1].split(".")[0]
        if name not in ids:
            raise ValueError(f"line {place} is about {name!r}, which is no prompt of this suite")
        scores = [float(number) for number in numbers[1].split(", ")[1:-1]]
        found |= {ids[name].picture(draw): score for draw, score in enumerate(scores)}
    return found


def oneig_answers(path: Path, items: Sequence[Item], model: str) -> dict[str, float]:
    """The score of each prompt, from a results file `alignment_prompt_score_*.csv` or `diversity_prompt_score_*.csv`:
    one row for each prompt, one column for each model."""
    ids = {item.id.replace("/", "_"): item.id for item in items}
    with path.open(newline="", encoding="utf-8-sig") as stream:
        header, *rows = list(csv.reader(stream)) or [[]]
    if model not in header[1:]:
        raise ValueError(f"it has the models {header[1:]} and not {model!r}; give one of them with --name")
    column, found = header.index(model), {}
    for row in rows:
        if row[0] not in ids:
            raise ValueError(f"its row {row[0]!r} is about no prompt of this suite")
        if row[column]:
            found[ids[row[0]]] = float(row[column])
    return found
