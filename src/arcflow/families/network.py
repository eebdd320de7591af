"""A network called as its stock pipeline calls it; prompts encoded, noise drawn, latents decoded.

Above this file a model is two callables of (x, sigma, cond), and x is tokens: patches of the latents, channel first in
each. `call` rounds time exactly as the stock pipelines do (`Family.enter`), so that teacher, student and pipeline see
the same number. Where the network itself takes an image (`Family.folds`), `call` makes one of the tokens (`folded`)
and tokens of what comes out (`unfolded`); a video is an image with an axis more.

`family` is that of the network, for those who know it already; who leaves it out has it looked up at every call."""

import math
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from arcflow.families import FAMILIES, family_of
from arcflow.families.conditioning import AGAINST, Cond
from arcflow.families.family import EditedImages, Editing, Family
from arcflow.families.weights import compute_dtype


def call(
    transformer: nn.Module,
    x: Float[Tensor, "batch tokens width"],
    sigma: float | Float[Tensor, " batch"],
    cond: Cond,
    family: Family | None = None,
) -> Float[Tensor, "batch tokens out"]:
    """Raw output of the network at noise level `sigma`, with the stock pipeline's casts."""
    family = family or family_of(transformer)
    output = raw_output(transformer, x, sigma, cond, family)
    if isinstance(output, list):  # images of one frame
        output = torch.stack(output).squeeze(2)
    if family.folds:
        tokens = unfolded(output, family.patch_of(transformer))
    else:
        tokens = family.leaves(output, x.shape[1], cond)
    return tokens if family.sign == 1 else family.sign * tokens


def raw_output(
    transformer: nn.Module,
    x: Float[Tensor, "batch tokens width"],
    sigma: float | Float[Tensor, " batch"],
    cond: Cond,
    family: Family,
) -> Tensor | list[Tensor]:
    """What leaves the network, as it is."""
    dtype = compute_dtype(transformer, family)
    time = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x)) * 1000
    cond, state = {name: value for name, value in cond.items() if not name.startswith(AGAINST)}, x
    if family.folds:
        cells = cond.pop("img_grid")[0].tolist()
        state = folded(x, cells, family.patch_of(transformer))
    if "img_beside" in cond:  # an image to edit: tokens behind those of x, or channels behind those of the image
        state = torch.cat([state, cond.pop("img_beside").to(state)], 1)
    return transformer(**family.enter(state, time, dtype), **family.arguments(cond), return_dict=False)[0]


def folded(x: Float[Tensor, "batch tokens width"], cells: list[int], patch: tuple[int, ...]) -> Tensor:
    """The image (batch, channels, *sides) that patches make, in rows and columns, or frames, rows and columns."""
    x = x.unflatten(1, cells).unflatten(-1, (-1, *patch))
    d = len(patch)  # batch, cells, channel, places in the patch
    order = [0, d + 1, *(axis for i in range(d) for axis in (1 + i, d + 2 + i))]
    sides = [n * p for n, p in zip(cells, patch, strict=True)]
    return x.permute(order).reshape(len(x), -1, *sides)


def unfolded(image: Tensor, patch: tuple[int, ...]) -> Float[Tensor, "batch tokens width"]:
    """Patches of an image (batch, channels, *sides), channel first in each: the inverse of `folded`."""
    split = [part for n, p in zip(image.shape[2:], patch, strict=True) for part in (n // p, p)]
    x = image.reshape(*image.shape[:2], *split)
    d = len(patch)
    order = [0, *(2 + 2 * i for i in range(d)), 1, *(3 + 2 * i for i in range(d))]
    return x.permute(order).flatten(1 + d).flatten(1, d)


def encode_prompts(
    pipe: DiffusionPipeline,
    prompts: list[str],
    *,
    height: int,
    width: int,
    frames: int = 1,
    guidance: float | None = None,
    max_sequence_length: int | None = None,
) -> Cond:
    """Conditioning of a batch of prompts for images of this size, by the pipeline's own text encoders. `guidance` and
    the length are the family's unless given."""
    text = encode_text(pipe, prompts, max_sequence_length)
    return place(pipe, text, height=height, width=width, frames=frames, guidance=guidance)


@torch.no_grad()
def encode_text(
    pipe: DiffusionPipeline,
    prompts: list[str],
    max_sequence_length: int | None = None,
    device: str | torch.device | None = None,
) -> Cond:
    """What the pipeline's text encoders make of prompts, a row for each: conditioning without image and guidance.
    `device` is theirs, if it is not that of the pipeline."""
    family = family_of(pipe.transformer)
    return family.encode(pipe, prompts, max_sequence_length or family.text_length(pipe), device)


def place(
    pipe: DiffusionPipeline,
    text: Cond,
    height: int,
    width: int,
    frames: int = 1,
    *,
    guidance: float | None = None,
    family: Family | None = None,
) -> Cond:
    """Conditioning made whole: encoded prompts, for images of this size, at this guidance."""
    family = family or family_of(pipe.transformer)
    cells = _cells(pipe, family, height, width, frames)
    cond = text | family.places(text, *cells)
    first = next(iter(text.values()))
    if family.folds:
        cond["img_grid"] = torch.tensor([cells] * len(first))
    if pipe.transformer.config.get("guidance_embeds"):
        scale = guidance if guidance is not None else family.guidance or 1.0
        cond["guidance"] = torch.full((len(first),), scale, device=first.device, dtype=torch.float32)
    return cond


@torch.no_grad()
def encode_edits(
    pipe: DiffusionPipeline,
    prompts: list[str],
    images: EditedImages,
    *,
    guidance: float | None = None,
    max_sequence_length: int | None = None,
    device: str | torch.device | None = None,
    second: bool = False,
) -> Cond:
    """Conditioning of instructions for these images to edit, which stand beside x; what is drawn has their size. With
    `second` it has that of the empty instruction too, where the text encoder sees the image (`AGAINST`).

    Raises:
        ValueError: the family has no editing model that is carried.
    """
    family = family_of(pipe.transformer)
    edit = editing(family)

    def text(words: list[str]) -> Cond:
        if edit.encode is None:
            return encode_text(pipe, words, max_sequence_length, device)
        return edit.encode(pipe, words, images, device)

    height, width = images.shape[1:3]
    where: dict[str, Any] = {"height": height, "width": width, "guidance": guidance, "family": family}
    to = pipe.transformer.device
    cond = place(pipe, {name: value.to(to) for name, value in text(prompts).items()}, **where)
    cond |= edit.places(cond, *_cells(pipe, family, height, width, 1))
    cond["img_beside"] = encode_images(pipe, images, family).to(to)
    if second and edit.encode is not None:
        empty = {name: value.to(to) for name, value in text([""] * len(prompts)).items()}
        cond |= {AGAINST + name: value for name, value in empty.items()}
    return cond


def editing(family: Family) -> Editing:
    """How the family's editing models read an image. Raises ValueError if none is carried."""
    if family.edit is None:
        known = ", ".join(one.name for one in FAMILIES if one.edit)
        raise ValueError(
            f"{family.name} has no editing model that is carried: expected one of {known}; leave data.sources off"
        )
    return family.edit


def noise(
    pipe: DiffusionPipeline, seeds: list[int], height: int, width: int, frames: int = 1, family: Family | None = None
) -> Float[Tensor, "batch tokens width"]:
    """Starting latents, float32 on the CPU: sample i is what the stock pipeline (in float32) draws from
    `torch.Generator("cpu").manual_seed(seeds[i])`, whatever the rest of the batch."""
    family = family or family_of(pipe.transformer)
    cells = _cells(pipe, family, height, width, frames)
    patch = family.patch_of(pipe.transformer)
    drawn = patch if family.packs else (1,) * len(patch)
    channels = pipe.transformer.get_submodule(family.head).out_features // math.prod(drawn)
    shape = (channels, *(n * p for n, p in zip(cells, drawn, strict=True)))
    draws = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    return unfolded(torch.stack(draws), drawn)


@torch.no_grad()
def decode(
    pipe: DiffusionPipeline, x: Float[Tensor, "batch tokens channels"], height: int, width: int, frames: int = 1
) -> UInt8[np.ndarray, "batch *frames height width 3"]:
    """Images of packed latents, by the pipeline's own autoencoder; of a video family, videos."""
    family = family_of(pipe.transformer)
    cells = _cells(pipe, family, height, width, frames)
    if x.shape[1] != math.prod(cells):
        counts = " x ".join(map(str, cells))
        raise ValueError(
            f"{x.shape[1]} tokens do not make an image of {height} x {width}: expected {counts} tokens. "
            f"Give the height and width the latents were made for."
        )
    return _to_uint8(family.to_vae(pipe, folded(x, list(cells), family.patch_of(pipe.transformer))))


@torch.no_grad()
def encode_images(
    pipe: DiffusionPipeline, images: UInt8[np.ndarray, "batch *frames height width 3"], family: Family | None = None
) -> Float[Tensor, "batch tokens channels"]:
    """Packed latents of images, or of videos, by the pipeline's own autoencoder; float32."""
    family = family or family_of(pipe.transformer)
    unit = torch.from_numpy(images).movedim(-1, 1).to(pipe.vae.device, pipe.vae.dtype) / 127.5 - 1
    return unfolded(family.from_vae(pipe, unit).float(), family.patch_of(pipe.transformer))


def _to_uint8(
    images: Float[Tensor, "batch 3 *frames height width"],
) -> UInt8[np.ndarray, "batch *frames height width 3"]:
    unit = (images.float() * 0.5 + 0.5).clamp(0, 1)
    return (rearrange(unit, "b c ... -> b ... c").cpu().numpy() * 255).round().astype(np.uint8)


def check_size(pipe: DiffusionPipeline, height: int, width: int, frames: int = 1) -> None:
    """Whether the model draws images, or videos, of this size. Raises ValueError if it does not."""
    _cells(pipe, family_of(pipe.transformer), height, width, frames)


def _cells(pipe: DiffusionPipeline, family: Family, height: int, width: int, frames: int) -> tuple[int, ...]:
    """Tokens along each side: in rows and columns, or frames, rows and columns."""
    compression, patch = family.compression(pipe), family.patch_of(pipe.transformer)
    *_, down, across = (c * p for c, p in zip(compression, patch, strict=True))
    if height % down or width % across or height < down or width < across:
        raise ValueError(f"image size {height} x {width}: both must be multiples of {down} for this pipeline.")
    cells = (height // down, width // across)
    if not family.video:
        if frames != 1:
            raise ValueError(f"{frames} frames: {family.name} draws images; expected 1, leave the frames out.")
        return cells
    each = compression[0]
    if frames < 1 or (frames - 1) % (each * patch[0]):
        raise ValueError(
            f"{frames} frames: expected 1 and a multiple of {each * patch[0]} more for this pipeline, say "
            f"{1 + each * patch[0] * max(1, round((frames - 1) / each / patch[0]))}."
        )
    return ((frames - 1) // each // patch[0] + 1, *cells)
