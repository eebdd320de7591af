"""Damage run folders at random and take them up again: what is lost, what goes unsaid, what is no sentence.

    python -m benchmarks.damaged_runs [--count 1000] [--seed 0] [--start 0]

A tiny run has stood still at its fifth iteration, with whole checkpoints of the third, fourth and fifth. Each copy of
its folder is damaged in one of the ways of `DAMAGES` and taken up to its sixth. Right is: the weights and moments of a
run that nothing has happened to, bit for bit, with a message wherever another checkpoint than the newest was taken or
something else was missed; or one ValueError that names the folder. Wrong is any other exception, another result, and
an older checkpoint without a word. `--start 300 --count 100` is the fourth hundred of the same thousand.
"""

import argparse
import copy
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from arcflow.config import Data
from arcflow.runs.checkpoint import RECORD
from arcflow.training.loop import train
from tests.support.trainings import config, tiny_pipe

DONE, ALL = 5, 6
ODD: tuple[Any, ...] = (None, True, -1, 0, 7, 3.5, 10**400, "x", [], {}, [[[]]], float("nan"), float("inf"))

NAMES = [f"{step:08d}" for step in range(1, ALL + 1)]

Damage = Callable[[Path, random.Random], None]


def newest(folder: Path) -> Path:
    """The checkpoint of the highest iteration that the run can have come to."""
    return max(path for path in (folder / "checkpoints").iterdir() if path.name in NAMES)


def tensors_of(folder: Path) -> Path:
    return next(newest(folder).glob("*.safetensors"))


def flip(path: Path, draw: random.Random, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(bits):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def zeros(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    path.write_bytes(content)


def harm(path: Path, draw: random.Random) -> None:
    """One of the ways in which a disk or a copy spoils a file."""
    kind = draw.choice((flip, cut, zeros, "gone", "empty", "text", "folder", "garbage"))
    if callable(kind):
        kind(path, draw)
        return
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text(draw.choice(("[]", "3", "{}", "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\0" * 20)))
    elif kind == "folder":
        path.mkdir()
    elif kind == "garbage":
        path.write_bytes(draw.randbytes(200))


def record(folder: Path, draw: random.Random) -> None:
    """An odd value somewhere in the newest record, or an entry more or less."""
    path = newest(folder) / RECORD
    content = json.loads(path.read_text())
    if draw.random() < 0.3:
        content.pop("sha256")  # a record of before, whose numbers nothing protects but their types
        part = draw.choice((content, content["files"], next(iter(content["files"].values()))))
    else:
        part = draw.choice((content, content["progress"], content["files"], next(iter(content["files"].values()))))
    name = draw.choice([*part, "flavor"])
    if draw.random() < 0.25:
        part.pop(name, None)
    else:
        part[name] = draw.choice(ODD)
    path.write_text(json.dumps(content))


def digit(folder: Path, draw: random.Random) -> None:
    """Another digit in one number of the newest record."""
    path = newest(folder) / RECORD
    text = path.read_text()
    place = draw.choice([i for i, letter in enumerate(text) if letter.isdigit()])
    path.write_text(text[:place] + draw.choice("0123456789".replace(text[place], "")) + text[place + 1 :])


def renamed(folder: Path, draw: random.Random) -> None:
    """An older checkpoint under a newer name."""
    there = sorted((folder / "checkpoints").iterdir())
    target = folder / "checkpoints" / f"{draw.choice((DONE, 9, 99999999)):08d}"
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(there[draw.randrange(2)], target)


def several(folder: Path, draw: random.Random) -> None:
    """The two newest are spoiled."""
    for checkpoint in sorted((folder / "checkpoints").iterdir())[-2:]:
        harm(draw.choice([path for path in checkpoint.iterdir() if path.is_file()]), draw)


def rewritten(folder: Path, draw: random.Random) -> None:
    """The tensors of the newest in a whole file, with one number changed, one missing, or of another type."""
    path = tensors_of(folder)
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    kind = draw.randrange(3)
    if kind == 0:
        tensors[name].flatten()[0] += 1
    elif kind == 1:
        del tensors[name]
    else:
        tensors[name] = tensors[name].to(torch.float64)
    save_file(tensors, path)


def strays(folder: Path, draw: random.Random) -> None:
    """What a Mac, a killed process and a user leave."""
    for place in (folder, folder / "checkpoints", newest(folder)):
        for name in draw.sample(("._a.safetensors", "x.tmp", "00000008.tmp", ".DS_Store", "log.jsonl.1234.tmp"), 2):
            (place / name).write_bytes(draw.randbytes(30))
    (folder / "checkpoints" / "00000007.tmp").mkdir(exist_ok=True)


def of_file(name: str) -> Damage:
    def damage(folder: Path, draw: random.Random) -> None:
        harm(folder / name, draw)

    return damage


DAMAGES: dict[str, Damage] = {
    "tensors of the newest": lambda folder, draw: harm(tensors_of(folder), draw),
    "tensors rewritten": rewritten,
    "record of the newest": lambda folder, draw: harm(newest(folder) / RECORD, draw),
    "an odd value": record,
    "a digit": digit,
    "renamed": renamed,
    "the two newest": several,
    "strays": strays,
    "run.json": of_file("run.json"),
    "log.jsonl": of_file("log.jsonl"),
    "speed.jsonl": of_file("speed.jsonl"),
    "held_out.safetensors": of_file("held_out.safetensors"),
}


class Bench:
    """A run that stands still, and what it becomes when nothing has happened to it."""

    def __init__(self, place: Path) -> None:
        data = Data(count=8, held_out_count=2, teacher_steps=2, height=8, width=8)
        run = config(place / "run", data=data, pictures=0, keep=3, save_every=1, eval_every=100)
        self.run = replace(run, optim=replace(run.optim, iterations=ALL))
        self.place, self.pipe = place, tiny_pipe()
        started = replace(self.run, optim=replace(run.optim, iterations=DONE))
        train(started, self.fresh(), lambda _: None)
        shutil.rmtree(place / "run" / "adapter")
        self.wanted, _ = self.take_up(lambda folder, draw: None, random.Random(0))

    def fresh(self) -> Any:
        """The pipeline as it was, without the time that making one takes."""
        pipe = copy.copy(self.pipe)
        pipe.transformer = copy.deepcopy(self.pipe.transformer)
        return pipe

    def take_up(self, damage: Damage, draw: random.Random) -> tuple[dict[str, Tensor], list[str]]:
        """What a damaged copy becomes, and what was said."""
        folder = self.place / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.place / "run", folder)
        damage(folder, draw)
        said = list[str]()
        train(replace(self.run, out=str(folder)), self.fresh(), said.append)
        return load_file(tensors_of(folder)), said


def outcome(bench: Bench, damage: Damage, draw: random.Random) -> str:
    """How one damage ended."""
    try:
        found, said = bench.take_up(damage, draw)
    except ValueError as error:
        return "refused" if str(bench.place) in str(error) else f"WRONG: names no folder: {error}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"
    if found.keys() != bench.wanted.keys() or any(not torch.equal(found[n], bench.wanted[n]) for n in found):
        return "WRONG: other numbers"
    at = next((int(one.split("at iteration ")[1].split()[0]) for one in said if "resuming" in one), 0)
    told = [one for one in said if "skipping" in one or "made again" in one or "not as it was" in one]
    if at == DONE:
        return "the newest, with a message" if told else "the newest"
    return "an older one, with a message" if told else "WRONG: an older one, without a word"


def survey(count: int, seed: int, start: int = 0) -> Counter[tuple[str, str]]:
    """How often each damage ended in which way, of the damages number `start` to `start + count` of a seed."""
    torch.set_num_threads(1)
    ends = Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as place:
        bench, names = Bench(Path(place)), list(DAMAGES)
        for i in range(start, start + count):
            name, draw = names[i % len(names)], random.Random(f"{seed}/{i}")
            ends[name, outcome(bench, DAMAGES[name], draw)] += 1
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    ends = survey(options.count, options.seed, options.start)
    for (name, end), times in sorted(ends.items()):
        print(f"{name:<24}{times:>5}  {end}")
    total = Counter[str]()
    for (_, end), times in ends.items():
        total[end.partition(":")[0]] += times
    print("in all: " + ", ".join(f"{times} {end}" for end, times in total.most_common()))


if __name__ == "__main__":
    main()
