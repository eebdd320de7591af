"""Adapters found, loaded and saved: a folder, or a repository on the Hugging Face Hub.

Loading is all or nothing: every name and shape is held against the transformer before anything is changed, and whatever
is wrong is one ValueError that names it. `sampling.attach` puts the adapter on a whole pipeline."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from arcflow.families.weights import compute_dtype
from arcflow.student import record
from arcflow.student.build import Design, check_takes_one, draft, exchange
from arcflow.student.formats import (
    FILES,
    PAIRS,
    PARTS,
    SINGLE,
    Found,
    Layout,
    checked_tensors,
    find,
    fingerprint_of,
    joined_file,
    metadata_of,
    networks_in,
    published_config,
    published_tensors,
    sizes_of,
    tensors_of,
)
from arcflow.student.record import AdapterInfo
from arcflow.student.state import State, parameters_of, state_of, trainable, uncompiled
from arcflow.system import files, hub
from arcflow.system.packages import version_of
from arcflow.system.processes import whole, writes
from arcflow.system.text import few


def load_adapter(transformer: nn.Module, folder: str | Path, *, dtype: torch.dtype | None = None) -> ModelMixin:
    """The same transformer, now the student that the adapter describes, in evaluation mode; an adapter it already
    carries is replaced. LoRA weights take `dtype`, the base's unless given; head and norm are float32."""
    transformer = uncompiled(transformer)
    exchange(transformer, draft_adapter(transformer, folder, dtype=dtype))
    return transformer.eval()


def draft_adapter(
    transformer: ModelMixin, folder: str | Path, *, dtype: torch.dtype | None = None, network: str = ""
) -> State:
    """The student that an adapter describes, ready to be put on this transformer, which is left alone. `network` is
    whose adapter is taken of a file that holds several."""
    found = found_at(folder, network)
    info = found.info
    check_takes_one(transformer)
    tensors = checked_tensors(transformer, found)
    design = Design(
        modes=info.modes,
        rank=info.rank,
        alpha=info.alpha or None,
        dropout=0.0,
        lora=info.rank > 0,
        targets=info.targets,
        form=info.form,
        grids=info.grids,
    )
    # all of it is overwritten: leave the global generator alone
    state = draft(transformer, design, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in parameters_of(state).items():
            parameter.copy_(tensors[name])
    for low in state.lows.values():
        low.to(dtype or compute_dtype(transformer, state.family))
    return state


def save_adapter(
    transformer: nn.Module, folder: str | Path, *, info: AdapterInfo | None = None, layout: Layout = "arcflow"
) -> Path:
    """The folder, with the student's adapter in it; or a file that is one by itself, if the name ends in .safetensors.
    Each file appears whole or not at all. All processes among which a network is shared out must call; the first one
    writes."""
    if layout not in FILES:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(map(repr, FILES))}.")
    folder, single = Path(folder), Path(folder).suffix == SINGLE
    if single and layout != "arcflow":
        raise ValueError(f"{str(folder)!r} is one file, the layout {layout!r} has two; expected a folder.")
    transformer = uncompiled(transformer)
    full = describe(transformer, info)
    tensors = {name: whole(p.detach()).cpu().contiguous() for name, p in trainable(transformer).items()}
    if not writes(transformer):
        return folder
    if layout == "arcflow":
        return write_adapter(tensors, full, folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, told = (folder / name for name in FILES[layout])
    content = published_config(transformer, full)
    policy = {"policy_config": json.dumps({"type": "ArcFlow"})}
    files.write_tensors(weights, published_tensors(tensors, full), policy)
    files.write_json(told, content)
    _leave_one(folder, layout)
    return folder


def write_adapter(tensors: dict[str, Tensor], info: AdapterInfo, path: Path) -> Path:
    """The folder, with an adapter of these tensors in it in our layout; or the file, if its name ends in .safetensors.

    Raises:
        ValueError: the record is one that could not be read again.
    """
    info = dataclasses.replace(info, sha256={})
    record.info_of(json.loads(json.dumps(record.record_content(info))), path)
    single = path.suffix == SINGLE
    weights, told = (path, None) if single else (path / name for name in FILES["arcflow"])
    weights.parent.mkdir(parents=True, exist_ok=True)
    files.write_tensors(weights, tensors, metadata_of(tensors, info))
    if told:
        with_digest = dataclasses.replace(info, sha256={weights.name: files.digest(weights)})
        files.write_json(told, record.record_content(with_digest))
        _leave_one(path, "arcflow")
    return path


def _leave_one(folder: Path, layout: Layout) -> None:
    """A folder holds one adapter."""
    for other in {"arcflow", "published"} - {layout}:
        for name in FILES[other]:
            (folder / name).unlink(missing_ok=True)


def join_adapters(adapters: Mapping[str, str | Path], path: str | Path) -> Path:
    """One file with the adapters of both networks of a pipeline, by the names that these have there: what
    `arcflow.attach` takes for the whole pipeline.

    Raises:
        ValueError: it is not these two networks, or their adapters do not walk one grid.
    """
    if set(adapters) != set(PARTS) or Path(path).suffix != SINGLE:
        raise ValueError(
            f"adapters for {sorted(adapters)} into {str(path)!r}: expected one for each of {', '.join(PARTS)}, and a "
            f"name that ends in {SINGLE}"
        )
    found = {network: found_at(adapters[network]) for network in PARTS}
    one, other = (found[network].info for network in PARTS)
    if (one.shift, one.final_step_scale) != (other.shift, other.final_step_scale):
        raise ValueError(
            f"the adapters were trained at the shifts {one.shift:g} and {other.shift:g}: both networks walk one grid; "
            f"expected the same shift"
        )
    if one.fingerprint and one.fingerprint == other.fingerprint:
        raise ValueError(
            f"both adapters are for the same network: expected one for each; give another than {adapters[PARTS[1]]}"
        )
    held = {name: (tensors_of(one), dataclasses.replace(one.info, sha256={})) for name, one in found.items()}
    files.write_tensors(Path(path), *joined_file(held))
    return Path(path)


def networks_at(path: str | Path) -> tuple[str, ...]:
    """Networks whose adapters a file holds together; none of any other adapter."""
    return networks_in(_local(path))


def found_at(path: str | Path, network: str = "") -> Found:
    """The adapter in a folder, in a file, or on the Hub: its files and what it says about itself. `network` is whose
    adapter is taken of a file that holds several."""
    return find(_local(path), network)


def read_info(path: str | Path) -> AdapterInfo:
    """What the adapter in a folder (or on the Hub) says about itself; of a file with several, what the first does."""
    return found_at(path, next(iter(networks_at(path)), "")).info


def describe(transformer: ModelMixin, info: AdapterInfo | None = None) -> AdapterInfo:
    """`info`, completed by what the student itself tells."""
    state = state_of(transformer)
    info = info or AdapterInfo()
    if state.grids and state.grids != info.grids:
        own, told = ([[round(level, 4) for level in grid] for grid in grids] for grids in (state.grids, info.grids))
        raise ValueError(
            f"the student's own steps are at {own}, the record's at {told}: expected the same. Give info the steps, "
            f"also_steps, shift and final_step_scale that the student was trained with."
        )
    return dataclasses.replace(
        info,
        base=info.base or str(getattr(transformer.config, "_name_or_path", "") or ""),
        family=state.family.name,
        modes=state.modes,
        pixels=state.pixels,
        rank=state.rank,
        alpha=state.alpha,
        targets=state.targets,
        form=state.form,
        guidance=state.family.guidance if info.guidance is None else info.guidance,
        sizes=sizes_of(transformer),
        fingerprint=fingerprint_of(transformer),
        versions={name: version_of(name) for name in ("arcflow", "torch", "diffusers", "peft")},
    )


def _local(path: str | Path) -> Path:
    """The folder or file a path means: one on this machine, or "root:inside" with a folder or a Hub repository as the
    root."""
    if not isinstance(path, str | Path):
        raise ValueError(
            f"{path!r} names no adapter: expected a folder, a file, or owner/name on the Hugging Face Hub."
        )
    if Path(path).is_dir() or (Path(path).is_file() and Path(path).suffix == SINGLE):
        return Path(path)
    root, _, inside = str(path).partition(":")
    if inside and Path(root).is_dir():
        within = Path(root) / inside
        if not (within.is_dir() or (within.is_file() and within.suffix == SINGLE)):
            there = sorted(entry.name for entry in Path(root).iterdir() if entry.is_dir())
            raise ValueError(
                f"{root!r} has no subfolder {inside!r}: expected one that holds an adapter; found {there}."
            )
        return within
    if Path(path).is_file():
        raise ValueError(
            f"{str(path)!r} is a file; expected a folder that holds {PAIRS}, or a {SINGLE} file that is an adapter by "
            f"itself. Give the folder."
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", root):
        return _fetched(root, inside)
    raise ValueError(
        f"no adapter folder {str(path)!r}; expected an existing folder that holds {PAIRS}, a {SINGLE} file, or a "
        f"repository on the Hugging Face Hub as 'owner/name' or 'owner/name:subfolder'."
    )


def _fetched(repository: str, inside: str) -> Path:
    """A local copy of an adapter on the Hub."""
    inside = inside.strip("/")
    if inside.endswith(SINGLE):
        file = hub.fetch(repository, [inside]) / inside
        if not file.is_file():
            raise ValueError(
                f"{repository!r} has no file {inside!r}: expected an adapter; see "
                f"https://huggingface.co/{repository}/tree/main."
            )
        return file
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
