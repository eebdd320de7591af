"""Damage caches of embeddings at random and read them as a training does: what is found, what is read in silence.

    python -m benchmarks.damaged_caches [--count 1000] [--seed 0]

Every cache is damaged in one of the ways of `DAMAGES`, half of them after a training has opened them, so that their
checksums are taken as known. Then it is opened and all prompts are read. Right is: the same numbers, or one ValueError
that names the folder. Then `make` runs again, which must give the same numbers, or refuse by name.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from arcflow.data import cache
from arcflow.data.cache import Cache
from arcflow.families.conditioning import Cond

PROMPTS = [f"a photo of cat {i}" for i in range(11)]
ABOUT = {"model": "tiny", "max_sequence_length": None, "encoder": "0" * 32}
ODD: tuple[Any, ...] = (None, True, -1, 0, 3.5, 10**400, "x", [], {}, [[[]]], float("nan"))


def encode(texts: list[str], scale: float = 1.0) -> Cond:
    """Embeddings that differ from prompt to prompt."""
    places = torch.tensor([float(len(text) + sum(map(ord, text)) % 97) for text in texts])
    states = torch.sin(places[:, None, None] * torch.arange(1, 25).view(3, 8)) * scale
    mask = torch.arange(3)[None] < 1 + (places.long() % 3)[:, None]
    return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask, "pooled_projections": states[:, 0]}


def make(folder: Path, scale: float = 1.0, **settings: Any) -> None:
    """A cache of five shards."""
    chosen: dict[str, Any] = {"about": ABOUT, "dtype": "float32", "shard": 3, "batch": 2, "log": lambda text: None}
    cache.make(folder, lambda texts: encode(texts, scale), PROMPTS, **(chosen | settings))


def read(folder: Path) -> dict[str, Tensor]:
    """What a training gets of it."""
    opened = Cache(folder, ABOUT, torch.device("cpu"), torch.float32)
    opened.need(PROMPTS)
    return opened(["", *PROMPTS])


def same(one: Cond, other: Cond) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def body(path: Path) -> int:
    """Where the numbers of a file begin."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def flipped(path: Path, first: int, last: int, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 32))):
        content[draw.randrange(first, min(last, len(content)))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """A shard with other tensors under the same texts."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(path)), path, metadata)


def swapped(tensors: dict[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
    a, b = draw.sample(sorted(name for name in tensors if name.endswith("pooled_projections")), 2)
    return tensors | {a: tensors[b], b: tensors[a]}


def of_another(folder: Path, shard: Path, draw: random.Random, **settings: Any) -> None:
    """Another cache's shard in its place, with that one's checksum."""
    other = folder.with_name(f"{folder.name}-other")
    make(other, 1.5, **settings)
    for ending in (".safetensors", ".sha256"):
        target = draw.choice((shard, shard, folder / "shard-99999.safetensors")).with_suffix(ending)
        shutil.copyfile(other / f"{shard.stem}{ending}", target)
    shutil.rmtree(other)


def changed_record(path: Path, draw: random.Random) -> None:
    """One odd value in a JSON record."""
    record = json.loads(path.read_text("utf-8"))
    name = draw.choice(sorted(record))
    value = record[name]
    way = draw.randrange(4)
    if way == 0:
        del record[name]
    elif way == 1:
        record[f"{name}x"] = record.pop(name)
    elif way == 2 and isinstance(value, int) and not isinstance(value, bool):
        record[name] = value + draw.choice((-1, 1, 100))
    else:
        record[name] = draw.choice(ODD)
    path.write_text(json.dumps(record), "utf-8")


def text_damage(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    cut = draw.randrange(len(content))
    path.write_bytes(
        draw.choice(
            (b"", content[:cut], b"[" * 100_000, b"\xff\xfe\0", b"[]", b"null", content * 2, b"\0" * len(content))
        )
    )


def quiet_damage(path: Path, draw: random.Random) -> None:
    """A flipped bit under the old time of the file."""
    stat = path.stat()
    flipped(path, body(path), 1 << 40, draw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def damages(folder: Path, draw: random.Random) -> dict[str, Callable[[], object]]:
    """All ways to damage a cache, by name."""
    shards = sorted(folder.glob("shard-*.safetensors"))
    shard, other = draw.sample(shards, 2)
    sums, about, checked = shard.with_suffix(".sha256"), folder / "cache.json", folder / "checked.json"

    def exchange() -> None:
        for ending in (".safetensors", ".sha256"):
            a, b = shard.with_suffix(ending), other.with_suffix(ending)
            first, second = a.read_bytes(), b.read_bytes()
            a.write_bytes(second)
            b.write_bytes(first)

    return {
        "bits of the numbers": lambda: flipped(shard, body(shard), 1 << 40, draw),
        "bits of the numbers, old time": lambda: quiet_damage(shard, draw),
        "bits of the header": lambda: flipped(shard, 0, body(shard), draw),
        "zeros": lambda: shard.write_bytes(shard.read_bytes()[:-64] + bytes(64)),
        "all zeros": lambda: shard.write_bytes(shard.read_bytes()[: body(shard)].ljust(shard.stat().st_size, b"\0")),
        "cut": lambda: shard.write_bytes(shard.read_bytes()[: draw.randrange(shard.stat().st_size)]),
        "longer": lambda: shard.write_bytes(shard.read_bytes() + bytes(draw.randrange(1, 100))),
        "two tensors changed places": lambda: rewritten(shard, lambda t: swapped(t, draw)),
        "integers": lambda: rewritten(shard, lambda t: {n: v.int() for n, v in t.items()}),
        "a shard is gone": shard.unlink,
        "a folder for a shard": lambda: (shard.unlink(), shard.mkdir()),
        "a checksum is gone": sums.unlink,
        "a checksum is damaged": lambda: text_damage(sums, draw),
        "two shards changed places": exchange,
        "another model's shard": lambda: of_another(folder, shard, draw, about=ABOUT | {"encoder": "1" * 32}),
        "another precision's shard": lambda: of_another(folder, shard, draw, dtype="bfloat16"),
        "the record has an odd value": lambda: changed_record(about, draw),
        "the record is damaged": lambda: text_damage(about, draw),
        "the record is gone": about.unlink,
        "the note of checks is damaged": lambda: text_damage(checked, draw) if checked.exists() else None,
        "a shard and the note of checks": lambda: (
            flipped(shard, body(shard), 1 << 40, draw),
            changed_record(checked, draw) if checked.exists() else None,
        ),
    }


def outcome(folder: Path, right: Cond) -> str:
    """What comes of reading a cache."""
    try:
        found = read(folder)
    except ValueError as error:
        named = str(folder) in str(error) and type(error) is ValueError
        return "refused by name" if named else f"vague: {error!r}"
    except Exception as error:
        return f"exception: {error!r}"
    return "the same numbers" if same(found, right) else "OTHER NUMBERS IN SILENCE"


def trial(folder: Path, seed: int) -> tuple[str, str, str]:
    """Damage a new cache and read it: the damage, what came of reading it, and of making it again."""
    draw = random.Random(seed)
    make(folder)
    ways = damages(folder, draw)
    names = list(ways)
    name = names[seed % len(names)]
    right = read(folder) if (seed + seed // len(names)) % 2 else None
    if right is None:  # opened elsewhere, so that nothing is noted here
        make(folder.with_name("whole"))
        right = read(folder.with_name("whole"))
    ways[name]()
    try:
        cache.verify(folder)
    except Exception as error:
        if type(error) is not ValueError or str(folder) not in str(error):
            return name, f"verified: {error!r}", "not tried"
    first = outcome(folder, right)
    try:
        make(folder)
        again = outcome(folder, right)
    except ValueError as error:
        again = "refused by name" if str(folder) in str(error) else f"vague: {error!r}"
    except Exception as error:
        again = f"exception: {error!r}"
    return name, first, again


GOOD = ("the same numbers", "refused by name")


def study(seeds: Iterable[int]) -> tuple[Counter[str], list[tuple[str, str, str]]]:
    """Trials by their seeds: how often each pair of outcomes came, and the trials that went wrong."""
    counts, wrong = Counter[str](), []
    for i in seeds:
        with tempfile.TemporaryDirectory() as place:
            name, first, again = trial(Path(place) / "cache", i)
        good = first in GOOD and again in GOOD
        counts[f"{first}; made again: {again}" if good else "wrong"] += 1
        if not good:
            wrong.append((name, first, again))
    return counts, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="caches to damage")
    parser.add_argument("--seed", type=int, default=0, help="number of the first one")
    asked = parser.parse_args()
    cache.tqdm = partial(cache.tqdm, disable=True)  # type: ignore[misc]
    counts, wrong = study(range(asked.seed, asked.seed + asked.count))
    for what, often in counts.most_common():
        print(f"{often:6d}  {what}")
    for name, first, again in wrong:
        print(f"wrong: {name}: {first}; made again: {again}")
