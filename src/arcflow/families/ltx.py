"""LTX-Video: its row, its conditioning and its autoencoder. A token is one latent pixel."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from arcflow.families.conditioning import Cond
from arcflow.families.family import Arguments, Family, as_it_is

RATE = 25
"""Frames a second that its pipelines assume."""

COMPRESSION = (8, 32, 32)
"""Frames and pixels along the sides of a latent pixel."""


def _arguments(cond: Cond) -> Arguments:
    frames, rows, columns = cond["img_cells"][0].tolist()
    return {
        "encoder_hidden_states": cond["encoder_hidden_states"],
        "encoder_attention_mask": cond["encoder_hidden_states_mask"],
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "rope_interpolation_scale": (COMPRESSION[0] / RATE, *COMPRESSION[1:]),
    }


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    embeds, mask, *_ = pipe.encode_prompt(
        prompt=prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=device
    )
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}


def _places(text: Cond, frames: int, rows: int, columns: int) -> Cond:
    return {"img_cells": torch.tensor([[frames, rows, columns]] * len(text["encoder_hidden_states"]))}


def _to_vae(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    vae = pipe.vae
    mean, std = (v.to(latents)[:, None, None, None] for v in (vae.latents_mean, vae.latents_std))
    latents = (latents * std / vae.config.scaling_factor + mean).to(vae.device, vae.dtype)
    time = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
    return vae.decode(latents, time, return_dict=False)[0]


def _from_vae(pipe: DiffusionPipeline, videos: Tensor) -> Tensor:
    vae = pipe.vae
    latents = vae.encode(videos).latent_dist.mode()
    mean, std = (v.to(latents)[:, None, None, None] for v in (vae.latents_mean, vae.latents_std))
    return (latents - mean) * vae.config.scaling_factor / std


LTX = Family(
    name="ltx",
    transformer="LTXVideoTransformer3DModel",
    pipeline="LTXPipeline",
    published="",
    embedder="proj_in",
    norm="",
    lora_targets=r"time_embed\.emb\.timestep_embedder\.linear_[12]|transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
    lora_skip="",
    every=r"(time_embed\.emb\.timestep_embedder|transformer_blocks)\..*",
    guidance=None,
    arguments=_arguments,
    encode=_encode,
    places=_places,
    text_length=lambda pipe: 128,
    to_vae=_to_vae,
    from_vae=_from_vae,
    patch=(1, 1, 1),
    enter=as_it_is,
    time=(0.0, 1000.0),
    clock=("timestep", 2),
    compression=lambda pipe: COMPRESSION,
    frames=161,
    scale=3.0,
    sizes=("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "caption_channels"),
)
