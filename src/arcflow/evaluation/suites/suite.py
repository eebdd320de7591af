"""Evaluation suites: whose prompts, how many images of each, and where the official scorer looks for them.

A suite is a row of `SUITES`. The prompts are the benchmark's own and do not come with the package, but for those of the
built-in world: a row names the file and its source, and `read_items` checks that it is that file, and whole.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from arcflow.system.text import Json
from arcflow.world.scene import FIRST_SEED, HELD_OUT, held_out, parse

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One prompt of a suite."""

    number: int
    """Place in the benchmark's own list, from 0, which the noise depends on."""
    id: str
    prompt: str
    category: str = ""
    """What the benchmark reports apart, a task or a style; empty where it has none."""
    more: dict[str, object] = field(default_factory=dict, hash=False)
    """What its scorer needs to know besides the prompt."""

    def image(self, draw: int) -> str:
        """The id of one of its images."""
        return f"{self.id}/{draw}"


Layout = Callable[[Item, Sequence[Path], Path, str], None]
"""(prompt, its images, folder, name of the model): show the images as the official scorer expects them."""

Answers = Callable[[Path, Sequence[Item], str], dict[str, float]]
"""(file, prompts, name of the model): the official scorer's numbers, by id of image or prompt."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One benchmark."""

    name: str
    paper: str
    file: str
    """What its prompts come in; empty for the built-in world."""
    source: str = ""
    """Where the prompt file can be fetched."""
    counts: tuple[Mapping[str, int], ...] = ()
    """Prompts in each category when it is whole; several where there are several editions."""
    images: int = 1
    """Images of each prompt."""
    read: Callable[[Path], list[Item]]
    layout: Layout | None = None
    answers: Answers | None = None
    shares: bool = False
    """Whether the answers say of each image only that it is right or wrong."""

    def seed(self, item: Item, draw: int) -> int:
        """Seed of an image's noise: the same for every model, number of steps and way to share the work."""
        if self.name == "world":  # the first image of a prompt is that of `arcflow evaluate` and `world score`
            return FIRST_SEED + item.number + (draw << 32)
        # Not at the top: the command line lists suites, and does not wait for torch.
        from arcflow.system.seeds import seed_of

        return seed_of("suite", self.name, item.number, draw)


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
        if count is not None and count < 1:
            raise ValueError(f"--count {count}: expected 1 prompt or more; leave it out to take {HELD_OUT}")
        return _world(count or HELD_OUT)
    remedy = f"expected {suite.file} from {suite.source}"
    if path is None:
        raise ValueError(f"the suite {suite.name} has its prompts in a file: {remedy}; give it with --prompts")
    try:
        items = suite.read(path)
        _check(suite, items, complete)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} cannot be used ({what}): {remedy}; get it again or correct --prompts") from error
    if count is None or count >= len(items):
        return items
    if count < 1:
        raise ValueError(f"--count {count}: expected 1 prompt or more; leave it out to take all {len(items)}")
    return spread(items, count)


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, evenly spread over the list; all where there are no more."""
    return [items[place * len(items) // count] for place in range(count)] if count < len(items) else list(items)


def _check(suite: Suite, items: list[Item], complete: bool) -> None:
    for item in items:
        if not isinstance(item.prompt, str) or not item.prompt.strip():
            raise ValueError(f"prompt {item.id} is empty or no text")
        if not re.fullmatch(r"\w[\w+-]*(/\w[\w+-]*)?", item.id):
            raise ValueError(f"{item.id!r} is no name for an image")
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


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The numbered lines of a file of text that are not blank: ends of any system, and no others, so that U+2028 in a
    prompt is part of it."""
    with path.open(encoding="utf-8-sig") as stream:
        return [(place, line.strip()) for place, line in enumerate(stream, 1) if line.strip()]


def read_records(path: Path) -> list[Json]:
    """The objects in the lines of a file. Raises ValueError with the line that is none."""
    found = []
    for place, line in numbered_lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {place} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {place} is no object")
        found.append(record)
    return found


def read_json(path: Path) -> Any:
    """What is in a file of JSON, with a byte order mark or without."""
    return json.loads(path.read_text("utf-8-sig"))


def read_table(path: Path, *columns: str) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream)
        rows = list(table)
    for column in columns:
        if column not in (table.fieldnames or []):
            raise ValueError(f"no column {column!r}, but {list(table.fieldnames or [])}")
    return rows


WORLD = Suite(name="world", paper="docs/world.md", file="", read=lambda path: [])
