"""A request for a change as it comes: a form with files, or JSON with data URIs; its fields, images and mask."""

import asyncio
import json

from fastapi import Request
from PIL import Image
from starlette.datastructures import FormData, UploadFile

from arcflow.serving import schema
from arcflow.serving.errors import Refused
from arcflow.serving.images import MOST_BYTES, from_data_uri, read_upload

MOST_JSON = 1 << 20
"""Bytes of a request without images."""

MOST_FORM = 64 << 20
"""Bytes of a request with images."""

MOST_IMAGES = 4
"""Images that one edit may read."""

Json = dict[str, object]
"""What an answer or a request says."""


async def read_edit(request: Request) -> tuple[schema.Edit, list[Image.Image], Image.Image | None]:
    """The fields, the images and the mask of an edit."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        fields, files, masks = _from_json(await request.body())
    elif kind == "multipart/form-data":
        async with request.form(max_files=MOST_IMAGES + 1, max_fields=64, max_part_size=MOST_JSON) as form:
            fields, files, masks = await _from_form(form)
    else:
        raise Refused(f"content type {kind or 'missing'!r}: expected multipart/form-data or application/json")
    if not 1 <= len(files) <= MOST_IMAGES:
        raise Refused(f"{len(files)} images: expected 1 to {MOST_IMAGES}", param="image")
    asked = schema.Edit.model_validate(fields)
    try:
        images = [await asyncio.to_thread(read_upload, file) for file in files]
    except ValueError as error:
        raise Refused(str(error), param="image", code="invalid_image") from None
    try:
        mask = await asyncio.to_thread(read_upload, masks[0]) if masks else None
    except ValueError as error:
        raise Refused(str(error), param="mask", code="invalid_image") from None
    return asked, images, mask


def _from_json(body: bytes) -> tuple[Json, list[bytes], list[bytes]]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused("the body is no JSON") from None
    if not isinstance(fields, dict):
        raise Refused("the body is no JSON object")
    images = fields.pop("image", None) or fields.pop("images", None) or []
    images = images if isinstance(images, list) else [images]
    mask = fields.pop("mask", None)
    texts = [[_address(one) for one in images], [_address(mask)] if mask is not None else []]
    try:
        files, masks = ([from_data_uri(text) for text in some] for some in texts)
    except ValueError as error:
        raise Refused(str(error), param="image", code="invalid_image") from None
    return fields, files, masks


def _address(image: object) -> str:
    """An image in JSON: words, or an object with them under `image_url`."""
    text = image.get("image_url") if isinstance(image, dict) else image
    if not isinstance(text, str):
        raise Refused("an image in JSON: expected data:image/png;base64,...", param="image", code="invalid_image")
    return text


async def _from_form(form: FormData) -> tuple[Json, list[bytes], list[bytes]]:
    fields = Json()
    files = list[bytes]()
    masks = list[bytes]()
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            data = await value.read(MOST_BYTES + 1)
            if name in ("image", "image[]"):
                files.append(data)
            elif name == "mask":
                masks.append(data)
            else:
                raise Refused(f"a file named {name!r}: expected image, image[] or mask", param=name)
        else:
            fields[name] = value
    return fields, files, masks
