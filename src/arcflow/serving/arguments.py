"""What a stock pipeline is told of an order: guidance, images, masks, steps, each in the pipeline's own words."""

import inspect
import math
from collections.abc import Mapping, Sequence

from diffusers import DiffusionPipeline

from arcflow.families import family_of
from arcflow.serving.order import Order, Piece

Words = dict[str, object]
"""What a pipeline is told by name; each takes words of its own."""


def known_to(pipe: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """What may be said to a pipeline's call, by name."""
    return inspect.signature(type(pipe).__call__).parameters


def guidance_of(pipe: DiffusionPipeline, order: Order) -> dict[str, float]:
    """Guidance, as the pipeline wants to be told."""
    known, guided = known_to(pipe), dict[str, float]()
    if "true_cfg_scale" in known:
        guided["true_cfg_scale"] = 1.0 if order.negative is None else order.negative
        if order.guidance is not None:
            guided["guidance_scale"] = order.guidance
    elif order.guidance is not None or "negative_prompt_embeds" in known:
        scale = order.negative if order.negative is not None else order.guidance
        guided["guidance_scale"] = family_of(pipe.transformer).off if scale is None else scale
    return guided


def inputs_of(pipe: DiffusionPipeline, order: Order, pieces: Sequence[Piece]) -> Words:
    """Images and masks of the pieces."""
    if order.task == "generate":
        return {}
    if order.task == "edit":
        known = known_to(pipe)
        fixed = {"max_area": order.height * order.width, "_auto_resize": False} if "_auto_resize" in known else {}
        images = list(pieces[0].images)
        return {"image": images if len(images) > 1 else images[0], **fixed}
    given: Words = {"image": [piece.images[0] for piece in pieces], "strength": order.strength}
    if order.task == "inpaint":
        given["mask_image"] = [piece.mask for piece in pieces]
    return given


def taken(order: Order) -> int:
    """Steps that are taken of those of the grid, when an image starts from less than all noise."""
    return order.steps - max(math.floor(order.steps - min(order.steps * order.strength, order.steps)), 0)
