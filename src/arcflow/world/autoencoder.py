"""The small FLUX's autoencoder: a stock `AutoencoderKL` with FLUX's layout, trained on rendered scenes.

64 x 64 pixels become 8 x 8 latents of 8 channels, so 2 x 2 patches give 16 tokens of width 32.

Latents that only reconstruct well are slow to learn a flow on; latents aligned with what an image means are much
quicker (VA-VAE, arXiv 2501.01423). Features of a foundation model are not needed here, the scene itself is known: the
encoder's mean is held near `plain_map`, which says in every cell what is there and where. It is trained in two stages.
First encoder and decoder together. Then the encoder is frozen, its latents are standardized (`shift_factor`,
`scaling_factor`), and the decoder alone goes on, on noisier latents: what it will see are the transformer's latents,
not the encoder's.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float
from torch import Tensor

from arcflow.world.check import accuracy
from arcflow.world.render import render_all
from arcflow.world.scene import BACKGROUNDS, COLORS, SHAPES, SIZE, Scene, sample_prompt, sample_prompts, sample_scene

OBJECT_WEIGHT = 3.0
"""Extra weight of a pixel that differs from the background."""
ALIGNMENT = 0.25
"""Weight of the squared distance between the encoder's mean and the plain map."""
POSTERIOR_STD = 0.15
"""Standard deviation the posterior is held to, in units of the plain map."""
LATENT_NOISE = 0.3
"""Largest standard deviation of the noise on standardized latents while the decoder is polished."""
CHANNELS, CELLS = 8, 8
STRENGTHS = (3.0, 1.5, 1.5, 2.0, 2.0, 2.5, 2.5)
"""Amplitudes of the plain map's channels from 1 on: cover, color twice, shape twice, place twice."""


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder: 8 times smaller, no quantization convolutions, as FLUX.1's."""
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (16, 32, 64, 64),
        "layers_per_block": 1,
        "latent_channels": CHANNELS,
        "norm_num_groups": 8,
        "sample_size": SIZE,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "shift_factor": 0.0,  # until `standardize` has seen the latents
        "scaling_factor": 1.0,
    }
    return AutoencoderKL(**config)


def scenes(count: int, seed: str) -> list[Scene]:
    """Random scenes of random captions."""
    rng = random.Random(seed)
    return [sample_scene(sample_prompt(rng), rng) for _ in range(count)]


def plain_map(scenes: Sequence[Scene]) -> Float[Tensor, "count 8 8 8"]:
    """What is where, on the latents' grid.

    Channel 0 is the background. The others are sums over objects, weighted by the share of a cell that the object's
    bounding square covers: 1 the cover itself, 2 and 3 the color on a circle, 4 and 5 the shape on a circle, 6 and 7
    the cell's place relative to the object's center, in radii.

    The strengths order what a flow decides on its way from noise: where objects are, then their shapes, then their
    colors, one close upon the other. Far apart they help the teacher (each decision stands when the next is made) and
    hurt its student, which has two calls for all of them (docs/log.md).
    """
    cell = SIZE / CELLS
    edge = np.arange(CELLS) * cell
    out = np.zeros((len(scenes), CHANNELS, CELLS, CELLS), np.float32)
    for z, scene in zip(out, scenes, strict=True):
        z[0] = 0.8 * (list(BACKGROUNDS).index(scene.background) - 1)
        z[1] = -1.0
        for o in scene.objects:
            along = [
                np.clip(np.minimum(edge + cell, c + o.radius) - np.maximum(edge, c - o.radius), 0, None) / cell
                for c in (o.y, o.x)
            ]
            cover = np.outer(*along)
            hue = 2 * np.pi * list(COLORS).index(o.color) / len(COLORS)
            kind = 2 * np.pi * SHAPES.index(o.shape) / len(SHAPES)
            dy, dx = (np.clip((edge + cell / 2 - c) / o.radius, -1, 1) for c in (o.y, o.x))
            features = (1, np.cos(hue), np.sin(hue), np.cos(kind), np.sin(kind), dx[None, :], dy[:, None])
            for channel, strength, feature in zip(z[1:], STRENGTHS, features, strict=True):
                channel += strength * feature * cover
    return torch.from_numpy(out)


def to_tensor(images: np.ndarray) -> Float[Tensor, "count 3 height width"]:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(x: Float[Tensor, "count 3 height width"]) -> np.ndarray:
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def posterior(model: ModelMixin, x: Float[Tensor, "count 3 height width"]) -> DiagonalGaussianDistribution:
    """The encoder's distribution of latents, a `DiagonalGaussianDistribution`."""
    return model.encode(x, return_dict=False)[0]


def vae_encode(
    model: ModelMixin, x: Float[Tensor, "count 3 height width"]
) -> Float[Tensor, "count channels rows columns"]:
    """Standardized latents, without the posterior's noise."""
    return (posterior(model, x).mode().float() - model.config.shift_factor) * model.config.scaling_factor


def vae_decode(
    model: ModelMixin, z: Float[Tensor, "count channels rows columns"]
) -> Float[Tensor, "count 3 height width"]:
    """Images of standardized latents."""
    return model.decode(z / model.config.scaling_factor + model.config.shift_factor, return_dict=False)[0]


def pixel_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared plus absolute error, pixels of objects weighted up."""
    paper = target[:, :, :1, :1]
    weight = 1 + OBJECT_WEIGHT * ((target - paper).abs().amax(1, keepdim=True) > 0.1)
    error = output.float() - target
    return (weight * (error.square() + 0.3 * error.abs())).mean()


def autoencoder_loss(model: ModelMixin, x: Tensor, plain: Tensor) -> Tensor:
    """Stage one: encoder and decoder together, the mean held near the plain map, the deviation near a constant."""
    latents = posterior(model, x)
    spread = (latents.logvar.float() / 2 - math.log(POSTERIOR_STD)).square().mean()
    aligned = (latents.mean.float() - plain).square().mean()
    output = model.decode(latents.sample(), return_dict=False)[0]
    return pixel_loss(output, x) + ALIGNMENT * aligned + 0.01 * spread


def decoder_loss(model: AutoencoderKL, x: Tensor) -> Tensor:
    """Stage two: the decoder alone, on noisy latents."""
    with torch.no_grad():
        z = vae_encode(model, x)
    noise = LATENT_NOISE * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
    return pixel_loss(vae_decode(model, z + noise), x)


@torch.no_grad()
def standardize(model: AutoencoderKL) -> None:
    """Set `shift_factor` and `scaling_factor` so that the latents of random scenes have mean 0 and variance 1."""
    z = posterior(model, to_tensor(render_all(scenes(512, "latents")))).mode()
    model.register_to_config(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))


@torch.no_grad()
def reconstruction_accuracy(model: AutoencoderKL, count: int) -> dict[str, float]:
    """Checker accuracy of held-out scenes after encoding and decoding: what caps every later figure."""
    prompts = sample_prompts(count, seed=1, split="test")
    rng = random.Random("reconstruction")
    x = to_tensor(render_all([sample_scene(prompt, rng) for prompt in prompts]))
    images = [to_images(vae_decode(model, vae_encode(model, part))) for part in x.split(64)]
    return accuracy(np.concatenate(images), prompts)
