"""What a studio is made of, what it can draw, and how those who wait follow a batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from diffusers.pipelines import auto_pipeline
from jaxtyping import UInt8

from arcflow import config
from arcflow.sampling.editing import READS_IMAGES
from arcflow.sampling.open import SHIPPED
from arcflow.serving.order import Task

TEACHER = "teacher"
"""Name of the base without a student."""

SERVED = (
    "flux",
    "flux2",
    "qwen_image",
    "sd3",
    "z_image",
    "krea2",
    "chroma",
    "longcat_image",
    "lumina2",
    "qwen_image_21",
    "ovis_image",
    "ernie_image",
)
"""Families with a stock pipeline: all that draw images, but FLUX.3."""


class Gone(Exception):
    """Nobody wants the batch any more."""


@dataclass(frozen=True, kw_only=True)
class StudioSetup:
    """What a studio is made of."""

    model: str = SHIPPED
    """The shipped small teacher, a diffusers pipeline folder, or a Hub id."""
    adapters: Mapping[str, str] = field(default_factory=lambda: {SHIPPED: SHIPPED})
    """Adapters by name; the first one is the default."""
    styles: Mapping[str, str] = field(default_factory=dict)
    """LoRAs by name."""
    teacher_lora: str | None = None
    """A LoRA on the teacher, as the adapters' records ask for it; "none" draws without."""
    device: config.Device = "auto"
    dtype: config.Dtype | Literal["auto"] = "auto"
    fit: config.Fit = "auto"
    """How the model is fitted to the card, as `families.fit` has it."""
    max_batch: int = 8
    kept_text: int = 256
    """MB of encoded prompts that are kept."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a studio can draw, for whoever asks before ordering."""

    model: str
    models: tuple[str, ...]
    """Names that an order may have, the default first."""
    steps: Mapping[str, int]
    """Steps that each is meant for."""
    guidance: Mapping[str, float | None]
    """What each embeds unless an order says another."""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The lowest and the highest guidance of those that were distilled over a range."""
    styles: tuple[str, ...]
    height: int
    width: int
    multiple: int
    """Height and width are multiples of this."""
    tasks: tuple[Task, ...]
    negative: bool
    """Whether negative prompts are understood."""


@dataclass(kw_only=True)
class Watch:
    """How the one who waits follows a batch."""

    wanted: Callable[[], bool] = lambda: True
    """Whether anybody still waits; asked after every step."""
    partial: Mapping[int, Callable[[int, UInt8[np.ndarray, "height width 3"]], None]] = field(default_factory=dict)
    """By place in the batch: called with the number of steps taken and the image as it would be."""

    def of(self, places: Sequence[int]) -> "Watch":
        """The same for some of the batch."""
        partial = {new: self.partial[old] for new, old in enumerate(places) if old in self.partial}
        return Watch(wanted=self.wanted, partial=partial)


def tasks_of(pipeline: str) -> tuple[Task, ...]:
    """What a pipeline of this class draws, by itself or by its siblings in diffusers."""
    if any(word in pipeline for word in READS_IMAGES):
        return ("generate", "edit")
    tasks: list[Task] = ["generate"]
    if auto_pipeline._get_task_class(auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, pipeline, False):
        tasks.append("vary")
    if auto_pipeline._get_task_class(auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING, pipeline, False):
        tasks.append("inpaint")
    return tuple(tasks)
