"""What a stock pipeline is told of an order: guidance, images, masks, steps, each in the pipeline's own words; and how
it tells of its steps."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from arcflow.families import family_of
from arcflow.sampling.editing import told_of_images
from arcflow.serving.order import Order, Piece

Words = dict[str, object]
"""What a pipeline is told by name; each takes words of its own."""

After = Callable[[DiffusionPipeline, int, object, dict[str, Tensor]], dict[str, Tensor]]
"""What is called after a step: (pipeline, number of the step, its time, latents by that name) -> what is to be changed,
which is nothing here."""


def known_to(pipe: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """What may be said to a pipeline's call, by name."""
    return inspect.signature(type(pipe).__call__).parameters


def guidance_of(pipe: DiffusionPipeline, order: Order) -> dict[str, float]:
    """Guidance, as the pipeline wants to be told."""
    known = known_to(pipe)
    guided = dict[str, float]()
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
        return {**told_of_images(pipe, pieces[0].images, order.height, order.width)}
    given: Words = {"image": [piece.images[0] for piece in pieces], "strength": order.strength}
    if order.task == "inpaint":
        given["mask_image"] = [piece.mask for piece in pieces]
    return given


def told_of(pipe: DiffusionPipeline) -> Words:
    """What pipelines of its family are told besides, and how much text they read, as far as this one knows of it."""
    known = known_to(pipe)
    return {name: value for name, value in family_of(pipe.transformer).told_to(pipe).items() if name in known}


@contextmanager
def called_back(pipe: DiffusionPipeline, after: After) -> Iterator[Words]:
    """While the block runs `after` is called after each step. What the pipeline must be told for that; nothing where it
    knows of no callback, for then its scheduler tells."""
    if "callback_on_step_end" in known_to(pipe):
        yield {"callback_on_step_end": after}
        return
    step, taken = pipe.scheduler.step, 0

    def noted(*given: Any, **named: Any) -> Any:  # noqa: ANN401 - as each scheduler has it
        nonlocal taken
        output = step(*given, **named)
        after(pipe, taken, None, {"latents": output[0]})
        taken += 1
        return output

    pipe.scheduler.step = noted
    try:
        yield {}
    finally:
        del pipe.scheduler.step


def taken(order: Order) -> int:
    """Steps that are taken of those of the grid, when an image starts from less than all noise."""
    return order.steps - max(math.floor(order.steps - min(order.steps * order.strength, order.steps)), 0)
