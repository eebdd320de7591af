"""DPG-Bench (arXiv 2403.05135): its prompts, the folder its scorer reads, the answers it writes."""

import re
from collections.abc import Sequence
from pathlib import Path

from arcflow.evaluation.suites.layouts import grid, write_once
from arcflow.evaluation.suites.suite import Item, Suite, numbered_lines, read_table


def dpg_layout(item: Item, images: Sequence[Path], root: Path, model: str) -> None:
    """One PNG with the name of the prompt's file, its four images in two rows."""
    write_once(root / f"{item.id}.png", lambda draft: grid(images).save(draft, "PNG"), of=images)


def dpg_answers(path: Path, items: Sequence[Item], model: str) -> dict[str, float]:
    """The score of each image, from the text file of `compute_dpg_bench.py`: path, scores, their mean; its summary
    by categories of questions is left out."""
    ids = {item.id: item for item in items}
    found = {}
    for place, line in numbered_lines(path):
        numbers = re.search(r"((?:, [0-9.e+-]+){2,})$", line)
        if not numbers:
            continue
        name = re.split(r"[/\\]", line[: numbers.start()])[-1].split(".")[0]
        if name not in ids:
            raise ValueError(f"line {place} is about {name!r}, which is no prompt of this suite")
        scores = [float(number) for number in numbers[1].split(", ")[1:-1]]
        found |= {ids[name].image(draw): score for draw, score in enumerate(scores)}
    return found


def _dpg(path: Path) -> list[Item]:
    """A folder of text files, or the table of questions; both in the order of the names, so that they mean the same."""
    if path.is_dir():
        texts = {file.stem: file.read_text("utf-8-sig").strip() for file in path.glob("*.txt")}
    else:
        texts = {}
        for row in read_table(path, "item_id", "text"):
            if texts.setdefault(row["item_id"], row["text"].strip()) != row["text"].strip():
                raise ValueError(f"{row['item_id']} has two prompts")
    return [Item(i, name, texts[name]) for i, name in enumerate(sorted(texts))]


DPG = Suite(
    name="dpg",
    paper="arXiv 2403.05135",
    file="the folder dpg_bench/prompts or the table dpg_bench/dpg_bench.csv",
    source="github.com/TencentQQGYLab/ELLA",
    counts=({"": 1065},),
    images=4,
    read=_dpg,
    layout=dpg_layout,
    answers=dpg_answers,
)
