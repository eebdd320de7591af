"""Latents to images and back, in the ways that several families share."""

import torch
from diffusers import DiffusionPipeline
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
