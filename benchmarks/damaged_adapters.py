"""Damage adapter files at random and load them: one clear error or the same student, and a network left as it was.

    python -m benchmarks.damaged_adapters [--count 10000] [--seed 0]

Each of the `LAYOUTS` is damaged `count` times, in one of the ways of `DAMAGES`: bits, cuts, headers, names, types,
values and records. Right is one ValueError of one line, after which the network is what it was, or the student that was
saved, to the last bit. Where nothing holds a checksum (the published layout, older records) a changed number cannot be
told from a trained one; there the student has to be finite.
"""

import argparse
import copy
import dataclasses
import json
import random
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from arcflow import student
from arcflow.student import adapter
from arcflow.student.record import FREE, AdapterInfo
from arcflow.system.text import controls

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2.5, 1e400, -0.0, 10**30, "", "x", "\x1b[31mred", "a\nb", "mixture"),
    *("coefficients", "all", [], [1], [[[]]], {}, {"x": 1}, float("nan"), float("-inf")),
)
LAYOUTS = ("folder", "folder, coefficients", "file", "file, coefficients", "published", "folder without checksum")
Told = tuple[dict[str, Any], dict[str, Tensor]]
"""Record and weights of an adapter."""

HELD = LAYOUTS[:4]
"""Layouts that hold a checksum."""


def network() -> Any:
    """A tiny FLUX transformer."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 1}
    sizes |= {"in_channels": 8, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4)}
    return FluxTransformer2DModel(**sizes, guidance_embeds=True).eval()


def make(net: Any, path: Path, layout: str) -> None:
    """An adapter for this network, in a folder of its own."""
    form = "coefficients" if "coefficients" in layout else "mixture"
    learned = student.build(copy.deepcopy(net), modes=3, rank=2, form=form, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in student.trainable(learned).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    target = path / "one.safetensors" if layout.startswith("file") else path
    adapter.save_adapter(learned, target, layout="published" if layout == "published" else "arcflow")
    if layout == "folder without checksum":
        record = json.loads((path / "arcflow.json").read_text())
        record["sha256"] = {}
        (path / "arcflow.json").write_text(json.dumps(record))
        weights = path / "adapter.safetensors"
        header, body = parts(weights)
        header.pop("__metadata__")
        put(weights, header, body)


def parts(weights: Path) -> tuple[dict[str, Any], bytes]:
    """Header and numbers of a safetensors file."""
    content = weights.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def put(weights: Path, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(text)) + text + body)


def changed(record: Any, draw: random.Random) -> Any:
    """A JSON value with one change somewhere in it."""
    if isinstance(record, dict) and record and draw.random() < 0.85:
        name = draw.choice(sorted(record))
        way = draw.randrange(5)
        if way == 0:
            return {key: value for key, value in record.items() if key != name}
        if way == 1:
            return record | {draw.choice((f"{name}x", name.upper(), "\x1b[2J")): record[name]}
        return record | {name: changed(record[name], draw)}
    if isinstance(record, list) and record and draw.random() < 0.7:
        where = draw.randrange(len(record))
        return [changed(one, draw) if i == where else one for i, one in enumerate(record)]
    if isinstance(record, int | float) and not isinstance(record, bool) and draw.random() < 0.6:
        return record + draw.choice((-1, 1, 0.5, 1e-3, 1000))
    return draw.choice(ODD)


def bits(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 2, 32))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    at = draw.randrange(len(content))
    more = bytes(draw.randrange(256) for _ in range(draw.choice((1, 8, 100))))
    path.write_bytes(draw.choice((content[:at], content + more, content[:at] + more + content[at:], b"", content * 2)))


def header(path: Path, draw: random.Random) -> None:
    head, body = parts(path)
    name = draw.choice(sorted(head))
    put(path, head | {name: changed(head[name], draw)} if draw.random() < 0.8 else changed(head, draw), body)


def exchanged(path: Path, draw: random.Random) -> None:
    head, body = parts(path)
    one, other = draw.sample([name for name in head if name != "__metadata__"], 2)
    put(path, head | {one: head[other], other: head[one]}, body)


def prefixed(path: Path, draw: random.Random) -> None:
    """Names with and without the prefix that some writers put before them."""
    head, body = parts(path)
    names = [name for name in head if name != "__metadata__"]
    some = set(names) if draw.random() < 0.5 else set(draw.sample(names, 3))
    put(path, {f"transformer.{name}" if name in some else name: value for name, value in head.items()}, body)


def numbers(path: Path, draw: random.Random) -> None:
    """One number that a float can be, but a weight cannot, or another weight."""
    head, body = parts(path)
    what = head[draw.choice([name for name in head if name != "__metadata__"])]
    kind, (start, end) = {"F32": "<f", "F16": "<e", "BF16": "<e"}[what["dtype"]], what["data_offsets"]
    size = struct.calcsize(kind)
    at = start + size * draw.randrange((end - start) // size)
    value = struct.pack(kind, draw.choice((float("nan"), float("inf"), float("-inf"), 0.0, 1.5)))
    put(path, head, body[:at] + value + body[at + size :])


def record(path: Path, draw: random.Random) -> None:
    """A change in the record: beside the tensors, or in their file's metadata."""
    beside = [path.parent / name for name in ("arcflow.json", "config.json") if (path.parent / name).is_file()]
    if beside and draw.random() < 0.7:
        content = json.loads(beside[0].read_text())
        beside[0].write_text(json.dumps(changed(content, draw)))
        return
    head, body = parts(path)
    metadata = head.get("__metadata__", {})
    if "arcflow" in metadata:
        metadata = metadata | {"arcflow": json.dumps(changed(json.loads(metadata["arcflow"]), draw))}
    put(path, head | {"__metadata__": metadata if draw.random() < 0.8 else changed(metadata, draw)}, body)


def record_bits(path: Path, draw: random.Random) -> None:
    beside = [path.parent / name for name in ("arcflow.json", "config.json") if (path.parent / name).is_file()]
    draw.choice((bits, cut))(beside[0] if beside else path, draw)


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    *(bits, cut, header, exchanged, prefixed, numbers, record, record_bits),
)


def loaded(net: Any, path: Path, wanted: Told, before: dict[str, Tensor]) -> str:
    """What a damaged adapter does: "refused", "the same", "other numbers", or what is wrong about it."""
    try:
        adapter.load_adapter(net, path)
    except ValueError as error:
        text = str(error)
        if controls(text) or not text:
            return f"wrong: an error of several lines or with control characters: {text!r}"
        return "refused" if same(net.state_dict(), before) else "wrong: refused, and the network is another one"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"
    info, weights = adapter.read_info(path), {k: p.detach().clone() for k, p in student.trainable(net).items()}
    student.remove(net)
    if not same(net.state_dict(), before):
        return "wrong: taken off, and the network is another one"
    if not all(weight.isfinite().all() for weight in weights.values()):
        return "wrong: weights that are not finite"
    return "the same" if same(weights, wanted[1]) and deciding(info) == wanted[0] else "other numbers"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def deciding(info: AdapterInfo) -> dict[str, Any]:
    """What of a record decides the images."""
    return {name: value for name, value in dataclasses.asdict(info).items() if name not in FREE}


def told_by(net: Any, path: Path) -> Told:
    """Record and weights of an adapter before it is damaged."""
    adapter.load_adapter(net, path)
    weights = {name: parameter.detach().clone() for name, parameter in student.trainable(net).items()}
    student.remove(net)
    return deciding(adapter.read_info(path)), weights


def study(layout: str, draws: Iterable[int]) -> tuple[Counter[str], list[str]]:
    """(how often what came of it, by damage; what was wrong) for these seeds."""
    counts, wrong, net = Counter[str](), list[str](), network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with tempfile.TemporaryDirectory() as place:
        whole, hurt = Path(place) / "whole", Path(place) / "hurt"
        whole.mkdir()
        make(net, whole, layout)
        name = "one.safetensors" if layout.startswith("file") else ""
        wanted = told_by(net, whole / name)
        for seed in draws:
            draw = random.Random(f"{layout} {seed}")
            shutil.rmtree(hurt, ignore_errors=True)
            shutil.copytree(whole, hurt)
            weights = next(hurt.glob("*.safetensors"))
            damage = draw.choice(DAMAGES)
            damage(weights, draw)
            came = loaded(net, hurt / name, wanted, before)
            counts[came.partition(":")[0]] += 1
            if came.startswith("wrong") or (layout in HELD and came == "other numbers"):
                wrong.append(f"{layout}, {damage.__name__}, seed {seed}: {came}")
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found: list[str] = []
    for layout in LAYOUTS:
        counts, wrong = study(layout, range(options.seed, options.seed + options.count))
        print(f"{layout}: {', '.join(f'{n} {what}' for what, n in counts.most_common())}", flush=True)
        found += wrong
        for line in wrong[:5]:
            print(f"    {line[:300]}")
    if found:
        raise SystemExit(f"{len(found)} wrong")


if __name__ == "__main__":
    main()
