"""Images on the wire: uploads checked before they are unpacked, and files with the recipe in them."""

import base64
import binascii
import io
import json
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

MOST_BYTES = 20 << 20
"""Bytes of an uploaded image, at most."""

MOST_PIXELS = 4096 * 4096
"""Pixels of an uploaded image, at most: a small file may unpack to gigabytes."""

READ = ("PNG", "JPEG", "WEBP")


def read_upload(data: bytes) -> Image.Image:
    """An uploaded image, upright.

    Raises:
        ValueError: it is too large, or no PNG, JPEG or WebP file.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"the image has {len(data)} bytes: expected at most {MOST_BYTES}")
    try:
        image = Image.open(io.BytesIO(data), formats=READ)
        wide, high = image.size
        if wide * high > MOST_PIXELS:
            raise ValueError(f"the image has {wide} x {high} pixels: expected at most {MOST_PIXELS}")
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(f"the image cannot be read: expected a whole file, one of {', '.join(READ)}") from None
    return ImageOps.exif_transpose(image)


def from_data_uri(text: str) -> bytes:
    """The bytes of `data:image/png;base64,...`, or of base64 alone.

    Raises:
        ValueError: it is neither.
    """
    head, comma, body = text.partition(",")
    if comma and not (head.startswith("data:image/") and head.endswith(";base64")):
        raise ValueError("the image's address cannot be read: expected data:image/png;base64,... (none is fetched)")
    try:
        return base64.b64decode(body if comma else text, validate=True)
    except binascii.Error:
        raise ValueError("the image cannot be read: expected base64, or data:image/png;base64,...") from None


def cropped(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image in color at this size, cut at the sides where its shape is another."""
    return ImageOps.fit(_flat(image), (width, height), Image.Resampling.LANCZOS)


def within(image: Image.Image, pixels: int) -> Image.Image:
    """The image in color, made smaller where it has more than so many pixels."""
    image = _flat(image)
    scale = (pixels / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.LANCZOS)


def holes(mask: Image.Image, height: int, width: int) -> Image.Image:
    """White where the image is to change: where the mask is transparent, or white if it has no transparency."""
    if mask.has_transparency_data:
        change = ImageOps.invert(mask.convert("RGBA").getchannel("A"))
    else:
        change = mask.convert("L")
    change = ImageOps.fit(change, (width, height), Image.Resampling.NEAREST)
    return change.point([0] * 128 + [255] * 128)


def _flat(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def written(
    image: UInt8[np.ndarray, "height width 3"], kind: str, compression: int, recipe: Mapping[str, object]
) -> bytes:
    """An image file; a PNG carries its recipe as text. Equal images of equal recipes are equal files."""
    file = io.BytesIO()
    shown = Image.fromarray(image)
    if kind == "png":
        chunks = PngInfo()
        for name, value in recipe.items():
            chunks.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
        shown.save(file, format="PNG", pnginfo=chunks)
    else:
        shown.save(file, format=kind.upper(), quality=max(compression, 1))
    return file.getvalue()
