"""The losses of the small teacher: flow matching from nothing, then guidance distilled into the network.

Stage one is flow matching (x_sigma = (1 - sigma) x0 + sigma eps, target eps - x0), captions dropped at times, guidance
input fixed at 1. Stage two distills guidance into the network, as FLUX.1-dev was (arXiv 2210.03142): with its own
frozen copy as teacher it learns u_empty + w (u_caption - u_empty), given w.
"""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from arcflow.distillation.policy import Teacher
from arcflow.distillation.walk import guided
from arcflow.families.conditioning import Cond, shared
from arcflow.families.flux import FLUX
from arcflow.families.network import call
from arcflow.path import column, noised, shift_sigma
from arcflow.world.autoencoder import plain_map, scenes
from arcflow.world.teacher import GRID
from arcflow.world.text import build_tokenizer, tokenize

GUIDANCE = (1.0, 5.0)
"""Range of guidance scales distilled into the teacher; `paper.GUIDANCE` is what it is used with."""

DROP_CAPTION = 0.1


@torch.no_grad()
def encode(
    t5: T5EncoderModel,
    clip: CLIPTextModel,
    texts: list[str],
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    grid: int = GRID,
) -> Cond:
    """Conditioning of captions as the pipeline makes it, but for the guidance; tokenizer and grid of tokens are the
    world's unless told."""
    ids = tokenize(tokenizer or build_tokenizer(), texts)
    text = {"encoder_hidden_states": t5(ids)[0], "pooled_projections": clip(ids).pooler_output}
    return text | FLUX.places(text, grid, grid)


def at_guidance(cond: Cond, scale: float | Float[Tensor, " batch"]) -> Cond:
    """Conditioning with a guidance, one for all samples or one for each."""
    pooled = cond["pooled_projections"]
    return cond | {"guidance": torch.as_tensor(scale, dtype=pooled.dtype).expand(len(pooled))}


def velocity_of(net: nn.Module) -> Teacher:
    """The network as a velocity model, with gradient."""
    return lambda x, sigma, cond: call(net, x, sigma, cond, FLUX)


def guided_by_captions(net: nn.Module, empty: Cond, scale: float | Float[Tensor, " batch"]) -> Teacher:
    """The network, whose guidance input is 1, under true guidance against the empty caption."""
    each = scale[:, None, None] if isinstance(scale, Tensor) else scale
    return guided(velocity_of(net), at_guidance(empty, 1.0), each)


def sample_sigma(count: int) -> Float[Tensor, "count"]:
    """Noise levels to train at: logit-normal, three in ten uniform, then shifted by 2 towards noise."""
    tau = torch.where(torch.rand(count) < 0.3, torch.rand(count), torch.sigmoid(torch.randn(count)))
    return shift_sigma(tau, 2.0)


@cache
def world_weight() -> Float[Tensor, "32"]:
    """Weights of the world's channels: the inverse of their deviation.

    Weights change how fast each channel is learned, not what is right. Colors vary least, and which shape has which
    color is learned last.
    """
    weight = 1 / plain_map(scenes(512, "weight")).std((0, 2, 3))
    return (weight / weight.mean()).repeat_interleave(4)


def flow_loss(net: nn.Module, x0: Tensor, cond: Cond, empty: Cond, weight: Tensor | float = 1.0) -> Tensor:
    """Stage one: mean squared error of the velocity, weighted by channel."""
    sigma, eps = sample_sigma(len(x0)), torch.randn_like(x0)
    drop = torch.rand(len(x0)) < DROP_CAPTION
    said = {
        name: value if shared(name) else torch.where(column(drop, value), empty[name], value)
        for name, value in cond.items()
    }
    x = noised(x0, eps, column(sigma, x0))
    error = velocity_of(net)(x, sigma, at_guidance(said, 1.0)) - (eps - x0)
    return (weight * error.square()).mean()


def guidance_loss(
    net: nn.Module, frozen: nn.Module, x0: Tensor, cond: Cond, empty: Cond, weight: Tensor | float = 1.0
) -> Tensor:
    """Stage two: match the frozen network's guided velocity, the scale given as guidance; channels weigh as before."""
    sigma, eps = sample_sigma(len(x0)), torch.randn_like(x0)
    low, high = GUIDANCE
    scale = low + (high - low) * torch.rand(len(x0))
    x = noised(x0, eps, column(sigma, x0))
    with torch.no_grad():
        target = guided_by_captions(frozen, empty, scale)(x, sigma, at_guidance(cond, 1.0))
    error = velocity_of(net)(x, sigma, at_guidance(cond, scale)) - target
    return (weight * error.square()).mean()
