"""Backbones that can be a student, one family a file."""

from torch import nn

from arcflow.families.family import Family
from arcflow.families.flux import FLUX
from arcflow.families.flux2 import FLUX2
from arcflow.families.qwen_image import QWEN_IMAGE

FAMILIES = (FLUX, QWEN_IMAGE, FLUX2)
"""Every backbone that can be a student."""


def family_of(transformer: nn.Module) -> Family:
    """The row of `FAMILIES` for this transformer."""
    for family in FAMILIES:
        if any(base.__name__ == family.transformer for base in type(transformer).__mro__):
            return family
    supported = ", ".join(family.transformer for family in FAMILIES)
    raise ValueError(
        f"{type(transformer).__name__} is not a supported backbone; expected one of {supported}. "
        f"Pass the pipeline's `transformer`, or add a row to arcflow.families.FAMILIES."
    )
