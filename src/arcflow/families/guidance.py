"""A range of guidance in one student: every sample is told a number of its own.

A base that embeds its guidance (FLUX.1-dev) takes it as an input, like the noise level. A student that was told one
number only has learned what the teacher does at that number. Told one for each sample, drawn evenly out of a range, and
asked for what the teacher does at the same, it follows a user's `guidance_scale` there. The number stands in the
conditioning, so that teacher, student, walks that are kept, and their copies in checkpoints have the same. It derives
from the run's seed and the sample's number alone: what a sample is told does not depend on batches or processes.
"""

from collections.abc import Iterable

import torch
from diffusers import ModelMixin
from torch import Generator

from arcflow.families.conditioning import Cond
from arcflow.families.family import Family

Range = tuple[float, float]
"""The lowest and the highest guidance."""


def usual(guidance: float | Range, family: Family) -> float:
    """The guidance of images for which nobody says one: a number as it is, of a range what is nearest to that which the
    family is drawn with."""
    if not isinstance(guidance, tuple):
        return guidance
    return guidance[0] if family.guidance is None else clamp_guidance(family.guidance, guidance)


def clamp_guidance(given: float, among: Range) -> float:
    """What of a range comes nearest to a number."""
    low, high = among
    return min(max(given, low), high)


def with_drawn_guidance(cond: Cond, among: Range | None, seeds: Iterable[int]) -> Cond:
    """The same conditioning with a guidance out of a range for each sample, by the samples' seeds; as it is without a
    range."""
    if among is None:
        return cond
    low, high = among
    drawn = [float(torch.rand((), generator=Generator().manual_seed(seed), dtype=torch.float64)) for seed in seeds]
    scale = cond["guidance"]
    return cond | {"guidance": torch.tensor([low + (high - low) * u for u in drawn]).to(scale)}


def check_embeds(transformer: ModelMixin, among: Range | None, base: str) -> None:
    """Refuse a range for a base whose student could not be told of it.

    Raises:
        ValueError: the transformer embeds no guidance.
    """
    if among is not None and not transformer.config.get("guidance_embeds"):
        raise ValueError(
            f"distill.guidance = {among}: expected one number for {base}, which embeds no guidance, so that a student "
            f"could not be told where in a range it is; leave it out, and say the scale of its second call with "
            f"distill.teacher_cfg"
        )
