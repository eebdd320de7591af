"""Do to a pipeline what its users do, in random order, with and without a student: is the image always the right one?

    python -m benchmarks.gestures [--count 100] [--length 12] [--seed 0] [--family flux] [--compiled]

A tiny pipeline is put through random gestures: students that come, go, are fused and exchanged; styles that are loaded,
weighed, switched off, merged, deleted; joined projections, offload, copies, another process, another thread, refused
calls. `State` keeps, in plain words, what should be on by now. After each gesture the pipeline draws, and what it draws
must be what a fresh pipeline draws that was brought into that state by the shortest way.
"""

import argparse
import copy
import pickle
import random
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from torch import Tensor

import arcflow
from arcflow import student
from arcflow.student import adapter
from arcflow.student.state import uncompiled
from tests.support.pipelines import PIPELINES, fresh, perturb, sample, save_style

STYLES = {
    "flux": (["ff.net.2", "proj_mlp"], ["ff.net.2", "norm_out.linear", "proj_out"]),
    "qwen_image": (["img_mlp.net.2"], ["img_mlp.net.2", "norm_out.linear", "proj_out"]),
    "flux2": (["ff.linear_out"], ["ff.linear_out", "norm_out.linear", "proj_out"]),
}
"""Layers of two styles: of the blocks alone, and of the norm and the last layer too, which the student has its own of.
Attention is left out: a style on it does not count while projections are joined, in a stock pipeline either."""


@dataclass
class State:
    """What should be on."""

    student: str | None = None
    fused: bool = False
    active: dict[str, float] = field(default_factory=dict)
    """Strengths of the styles that are loaded and named by the last `set_adapters`."""
    loaded: list[str] = field(default_factory=list)
    off: bool = False
    merged: float | None = None
    """Strength at which the active styles are merged into the base."""
    joined: bool = False
    offloaded: bool = False
    compiled: bool = False

    def seen(self) -> tuple[str | None, tuple[tuple[str, float], ...]]:
        """What an image depends on."""
        scale = 1.0 if self.merged is None else self.merged
        return self.student, tuple(sorted((n, w * scale) for n, w in self.active.items() if not self.off and w))


Gesture = Callable[["Walk", random.Random], None]


class Bench:
    """A pipeline, two adapters and two styles for it, and the images of every state that was asked for."""

    def __init__(self, family: str, place: Path) -> None:
        torch.manual_seed(0)
        self.stock = PIPELINES[family]()
        self.adapters, self.styles = {}, {}
        for seed, form in enumerate(("mixture", "coefficients")):
            net = copy.deepcopy(self.stock.transformer)
            student.build(net, modes=4, rank=2, targets="all", form=form, generator=torch.Generator().manual_seed(seed))
            perturb(net, seed=seed)
            self.adapters[form] = adapter.save_adapter(net, place / form)
        for name, chosen in zip(("blocks", "ends"), STYLES[family], strict=True):
            self.styles[name] = save_style(self.stock, place / name, chosen)
        self.images: dict[object, Tensor] = {}

    def wanted(self, state: State) -> Tensor:
        """What a fresh pipeline draws that was brought into this state by the shortest way."""
        seen = state.seen()
        if seen not in self.images:
            pipe = fresh(self.stock)
            for name, _ in seen[1]:
                pipe.load_lora_weights(self.styles[name], adapter_name=name)
            if seen[1]:
                pipe.set_adapters([name for name, _ in seen[1]], [weight for _, weight in seen[1]])
            if seen[0]:
                arcflow.attach(pipe, self.adapters[seen[0]])
            self.images[seen] = image(pipe)
        return self.images[seen]


class Walk:
    """One pipeline on its way."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.pipe, self.state = bench, fresh(bench.stock), State()

    def draw(self) -> Tensor:
        return image(self.pipe)


def image(pipe: object) -> Tensor:
    """Latents from one prompt and one noise."""
    drawn = sample(pipe)
    assert isinstance(drawn, Tensor)
    return drawn


class Refused(Exception):
    """A gesture that makes no sense in this state."""


def only(condition: bool) -> None:
    if not condition:
        raise Refused


def attach(walk: Walk, draw: random.Random) -> None:
    only(not walk.state.offloaded)
    name, fused = draw.choice(list(walk.bench.adapters)), draw.random() < 0.4
    only(walk.state.merged is None or "ends" not in walk.state.active)
    arcflow.attach(walk.pipe, walk.bench.adapters[name], fuse=fused)
    walk.state.student, walk.state.fused = name, fused


def detach(walk: Walk, draw: random.Random) -> None:
    only(walk.state.student is not None and not walk.state.offloaded)
    arcflow.detach(walk.pipe)
    walk.state.student, walk.state.fused = None, False


def fuse(walk: Walk, draw: random.Random) -> None:
    only(walk.state.student is not None and not walk.state.offloaded)
    net = uncompiled(walk.pipe.transformer)
    (student.unfuse if walk.state.fused else student.fuse)(net)
    walk.state.fused = not walk.state.fused


def load(walk: Walk, draw: random.Random) -> None:
    left = [name for name in walk.bench.styles if name not in walk.state.loaded]
    only(bool(left) and walk.state.merged is None and not walk.state.off and not walk.state.offloaded)
    only(not walk.state.compiled)  # what is loaded into a compiled transformer is not found again, in stock either
    name = draw.choice(left)
    walk.pipe.load_lora_weights(walk.bench.styles[name], adapter_name=name)
    walk.state.loaded.append(name)
    weigh(walk, draw)  # which are on after a load is diffusers' business


def weigh(walk: Walk, draw: random.Random) -> None:
    only(bool(walk.state.loaded) and walk.state.merged is None and not walk.state.off)
    names = draw.sample(walk.state.loaded, draw.randint(1, len(walk.state.loaded)))
    weights = [draw.choice((0.5, 1.0)) for _ in names]
    walk.pipe.set_adapters(names, weights)
    walk.state.active = dict(zip(names, weights, strict=True))


def switch(walk: Walk, draw: random.Random) -> None:
    only(bool(walk.state.loaded) and walk.state.merged is None)
    (walk.pipe.enable_lora if walk.state.off else walk.pipe.disable_lora)()
    walk.state.off = not walk.state.off


def delete(walk: Walk, draw: random.Random) -> None:
    only(bool(walk.state.loaded) and walk.state.merged is None and not walk.state.off)
    name = draw.choice(walk.state.loaded)
    walk.pipe.delete_adapters(name)
    walk.state.loaded.remove(name)
    walk.state.active.pop(name, None)
    if walk.state.loaded:
        weigh(walk, draw)


def unload(walk: Walk, draw: random.Random) -> None:
    only(walk.state.merged is None and not walk.state.offloaded)
    walk.pipe.unload_lora_weights()
    walk.state.loaded, walk.state.active, walk.state.off = [], {}, False


def merge(walk: Walk, draw: random.Random) -> None:
    only(not walk.state.off and not walk.state.offloaded and list(walk.state.active) == ["blocks"])
    only(not walk.state.compiled)  # a stock transformer does not notice it either
    if walk.state.merged is None:
        walk.state.merged = draw.choice((0.5, 1.0))
        walk.pipe.fuse_lora(lora_scale=walk.state.merged)
    else:
        walk.pipe.unfuse_lora()
        walk.state.merged = None
        weigh(walk, draw)  # a stock pipeline keeps the strength of the merge


def join(walk: Walk, draw: random.Random) -> None:
    net = uncompiled(walk.pipe.transformer)
    only(hasattr(net, "fuse_qkv_projections") and not walk.state.offloaded and not walk.state.compiled)
    (net.unfuse_qkv_projections if walk.state.joined else net.fuse_qkv_projections)()
    walk.state.joined = not walk.state.joined


def offload(walk: Walk, draw: random.Random) -> None:
    net = uncompiled(walk.pipe.transformer)
    only(not walk.state.compiled)
    if walk.state.offloaded:
        remove_hook_from_module(net, recurse=True)
    else:
        cpu_offload(net, execution_device=torch.device("cpu"), offload_buffers=True)
    walk.state.offloaded = not walk.state.offloaded


def copied(walk: Walk, draw: random.Random) -> None:
    only(not walk.state.offloaded and not walk.state.compiled)
    old = walk.pipe
    walk.pipe = copy.copy(old)
    walk.pipe.transformer, walk.pipe.scheduler = copy.deepcopy((old.transformer, old.scheduler))
    if walk.state.student:
        arcflow.detach(old)  # whatever the old one does, the copy goes its own way


def pickled(walk: Walk, draw: random.Random) -> None:
    only(not walk.state.offloaded and not walk.state.compiled)
    walk.pipe.transformer = pickle.loads(pickle.dumps(walk.pipe.transformer))


def threaded(walk: Walk, draw: random.Random) -> None:
    second, drawn = copy.copy(walk.pipe), []
    second.scheduler = copy.deepcopy(walk.pipe.scheduler)
    thread = threading.Thread(target=lambda: drawn.append(image(second)))
    thread.start()
    thread.join()
    if not drawn or not close(drawn[0], walk.bench.wanted(walk.state)):
        raise AssertionError("another image in another thread")


def refused(walk: Walk, draw: random.Random) -> None:
    """Calls that cannot be, of which nothing may be left."""
    pipe, net = walk.pipe, uncompiled(walk.pipe.transformer)
    parts = [lambda: arcflow.attach(pipe, walk.bench.styles["blocks"])]
    if walk.state.student:
        parts += [lambda: pipe.save_pretrained("never"), lambda: student.build(net, modes=4)]
    else:
        parts += [lambda: arcflow.detach(pipe), lambda: student.fuse(net)]
    if walk.state.offloaded:
        parts += [lambda: arcflow.attach(pipe, walk.bench.adapters["mixture"])]
    try:
        draw.choice(parts)()
    except ValueError:
        return
    raise AssertionError("not refused")


def compiled(walk: Walk, draw: random.Random) -> None:
    only(not walk.state.offloaded)
    if walk.state.compiled:
        walk.pipe.transformer = uncompiled(walk.pipe.transformer)
    else:
        walk.pipe.transformer = torch.compile(walk.pipe.transformer, backend=draw.choice(BACKENDS))
    walk.state.compiled = not walk.state.compiled


def compiled_in_place(walk: Walk, draw: random.Random) -> None:
    """Compiled under its own name, whole or block by block, or compiled no more."""
    net = uncompiled(walk.pipe.transformer)
    only(not walk.state.offloaded and not walk.state.compiled)
    parts = [module for module in net.modules() if getattr(module, "_compiled_call_impl", None) is not None]
    if parts:
        for module in parts:
            module._compiled_call_impl = None
    elif draw.random() < 0.5:
        net.compile(backend=draw.choice(BACKENDS))
    else:
        net.compile_repeated_blocks(backend=draw.choice(BACKENDS))


BACKENDS = ("eager", "eager", "eager", "aot_eager")
"""What a graph is run with: what is asked here is what is traced, and when it is traced again."""

GESTURES: tuple[Gesture, ...] = (
    attach, attach, detach, fuse, load, load, weigh, switch, delete, unload,
    merge, join, offload, copied, pickled, threaded, refused,
)  # fmt: skip


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=2e-4)


def walk_once(bench: Bench, draw: random.Random, length: int, gestures: tuple[Gesture, ...]) -> str | None:
    """What went wrong on one walk; None if nothing."""
    walk, done = Walk(bench), list[str]()
    while len(done) < length:
        gesture = draw.choice(gestures)
        try:
            gesture(walk, draw)
        except Refused:
            continue
        except Exception as error:
            return f"{' '.join([*done, gesture.__name__])}: {type(error).__name__}: {error}"
        done.append(gesture.__name__)
        try:
            drawn = walk.draw()
        except Exception as error:
            return f"{' '.join(done)}: drawing: {type(error).__name__}: {error}"
        if not close(drawn, bench.wanted(walk.state)):
            apart = float((drawn - bench.wanted(walk.state)).square().mean().sqrt())
            return f"{' '.join(done)}: another image, {apart:.2g} off, in {walk.state}"
    return None


def survey(family: str, count: int, length: int, seed: int, more: tuple[Gesture, ...] = ()) -> list[str]:
    """What went wrong in so many walks of so many gestures."""
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bench = Bench(family, Path(place))
        draws = (random.Random(f"{family}/{seed}/{i}") for i in range(count))
        return [flaw for draw in draws if (flaw := walk_once(bench, draw, length, (*GESTURES, *more)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--length", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=list(PIPELINES), nargs="*", default=list(PIPELINES))
    parser.add_argument("--compiled", action="store_true", help="compile and take apart again as well (slow)")
    options = parser.parse_args()
    for family in options.family:
        more = 2 * (compiled, compiled_in_place) if options.compiled else ()
        flaws = survey(family, options.count, options.length, options.seed, more)
        for flaw in flaws:
            print(f"{family}: {flaw}")
        print(f"{family}: {len(flaws)} of {options.count} walks of {options.length} gestures went wrong")


if __name__ == "__main__":
    main()
