"""What differs between backbones, as data: one row per diffusers transformer class.

A row says where the last layers are, which Linears take a LoRA, how many latent pixels a token packs, and which
functions turn prompts into conditioning and latents into images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from arcflow.families.conditioning import Cond

Arguments = dict[str, Tensor | list[list[tuple[int, ...]]] | None]
"""Conditioning as a transformer takes it: tensors, and lists of sizes in Qwen-Image."""


@dataclass(frozen=True)
class Family:
    """One backbone: names, places and the functions that know its conditioning."""

    name: str
    transformer: str
    """Class name of the stock diffusers transformer."""
    pipeline: str
    """Class name of its text-to-image pipeline."""
    published: str
    """Class name in the config.json of a published adapter; empty where nobody has published any."""
    embedder: str
    """First Linear on the latents: what it computes in, the network does."""
    lora_targets: str
    """Regular expression for the full names of the Linears that take a LoRA. Never the output head, see `head`."""
    lora_skip: str
    """The same for Linears whose output nobody reads; `{last}` is the index of the last block. Empty: none."""
    guidance: float | None
    """Guidance embedding the adapters are distilled with; None where there is no such input."""
    arguments: Callable[[Cond], Arguments]
    """Conditioning as keyword arguments of the transformer."""
    encode: Callable[[DiffusionPipeline, list[str], int, str | torch.device | None], Cond]
    """(pipe, prompts, text tokens, device of the text encoders) -> what these make of them, a row for each."""
    places: Callable[[Cond, int, int], Cond]
    """(that, rows and columns of tokens) -> where text and picture stand."""
    text_length: Callable[[DiffusionPipeline], int]
    """(pipe) -> text tokens its encoder reads at most."""
    to_vae: Callable[[DiffusionPipeline, Tensor], Tensor]
    """(pipe, latents (B, C, h, w)) -> images (B, 3, H, W) in [-1, 1]."""
    from_vae: Callable[[DiffusionPipeline, Tensor], Tensor]
    """The way back, to the mean of what the encoder gives."""
    head: str = "proj_out"
    norm: str = "norm_out"
    pixels: int = 4
    """Latent pixels per token, P: a patch of 2 x 2."""
    negative: bool = True
    """Whether its pipelines take a negative prompt, and guide by a second call against it (`true_cfg_scale`)."""
    packs: bool = True
    """Whether noise is drawn as pixels and packed into tokens; else its channels are the tokens'."""


def as_keywords(cond: Cond) -> Arguments:
    return {**cond}


def reads_512_tokens(pipe: DiffusionPipeline) -> int:
    return 512


TIME_EMBEDDERS = r"time_(text|guidance)_embed\.timestep_embedder\.linear_[12]"

EVERY_LINEAR = r"(time_(text|guidance)_embed|(single_)?transformer_blocks)\..*"
