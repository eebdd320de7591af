"""Latents to images and back, in the ways that several families share."""

import torch
from diffusers import DiffusionPipeline
from einops import rearrange
from torch import Tensor


def shifted_to_vae(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) of latents that are scaled and shifted as a whole."""
    config = pipe.vae.config
    latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
    return pipe.vae.decode(latents.to(pipe.vae.device, pipe.vae.dtype), return_dict=False)[0]


def shifted_from_vae(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    """The way back, to the mean of what the encoder gives."""
    config = pipe.vae.config
    return (pipe.vae.encode(images).latent_dist.mode() - (config.shift_factor or 0.0)) * config.scaling_factor


def video_to_vae(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Videos (B, 3, F, H, W) of latents that have a mean and a deviation for each channel."""
    config = pipe.vae.config
    latents = latents.to(pipe.vae.device, pipe.vae.dtype)
    mean, std = (torch.tensor(v).to(latents)[:, None, None, None] for v in (config.latents_mean, config.latents_std))
    return pipe.vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]


def video_from_vae(pipe: DiffusionPipeline, videos: Tensor) -> Tensor:
    """The way back, to the mean of what the encoder gives."""
    config = pipe.vae.config
    latents = pipe.vae.encode(videos).latent_dist.mode()
    mean, std = (torch.tensor(v).to(latents)[:, None, None, None] for v in (config.latents_mean, config.latents_std))
    return (latents - mean) / std


def frame_to_vae(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Images by an autoencoder of videos: of one frame."""
    return video_to_vae(pipe, latents.unsqueeze(2))[:, :, 0]


def frame_from_vae(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    """The way back, to the mean of what the encoder gives."""
    return video_from_vae(pipe, images.unsqueeze(2))[:, :, 0]


def normalized_to_vae(pipe: DiffusionPipeline, latents: Tensor, smallest: float) -> Tensor:
    """Images of FLUX.2's autoencoder, whose latents are normalized in squares of 2 x 2: (B, 4 C, h, w) to (B, 3, H, W).
    `smallest` is added to the variances."""
    vae = pipe.vae
    latents = latents.to(vae.device, vae.dtype)
    mean, std = vae.bn.running_mean, (vae.bn.running_var + smallest).sqrt()
    latents = latents * std[:, None, None] + mean[:, None, None]
    return vae.decode(rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2), return_dict=False)[0]


def normalized_from_vae(pipe: DiffusionPipeline, images: Tensor, smallest: float) -> Tensor:
    """The way back, to the mean of what the encoder gives."""
    vae = pipe.vae
    latents = rearrange(vae.encode(images).latent_dist.mode(), "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
    mean, std = vae.bn.running_mean, (vae.bn.running_var + smallest).sqrt()
    return (latents - mean[:, None, None]) / std[:, None, None]
