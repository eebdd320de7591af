"""What differs between backbones, as data: one row per diffusers transformer class.

A row says where the last layers are, which Linears take a LoRA, how many latent pixels a token packs, how state and
time enter the network and what leaves it, and which functions turn prompts into conditioning and latents into images.
Entries with a default are those of a network that works on tokens from end to end, as FLUX.1 does."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import numpy as np
import torch
from diffusers import DiffusionPipeline
from jaxtyping import UInt8
from torch import Tensor, nn

from arcflow.families.conditioning import Cond

Arguments = dict[str, Tensor | list[Tensor] | list[list[tuple[int, ...]]] | int | tuple[float, ...] | None]
"""What a transformer takes: tensors, lists of them in Z-Image, and lists of sizes in Qwen-Image."""

TIME_EMBEDDERS = r"time_(text|guidance)_embed\.timestep_embedder\.linear_[12]"

EVERY_LINEAR = r"(time_(text|guidance)_embed|(single_)?transformer_blocks)\..*"

SIZES = (
    "num_layers",
    "num_single_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
)
"""Entries of FLUX's config that a base must share with an adapter."""


def as_keywords(cond: Cond) -> Arguments:
    return {**cond}


def reads_512_tokens(pipe: DiffusionPipeline) -> int:
    return 512


def cast_then_divided(x: Tensor, time: Tensor, dtype: torch.dtype) -> Arguments:
    """Arguments as in FLUX.1's pipelines: 1000 sigma in the network's dtype (761.9 is 760 in bfloat16), over 1000."""
    return {"hidden_states": x.to(dtype), "timestep": time.to(dtype) / 1000}


def divided_then_cast(x: Tensor, time: Tensor, dtype: torch.dtype) -> Arguments:
    """Sigma in float32, then in the network's dtype."""
    return {"hidden_states": x.to(dtype), "timestep": (time / 1000).to(dtype)}


def as_it_is(x: Tensor, time: Tensor, dtype: torch.dtype) -> Arguments:
    """1000 sigma in float32."""
    return {"hidden_states": x.to(dtype), "timestep": time}


def first_tokens(tokens: Tensor, count: int, cond: Cond) -> Tensor:
    """The image's tokens where others, if there are any, stand behind them."""
    return tokens[:, :count]


def last_tokens(tokens: Tensor, count: int, cond: Cond) -> Tensor:
    """The image's tokens where the text's stand before them."""
    return tokens[:, -count:]


def nowhere(text: Cond, *cells: int) -> Cond:
    """Where things stand, for a network that finds out by itself."""
    return {}


def spatial(pipe: DiffusionPipeline) -> tuple[int, ...]:
    """Pixels along the sides of a latent pixel."""
    return (pipe.vae_scale_factor, pipe.vae_scale_factor)


EditedImages = UInt8[np.ndarray, "batch height width 3"]
"""Images to edit, all of one size."""


@dataclass(frozen=True)
class Editing:
    """How a family's editing models read an image: with the text, and as tokens behind those of x."""

    places: Callable[[Cond, int, int], Cond]
    """(conditioning of an image, rows and columns of tokens) -> where that image and the one to edit stand."""
    encode: Callable[[DiffusionPipeline, list[str], EditedImages, str | torch.device | None], Cond] | None = None
    """(pipe, instructions, images to edit, device) -> what text encoders that see the image make of both, a row for
    each; None where they read the instruction alone."""
    draws: bool = True
    """Whether its editing models draw an image from words alone too."""


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
    places: Callable[..., Cond]
    """(that, frames of a video, rows and columns of tokens) -> where text and image stand."""
    text_length: Callable[[DiffusionPipeline], int]
    """(pipe) -> text tokens its encoder reads at most."""
    to_vae: Callable[[DiffusionPipeline, Tensor], Tensor]
    """(pipe, latents (B, C, h, w)) -> images (B, 3, H, W) in [-1, 1]."""
    from_vae: Callable[[DiffusionPipeline, Tensor], Tensor]
    """The way back, to the mean of what the encoder gives."""
    head: str = "proj_out"
    """Name of the last Linear, dotted where it lies deeper."""
    norm: str = "norm_out"
    """Name of the module before it whose Linears are tuned; empty where it has none."""
    blocks: str = "transformer_blocks"
    """Name of the list of blocks, whose last one `lora_skip` may mean."""
    every: str = EVERY_LINEAR
    """Regular expression for all Linears that can take a LoRA (`targets` "all")."""
    patch: tuple[int, ...] = (2, 2)
    """Latent pixels along the sides of a token: rows and columns, and frames before them in a video."""
    folds: bool = False
    """Whether the network itself takes an image and folds its tokens back into one, behind the head. Its config then
    says the patch."""
    patch_first: bool = False
    """Whether the head's rows go by the place in the patch first and the channel then; else the other way."""
    enter: Callable[[Tensor, Tensor, torch.dtype], Arguments] = cast_then_divided
    """(state, 1000 sigma in float32, the network's dtype) -> both as keyword arguments, rounded as pipelines do."""
    leaves: Callable[[Tensor, int, Cond], Tensor] = first_tokens
    """(tokens behind the head, how many the image has, conditioning) -> the image's."""
    sign: float = 1.0
    """-1 where the network gives the velocity's negative."""
    time: tuple[float, float] = (0.0, 1.0)
    """a and b where the network is told the time a + b sigma."""
    clock: tuple[str, int] = ("timestep", 3)
    """Name and place of that argument."""
    reads: str = "max_sequence_length"
    """Argument of its pipelines for the text tokens that are read; empty where there is none."""
    negative: bool = True
    """Whether its pipelines take a negative prompt."""
    second: str = "guidance_scale"
    """Argument of its pipelines for the scale of a second call, against the negative prompt."""
    scale: float = 4.0
    """The value that the model is meant for."""
    off: float = 1.0
    """The greatest value that makes no second call. Guided velocities are negative + (1 + value - off) * difference."""
    wide: bool = False
    """Whether its pipelines want latents in float32 after each step, whatever these start in."""
    packs: bool = True
    """Whether noise is drawn as pixels and packed into tokens; else its channels are the tokens'."""
    told: Mapping[str, bool] = field(default_factory=dict)
    """What its pipelines are told besides, so that they draw a prompt as it was distilled."""
    frames: int = 1
    """Frames of a video that its pipelines draw unless told another number."""
    compression: Callable[[DiffusionPipeline], tuple[int, ...]] = spatial
    """(pipe) -> pixels, and frames, along the sides of a latent pixel."""
    edit: Editing | None = None
    """What its editing models do besides; None where it has none that is carried as a teacher."""
    sizes: tuple[str, ...] = SIZES
    """Entries of the transformer's config that a base must share with an adapter."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """A row of the list goes to another process by its name, whatever functions it has."""
        from arcflow.families import FAMILIES, family_named  # which have this row

        if any(family is self for family in FAMILIES):
            return family_named, (self.name,)
        return super().__reduce_ex__(protocol)

    @property
    def pixels(self) -> int:
        """Latent pixels per token, P, where the config says no other."""
        return math.prod(self.patch)

    @property
    def video(self) -> bool:
        return len(self.patch) == 3

    def told_to(self, pipe: DiffusionPipeline) -> dict[str, bool | int]:
        """What its pipelines are told besides, and how much text their encoder reads."""
        return {**self.told, **({self.reads: self.text_length(pipe)} if self.reads else {})}

    def patch_of(self, transformer: nn.Module) -> tuple[int, ...]:
        """Sides of a token of this transformer, in latent pixels."""
        config: Mapping[str, Any] = transformer.config  # type: ignore[assignment]  # a model of diffusers
        size = config.get("patch_size") if self.folds else None
        if size is None:
            return self.patch
        return (size,) * len(self.patch) if isinstance(size, int) else tuple(size)
