"""A network called as its stock pipeline calls it; prompts encoded, noise drawn, latents decoded.

Above this file a model is two callables of (x, sigma, cond). `call` rounds time exactly as the stock pipelines do:
they cast 1000 sigma to the dtype of the latents before dividing it again (in bfloat16 761.9 becomes 760), so that
teacher, student and pipeline see the same number.

`family` is that of the network, for those who know it already; who leaves it out has it looked up at every call."""

import numpy as np
import torch
from diffusers import DiffusionPipeline
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from arcflow.families import family_of
from arcflow.families.conditioning import Cond
from arcflow.families.family import Family
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
    dtype = compute_dtype(transformer, family)
    time = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x)) * 1000
    return transformer(
        hidden_states=x.to(dtype),
        timestep=time.to(dtype) / 1000,
        return_dict=False,
        **family.arguments(cond),
    )[0]


def encode_prompts(
    pipe: DiffusionPipeline,
    prompts: list[str],
    *,
    height: int,
    width: int,
    guidance: float | None = None,
    max_sequence_length: int | None = None,
) -> Cond:
    """Conditioning of a batch of prompts for images of this size, by the pipeline's own text encoders. `guidance` and
    the length are the family's unless given."""
    text = encode_text(pipe, prompts, max_sequence_length)
    return place(pipe, text, height=height, width=width, guidance=guidance)


@torch.no_grad()
def encode_text(
    pipe: DiffusionPipeline,
    prompts: list[str],
    max_sequence_length: int | None = None,
    device: str | torch.device | None = None,
) -> Cond:
    """What the pipeline's text encoders make of prompts, a row for each: conditioning without picture and guidance.
    `device` is theirs, if it is not that of the pipeline."""
    family = family_of(pipe.transformer)
    return family.encode(pipe, prompts, max_sequence_length or family.text_length(pipe), device)


def place(
    pipe: DiffusionPipeline,
    text: Cond,
    *,
    height: int,
    width: int,
    guidance: float | None = None,
    family: Family | None = None,
) -> Cond:
    """Conditioning made whole: encoded prompts, for images of this size, at this guidance."""
    family = family or family_of(pipe.transformer)
    cond = text | family.places(text, *_grid(pipe, height, width))
    if pipe.transformer.config.get("guidance_embeds"):
        embeds = text["encoder_hidden_states"]
        scale = guidance if guidance is not None else family.guidance or 1.0
        cond["guidance"] = torch.full((len(embeds),), scale, device=embeds.device, dtype=torch.float32)
    return cond


def noise(
    pipe: DiffusionPipeline, seeds: list[int], height: int, width: int, family: Family | None = None
) -> Float[Tensor, "batch tokens width"]:
    """Starting latents, float32 on the CPU: sample i is what the stock pipeline (in float32) draws from
    `torch.Generator("cpu").manual_seed(seeds[i])`, whatever the rest of the batch."""
    rows, columns = _grid(pipe, height, width)
    family = family or family_of(pipe.transformer)
    p = 2 if family.packs else 1
    shape = (pipe.transformer.config.in_channels // p**2, p * rows, p * columns)
    draws = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    return rearrange(torch.stack(draws), "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)


@torch.no_grad()
def decode(
    pipe: DiffusionPipeline, x: Float[Tensor, "batch tokens channels"], height: int, width: int
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Images of packed latents, by the pipeline's own autoencoder."""
    rows, columns = _grid(pipe, height, width)
    if x.shape[1] != rows * columns:
        raise ValueError(
            f"{x.shape[1]} tokens do not make an image of {height} x {width}: expected {rows} x {columns} tokens. "
            f"Give the height and width the latents were made for."
        )
    latents = rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2)
    images = family_of(pipe.transformer).to_vae(pipe, latents)
    return _to_uint8(images)


@torch.no_grad()
def encode_pictures(
    pipe: DiffusionPipeline, images: UInt8[np.ndarray, "batch height width 3"], family: Family | None = None
) -> Float[Tensor, "batch tokens channels"]:
    """Packed latents of pictures, by the pipeline's own autoencoder; float32."""
    unit = torch.from_numpy(images).permute(0, 3, 1, 2).to(pipe.vae.device, pipe.vae.dtype) / 127.5 - 1
    family = family or family_of(pipe.transformer)
    latents = family.from_vae(pipe, unit).float()
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def _to_uint8(images: Float[Tensor, "batch 3 height width"]) -> UInt8[np.ndarray, "batch height width 3"]:
    unit = (images.float() * 0.5 + 0.5).clamp(0, 1)
    return (rearrange(unit, "b c h w -> b h w c").cpu().numpy() * 255).round().astype(np.uint8)


def _grid(pipe: DiffusionPipeline, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens: a token covers 2 x 2 latent pixels."""
    patch = 2 * pipe.vae_scale_factor
    if height % patch or width % patch or min(height, width) < patch:
        raise ValueError(f"image size {height} x {width}: both must be multiples of {patch} for this pipeline.")
    return height // patch, width // patch
