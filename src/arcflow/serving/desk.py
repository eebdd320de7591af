"""Where requests become orders: what is asked for is held against what the model, the queue and the limits allow."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from arcflow.serving import schema
from arcflow.serving.arguments import taken
from arcflow.serving.engine import Engine, NotReady
from arcflow.serving.errors import Refused
from arcflow.serving.images import cropped, holes, within
from arcflow.serving.offer import TEACHER, Offer
from arcflow.serving.order import Order, Piece, Task

NEGATIVE = 2.0
"""Guidance against a negative prompt, where a request does not say."""

STRENGTH = 0.6
"""How much of the noise an image to be changed starts from, where a request does not say."""

CHANGE_STEPS = 4
"""Least steps of a change, where a request does not say: strength counts in whole ones."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask at most."""

    side: int = 2048
    """Pixels of the longer side."""
    pixels: int = 2048 * 2048
    steps: int = schema.MOST_STEPS


class Desk:
    """Takes requests for one engine."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine = engine
        self.limits = limits

    def order(
        self, offer: Offer, asked: schema.Asked, images: Sequence[Image.Image], mask: Image.Image | None
    ) -> tuple[Order, list[Piece]]:
        """What a request asks for, checked against what there is."""
        model = known_model(offer, asked.model or offer.models[0])
        task = _task(offer, asked, images, mask)
        if task == "edit":  # no more than the model draws itself: what it reads beside the text costs as much
            images = [within(image, offer.height * offer.width) for image in images]
        height, width = self._size(offer, asked.size, images if task != "generate" else ())
        strength = asked.strength if isinstance(asked, schema.Edit) else None
        if strength is not None and task == "edit":
            raise Refused("this model reads the image whole and knows no strength; leave it out", param="strength")
        changes = task in ("vary", "inpaint")
        usual = max(offer.steps[model], CHANGE_STEPS) if changes else offer.steps[model]
        steps = asked.num_inference_steps or usual
        if steps > self.limits.steps:
            raise Refused(f"{steps} steps: expected at most {self.limits.steps}", param="num_inference_steps")
        if asked.true_cfg_scale is not None and asked.negative_prompt is None:
            raise Refused("true_cfg_scale guides away from a negative prompt: give one", param="true_cfg_scale")
        if asked.negative_prompt is not None and not offer.negative:
            raise Refused("this model takes no negative prompt; leave it out", param="negative_prompt")
        guidance = offer.guidance[model] if asked.guidance_scale is None else asked.guidance_scale
        if guidance is None and model == TEACHER:
            guidance = next((g for g in offer.guidance.values() if g is not None), None)
        order = Order(
            height=height,
            width=width,
            steps=steps,
            model=model,
            guidance=guidance,
            negative=None if asked.negative_prompt is None else asked.true_cfg_scale or NEGATIVE,
            styles=_styles(offer, asked.lora or {}),
            task=task,
            strength=(STRENGTH if strength is None else strength) if changes else 1.0,
            inputs=tuple(image.size for image in images) if task == "edit" else (),
        )
        if taken(order) < 1:
            raise Refused(
                f"strength {order.strength} of {steps} steps leaves none: expected at least {1 / steps:.3g}",
                param="strength",
            )
        if asked.n > self.engine.max_waiting:  # the queue would be too full for ever
            raise Refused(f"n {asked.n}: this server's queue holds {self.engine.max_waiting} images", param="n")
        first = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        if first + asked.n > schema.SEEDS:
            raise Refused(f"seeds {first} to {first + asked.n - 1}: expected them below 2^63", param="seed")
        seen = tuple(cropped(image, height, width) if changes else image for image in images)
        pieces = [
            Piece(
                prompt=asked.prompt,
                seed=first + i,
                negative=asked.negative_prompt or "",
                images=seen,
                mask=holes(mask, height, width) if mask is not None and task == "inpaint" else None,
            )
            for i in range(asked.n)
        ]
        return order, pieces

    def _size(self, offer: Offer, size: str, images: Sequence[Image.Image]) -> tuple[int, int]:
        """Height and width. "auto" is the model's own, in the shape of the image to be changed."""
        if size == "auto":
            if not images:
                return offer.height, offer.width
            wide, high = images[0].size
            scale = (offer.height * offer.width / (wide * high)) ** 0.5

            most = max(self.limits.side // offer.multiple, 1)

            def side(pixels: int) -> int:
                return min(max(round(pixels * scale / offer.multiple), 1), most) * offer.multiple

            return side(high), side(wide)
        width, height = map(int, size.split("x"))
        if width % offer.multiple or height % offer.multiple or not width or not height:
            raise Refused(f"size {size}: expected multiples of {offer.multiple}", param="size", code="invalid_size")
        if max(width, height) > self.limits.side or width * height > self.limits.pixels:
            raise Refused(
                f"size {size}: expected sides of at most {self.limits.side} and {self.limits.pixels} pixels",
                param="size",
                code="invalid_size",
            )
        return height, width


def offer_of(engine: Engine) -> Offer:
    if engine.offer is None or engine.state != "ready":
        raise NotReady(engine.state)
    return engine.offer


def known_model(offer: Offer, name: str) -> str:
    if name not in offer.models:
        known = ", ".join(offer.models)
        raise Refused(f"no model {name!r}: expected one of {known}", status=404, param="model", code="model_not_found")
    return name


def _styles(offer: Offer, asked: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    for name in asked:
        if name not in offer.styles:
            known = ", ".join(offer.styles) or "none are loaded"
            raise Refused(f"no style {name!r}: expected one of these: {known}", param="lora")
    return tuple(sorted((name, strength) for name, strength in asked.items() if strength))


def _task(offer: Offer, asked: schema.Asked, images: Sequence[Image.Image], mask: Image.Image | None) -> Task:
    if not isinstance(asked, schema.Edit):
        return "generate"
    if "edit" in offer.tasks:
        if mask is not None:
            raise Refused("this model edits by words and takes no mask; leave it out", param="mask")
        return "edit"
    if len(images) > 1:
        raise Refused(f"{len(images)} images: this model starts from one alone", param="image")
    task: Task = "vary" if mask is None else "inpaint"
    if task not in offer.tasks:
        what = "images" if mask is None else "images under a mask"
        raise Refused(f"this model has no pipeline that changes {what}; it draws from words", param="image")
    return task
