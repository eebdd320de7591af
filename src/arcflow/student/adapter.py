"""Adapters found, loaded and saved: a folder, or a repository on the Hugging Face Hub.

Loading is all or nothing: every name and shape is held against the transformer before anything is changed, and whatever
is wrong is one ValueError that names it. `sampling.attach` puts the adapter on a whole pipeline."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch

from arcflow.families import family_of
from arcflow.families.weights import compute_dtype
from arcflow.student import layers as student_layers
from arcflow.student.build import build, remove
from arcflow.student.formats import (
    FILES,
    PAIRS,
    AdapterInfo,
    Layout,
    checked_tensors,
    few,
    find,
    fingerprint_of,
    published_config,
    published_tensors,
    sizes_of,
)
from arcflow.student.layers import trainable
from arcflow.system import files, hub
from arcflow.system.packages import version_of
from arcflow.system.processes import whole, writes


def load_adapter(transformer: Any, folder: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """The same transformer, now the student that the adapter describes, in evaluation mode; an adapter it already
    carries is replaced. LoRA weights take `dtype`, the base's unless given; head and norm are float32."""
    found = find(_local(folder))
    info = found.info
    tensors = checked_tensors(transformer, found)
    if student_layers.is_student(transformer):
        remove(transformer)
    build(
        transformer,
        modes=info.modes,
        rank=max(info.rank, 1),
        alpha=info.alpha or None,
        dropout=0.0,
        lora=info.rank > 0,
        targets=info.targets,
        generator=torch.Generator().manual_seed(0),  # all of it is overwritten: leave the global generator alone
    )
    with torch.no_grad():
        for name, parameter in trainable(transformer).items():
            parameter.copy_(tensors[name])
    dtype = dtype or compute_dtype(transformer)
    for layer in student_layers.lora_layers(transformer).values():
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)
    return transformer.eval()


def save_adapter(
    transformer: Any, folder: str | Path, *, info: AdapterInfo | None = None, layout: Layout = "arcflow"
) -> Path:
    """The folder, with the student's adapter in it. Each file appears whole or not at all. All processes among which a
    network is shared out must call; the first one writes."""
    if layout not in FILES:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(map(repr, FILES))}.")
    full = describe(transformer, info)
    tensors = {name: whole(p.detach()).cpu().contiguous() for name, p in trainable(transformer).items()}
    folder = Path(folder)
    if not writes(transformer):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weights, record = (folder / name for name in FILES[layout])
    if layout == "published":
        content, metadata = published_config(transformer, full), {"policy_config": json.dumps({"type": "ArcFlow"})}
        tensors = published_tensors(tensors, full)
    else:
        content, metadata = dataclasses.asdict(full), {"format": "arcflow"}
    files.write_tensors(weights, tensors, metadata)
    files.write_json(record, content)
    for other in {"arcflow", "published"} - {layout}:
        for name in FILES[other]:  # a folder holds one adapter
            (folder / name).unlink(missing_ok=True)
    return folder


def read_info(path: str | Path) -> AdapterInfo:
    """What the adapter in a folder (or on the Hub) says about itself."""
    return find(_local(path)).info


def describe(transformer: Any, info: AdapterInfo | None = None) -> AdapterInfo:
    """`info`, completed by what the student itself tells."""
    family, layers = family_of(transformer), list(student_layers.lora_layers(transformer).values())
    info = info or AdapterInfo()
    rank = layers[0].r[student_layers.ADAPTER] if layers else 0
    return dataclasses.replace(
        info,
        base=info.base or str(getattr(transformer.config, "_name_or_path", "") or ""),
        family=family.name,
        modes=student_layers.modes(transformer),
        pixels=family.pixels,
        rank=rank,
        alpha=layers[0].scaling[student_layers.ADAPTER] * rank if layers else 0.0,
        targets=student_layers.targets(transformer),
        guidance=family.guidance if info.guidance is None else info.guidance,
        sizes=sizes_of(transformer),
        fingerprint=fingerprint_of(transformer),
        versions={name: version_of(name) for name in ("arcflow", "torch", "diffusers", "peft")},
    )


def _local(path: str | Path) -> Path:
    """The folder a path means: a folder, or "root:subfolder" with a folder or a Hub repository as the root."""
    if Path(path).is_dir():
        return Path(path)
    root, _, inside = str(path).partition(":")
    if inside and Path(root).is_dir():
        if not (Path(root) / inside).is_dir():
            there = sorted(entry.name for entry in Path(root).iterdir() if entry.is_dir())
            raise ValueError(
                f"{root!r} has no subfolder {inside!r}: expected one that holds an adapter; found {there}."
            )
        return Path(root) / inside
    if Path(path).is_file():
        raise ValueError(
            f"{str(path)!r} is a file; expected a folder that holds {PAIRS}. Give the folder, not a file in it."
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", root):
        return _fetched(root, inside)
    raise ValueError(
        f"no adapter folder {str(path)!r}; expected an existing folder that holds {PAIRS}, or a repository on the "
        f"Hugging Face Hub as 'owner/name' or 'owner/name:subfolder'."
    )


def _fetched(repository: str, inside: str) -> Path:
    """A local copy of an adapter on the Hub."""
    inside = inside.strip("/")
    prefix = f"{inside}/" if inside else ""
    folder = hub.fetch(repository, [f"{prefix}{name}" for files in FILES.values() for name in files]) / inside
    if not any(all((folder / file).is_file() for file in files) for files in FILES.values()):
        names = [f"'{repository}:{name}'" for files in FILES.values() for name in hub.folders(repository, files)]
        raise ValueError(
            f"{repository!r} has no adapter in its {f'subfolder {inside!r}' if inside else 'top folder'}: expected "
            f"{PAIRS}. {f'Such files are in {few(names)}' if names else 'It holds none'}; see "
            f"https://huggingface.co/{repository}/tree/main."
        )
    return folder
