"""The two layouts of an adapter on disk: what a record says, and what its tensors must be.

    arcflow     adapter.safetensors + arcflow.json: all that sampling needs (base, K, rank, shift, steps, guidance, ...)
    published   diffusion_pytorch_model.safetensors (float16) + config.json, the layout of the paper's authors, which
                leaves out alpha (= rank), shift, steps, guidance and the base

The names of the tensors are the same in both (`proj_out_means.weight`, `<module>.lora_A.weight`, ...)."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arcflow.config import Targets
from arcflow.families import FAMILIES, family_of
from arcflow.families.family import Family
from arcflow.families.weights import dense
from arcflow.path import SHIFT
from arcflow.student import layers as student_layers
from arcflow.system.packages import version_of

Layout = Literal["arcflow", "published"]

FILES: dict[str, tuple[str, str]] = {
    "arcflow": ("adapter.safetensors", "arcflow.json"),
    "published": ("diffusion_pytorch_model.safetensors", "config.json"),
}

PAIRS = " or ".join(" + ".join(files) for files in FILES.values())

SIZES = (
    "num_layers",
    "num_single_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
)
"""Entries of a transformer's config that a base must share with an adapter."""


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What an adapter's tensors do not say. Fields marked * are filled in by `save_adapter` from the student."""

    base: str = ""
    """* Where the base came from: a Hub id or a path."""
    family: str = ""
    """* Row of `families.FAMILIES`."""
    modes: int = 0
    """* K."""
    pixels: int = 4
    """* Latent pixels per token, P."""
    rank: int = 0
    """* Rank of the LoRA; 0 for none."""
    alpha: float = 0.0
    """* LoRA scale times rank."""
    targets: Targets = "feed_forward"
    """* Which Linears carry the LoRA."""
    shift: float = SHIFT
    """Shift between raw time and noise level the student was trained with."""
    steps: int = 2
    """Number of steps it was trained for."""
    also_steps: tuple[int, ...] = ()
    """Others that it was trained for too."""
    final_step_scale: float = 1.0
    """Length of the last step over the others."""
    guidance: float | None = None
    """Guidance embedding it was trained with; None: the family's."""
    teacher_lora: str | None = None
    """A LoRA that was part of the teacher: the pipeline needs it too, before this adapter."""
    sizes: dict[str, Any] = field(default_factory=dict)
    """* The base's sizes (`SIZES`)."""
    fingerprint: list[float] = field(default_factory=list)
    """* Some weights of the base's last layer, to tell it from another of the same sizes; empty: not known."""
    versions: dict[str, str] = field(default_factory=dict)
    """* Versions of the packages that wrote it."""
    training: dict[str, Any] = field(default_factory=dict)
    """Record of the training: config, progress, whatever its maker wants to keep."""


class Found(NamedTuple):
    weights: Path
    info: AdapterInfo
    layout: Layout


def find(folder: Path) -> Found:
    """The adapter files in a folder and what they say."""
    for layout in ("arcflow", "published"):
        weights, record = (folder / name for name in FILES[layout])
        if weights.is_file() and record.is_file():
            content = _json(record)
            info = _own_info(content, record) if layout == "arcflow" else _published_info(content, record, weights)
            _check_record(info, record)
            return Found(weights, info, layout)
    inside = sorted(entry.name for entry in folder.iterdir())
    folders = [name for name in inside if (folder / name).is_dir()]
    hint = f" Did you mean its subfolder {' or '.join(map(repr, folders))}?" if folders else ""
    raise ValueError(f"no adapter in {str(folder)!r}: expected {PAIRS}, found {inside or 'nothing'}.{hint}")


def _check_record(info: AdapterInfo, record: Path) -> None:
    whole = isinstance(info.modes, int) and isinstance(info.rank, int)
    if not (whole and info.modes > 0 and info.rank >= 0 and info.targets in get_args(Targets)):
        raise ValueError(
            f"{record} says {info.modes!r} modes, rank {info.rank!r} and targets {info.targets!r}; expected whole "
            f"numbers, at least 1 and 0, and one of {', '.join(map(repr, get_args(Targets)))}. The file was changed or "
            f"damaged, or written by a newer arcflow: upgrade, or fetch or save it again."
        )


def _own_info(content: dict[str, Any], record: Path) -> AdapterInfo:
    known = {f.name for f in dataclasses.fields(AdapterInfo)}
    lacking = [name for name in ("family", "modes", "rank") if name not in content]
    if lacking or not set(content) <= known:
        raise ValueError(
            f"{record} is not a record this version of arcflow reads: missing {lacking}, unknown "
            f"{sorted(set(content) - known)}. Was it written by a newer arcflow? Upgrade, or save the adapter again."
        )
    fields: dict[str, Any] = {**content, "also_steps": tuple(content.get("also_steps", ()))}
    return AdapterInfo(**fields)


def _published_info(content: dict[str, Any], record: Path, weights: Path) -> AdapterInfo:
    families = {family.published: family for family in FAMILIES if family.published}
    name = content.get("_class_name")
    if name not in families or "num_gaussians" not in content:
        raise ValueError(
            f"{record} describes {name!r}, with num_gaussians {content.get('num_gaussians')}; expected one of "
            f"{', '.join(families)} with a number of modes. Is this an ArcFlow adapter?"
        )
    ranks = [shape[0] for key, shape in _header(weights).items() if key.endswith(".lora_A.weight")]
    steps = re.search(r"(\d+)steps?\b", record.parent.name)
    return AdapterInfo(
        family=families[name].name,
        modes=content["num_gaussians"],
        pixels=content.get("logweights_channels", 4),
        rank=ranks[0] if ranks else 1,  # published adapters always have a LoRA: without any, all of it is missing
        steps=int(steps[1]) if steps else 2,
        guidance=families[name].guidance,
        sizes={size: content[size] for size in SIZES if size in content},
    )


def checked_tensors(transformer: Any, found: Found) -> dict[str, Tensor]:
    """The adapter's tensors by name, once base, names and shapes are as they should be."""
    weights, info, _ = found
    family = family_of(transformer)
    _check_base(transformer, family, found)
    expected = student_layers.shapes(transformer, info.modes, info.rank, info.targets)
    present = _header(weights)
    missing, unknown = sorted(set(expected) - set(present)), sorted(set(present) - set(expected))
    misshapen = [
        f"{name} {present[name]} (expected {expected[name]})"
        for name in sorted(set(expected) & set(present))
        if present[name] != expected[name]
    ]
    problems = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {what}: {few(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"{weights} does not fit this {family.transformer} with K = {info.modes} and rank {info.rank}. {told}. "
            f"Nothing was loaded. Check that adapter and base belong together, and fetch or save the adapter again."
        )
    tensors = {}
    with safe_open(weights, "pt") as file:
        for key in file.keys():
            tensors[_bare(key)] = file.get_tensor(key)
    broken = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if broken:
        raise ValueError(
            f"{weights} holds values that are not finite in {few(broken)}. Nothing was loaded. The training diverged, "
            f"or float16 overflowed: take an earlier checkpoint, or save with layout='arcflow'."
        )
    return tensors


def _check_base(transformer: Any, family: Family, found: Found) -> None:
    info = found.info
    if info.family != family.name:
        raise ValueError(
            f"{found.weights} is an adapter for the family {info.family!r}, but the base is a {family.transformer} "
            f"({family.name!r}). Load the base it was made for{f': {info.base}' if info.base else ''}."
        )
    own = json.loads(json.dumps(sizes_of(transformer)))
    wrong = [f"{k} is {own[k]} (the adapter's base has {v})" for k, v in info.sizes.items() if k in own and own[k] != v]
    if wrong:
        raise ValueError(
            f"{found.weights} was made for another base: {'; '.join(wrong)}. Nothing was loaded. "
            f"Load the base it was made for{f': {info.base}' if info.base else ''}."
        )
    if info.fingerprint:
        theirs, ours = torch.tensor(info.fingerprint), torch.tensor(fingerprint_of(transformer))
        # loose enough for 4 bits and light fine-tuning of the base
        if theirs.shape != ours.shape or (theirs - ours).norm() > 0.25 * theirs.norm():
            raise ValueError(
                f"{found.weights} was made for another base of the same sizes: the last layers differ. Nothing was "
                f"loaded. Load the base it was made for{f': {info.base}' if info.base else ''}; to try it on this one "
                f"all the same, empty `fingerprint` in arcflow.json."
            )


def _header(weights: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, without reading the tensors."""
    try:
        with safe_open(weights, "pt") as file:
            return {_bare(key): tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{weights} cannot be read: {error}. Nothing was loaded. The file is truncated or damaged: copy, fetch or "
            f"save it again."
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}). The file is damaged: fetch or save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected an object. Fetch or save it again.")
    return content


def published_config(transformer: Any, info: AdapterInfo) -> dict[str, Any]:
    family = family_of(transformer)
    if not family.published:
        raise ValueError(f"there is no published layout for the family {family.name!r}; save with layout='arcflow'.")
    if not info.rank:
        raise ValueError("the published layout has a LoRA always, this student has none; save with layout='arcflow'.")
    if info.targets != "feed_forward":
        raise ValueError(
            f"the published layout has its LoRA on feed-forward layers, this student on {info.targets!r}; "
            f"save with layout='arcflow'."
        )
    narrow = transformer.config.out_channels
    return {
        "_class_name": family.published,
        "_diffusers_version": version_of("diffusers"),
        **info.sizes,
        # the authors write the packed width, where the base has the latents'
        "out_channels": narrow and student_layers.frozen(transformer, family.head).out_features,
        "num_gaussians": info.modes,
        "logweights_channels": info.pixels,
    }


def published_tensors(tensors: dict[str, Tensor], info: AdapterInfo) -> dict[str, Tensor]:
    """float16, with the LoRA's scale in B: the layout implies alpha = rank."""
    scale = info.alpha / info.rank
    scaled = {k: t * scale if scale != 1 and k.endswith("lora_B.weight") else t for k, t in tensors.items()}
    return {name: tensor.half() for name, tensor in scaled.items()}


def sizes_of(transformer: Any) -> dict[str, Any]:
    return {name: transformer.config[name] for name in SIZES if name in transformer.config}


def fingerprint_of(transformer: Any) -> list[float]:
    weight = dense(student_layers.frozen(transformer, family_of(transformer).head)).weight.detach().flatten()
    return weight[:: max(1, weight.numel() // 64)][:64].float().tolist()


def _bare(key: str) -> str:
    return key.removeprefix("transformer.")


def few(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
