"""What is asked for: a piece is one picture, an order is all that pictures must share to be drawn together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Task = Literal["generate", "vary", "inpaint", "edit"]
"""From noise; from a picture and noise; where a mask is white; by a pipeline that reads pictures beside the text."""


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
    """How much of the noise a picture starts from."""
    pictures: tuple[tuple[int, int], ...] = ()
    """Sizes of the pictures that a pipeline reads beside the text."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is a picture's own."""

    prompt: str
    seed: int
    negative: str = ""
    images: tuple[Image.Image, ...] = ()
    mask: Image.Image | None = None
    """White where the picture is to change."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture, and what it cost."""

    image: UInt8[np.ndarray, "height width 3"]
    seconds: Mapping[str, float]
    """Of its batch, by part: text, transformer, vae."""
    batch: int
    """Pictures that were drawn together."""
    calls: int
    """Network calls, each for the whole batch."""
    text_tokens: int
    image_tokens: int
    waited: float = field(default=0.0)
    """Seconds in the queue."""
