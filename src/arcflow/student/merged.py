"""A diffusers folder whose transformer is the student: for programs that read folders and know no LoRA.

The base's folder is copied, and its transformer rewritten shard by shard, so that one shard at a time is in memory. At
the student's own number of steps the pipeline is a stock one with its own Euler scheduler.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from arcflow.student.plain_lora import Factors
from arcflow.system import files

FLOATS = ("F32", "F16", "BF16", "F64")
"""Types of weights, as safetensors calls them, into which a LoRA can be added."""

WHOLE = (".safetensors", ".ckpt", ".pt", ".bin", ".gguf")
"""How files end that may lie beside a pipeline with the whole model in them: the base's, which nobody needs here."""


def write_merged(base: Path, out: Path, factors: Mapping[str, Factors], scheduler: Mapping[str, object]) -> Path:
    """The folder, with a pipeline in it: that of `base`, a LoRA added into its transformer, and this scheduler.

    Raises:
        ValueError: `base` is no pipeline's folder, or its weights are quantized or not where the LoRA expects them.
            Nothing is written then.
    """
    index, shards = base / "model_index.json", sorted((base / "transformer").glob("*.safetensors"))
    if not index.is_file() or not shards:
        raise ValueError(
            f"{str(base)!r} is no pipeline that can be merged into: expected a diffusers folder with model_index.json "
            f"and transformer/*.safetensors. Give --model the folder, or the Hub id, of the adapter's base."
        )
    if out.resolve() == base.resolve():
        raise ValueError(f"{str(out)!r} is the base itself: expected another folder; give --out.")
    for shard in shards:
        _check_shard(shard, factors)
    _check_whole(shards, factors)
    parts = json.loads(index.read_text("utf-8"))
    parts["scheduler"] = ["diffusers", scheduler["_class_name"]]
    for path in sorted(base.rglob("*")):
        there = out / path.relative_to(base)
        if not path.is_file() or path.is_relative_to(out) or path in (index, *shards):
            continue
        hidden = any(part.startswith(".") for part in path.relative_to(base).parts)
        if hidden or there.parent == out / "scheduler" or (path.parent == base and path.suffix in WHOLE):
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(there, lambda draft, path=path: shutil.copyfile(path, draft))
    (out / "transformer").mkdir(parents=True, exist_ok=True)
    for shard in shards:
        tensors, metadata = _merged_shard(shard, factors)
        files.write_tensors(out / "transformer" / shard.name, tensors, metadata)
    files.write_json(out / "scheduler" / "scheduler_config.json", dict(scheduler))
    files.write_json(out / index.name, parts)  # last: a folder without it is no pipeline
    return out


def _check_shard(shard: Path, factors: Mapping[str, Factors]) -> None:
    """Whether the weights of a file can be added to."""
    with safe_open(shard, "pt") as file:
        for key in file.keys():
            found = factors.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
            if found is None:
                continue
            stored, wanted = file.get_slice(key), [len(found.up), found.down.shape[1]]
            if stored.get_dtype() not in FLOATS or list(stored.get_shape()) != wanted:
                raise ValueError(
                    f"{shard} holds {key} as {stored.get_dtype()} {list(stored.get_shape())}; expected {wanted} in "
                    f"{', '.join(FLOATS)}. Nothing was written. Give --model the unquantized base of the adapter."
                )


def _check_whole(shards: list[Path], factors: Mapping[str, Factors]) -> None:
    """Whether every Linear of the LoRA is there."""
    there: set[str] = set()
    for shard in shards:
        with safe_open(shard, "pt") as file:
            there |= set(file.keys())
    missing = sorted(name for name in factors if f"{name}.weight" not in there)
    if missing:
        raise ValueError(
            f"{shards[0].parent} lacks {len(missing)} Linears of the LoRA, {missing[0]} for one: expected the base "
            f"that the adapter was made for. Nothing was written. Check --model."
        )


def _merged_shard(shard: Path, factors: Mapping[str, Factors]) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(shard, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata() or {"format": "pt"}
    for key, weight in tensors.items():
        found = factors.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        if found is not None:
            tensors[key] = found.merged(weight)
    return tensors, metadata
