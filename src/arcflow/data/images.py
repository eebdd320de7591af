"""Images from files as a viewer shows them, in eight-bit RGB.

A file holds more than its numbers: phones store an image lying on its side and note the turn, sixteen bits want
scaling, and what is transparent shows the page behind it, which is white here.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps


def read_image(path: str | Path) -> UInt8[np.ndarray, "rows columns 3"]:
    """An image as it is seen.

    Raises:
        ValueError: it cannot be read, or is larger than Pillow takes for safe; the message names the file.
    """
    return np.asarray(_seen(path))


def read_images(paths: Sequence[str], size: tuple[int, ...]) -> UInt8[np.ndarray, "batch height width 3"]:
    """Images of one size (height, width), cut from the middle of the files. Raises ValueError as `read_image`."""
    filled = [ImageOps.fit(_seen(path), (size[1], size[0]), Image.Resampling.LANCZOS) for path in paths]
    return np.stack([np.asarray(image) for image in filled])


def _seen(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return _flat(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise whatever they like: SyntaxError, struct.error, DecompressionBombError
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is no image that can be read ({why}): expected PNG, JPEG or WebP; correct the file, or take it "
            f"away"
        ) from error


def _flat(image: Image.Image) -> Image.Image:
    """RGB in eight bits, on white where an image is transparent."""
    if image.mode == "F":
        raise ValueError("its numbers are floating, whose range is not told")
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("it has more than 16 bits a channel")
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image.convert("RGB")
