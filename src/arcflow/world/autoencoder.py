"""The small FLUX's autoencoder: a stock `AutoencoderKL` with FLUX's layout, trained on rendered scenes.

64 x 64 pixels become 8 x 8 latents of 16 channels, so 2 x 2 patches give 16 tokens of width 64, as FLUX packs them.
It is trained in two stages. First encoder and decoder together (pixel error, objects weighted, plus a small KL term).
Then the encoder is frozen, its latents are standardised (`shift_factor`, `scaling_factor`), and the decoder alone goes
on, on latents with a little noise: what it will see are the transformer's latents, not the encoder's.
"""

import random

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from arcflow.world.check import accuracy
from arcflow.world.render import render_all
from arcflow.world.scene import sample_prompt, sample_prompts, sample_scene

OBJECT_WEIGHT = 3.0
"""Extra weight of a pixel that differs from the background."""
KL_WEIGHT = 1e-4
LATENT_NOISE = 0.1
"""Standard deviation of the noise on standardised latents while the decoder is polished."""


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder: 8 times smaller, 16 channels, no quantisation convolutions, as FLUX.1's."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def pictures(count: int, seed: str) -> Float[Tensor, "count 3 64 64"]:
    """Rendered random scenes, in [-1, 1]."""
    rng = random.Random(seed)
    return to_tensor(render_all([sample_scene(sample_prompt(rng), rng) for _ in range(count)]))


def to_tensor(images: np.ndarray) -> Float[Tensor, "count 3 64 64"]:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(x: Float[Tensor, "count 3 64 64"]) -> np.ndarray:
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def pixel_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared plus absolute error, pixels of objects weighted up."""
    paper = target[:, :, :1, :1]
    weight = 1 + OBJECT_WEIGHT * ((target - paper).abs().amax(1, keepdim=True) > 0.1)
    error = output.float() - target
    return (weight * (error.square() + 0.3 * error.abs())).mean()


def autoencoder_loss(model: AutoencoderKL, x: Tensor) -> Tensor:
    """Stage one: encoder and decoder together."""
    posterior = model.encode(x).latent_dist
    return pixel_loss(model.decode(posterior.sample()).sample, x) + KL_WEIGHT * posterior.kl().mean() / 1024


def decoder_loss(model: AutoencoderKL, x: Tensor) -> Tensor:
    """Stage two: the decoder alone, on noisy latents."""
    with torch.no_grad():
        z = model.encode(x).latent_dist.mode()
    noise = torch.randn_like(z) * (LATENT_NOISE * torch.rand(len(z), 1, 1, 1)) / model.config.scaling_factor
    return pixel_loss(model.decode(z + noise).sample, x)


@torch.no_grad()
def standardize(model: AutoencoderKL) -> None:
    """Set `shift_factor` and `scaling_factor` so that the latents of random scenes have mean 0 and variance 1."""
    z = model.encode(pictures(512, "latents")).latent_dist.mode()
    model.register_to_config(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))


@torch.no_grad()
def reconstruction_accuracy(model: AutoencoderKL, count: int = 512) -> dict[str, float]:
    """Checker accuracy of held-out scenes after encoding and decoding: what caps every later figure."""
    prompts, rng = sample_prompts(count, seed=1, split="test"), random.Random("reconstruction")
    x = to_tensor(render_all([sample_scene(prompt, rng) for prompt in prompts]))
    images = [to_images(model.decode(model.encode(part).latent_dist.mode()).sample) for part in x.split(64)]
    return accuracy(np.concatenate(images), prompts)
