"""Evaluation suites: whose prompts, how many pictures of each, and where the official scorer looks for them.

A suite is a row of `SUITES`. The prompts are the benchmark's own and do not come with the package, but for those of the
built-in world: a row names the file and where it is to be had, and `read_items` checks that it is that file, and whole.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcflow.state import seed_of
from arcflow.suites import official
from arcflow.suites.official import Item
from arcflow.world.commands import FIRST_SEED, held_out
from arcflow.world.scene import parse

Layout = Callable[[Item, Sequence[Path], Path, str], None]
"""(prompt, its pictures, folder, name of the model): show the pictures as the official scorer expects them."""
Answers = Callable[[Path, Sequence[Item], str], dict[str, float]]
"""(file, prompts, name of the model): the official scorer's numbers, by id of picture or prompt."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One benchmark."""

    name: str
    paper: str
    file: str
    """What its prompts come in; empty for the built-in world."""
    source: str = ""
    """Where that is to be had."""
    counts: tuple[Mapping[str, int], ...] = ()
    """Prompts in each category when it is whole; several where there are several editions."""
    pictures: int = 1
    """Pictures of each prompt."""
    read: Callable[[Path], list[Item]]
    layout: Layout | None = None
    answers: Answers | None = None

    def seed(self, item: Item, draw: int) -> int:
        """Seed of a picture's noise: the same for every model, number of steps and way to share the work."""
        if self.name == "world":  # the first picture of a prompt is that of `arcflow evaluate` and `world score`
            return FIRST_SEED + item.number + (draw << 32)
        return seed_of("suite", self.name, item.number, draw)


WORLD_COUNT = 384
"""Captions of the built-in world, unless told."""


def read_items(suite: Suite, path: Path | None, *, count: int | None = None, complete: bool = True) -> list[Item]:
    """The prompts of a suite, in its own order.

    Args:
        path: the benchmark's own file or folder; None for the built-in world.
        count: take only so many, evenly spread over the list; of the world, the first.
        complete: the file must be the whole benchmark.

    Raises:
        ValueError: it is not what the suite's row says.
    """
    if suite.name == "world":
        if path is not None:
            raise ValueError(f"the prompts of the suite world are built in, got {path}; leave --prompts out")
        return _world(count or WORLD_COUNT)
    remedy = f"expected {suite.file} from {suite.source}"
    if path is None:
        raise ValueError(f"the suite {suite.name} has its prompts in a file: {remedy}; give it with --prompts")
    try:
        items = suite.read(path)
        _check(suite, items, complete)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} cannot be used ({what}): {remedy}; get it again or correct --prompts") from error
    if count is None or count >= len(items):
        return items
    return [items[place * len(items) // count] for place in range(count)]


def _check(suite: Suite, items: list[Item], complete: bool) -> None:
    for item in items:
        if not isinstance(item.prompt, str) or not item.prompt.strip():
            raise ValueError(f"prompt {item.id} is empty or no text")
        if not re.fullmatch(r"\w[\w+-]*(/\w[\w+-]*)?", item.id):
            raise ValueError(f"{item.id!r} is no name for a picture")
    twice = [name for name, times in Counter(item.id for item in items).items() if times > 1]
    if twice:
        raise ValueError(f"{twice[0]} is there more than once")
    found = dict(Counter(item.category for item in items))
    unknown = sorted(set(found) - {name for counts in suite.counts for name in counts})
    if unknown:
        raise ValueError(f"unknown category {unknown[0]!r}")
    if not items or (complete and found not in suite.counts):
        whole = " or ".join(_told(counts) for counts in suite.counts)
        raise ValueError(f"{_told(found)} prompts, not {whole}; a part of it will do with --no-complete")


def _told(counts: Mapping[str, int]) -> str:
    named = ", ".join(f"{name} {count}" for name, count in counts.items() if name)
    return f"{sum(counts.values())}{f' ({named})' if named else ''}"


def _world(count: int) -> list[Item]:
    texts = held_out(count)
    return [Item(i, f"{i:05d}", text, parse(text).skill) for i, text in enumerate(texts)]


def _geneval(path: Path) -> list[Item]:
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    for record in records:
        if not isinstance(record["include"], list):
            raise ValueError("'include' is no list")
    return [Item(i, f"{i:05d}", record["prompt"], record["tag"], record) for i, record in enumerate(records)]


def _dpg(path: Path) -> list[Item]:
    """A folder of text files, or the table of questions; both in the order of the names, so that they mean the same."""
    if path.is_dir():
        texts = {file.stem: file.read_text("utf-8").strip() for file in path.glob("*.txt")}
    else:
        texts = {}
        for row in _table(path, "item_id", "text"):
            if texts.setdefault(row["item_id"], row["text"].strip()) != row["text"].strip():
                raise ValueError(f"{row['item_id']} has two prompts")
    return [Item(i, name, texts[name]) for i, name in enumerate(sorted(texts))]


ONEIG_CLASSES = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}
"""Categories, and the folders of their pictures."""


def _oneig(path: Path) -> list[Item]:
    rows = _table(path, "category", "id")
    column = next((name for name in ("prompt_en", "prompt_cn") if name in rows[0]), None) if rows else None
    if column is None:
        raise ValueError("no column 'prompt_en' or 'prompt_cn'")
    return [
        Item(i, f"{ONEIG_CLASSES.get(row['category'], 'unknown')}/{row['id']}", row[column], row["category"])
        for i, row in enumerate(rows)
    ]


COCO_COUNT = 10_000


def _coco(path: Path) -> list[Item]:
    """Lines with a prompt each, or COCO's own annotations: of each image the caption of the lowest id, the images by
    their ids, the first 10 000."""
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        return [
            Item(i, str(record.get("id", f"{i:05d}")), record["prompt"] if "prompt" in record else record["caption"])
            for i, record in enumerate(records)
        ]
    captions: dict[int, str] = {}
    for note in sorted(json.loads(path.read_text("utf-8"))["annotations"], key=lambda note: note["id"]):
        captions.setdefault(note["image_id"], note["caption"].strip())
    return [Item(i, f"{image:012d}", captions[image]) for i, image in enumerate(sorted(captions)[:COCO_COUNT])]


HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")


def _hpsv2(path: Path) -> list[Item]:
    lists = {style: json.loads((path / f"{style}.json").read_text("utf-8")) for style in HPSV2_STYLES}
    named = [(style, i, text) for style, texts in lists.items() for i, text in enumerate(texts)]
    return [Item(number, f"{style}/{i:05d}", text, style) for number, (style, i, text) in enumerate(named)]


def _table(path: Path, *columns: str) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream)
        rows = list(table)
    for column in columns:
        if column not in (table.fieldnames or []):
            raise ValueError(f"no column {column!r}, but {list(table.fieldnames or [])}")
    return rows


_GENEVAL = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
_ONEIG = dict(zip([*ONEIG_CLASSES][:5], (245, 244, 206, 200, 225), strict=True))

SUITES = {
    suite.name: suite
    for suite in (
        Suite(name="world", paper="docs/world.md", file="", read=lambda path: []),
        Suite(
            name="geneval",
            paper="arXiv 2310.11513",
            file="prompts/evaluation_metadata.jsonl",
            source="github.com/djghosh13/geneval",
            counts=(_GENEVAL,),
            pictures=4,
            read=_geneval,
            layout=official.geneval_layout,
            answers=official.geneval_answers,
        ),
        Suite(
            name="dpg",
            paper="arXiv 2403.05135",
            file="the folder dpg_bench/prompts or the table dpg_bench/dpg_bench.csv",
            source="github.com/TencentQQGYLab/ELLA",
            counts=({"": 1065},),
            pictures=4,
            read=_dpg,
            layout=official.dpg_layout,
            answers=official.dpg_answers,
        ),
        Suite(
            name="oneig",
            paper="arXiv 2506.07977",
            file="OneIG-Bench.csv or OneIG-Bench-ZH.csv",
            source="github.com/OneIG-Bench/OneIG-Benchmark",
            counts=(_ONEIG, {**_ONEIG, "Multilingualism": 200}),
            pictures=4,
            read=_oneig,
            layout=official.oneig_layout,
            answers=official.oneig_answers,
        ),
        Suite(
            name="coco",
            paper="arXiv 1405.0312",
            file="annotations/captions_val2014.json, or lines of JSON with a prompt each (.jsonl)",
            source="cocodataset.org",
            counts=({"": COCO_COUNT},),
            read=_coco,
            layout=official.flat_layout,
        ),
        Suite(
            name="hpsv2",
            paper="arXiv 2306.09341",
            file=f"a folder with {', '.join(f'{style}.json' for style in HPSV2_STYLES)}",
            source="huggingface.co/datasets/zhwang/HPDv2 (benchmark)",
            counts=(dict.fromkeys(HPSV2_STYLES, 800),),
            read=_hpsv2,
            layout=official.hpsv2_layout,
        ),
    )
}
