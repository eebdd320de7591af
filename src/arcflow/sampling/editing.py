"""Images to edit: which pipelines read one, what is drawn from them, and what a stock pipeline is told of one.

An editing model draws from an image and an instruction. The image is cut from its middle to the shape of what is drawn,
as it is in a distillation, so that a student draws what it has learned."""

import inspect
import math
from collections.abc import Sequence

from diffusers import DiffusionPipeline
from PIL import Image

from arcflow.data.images import read_image
from arcflow.families.family import Family

READS_IMAGES = ("Kontext", "Edit", "Flux2")
"""In the names of pipelines that read images beside the text."""

AREA = 1024 * 1024
"""Pixels that are drawn at most, where nobody says a size."""


def check_editing(model: str, pipeline: str, family: Family, *, asked: bool) -> None:
    """Refuse an image to edit that a pipeline of this class does not read, or words alone where it wants an image.

    Raises:
        ValueError: one of these.
    """
    reads = family.edit is not None and any(word in pipeline for word in READS_IMAGES)
    if asked and not reads:
        raise ValueError(
            f"an image to edit: {model} is a {pipeline}, which reads none: expected FLUX.1 Kontext, FLUX.2 or "
            f"Qwen-Image-Edit; leave --image and --sources out"
        )
    if not asked and "Edit" in pipeline:
        raise ValueError(
            f"{model} is a {pipeline}, which edits images and draws none from words alone: expected --image FILE, or "
            f"--sources with a list that has a column source"
        )


def drawn_size(path: str, token: int) -> tuple[int, int]:
    """Height and width of what is drawn from an image: its own, of at most `AREA` pixels, in multiples of `token`.

    Raises:
        ValueError: the file is no image.
    """
    height, width = read_image(path).shape[:2]
    scale = min(1.0, math.sqrt(AREA / (height * width)))
    high, wide = (max(token, int(side * scale) // token * token) for side in (height, width))
    return high, wide


def told_of_images(
    pipe: DiffusionPipeline, images: Sequence[Image.Image], height: int, width: int
) -> dict[str, Image.Image | list[Image.Image] | int | bool]:
    """What a pipeline is told of the images it edits into one of this size."""
    known = inspect.signature(type(pipe).__call__).parameters
    # Kontext would else choose a size of its own
    fixed = {"max_area": height * width, "_auto_resize": False} if "_auto_resize" in known else {}
    return {"image": list(images) if len(images) > 1 else images[0], **fixed}
