"""A diffusers folder whose transformer is the student: for programs that read folders and know no LoRA.

The base's folder is copied, and its transformer rewritten shard by shard, so that one shard at a time is in memory. A
student in coefficients is, at its own number of steps, a stock pipeline with its own Euler scheduler. A mixture keeps
the classes of the base, with a wider last layer, and brings its scheduler as a file: `scheduling_arcflow`.
"""

import ast
import inspect
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from arcflow import portable
from arcflow.families import family_named as named_family
from arcflow.student.plain_lora import Factors, factors_of, stock_scheduler
from arcflow.student.record import AdapterInfo
from arcflow.system import files

FLOATS = ("F32", "F16", "BF16", "F64")
"""Types of weights, as safetensors calls them, into which a LoRA can be added."""

WHOLE = (".safetensors", ".ckpt", ".pt", ".bin", ".gguf")
"""How files end that may lie beside a pipeline with the whole model in them: the base's, which nobody needs here."""

SCHEDULING = "scheduling_arcflow"
"""Module of the scheduler that a mixture brings."""


@dataclass(frozen=True)
class Change:
    """What becomes of a base's folder."""

    factors: Mapping[str, Factors]
    """LoRA by the names of the Linears."""
    scheduler: Mapping[str, object]
    """The configuration of the scheduler."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """What is put in the place of the base's own, or beside it."""
    packed: int | None = None
    """Width of the transformer's output, a packed mixture; None if it is the base's."""


def change_of(tensors: Mapping[str, Tensor], info: AdapterInfo) -> Change:
    """What an adapter makes of its base's folder, with nothing lost in either form of a path."""
    if info.form == "coefficients":
        return Change(factors_of(tensors, info), stock_scheduler(info))
    family = named_family(info.family)
    if family.folds or family.sign != 1:
        raise ValueError(
            f"a mixture of {family.name} cannot be merged: its network folds what leaves the head into an image. "
            f"Export --layout arcflow or lora, or distill with model.form coefficients."
        )
    parts = [f"{family.head}_{part}" for part in ("means", "logweights", "loggamma")]
    head = {
        f"{family.head}.{kind}": torch.cat([tensors[f"{part}.{kind}"].float() for part in parts])
        for kind in ("weight", "bias")
    }
    norm = {name: tensor for name, tensor in tensors.items() if name.startswith("norm_out.") and ".lora_" not in name}
    scheduler = {
        "_class_name": "ArcFlowScheduler",
        "num_modes": info.modes,
        "pixels": info.pixels,
        "shift": info.shift,
        "final_step_scale": info.final_step_scale,
        "steps": info.fewest,
        "num_train_timesteps": 1000,
    }
    return Change(factors_of(tensors, info), scheduler, head | norm, len(head[f"{family.head}.bias"]))


def scheduler_code() -> str:
    """`scheduling_arcflow` as one file that needs diffusers alone: the portable formulas, and the scheduler."""
    from arcflow.student import scheduling_arcflow

    imports: set[ast.Import | ast.ImportFrom] = set()
    bodies = []
    for module in (portable, scheduling_arcflow):
        source = inspect.getsource(module)
        found = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
        imports |= set(found)
        end = max(node.end_lineno or 0 for node in found)
        bodies.append("\n".join(source.splitlines()[end:]).strip())

    def place(node: ast.Import | ast.ImportFrom) -> tuple[bool, bool, str]:
        """Order of imports: Python's own first, whole modules before names."""
        name = node.names[0].name if isinstance(node, ast.Import) else str(node.module)
        return name.split(".")[0] not in sys.stdlib_module_names, isinstance(node, ast.ImportFrom), name

    lines: dict[str, bool] = {}
    for node in sorted(imports, key=place):
        text = ast.unparse(node)
        if "arcflow" not in text:
            lines[text] = place(node)[0]
    own, others = ([line for line, other in lines.items() if other is kind] for kind in (False, True))
    head = f'"""{scheduling_arcflow.__doc__}"""'
    return "\n\n".join([head, "\n".join(own), "\n".join(others), *(f"{body}\n" for body in bodies)])


def write_merged(base: Path, out: Path, change: Change) -> Path:
    """The folder, with a pipeline in it: that of `base` with this change.

    Raises:
        ValueError: `base` is no pipeline's folder, or its weights are quantized or not where the LoRA expects them.
            Nothing is written then.
    """
    index = base / "model_index.json"
    shards = sorted((base / "transformer").glob("*.safetensors"))
    if not index.is_file() or not shards:
        raise ValueError(
            f"{str(base)!r} is no pipeline that can be merged into: expected a diffusers folder with model_index.json "
            f"and transformer/*.safetensors. Give --model the folder, or the Hub id, of the adapter's base."
        )
    if out.resolve() == base.resolve():
        raise ValueError(f"{str(out)!r} is the base itself: expected another folder; give --out.")
    for shard in shards:
        _check_shard(shard, change)
    _check_whole(shards, change)
    parts = _placeless(index) or json.loads(index.read_text("utf-8"))
    parts["scheduler"] = ["diffusers" if change.packed is None else SCHEDULING, change.scheduler["_class_name"]]
    for path in sorted(base.rglob("*")):
        there = out / path.relative_to(base)
        if not path.is_file() or path.is_relative_to(out) or path in (index, *shards):
            continue
        hidden = any(part.startswith(".") for part in path.relative_to(base).parts)
        if hidden or there.parent == out / "scheduler" or (path.parent == base and path.suffix in WHOLE):
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json" and (record := _placeless(path)) is not None:
            files.write_json(there, record)
        else:
            files.write_atomic(there, partial(shutil.copyfile, path))
    (out / "transformer").mkdir(parents=True, exist_ok=True)
    size = 0
    for shard in shards:
        tensors, metadata = _merged_shard(shard, change)
        size += sum(tensor.nbytes for tensor in tensors.values())
        files.write_tensors(out / "transformer" / shard.name, tensors, metadata)
    (out / "scheduler").mkdir(exist_ok=True)
    if change.packed is not None:
        _widen(out / "transformer", change.packed, size)
        files.write_text(out / "scheduler" / f"{SCHEDULING}.py", scheduler_code())
    files.write_json(out / "scheduler" / "scheduler_config.json", dict(change.scheduler))
    files.write_json(out / index.name, parts)  # last: a folder without it is no pipeline
    return out


PLACE = "_name_or_path"
"""The field of a configuration in which diffusers and transformers write down where it was read; nobody reads it."""


def _placeless(path: Path) -> dict[str, object] | None:
    """A configuration without the place on this machine that it was read from; None if it names none."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or PLACE not in record:
        return None
    return {name: value for name, value in record.items() if name != PLACE}


def _check_shard(shard: Path, change: Change) -> None:
    """Whether the weights of a file can be added to, or replaced."""
    with safe_open(shard, "pt") as file:
        for key in file.keys():
            found = change.factors.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
            new = change.weights.get(key)
            if found is None and new is None:
                continue
            stored = file.get_slice(key)
            if new is None:
                wanted = [len(found.up), found.down.shape[1]] if found else []
            else:
                wanted = [stored.get_shape()[0], *new.shape[1:]]
            if stored.get_dtype() not in FLOATS or list(stored.get_shape()) != wanted:
                raise ValueError(
                    f"{shard} holds {key} as {stored.get_dtype()} {list(stored.get_shape())}; expected {wanted} in "
                    f"{', '.join(FLOATS)}. Nothing was written. Give --model the unquantized base of the adapter."
                )


def _widen(transformer: Path, packed: int, size: int) -> None:
    """Say in the files how wide the last layer is, and how many bytes there are."""
    config = json.loads((transformer / "config.json").read_text("utf-8"))
    files.write_json(transformer / "config.json", config | {"out_channels": packed // config.get("patch_size", 1) ** 2})
    for index in transformer.glob("*.safetensors.index.json"):
        content = json.loads(index.read_text("utf-8"))
        files.write_json(index, content | {"metadata": content.get("metadata", {}) | {"total_size": size}})


def _check_whole(shards: list[Path], change: Change) -> None:
    """Whether every Linear of the LoRA is there, and every tensor that is replaced."""
    there: set[str] = set()
    for shard in shards:
        with safe_open(shard, "pt") as file:
            there |= set(file.keys())
    bare = sorted(name for name in change.weights if name not in there and name.endswith(".bias"))
    if bare:
        raise ValueError(
            f"the base has no {bare[0]}, as FLUX.2 has none, and a mixture's last layer needs one: no stock class has "
            f"it. Nothing was written. Use the adapter by arcflow.attach or in ComfyUI, or train one in coefficients "
            f"(--model.form coefficients)."
        )
    wanted = {*(f"{name}.weight" for name in change.factors), *change.weights}
    missing = sorted(wanted - there)
    if missing:
        raise ValueError(
            f"{shards[0].parent} lacks {len(missing)} weights of the adapter's, {missing[0]} for one: expected the "
            f"base that the adapter was made for. Nothing was written. Check --model."
        )


def _merged_shard(shard: Path, change: Change) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(shard, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata() or {"format": "pt"}
    for key, weight in tensors.items():
        found = change.factors.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        if key in change.weights:
            tensors[key] = change.weights[key].to(weight.dtype).contiguous()
        elif found is not None:
            tensors[key] = found.merged(weight)
    return tensors, metadata
