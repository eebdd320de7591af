"""Kill the making of caches, samples and suites again and again, then let it end: is anything lost, doubled or half?

    python -m benchmarks.killed [--kills 10] [--of caches] [--seed 0]

Each is made by children of this process that are killed (SIGKILL) at random moments, once what is there has grown by a
random amount; the last one is left alone. What comes out is held against one that nobody has killed: a cache byte for
byte, samples and a suite image by image and number by number, its manifest line by line. Nothing may be left beside it.
"""

import argparse
import json
import multiprocessing
import random
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from arcflow.commands.sample import Sample
from arcflow.commands.suite import run_suite
from arcflow.data import cache
from arcflow.evaluation.request import Request
from arcflow.sampling.options import Drawing, Machine, ModelAndAdapter
from benchmarks import damaged_caches

SCORER = """import json, sys, time
with open(sys.argv[2], "a") as out:
    for line in open(sys.argv[1]):
        time.sleep(0.02)
        asked = json.loads(line)
        out.write(json.dumps({"id": asked["id"], "score": len(asked["prompt"]) % 7}) + chr(10))
        out.flush()
"""


NEEDED = (
    "arcflow.sampling.attach",
    "arcflow.sampling.generate",
    "diffusers.pipelines.flux.pipeline_flux",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
)
"""Modules that are imported once, and not by every child; to import is most of what a child does."""


def make_cache(folder: Path) -> None:
    """A cache of 40 shards, whose text encoder takes its time."""

    def slow(texts: list[str]) -> dict[str, torch.Tensor]:
        time.sleep(0.01)
        return damaged_caches.encode(texts)

    prompts = [f"a photo of dog {i}" for i in range(160)]
    cache.make(folder, slow, prompts, about=damaged_caches.ABOUT, shard=4, batch=2, log=lambda text: None)


def make_samples(folder: Path, seeds: int = 20) -> None:
    """So many images of two prompts, from the shipped student."""
    sys.stdout = open("/dev/null", "w")  # noqa: SIM115
    machine, prompts = Machine(device="cpu", batch=2), ("a red ring", "a blue square")
    Sample(prompt=prompts, seed=tuple(range(seeds)), out=folder, machine=machine).run()


def make_suite(folder: Path) -> None:
    """The built-in world in one step of the small teacher, with features and a scorer."""
    program = folder.with_name("score.py")
    program.write_text(SCORER, "utf-8")
    words = f"{shlex.quote(sys.executable)} -S {shlex.quote(str(program))} {{manifest}} {{out}}"
    request = Request(
        suite="world",
        count=40,
        out=folder,
        scorer=(f"mine={words}",),
        features=("world",),
        subject=ModelAndAdapter(adapter="none"),
        drawing=Drawing(steps=1),
        machine=Machine(batch=2, device="cpu"),
    )
    sys.stdout = open("/dev/null", "w")  # noqa: SIM115
    run_suite(request)


def weight(folder: Path) -> int:
    """How much there is."""
    kept = [path for path in folder.rglob("*") if path.suffix in (".png", ".out", ".safetensors", ".sha256")]
    return sum(path.read_bytes().count(b"\n") if path.suffix == ".out" else 1 for path in kept if path.exists())


def kill_often(make: Callable[[Path], None], folder: Path, kills: int, moments: random.Random) -> int:
    """Kill what makes a folder so often, then let it end; how many children were killed at work."""
    fork, killed = multiprocessing.get_context("fork"), 0
    for _ in range(kills):
        enough = weight(folder) + moments.randrange(1, 8)
        child = fork.Process(target=make, args=(folder,))
        child.start()
        while weight(folder) < enough and child.is_alive():
            time.sleep(moments.uniform(0, 0.02))
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
    child = fork.Process(target=make, args=(folder,))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"the last one ended with {child.exitcode}")
    return killed


def content(folder: Path) -> dict[str, object]:
    """What must be the same: bytes, lines in any order, metrics; of clocks and of how features were cut into files only
    that they are there."""
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.partition("/")[0] in ("clock", "measured") or path.suffix == ".log":
            found[path.parent.name + path.suffix] = "there"
        elif path.name == "manifest.jsonl":
            records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            found[name] = sorted(str({key: value for key, value in r.items() if key != "seconds"}) for r in records)
        elif path.name == "results.json":
            found[name] = json.loads(path.read_text("utf-8"))["metrics"]
        elif path.name == "index.html":
            found[name] = sorted(path.read_text("utf-8").replace(folder.name, "").splitlines())
        elif path.suffix == ".jsonl":
            found[name] = sorted(path.read_text("utf-8").splitlines())
        else:
            found[name] = path.read_bytes()
    return found


def trial(make: Callable[[Path], None], kills: int, seed: int) -> tuple[int, list[str]]:
    """How many children were killed, and the files that differ from those of a run that nobody has killed."""
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / name for name in ("whole", "killed")]
        kill_often(make, folders[0], 0, random.Random(seed))
        killed = kill_often(make, folders[1], kills, random.Random(seed))
        whole, other = map(content, folders)
        return killed, [name for name in sorted({*whole, *other}) if whole.get(name) != other.get(name)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="kills of each")
    parser.add_argument("--of", choices=("caches", "samples", "suites"), help="only these")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # a process with a pool of threads cannot be forked
    cache.tqdm = partial(cache.tqdm, disable=True)
    for name in NEEDED:
        import_module(name)
    enough = partial(make_samples, seeds=max(20, 2 * asked.kills))  # for every kill to find one at work
    for what, make in (("caches", make_cache), ("samples", enough), ("suites", make_suite)):
        if asked.of not in (None, what):
            continue
        killed, differing = trial(make, asked.kills, asked.seed)
        print(f"{what}: {killed} of {asked.kills} killed at work; differing files: {differing or 'none'}")
