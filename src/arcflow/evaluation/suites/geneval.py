"""GenEval (arXiv 2310.11513): its prompts, the folder its scorer reads, the answers it writes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from arcflow.evaluation.suites.layouts import link, write_once
from arcflow.evaluation.suites.suite import Item, Suite, read_records


def geneval_layout(item: Item, images: Sequence[Path], root: Path, model: str) -> None:
    """<00000>/metadata.jsonl, and samples/0000.png and on beside it."""
    folder = root / f"{item.number:05d}"
    write_once(folder / "metadata.jsonl", lambda draft: draft.write_text(json.dumps(item.more) + "\n", "utf-8"))
    for draw, image in enumerate(images):
        link(image, folder / "samples" / f"{draw:04d}.png")
    for more in (folder / "samples").glob("[0-9]*.png"):  # of a run with more images of each prompt
        if int(more.stem) >= len(images):
            more.unlink()


def geneval_answers(path: Path, items: Sequence[Item], model: str) -> dict[str, float]:
    """Whether each image is right, from the JSON lines of `evaluate_images.py`."""
    ids = {f"{item.number:05d}": item for item in items}
    found = {}
    for place, record in enumerate(read_records(path), 1):
        where = re.search(r"(\d{5})[/\\]samples[/\\](\d+)\.png$", str(record.get("filename")))
        if not where or where[1] not in ids or not isinstance(record.get("correct"), bool):
            raise ValueError(f"line {place} tells of no image of this suite whether it is correct")
        found[ids[where[1]].image(int(where[2]))] = float(record["correct"])
    return found


def _geneval(path: Path) -> list[Item]:
    records = read_records(path)
    for record in records:
        if not isinstance(record["include"], list):
            raise ValueError("'include' is no list")
    return [Item(i, f"{i:05d}", record["prompt"], record["tag"], record) for i, record in enumerate(records)]


_GENEVAL = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}

GENEVAL = Suite(
    name="geneval",
    paper="arXiv 2310.11513",
    file="prompts/evaluation_metadata.jsonl",
    source="github.com/djghosh13/geneval",
    counts=(_GENEVAL,),
    images=4,
    read=_geneval,
    layout=geneval_layout,
    answers=geneval_answers,
    shares=True,
)
