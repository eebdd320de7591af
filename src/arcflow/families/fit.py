"""How a pipeline is put on a device (`--fit`): whole, part by part, layer by layer, or in fewer bits.

    card      everything on the device
    offload   one part at a time on the card, the rest in the CPU's memory
    int8      transformer and text encoders in 8 bits (torchao, bitsandbytes), one part at a time on the card
    nf4       the same in 4 bits (bitsandbytes)
    group     layer by layer on the card

"auto" is the fastest that fits, by the model's own sizes and what a call takes (`families.memory`, as `arcflow doctor`
tells it). On a device other than a GPU there is nothing to fit into: "card" it is there, and "int8" on a CPU.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from arcflow.config import Dtype, Fit, Model
from arcflow.families.family import Family
from arcflow.families.memory import Parts, best, parts_of, ways
from arcflow.system.packages import need

Chosen = Literal["card", "offload", "int8", "nf4", "group"]

SHORT: dict[Chosen, tuple[Literal["int8", "nf4"], Literal[4, 8]]] = {"int8": ("int8", 8), "nf4": ("nf4", 4)}
"""The ways that store weights in fewer bits: how the transformer's, and bits of the text encoders'."""

BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""Names of weights in a part's folder; with `.index.json` behind it, a list of several files."""


def check_fit(fit: Fit, device: torch.device) -> None:
    """Refuse what this device, or what is installed, has no way for.

    Raises:
        ValueError: in a sentence, with what would do.
    """
    remedy = f"take --fit {'card or int8' if device.type == 'cpu' else 'card'}, or --device cuda"
    if device.type != "cuda" and (fit in ("offload", "nf4", "group") or (fit == "int8" and device.type != "cpu")):
        raise ValueError(f"--fit {fit} is for GPUs, and the device is {device.type}: {remedy}")
    if fit == "int8":
        need("torchao", asked="--fit int8", install="arcflow[quantized]")
    if fit == "nf4" or (fit == "int8" and device.type == "cuda"):
        need("bitsandbytes", asked=f"--fit {fit}", install="arcflow[quantized]")


def is_short(folder: Path) -> bool:
    """Whether the transformer of a pipeline's folder is stored in few bits."""
    config = folder / "transformer" / "config.json"
    return config.is_file() and "quantization_config" in json.loads(config.read_text("utf-8"))


def choose(fit: Fit, device: torch.device, parts: Parts, *, short: bool = False) -> Chosen:
    """The way that "auto" stands for here; any other as it is.

    Args:
        parts: what the model takes, see `weighed`.
        short: the weights are in few bits already, so there is no choosing of fewer.

    Raises:
        ValueError: the card is too small for every way.
    """
    if fit != "auto":
        return fit
    if device.type != "cuda":
        return "card"
    card = torch.cuda.get_device_properties(device).total_memory / 1e9
    return fastest(parts, card, short=short)


def fastest(parts: Parts, card: int | float, *, short: bool = False) -> Chosen:
    """The fastest way that fits a card with this memory in GB; see `choose`."""
    way = best(parts, card)
    if short:
        way = next((way for way in ways(parts) if way.gigabytes <= card and way.fit not in SHORT), None)
    if way is None:
        least = min(way.gigabytes for way in ways(parts))
        raise ValueError(
            f"the card has {card:.1f} GB, and the smallest way takes {least:.1f} GB, computed at 1024 x 1024: expected "
            f"a larger card; --fit group tries it all the same, at a smaller size perhaps"
        )
    assert way.fit != "auto"
    return way.fit


def room_to_fuse(parts: Parts, device: torch.device) -> bool:
    """Whether a card that holds everything has room for the copies that fusing makes, of all Linears at worst."""
    if device.type != "cuda":
        return True
    card = torch.cuda.get_device_properties(device).total_memory / 1e9
    return next(ways(parts)).gigabytes + parts.transformer <= card


def weighed(folder: Path, family: Family, dtype: Dtype) -> Parts:
    """GB that the model in a pipeline's folder takes: its own weights in that dtype, counted in their files, and for a
    call what the family's large model needs. Where the files do not tell, the large model's."""
    row = parts_of(family.name)
    each = BYTES[dtype]
    parts = [part for part in folder.iterdir() if part.is_dir() and not part.name.startswith(".")]
    found = {part.name: sum(_bytes(file, each) for file in _files(part)) / 1e9 for part in parts}
    if not found.get("transformer"):
        return row
    text = sum(size for name, size in found.items() if name.startswith("text_encoder"))
    return replace(row, transformer=found["transformer"], text=text, vae=found.get("vae", row.vae))


def _files(part: Path) -> Iterator[Path]:
    """The files of a part's weights, one precision of it."""
    for name in WEIGHTS:
        index = part / f"{name}.index.json"
        if index.is_file():
            shards = json.loads(index.read_text("utf-8"))["weight_map"].values()
            yield from (part / shard for shard in sorted(set(shards)))
        elif (part / name).is_file():
            yield part / name


def _bytes(file: Path, each: int) -> int:
    """Bytes of a file's tensors where floats take so many each, and all others what they take there."""
    total = 0
    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            stored = opened.get_slice(name)
            size = each if stored.get_dtype() in ("F32", "BF16", "F16", "F64") else STORED.get(stored.get_dtype(), 1)
            total += size * math.prod(stored.get_shape())
    return total


STORED = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
"""Bytes of types that are no floats, where it is not one."""


def shortened(model: Model, fit: Chosen, device: torch.device) -> Model:
    """Settings of a model for the bits that a way asks for. On a CPU its memory holds the text encoders."""
    if fit not in SHORT:
        return model
    quantize, bits = SHORT[fit]
    return replace(model, quantize=quantize, text_bits=bits if device.type == "cuda" else None)


def fitted(pipe: DiffusionPipeline, fit: Chosen, device: torch.device) -> DiffusionPipeline:
    """The same pipeline, on its device. What goes on it (an adapter) comes before, unless everything is on the card."""
    if fit == "group":
        pipe.enable_group_offload(
            onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=True
        )
    elif fit != "card" and device.type == "cuda":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe
