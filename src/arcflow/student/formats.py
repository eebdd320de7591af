"""The two layouts of an adapter on disk: which files, and what their tensors must be.

    arcflow     adapter.safetensors + arcflow.json: all that sampling needs (base, K, rank, shift, steps, guidance).
                The tensor file carries the record in its metadata too, so that it is an adapter by itself.
    published   diffusion_pytorch_model.safetensors (float16) + config.json, the layout of the paper's authors, which
                leaves out alpha (= rank), shift, steps, guidance and the base

The names of the tensors are the same in both (`proj_out_means.weight`, `<module>.lora_A.weight`, ...).

One file may hold an adapter for each network of a pipeline that has two: names then begin with the network's
(`transformer_2.proj_out_means.weight`), and the metadata has a record for each, by that name."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arcflow.families import FAMILIES, family_of
from arcflow.families.family import Family
from arcflow.families.weights import dense
from arcflow.student import record
from arcflow.student.layers import kept_weight
from arcflow.student.places import base_linear, trainable_shapes
from arcflow.student.record import AdapterInfo
from arcflow.system import files
from arcflow.system.packages import version_of
from arcflow.system.text import few, shown

Layout = Literal["arcflow", "published"]

FILES: dict[str, tuple[str, str]] = {
    "arcflow": ("adapter.safetensors", "arcflow.json"),
    "published": ("diffusion_pytorch_model.safetensors", "config.json"),
}

PAIRS = " or ".join(" + ".join(files) for files in FILES.values())

FLOATS = ("F32", "F16", "BF16")
"""Types of the weights that are read, as safetensors calls them."""

PREFIX = "transformer."
"""What may stand before the names of an adapter's tensors."""

SINGLE = ".safetensors"
"""How the name of a file ends that is an adapter by itself."""

PARTS = ("transformer", "transformer_2")
"""Parts of a pipeline that may carry a student; Wan 2.2 has two, one for each range of noise levels."""

RECORD = "arcflow"
"""Entry of a tensor file's metadata that holds the record, so that the file is an adapter by itself."""

CONTENT = "content"
"""Name under which such a record has the SHA-256 of itself and the tensors, in whose file it stands."""


NETWORKS = "arcflow_networks"
"""Entry of the metadata of a file that holds several adapters: a record for each, by its network's name."""


class Found(NamedTuple):
    weights: Path
    info: AdapterInfo
    layout: Layout
    network: str = ""
    """The network whose adapter this is, of a file that holds several."""


def networks_in(path: Path) -> tuple[str, ...]:
    """Networks whose adapters a file holds together; none of any other adapter."""
    return tuple(sorted(_records(path))) if path.is_file() else ()


def find(path: Path, network: str = "") -> Found:
    """The adapter in a folder, or in a file by itself, and what it says; that of one network, in a file of several.

    Raises:
        ValueError: there is none, or its record is not what a record must be.
    """
    if path.is_file():
        held = networks_in(path)
        if held and network not in held:
            raise ValueError(
                f"{path} holds adapters for {' and '.join(map(repr, held))}: expected one of them, not {network!r}; "
                f"arcflow.attach(pipe, path) puts each on its network"
            )
        network = network if held else ""
        own = _own_record(path, network)
        if own is None:
            raise ValueError(
                f"{path} has no record of an adapter in it; expected a file that arcflow saved, or a folder that holds "
                f"{PAIRS}. Give the folder, or save the adapter again."
            )
        return Found(path, own, "arcflow", network)
    for layout in ("arcflow", "published"):
        weights, told = (path / name for name in FILES[layout])
        if not (weights.is_file() and told.is_file()):
            continue
        content = record.read_unchecked(told)
        if layout == "published":
            return Found(weights, _published_info(content, told, weights), layout)
        info = record.info_of(content, told)
        if info.sha256 and (own := _own_record(weights)):
            record.agree(info, own, told, weights)
        return Found(weights, info, layout)
    inside = sorted(entry.name for entry in path.iterdir())
    folders = [name for name in inside if (path / name).is_dir()]
    hint = f" Did you mean its subfolder {' or '.join(map(repr, folders))}?" if folders else ""
    raise ValueError(f"no adapter in {str(path)!r}: expected {PAIRS}, found {inside or 'nothing'}.{hint}")


def _own_record(weights: Path, network: str = "") -> AdapterInfo | None:
    """The record that a tensor file carries in its metadata, if it does."""
    content = _own_content(weights, network)
    return None if content is None else record.info_of(content, weights)


def _own_content(weights: Path, network: str = "") -> dict[str, object] | None:
    if network:
        return _records(weights)[network]
    with _opened(weights) as file:
        text = (file.metadata() or {}).get(RECORD)
    return None if text is None else record.parse_record(text, weights)


def _records(weights: Path) -> dict[str, dict[str, object]]:
    """What a file of several adapters says of each, not yet checked; nothing of any other file."""
    with _opened(weights) as file:
        text = (file.metadata() or {}).get(NETWORKS)
    told = {} if text is None else record.parse_record(text, weights)
    wrong = [name for name, content in told.items() if name not in PARTS or not isinstance(content, dict)]
    if wrong:
        raise ValueError(
            f"{weights} names the networks {few(sorted(told))}: expected {' and '.join(map(repr, PARTS))}, with a "
            f"record each. The file was changed or damaged: fetch or save it again."
        )
    return {name: content for name, content in told.items() if isinstance(content, dict)}


def joined_file(adapters: dict[str, tuple[dict[str, Tensor], AdapterInfo]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that holds the adapters of several networks, by the networks' names."""
    tensors = {f"{network}.{name}": t for network, (own, _) in adapters.items() for name, t in own.items()}
    records = {network: json.loads(metadata_of(own, info)[RECORD]) for network, (own, info) in adapters.items()}
    return tensors, {NETWORKS: json.dumps(records)}


def metadata_of(tensors: dict[str, Tensor], info: AdapterInfo) -> dict[str, str]:
    """What makes a tensor file an adapter by itself: its record, with a SHA-256 over that and the tensors. It is one
    entry, for safetensors writes several in any order."""
    content = record.record_content(info)
    return {RECORD: json.dumps({**content, "sha256": {CONTENT: _content_digest(tensors, content)}})}


def _content_digest(tensors: dict[str, Tensor], content: dict[str, object]) -> str:
    """SHA-256 over a record but for its checksum, and over name, type, shape and bytes of every tensor."""
    total = hashlib.sha256(json.dumps({**content, "sha256": {}}).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _published_info(content: dict[str, object], told: Path, weights: Path) -> AdapterInfo:
    families = {family.published: family for family in FAMILIES if family.published}
    name = content.get("_class_name")
    if not isinstance(name, str) or name not in families or "num_gaussians" not in content:
        raise ValueError(
            f"{told} describes {shown(repr(name))}, with num_gaussians {shown(repr(content.get('num_gaussians')))}; "
            f"expected one of {', '.join(families)} with a number of modes. Is this an ArcFlow adapter?"
        )
    stored = _header(Found(weights, AdapterInfo(), "published"))
    ranks = [t.shape[0] for key, t in stored.items() if key.endswith(".lora_A.weight") and len(t.shape) == 2]
    steps = re.search(r"(\d{1,3})steps?\b", told.parent.name)
    fields = {
        "family": families[name].name,
        "modes": content["num_gaussians"],
        "pixels": content.get("logweights_channels", 4),
        "rank": ranks[0] if ranks else 1,  # published adapters always have a LoRA: without any, all of it is missing
        "steps": max(1, int(steps[1])) if steps else 2,
        "guidance": families[name].guidance,
        "sizes": {size: content[size] for size in families[name].sizes if size in content},
    }
    return record.info_of(fields, told)


def checked_tensors(transformer: ModelMixin, found: Found) -> dict[str, Tensor]:
    """The adapter's tensors by name, once base, names and shapes are as they should be."""
    weights, info = found.weights, found.info
    family = family_of(transformer)
    _check_base(transformer, family, found)
    expected = trainable_shapes(transformer, info.modes, info.rank, info.targets, info.form)
    present = _header(found)
    missing, unknown = sorted(set(expected) - set(present)), sorted(set(present) - set(expected))
    both = sorted(set(expected) & set(present))
    misshapen = [
        f"{name} {present[name].shape} (expected {expected[name]})"
        for name in both
        if present[name].shape != expected[name]
    ]
    mistyped = [f"{name} {present[name].dtype}" for name in both if present[name].dtype not in FLOATS]
    problems = {
        "missing": missing,
        "unknown": unknown,
        "misshapen": misshapen,
        f"of a type other than {', '.join(FLOATS)}": mistyped,
    }
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {what}: {few(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"{weights} does not fit this {family.transformer} with K = {info.modes} and rank {info.rank}. {told}. "
            f"Nothing was loaded. Check that adapter and base belong together, and fetch or save the adapter again."
        )
    return tensors_of(found)


def tensors_of(found: Found) -> dict[str, Tensor]:
    """The tensors in an adapter's file by their bare names, held against its checksum if there is one."""
    weights = found.weights
    told = found.info.sha256
    of_file = told and CONTENT not in told
    if of_file and told.get(weights.name) != files.digest(weights):
        raise _changed(weights)
    with _opened(weights) as file:
        tensors = {name: file.get_tensor(key) for name, key in _names(file, found.network).items()}
    own = None if of_file else _own_content(weights, found.network)
    if own is not None and own.get("sha256") != {CONTENT: _content_digest(tensors, own)}:
        raise _changed(weights)
    broken = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if broken:
        raise ValueError(
            f"{weights} holds values that are not finite in {few(broken)}. Nothing was loaded. The training diverged, "
            f"or float16 overflowed: take an earlier checkpoint, or save with layout='arcflow'."
        )
    return {_bare(key): tensor for key, tensor in tensors.items()}


def _changed(weights: Path) -> ValueError:
    return ValueError(
        f"{weights} is not the file that its record was written for: the checksums (SHA-256) differ. Nothing was "
        f"loaded. It was changed or damaged: copy, fetch or save the adapter again."
    )


def _check_base(transformer: ModelMixin, family: Family, found: Found) -> None:
    info = found.info
    if info.family != family.name:
        raise ValueError(
            f"{found.weights} is an adapter for the family {info.family!r}, but the base is a {family.transformer} "
            f"({family.name!r}). Load the base it was made for{f': {info.base}' if info.base else ''}."
        )
    pixels = math.prod(family.patch_of(transformer))
    if info.pixels != pixels:
        raise ValueError(
            f"{found.weights} was made for {info.pixels} latent pixels a token, but a {family.transformer} has "
            f"{pixels}. Nothing was loaded. Fetch or save the adapter again."
        )
    own = json.loads(json.dumps(sizes_of(transformer)))
    wrong = [
        f"{k} is {own[k]} (the adapter's base has {shown(v)})"
        for k, v in info.sizes.items()
        if k in own and own[k] != v
    ]
    if wrong:
        raise ValueError(
            f"{found.weights} was made for another base: {'; '.join(wrong)}. Nothing was loaded. "
            f"Load the base it was made for{f': {info.base}' if info.base else ''}."
        )
    if info.fingerprint:
        theirs = torch.tensor(info.fingerprint)
        ours = torch.tensor(fingerprint_of(transformer))
        # loose enough for 4 bits and light fine-tuning of the base
        if theirs.shape != ours.shape or (theirs - ours).norm() > 0.25 * theirs.norm():
            raise ValueError(
                f"{found.weights} was made for another base of the same sizes: the last layers differ. Nothing was "
                f"loaded. Load the base it was made for{f': {info.base}' if info.base else ''}; to try it on this one "
                f"all the same, empty `fingerprint` in arcflow.json."
            )


class _Stored(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


def _names(file: safe_open, network: str) -> dict[str, str]:
    """Names of an adapter's tensors, and those that they have in the file."""
    before = f"{network}." if network else ""
    return {key.removeprefix(before): key for key in file.keys() if key.startswith(before)}


def _header(found: Found) -> dict[str, _Stored]:
    """Names, shapes and types of an adapter's tensors, without reading these.

    Raises:
        ValueError: the file cannot be read, or holds a tensor twice, with and without a prefix.
    """
    weights = found.weights
    with _opened(weights) as file:
        slices = {name: file.get_slice(key) for name, key in _names(file, found.network).items()}
        stored = {key: _Stored(tuple(one.get_shape()), one.get_dtype()) for key, one in slices.items()}
    names = [_bare(key) for key in stored]
    doubled = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if doubled:
        raise ValueError(
            f"{weights} holds {few(doubled)} twice, with the prefix {PREFIX!r} and without. Nothing was loaded. Leave "
            f"one of each, or fetch or save the adapter again."
        )
    return {_bare(key): one for key, one in stored.items()}


@contextmanager
def _opened(weights: Path) -> Iterator[safe_open]:
    try:
        with safe_open(weights, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{weights} cannot be read: {shown(error)}. Nothing was loaded. The file is truncated or damaged: copy, "
            f"fetch or save it again."
        ) from error


def check_published(info: AdapterInfo) -> None:
    """Refuse a student that the published layout cannot hold.

    Raises:
        ValueError: its family has no such layout, or the student is of another kind.
    """
    family = next((family for family in FAMILIES if family.name == info.family), None)
    if family is None or not family.published:
        raise ValueError(f"there is no published layout for the family {info.family!r}; save with layout='arcflow'.")
    if not info.rank:
        raise ValueError("the published layout has a LoRA always, this student has none; save with layout='arcflow'.")
    if info.form != "mixture":
        raise ValueError(f"the published layout holds mixtures, this student is in {info.form}; save it as 'arcflow'.")
    if info.targets != "feed_forward":
        raise ValueError(
            f"the published layout has its LoRA on feed-forward layers, this student on {info.targets!r}; "
            f"save with layout='arcflow'."
        )


def published_config(transformer: ModelMixin, info: AdapterInfo) -> dict[str, object]:
    """What stands in the published layout's config.json."""
    check_published(info)
    family = family_of(transformer)
    narrow = transformer.config.out_channels
    return {
        "_class_name": family.published,
        "_diffusers_version": version_of("diffusers"),
        **info.sizes,
        # the authors write the packed width, where the base has the latents'
        "out_channels": narrow and base_linear(transformer, family.head).out_features,
        "num_gaussians": info.modes,
        "logweights_channels": info.pixels,
    }


def published_tensors(tensors: dict[str, Tensor], info: AdapterInfo) -> dict[str, Tensor]:
    """float16, with the LoRA's scale in B: the layout implies alpha = rank."""
    scale = info.alpha / info.rank
    scaled = {k: t * scale if scale != 1 and k.endswith("lora_B.weight") else t for k, t in tensors.items()}
    return {name: tensor.half() for name, tensor in scaled.items()}


def sizes_of(transformer: ModelMixin) -> dict[str, object]:
    """Entries of the transformer's config that a base must share with an adapter."""
    names = family_of(transformer).sizes
    return {name: transformer.config[name] for name in names if name in transformer.config}


def fingerprint_of(transformer: ModelMixin) -> list[float]:
    linear = base_linear(transformer, family_of(transformer).head)
    kept = kept_weight(linear)  # of a fused student in coefficients: its LoRA is on the last layer too
    own = dense(linear).weight if kept is None else kept
    weight = own.detach().flatten()
    return weight[:: max(1, weight.numel() // 64)][:64].float().tolist()


def _bare(key: str) -> str:
    return key.removeprefix(PREFIX)
