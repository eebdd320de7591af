"""Motion: how much a student's videos move, against the teacher's from the same noise.

    motion = mean |latent of frame f + 1 - latent of frame f| of the student, over that of the teacher

1 is the teacher's; students of few steps tend to be slower, and below 1. Latents stand for pixels: their changes are
those of several frames at once, and no autoencoder is needed.
"""

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

SHOWN = 4
"""Frames of a strip."""


def motion(student: Float[Tensor, "n tokens width"], teacher: Float[Tensor, "n tokens width"], frames: int) -> float:
    """Change from frame to frame of the student's latents over that of the teacher's; frames stand one after another.

    Args:
        frames: latent frames, at least two.
    """
    moved = [x.unflatten(1, (frames, -1)).diff(dim=1).abs().mean() for x in (student, teacher)]
    return float(moved[0] / moved[1])


def strip(image: UInt8[np.ndarray, "*frames rows columns 3"], shown: int = SHOWN) -> UInt8[np.ndarray, "rows width 3"]:
    """Frames of a video side by side, from the first to the last; an image as it is."""
    if image.ndim == 3:
        return image
    places = np.linspace(0, len(image) - 1, min(shown, len(image))).round().astype(int)
    return np.concatenate(list(image[places]), 1)
