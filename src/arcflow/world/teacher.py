"""The small teacher: a genuine diffusers `FluxPipeline` that draws this world, and its transformer's losses.

Stage one is flow matching (x_sigma = (1 - sigma) x0 + sigma eps, target eps - x0), captions dropped at times, guidance
input fixed at 1. Stage two distils guidance into the network, as FLUX.1-dev was (arXiv 2210.03142): with its own frozen
copy as teacher it learns u_empty + w (u_caption - u_empty), given w.
"""

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from arcflow.path import SHIFT, shift_sigma, step_grid
from arcflow.world.autoencoder import CELLS, CHANNELS, plain_map, scenes
from arcflow.world.text import WIDTH, build_tokenizer, tokenize

GRID, TOKEN = CELLS // 2, 4 * CHANNELS
GUIDANCE = (1.0, 5.0)
"""Range of guidance scales distilled into the teacher; 3.5 is what it is used with."""
DROP_CAPTION = 0.1

Conditioning = tuple[Float[Tensor, "#batch words width"], Float[Tensor, "#batch width"]]


def build_transformer() -> FluxTransformer2DModel:
    """An untrained small FLUX: 16 tokens of width 32, guidance embedding, 3 double and 9 single blocks.

    Narrow and deep: a student has to do in two calls what the teacher does in fifty, one block after the other.

    Modulations and the output start at zero, so every block starts as the identity (adaLN-Zero, arXiv 2212.09748).
    """
    net = FluxTransformer2DModel(
        in_channels=TOKEN,
        num_layers=3,
        num_single_layers=9,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 10, 10),
    )
    for name, module in net.named_modules():
        if name == "proj_out" or (name.endswith(".linear") and "norm" in name):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return net


def assemble(
    transformer: FluxTransformer2DModel, vae: AutoencoderKL, t5: T5EncoderModel, clip: CLIPTextModel
) -> FluxPipeline:
    """The parts as one stock pipeline, sampling on the grid of shift 3.2."""
    tokenizer: Any = build_tokenizer()
    for part in (transformer, vae):  # else the folder it was trained in goes out with it
        part.register_to_config(_name_or_path="")
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def teacher_folder() -> Path:
    """Where the shipped teacher lies: an ordinary `FluxPipeline` folder."""
    return Path(str(files("arcflow") / "assets" / "teacher"))


def load_teacher(folder: str | Path | None = None) -> FluxPipeline:
    """The shipped teacher (or another folder's), on the CPU in float32.

    Raises:
        ValueError: the folder holds no pipeline.
    """
    path = Path(folder) if folder else teacher_folder()
    if not (path / "model_index.json").is_file():
        raise ValueError(f"no teacher in {path}: expected a FluxPipeline folder; train one with `arcflow world train`")
    return FluxPipeline.from_pretrained(path, dtype=torch.float32)


@cache
def _positions() -> Float[Tensor, "16 3"]:
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    return torch.stack([torch.zeros(GRID, GRID), rows, columns], -1).reshape(-1, 3).float()


def velocity(net: FluxTransformer2DModel, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: Tensor) -> Tensor:
    """The transformer's velocity at packed latents (n, 16, 32)."""
    words, pooled = cond
    return net(
        hidden_states=x,
        timestep=sigma,
        guidance=guidance,
        encoder_hidden_states=words,
        pooled_projections=pooled,
        txt_ids=torch.zeros(words.shape[1], 3),
        img_ids=_positions(),
        return_dict=False,
    )[0]


def pack(z: Float[Tensor, "n 8 8 8"]) -> Float[Tensor, "n 16 32"]:
    """Latents to tokens, 2 x 2 patches, channel slowest: FLUX's own packing."""
    return z.reshape(-1, CHANNELS, GRID, 2, GRID, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, GRID * GRID, TOKEN)


def unpack(x: Float[Tensor, "n 16 32"]) -> Float[Tensor, "n 8 8 8"]:
    """Tokens back to latents."""
    return x.reshape(-1, GRID, GRID, CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, CHANNELS, 2 * GRID, 2 * GRID)


@torch.no_grad()
def embed(t5: T5EncoderModel, clip: CLIPTextModel, texts: list[str]) -> Conditioning:
    """T5 tokens and CLIP's pooled vector, as the pipeline computes them."""
    ids = tokenize(build_tokenizer(), texts)
    return t5(ids)[0], clip(ids).pooler_output


def sample_sigma(count: int) -> Float[Tensor, "count"]:
    """Noise levels to train at: logit-normal, three in ten uniform, then shifted by 2 towards noise."""
    tau = torch.where(torch.rand(count) < 0.3, torch.rand(count), torch.sigmoid(torch.randn(count)))
    return shift_sigma(tau, 2.0)


@cache
def _weight() -> Float[Tensor, "32"]:
    weight = 1 / plain_map(scenes(512, "weight")).std((0, 2, 3))
    return (weight / weight.mean()).repeat_interleave(4)


def flow_loss(net: FluxTransformer2DModel, x0: Tensor, cond: Conditioning, empty: Conditioning) -> Tensor:
    """Stage one: mean squared error of the velocity, a channel's weight the inverse of its deviation.

    Weights change how fast each channel is learned, not what is right. Colors vary least, and which shape has which
    color is learned last.
    """
    sigma, eps = sample_sigma(len(x0)), torch.randn_like(x0)
    drop = torch.rand(len(x0)) < DROP_CAPTION
    words = torch.where(drop[:, None, None], empty[0], cond[0])
    pooled = torch.where(drop[:, None], empty[1], cond[1])
    x = x0 + sigma[:, None, None] * (eps - x0)
    error = velocity(net, x, sigma, (words, pooled), torch.ones(len(x0))) - (eps - x0)
    return (_weight() * error.square()).mean()


def guided_velocity(
    net: FluxTransformer2DModel, x: Tensor, sigma: Tensor, cond: Conditioning, empty: Conditioning, scale: Tensor
) -> Tensor:
    """Classifier-free guidance in one batched call: u_empty + scale (u_caption - u_empty)."""
    n = len(x)
    words = torch.cat([cond[0], empty[0].expand_as(cond[0])])
    pooled = torch.cat([cond[1], empty[1].expand_as(cond[1])])
    both = velocity(net, torch.cat([x, x]), torch.cat([sigma, sigma]), (words, pooled), torch.ones(2 * n))
    caption, nothing = both.chunk(2)
    return nothing + scale[:, None, None] * (caption - nothing)


def guidance_loss(
    net: FluxTransformer2DModel,
    frozen: FluxTransformer2DModel,
    x0: Tensor,
    cond: Conditioning,
    empty: Conditioning,
) -> Tensor:
    """Stage two: match the frozen network's guided velocity, the scale given as guidance; channels weigh as before."""
    sigma, eps = sample_sigma(len(x0)), torch.randn_like(x0)
    low, high = GUIDANCE
    scale = low + (high - low) * torch.rand(len(x0))
    x = x0 + sigma[:, None, None] * (eps - x0)
    with torch.no_grad():
        target = guided_velocity(frozen, x, sigma, cond, empty, scale)
    return (_weight() * (velocity(net, x, sigma, cond, scale) - target).square()).mean()


@torch.no_grad()
def draw(
    velocity_at: Callable[[Tensor, Tensor], Tensor], x: Float[Tensor, "n 16 32"], steps: int
) -> Float[Tensor, "n 16 32"]:
    """Plain Euler from noise on the grid of shift 3.2, for judging a network in training."""
    for a, b in pairwise(step_grid(steps)):
        x = x + (b - a) * velocity_at(x, a.expand(len(x)))
    return x
