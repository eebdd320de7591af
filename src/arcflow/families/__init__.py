"""Backbones that can be a student, one family a file."""

from torch import nn

from arcflow.families.chroma import CHROMA
from arcflow.families.ernie_image import ERNIE_IMAGE
from arcflow.families.family import Family
from arcflow.families.flux import FLUX
from arcflow.families.flux2 import FLUX2
from arcflow.families.flux3 import FLUX3
from arcflow.families.krea2 import KREA2
from arcflow.families.longcat_image import LONGCAT_IMAGE
from arcflow.families.ltx import LTX
from arcflow.families.lumina2 import LUMINA2
from arcflow.families.ovis_image import OVIS_IMAGE
from arcflow.families.qwen_image import QWEN_IMAGE
from arcflow.families.qwen_image_21 import QWEN_IMAGE_21
from arcflow.families.sd3 import SD3
from arcflow.families.wan import WAN
from arcflow.families.z_image import Z_IMAGE

FAMILIES = (
    FLUX,
    QWEN_IMAGE,
    FLUX2,
    SD3,
    Z_IMAGE,
    KREA2,
    CHROMA,
    LONGCAT_IMAGE,
    LUMINA2,
    QWEN_IMAGE_21,
    WAN,
    LTX,
    OVIS_IMAGE,
    ERNIE_IMAGE,
    FLUX3,
)
"""Every backbone that can be a student."""


UNCARRIED = {
    "CogView4Transformer2DModel": "its time is no function of the noise level",
    "GlmImageTransformer2DModel": "its time is no function of the noise level",
    "MochiTransformer3DModel": "it runs from the image to the noise, on a schedule of its own",
    "CosmosTransformer3DModel": "its network gives no velocity, it is scaled by the noise level",
    "StableAudio3DiTModel": "a convolution behind its last layer mixes channels",
    "AceStepTransformer1DModel": "its last layer is no Linear",
    "LTX2VideoTransformer3DModel": "video and sound leave by two heads",
}
"""Transformers that have no row, and why: docs/families.md."""


def family_named(name: str) -> Family:
    """The family of this name. Raises ValueError, with the known ones, if there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"{name!r} is no family: expected one of {known}; add a row to arcflow.families.FAMILIES.")


def family_of(transformer: nn.Module) -> Family:
    """The row of `FAMILIES` for this transformer."""
    for family in FAMILIES:
        if any(base.__name__ == family.transformer for base in type(transformer).__mro__):
            return family
    supported = ", ".join(family.transformer for family in FAMILIES)
    name = type(transformer).__name__
    why = f" ({UNCARRIED[name]})" if name in UNCARRIED else ""
    raise ValueError(
        f"{name} is not a supported backbone{why}; expected one of {supported}. "
        f"Pass the pipeline's `transformer`, or add a row to arcflow.families.FAMILIES."
    )
