"""Models that adapters are for, as data: which one it is in ComfyUI, and what its last layers are called in diffusers.

Where a layer is in ComfyUI's model is ComfyUI's own map of names to say, and `portable.COMFYUI` of those it lacks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model of the authors', by whatever files it comes."""

    model: str
    """ComfyUI's class of it."""
    config: Mapping[str, object] = field(default_factory=dict)
    """What tells it from others of that class: entries of its configuration, None for those that it lacks."""
    head: str = "proj_out"
    """Its last Linear."""
    norm: str = ""
    """The Linear of the norm before, which a mixture has its own of; empty where there is none."""
    patch_first: bool = False
    """Whether the rows of the last Linear go by the place in the patch first and the channel then."""
    guidance: float | None = None
    """Guidance embedding of adapters that do not say theirs."""

    def fits(self, model: Any) -> bool:
        """Whether a MODEL's inside is this one."""
        config = model.model_config.unet_config
        return type(model).__name__ == self.model and all(config.get(k) == v for k, v in self.config.items())


FAMILIES = {
    "flux": Family(model="Flux", norm="norm_out.linear", guidance=3.5),
    "flux2": Family(model="Flux2", norm="norm_out.linear", guidance=4.0),
    "qwen_image": Family(model="QwenImage", norm="norm_out.linear"),
    "sd3": Family(model="SD3", norm="norm_out.linear", patch_first=True),
    "z_image": Family(
        model="Lumina2",
        config={"z_image_modulation": True},
        head="all_final_layer.2-1.linear",
        norm="all_final_layer.2-1.adaLN_modulation.1",
        patch_first=True,
    ),
    "lumina2": Family(
        model="Lumina2",
        config={"z_image_modulation": None},
        head="norm_out.linear_2",
        norm="norm_out.linear_1",
        patch_first=True,
    ),
    "chroma": Family(model="Chroma"),
    "longcat_image": Family(model="LongCatImage", norm="norm_out.linear"),
    "krea2": Family(model="Krea2", head="final_layer.linear"),
    "wan": Family(model="WAN21", config={"model_type": "t2v"}, patch_first=True),
    "ltx": Family(model="LTXV"),
}

REFUSED = {"qwen_image_21": "ComfyUI has no Qwen-Image 2.1"}
"""Families of adapters that these nodes do not carry, and why."""


def named(family: str, file: str) -> Family:
    """The family that an adapter names. Raises ValueError if it is not among them."""
    if family not in FAMILIES:
        why = REFUSED.get(family, "these nodes do not know it")
        raise ValueError(f"{file} is for {family!r}: {why}. Draw it in diffusers; here are {', '.join(FAMILIES)}.")
    return FAMILIES[family]


def of(model: Any) -> str | None:
    """Name of the family that a MODEL is of."""
    return next((name for name, family in FAMILIES.items() if family.fits(model)), None)
