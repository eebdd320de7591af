"""One adapter file, read and checked: tensors, and what they do not say.

Three kinds of file are taken: one that carries its record in its metadata (`arcflow export --layout file`), one with
`arcflow.json` beside it (`arcflow export`), and the published layout of arXiv 2602.09014, whose number of modes follows
from the shapes, with alpha = rank and shift 3.2. Nothing is unpickled, and what does not fit is refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import families
from .portable import SHIFT, Grids, step_grid

PREFIX = "transformer."

PACKED = ("means", "logweights", "loggamma")
"""The packed head's Linears, in packed order: what stands behind the last layer's name."""

BENDS = "bends"
"""The same for what bends the path of a student in coefficients, whose last layer is the base's with a LoRA."""


LARGEST = 1 << 20
"""Bytes of the largest record that is read."""

MARKS = {"time_guidance_embed.": "flux2", "single_transformer_blocks.": "flux", ".img_mlp.": "qwen_image"}
"""What tells a family by the names of its layers, where no record does."""

PUBLISHED = {"ArcFluxTransformer2DModel": "flux", "ArcQwenImageTransformer2DModel": "qwen_image"}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What is needed to put an adapter on a model."""

    name: str
    """The file's, for messages."""
    family: str
    modes: int
    pixels: int
    """0 in coefficients."""
    scale: float
    """Alpha over rank."""
    tensors: Mapping[str, Tensor]
    """By their names in diffusers, without a prefix."""
    shift: float = SHIFT
    final_step_scale: float = 1.0
    steps: tuple[int, ...] = (2,)
    """Numbers of steps that it was trained for."""
    guidance: float | None = None
    """Guidance embedding it was distilled with; None where the base takes none."""
    guidances: tuple[float, float] | None = None
    """The lowest and the highest one, where it was distilled over a range."""
    guided: bool = True
    """Whether its teacher was guided, so that guiding it again is too much."""
    teacher_lora: str | None = None
    fingerprint: tuple[float, ...] = ()
    """Some weights of the base's last layer; empty if not known."""

    def lora(self) -> dict[str, Tensor]:
        """The LoRA's tensors."""
        return {name: tensor for name, tensor in self.tensors.items() if ".lora_" in name}

    def linears(self) -> list[str]:
        """Names of the layers with a LoRA."""
        return [name.removesuffix(".lora_A.weight") for name in self.tensors if name.endswith(".lora_A.weight")]

    @property
    def ends(self) -> families.Family:
        """What its last layers are called."""
        return families.FAMILIES[self.family]

    @property
    def in_coefficients(self) -> bool:
        """Whether the path is in coefficients, else it is a mixture."""
        return not self.pixels

    @property
    def grids(self) -> Grids:
        """Noise levels of the steps that it was trained for."""
        return tuple(tuple(step_grid(n, self.shift, self.final_step_scale).tolist()) for n in self.steps)

    def last(self) -> tuple[int, int]:
        """Width and features of the base's last layer."""
        head = self.ends.head
        if self.in_coefficients:
            return self.tensors[f"{head}.lora_B.weight"].shape[0], self.tensors[f"{head}.lora_A.weight"].shape[1]
        rows, features = self.tensors[f"{head}_means.weight"].shape
        return rows // self.modes, features

    def bends(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of what bends the path, in float32."""
        name = f"{self.ends.head}_{BENDS}"
        return self.tensors[f"{name}.weight"].float(), self.tensors[f"{name}.bias"].float()

    def packed(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the head as one Linear whose output is packed, in float32."""
        names = [f"{self.ends.head}_{one}" for one in PACKED]
        weights, biases = ([self.tensors[f"{name}.{part}"].float() for name in names] for part in ("weight", "bias"))
        return torch.cat(weights), torch.cat(biases)

    def norm(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the last norm's Linear, in diffusers' order, in float32."""
        bias = self.tensors.get(f"{self.ends.norm}.bias")
        return self.tensors[f"{self.ends.norm}.weight"].float(), None if bias is None else bias.float()


def read(path: str | Path) -> Adapter:
    """The adapter in a .safetensors file.

    Raises:
        ValueError: it is none, or damaged, or written by a newer version.
    """
    path = Path(path)
    tensors, metadata = _opened(path)
    if "arcflow_networks" in metadata:
        raise ValueError(
            f"{path.name} holds adapters for 'transformer' and 'transformer_2' of a pipeline, which are two MODELs "
            f"here. Take the two adapters it was made of, each in a file of its own, and a node for each."
        )
    if not any(name.endswith(("_means.weight", f"_{BENDS}.weight")) for name in tensors):
        raise ValueError(
            f"{path.name} holds no ArcFlow adapter (no tensor of its last layer). Is it an ordinary LoRA? Then "
            f"load it with the node 'Load LoRA'."
        )
    record = _record(path, metadata)
    settings = {"family": _family(path, tensors), "scale": 1.0} if record is None else _settings(path, record)
    family = families.named(settings["family"], path.name)
    bent = f"{family.head}_{BENDS}.weight" in tensors
    _check_names(path, tensors, family, bent)
    modes, pixels = (_bent_modes if bent else _sizes)(path, tensors, family.head)
    known = {"name": path.name, "modes": modes, "pixels": pixels, "tensors": tensors}
    if record is None:
        return Adapter(**known, **settings, guidance=family.guidance)
    if record.get("modes") != modes or not (bent or record.get("pixels", 4) == pixels):
        raise ValueError(
            f"the record of {path.name} says {record.get('modes')} modes of {record.get('pixels', 4)} pixels, its "
            f"tensors have {modes} of {pixels}. It was changed or damaged: fetch or save it again."
        )
    return Adapter(**known, **settings)


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name} is no .safetensors file, and no other is read. Choose the adapter's own file.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} cannot be read ({error}). Copy or fetch it again.") from error
    broken = sorted(name for name, tensor in tensors.items() if not (tensor.is_floating_point() and _finite(tensor)))
    if broken:
        raise ValueError(f"{path.name} holds values that are not finite in {_few(broken)}. Fetch or save it again.")
    return tensors, metadata


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _sizes(path: Path, tensors: Mapping[str, Tensor], head: str) -> tuple[int, int]:
    """Modes and pixels of a mixture, from the shapes: K P logits and (K - 1) P momentum factors."""
    rows = [tensors[f"{head}_{name}.weight"].shape[0] for name in PACKED]
    velocities, logits, factors = rows
    pixels = logits - factors
    if pixels < 1 or logits % pixels or velocities % logits:
        raise ValueError(
            f"the last layer of {path.name} has {rows} rows in {', '.join(PACKED)}; expected K*D, K*P and (K-1)*P with "
            f"P dividing D. It is damaged, or was written by a newer arcflow: fetch it again, or update these nodes."
        )
    return logits // pixels, pixels


def _bent_modes(path: Path, tensors: Mapping[str, Tensor], head: str) -> tuple[int, int]:
    """Number of coefficients, from the shapes, and 0."""
    rows, width = tensors[f"{head}_{BENDS}.weight"].shape[0], tensors[f"{head}.lora_B.weight"].shape[0]
    if rows % width:
        raise ValueError(f"{path.name} has {rows} rows of bends for a width of {width}. It is damaged: fetch it again.")
    return rows // width + 1, 0


def _check_names(path: Path, tensors: Mapping[str, Tensor], family: families.Family, bent: bool) -> None:
    ends = (".lora_A.weight", ".lora_B.weight")
    wanted = {f"{family.head}_{name}.{part}" for name in ((BENDS,) if bent else PACKED) for part in ("weight", "bias")}
    if bent:
        wanted |= {family.head + end for end in ends}
    elif family.norm:
        wanted.add(f"{family.norm}.weight")
    allowed = wanted | {f"{family.norm}.bias"}
    missing = sorted(wanted - set(tensors))
    unknown = sorted(name for name in tensors if name not in allowed and not name.endswith(ends))
    halves = sorted(
        name
        for name in tensors
        for one, other in (ends, ends[::-1])
        if name.endswith(one) and name.removesuffix(one) + other not in tensors
    )
    if missing or unknown or halves:
        raise ValueError(
            f"{path.name} is not an adapter that these nodes can read: missing {_few(missing)}, unknown "
            f"{_few(unknown)}, without its other half {_few(halves)}. Adapters that train every weight ('full') are "
            f"not LoRAs; others may need newer nodes."
        )


def _record(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The record in a file's metadata, or beside it; None for the published layout."""
    told = path.with_name("arcflow.json")
    if "arcflow" in metadata:
        return _parsed(path, metadata["arcflow"])
    if path.name == "adapter.safetensors" and told.is_file():
        if told.stat().st_size > LARGEST:
            raise ValueError(f"{told.name} beside {path.name} is too large for a record. Fetch it again.")
        return _parsed(told, told.read_text("utf-8"))
    return None


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the record of {path.name} is not JSON ({error}). Fetch or save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"the record of {path.name} is no JSON object. Fetch or save it again.")
    return content


def _settings(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `Adapter` that a record holds, each checked."""

    def number(name: str, default: float, least: float = 0.0) -> float:
        value = record.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or not least < value < 1e6:
            raise ValueError(f"the record of {path.name} says {name} = {value!r}; expected a number above {least:g}.")
        return float(value)

    family = record.get("family")
    if not isinstance(family, str):
        raise ValueError(f"the record of {path.name} says family = {family!r}; expected a name. Fetch it again.")
    also, lora, prints = (record.get(name) or () for name in ("also_steps", "teacher_lora", "fingerprint"))
    trained = record.get("training")
    settings = trained.get("settings") if isinstance(trained, dict) else None
    distill = settings.get("distill") if isinstance(settings, dict) else None
    cfg = distill.get("teacher_cfg") if isinstance(distill, dict) else None
    guidance = record.get("guidance")
    among = record.get("guidance_range")
    if among is not None and not (isinstance(among, list) and len(among) == 2 and {*map(type, among)} <= {int, float}):
        raise ValueError(f"the record of {path.name} says guidance_range = {among!r}; expected two numbers.")
    rank = number("rank", 1, -1.0)
    return {
        "family": family,
        "scale": number("alpha", rank, -1.0) / max(rank, 1.0),
        "shift": number("shift", SHIFT),
        "final_step_scale": number("final_step_scale", 1.0),
        "steps": (int(number("steps", 2)), *(int(one) for one in also)),
        "guidance": None if guidance is None else number("guidance", 0.0, -1.0),
        "guidances": tuple(among) if among else None,
        "guided": not isinstance(cfg, int | float) or cfg > 1 or guidance is not None,
        "teacher_lora": str(lora) if lora else None,
        "fingerprint": tuple(float(one) for one in prints),
    }


def _family(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """The family of an adapter without a record: by its config.json, else by the names of its layers."""
    told = path.with_name("config.json")
    if told.is_file() and told.stat().st_size <= LARGEST:
        name = _parsed(told, told.read_text("utf-8")).get("_class_name")
        if isinstance(name, str) and name in PUBLISHED:
            return PUBLISHED[name]
    for mark, family in MARKS.items():
        if any(mark in name for name in tensors):
            return family
    raise ValueError(f"{path.name} does not say which model it is for. Save it with `arcflow export --layout file`.")


def _few(names: list[str], most: int = 6) -> str:
    shown = ", ".join(repr(name[:80]) for name in names[:most]) or "nothing"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
