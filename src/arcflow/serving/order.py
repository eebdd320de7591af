"""What is asked for: a piece is one image, an order is all that images must share to be drawn together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Task = Literal["generate", "vary", "inpaint", "edit"]
"""From noise; from an image and noise; where a mask is white; by a pipeline that reads images beside the text."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """Everything that decides how a batch is drawn. Pieces of equal orders may share one."""

    height: int
    width: int
    steps: int
    model: str
    """Name of an adapter, or of the teacher."""
    guidance: float | None = None
    """Guidance that the network reads; None where it reads none."""
    negative: float | None = None
    """Guidance by a second call with the negative prompt; None for one call a step."""
    styles: tuple[tuple[str, float], ...] = ()
    """Names and strengths of LoRAs, by name."""
    task: Task = "generate"
    strength: float = 1.0
    """How much of the noise an image starts from."""
    inputs: tuple[tuple[int, int], ...] = ()
    """Sizes of the images that a pipeline reads beside the text."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is an image's own."""

    prompt: str
    seed: int
    negative: str = ""
    images: tuple[Image.Image, ...] = ()
    mask: Image.Image | None = None
    """White where the image is to change."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """An image, and what it cost."""

    image: UInt8[np.ndarray, "height width 3"]
    seconds: Mapping[str, float]
    """Time that its batch took, by part: text, transformer, vae."""
    batch: int
    """Images that were drawn together."""
    calls: int
    """Network calls, each for the whole batch."""
    text_tokens: int
    image_tokens: int
    waited: float = field(default=0.0)
    """Seconds in the queue."""
