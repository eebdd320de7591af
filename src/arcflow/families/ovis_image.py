"""Ovis-Image: its row and its conditioning."""

import torch
from diffusers import DiffusionPipeline

from arcflow.families.autoencoder import shifted_from_vae, shifted_to_vae
from arcflow.families.conditioning import Cond
from arcflow.families.family import Family, as_keywords


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    embeds, *_ = pipe.encode_prompt(
        prompt=prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=device
    )
    return {"encoder_hidden_states": embeds}


def _places(text: Cond, rows: int, columns: int) -> Cond:
    embeds = text["encoder_hidden_states"]
    words = torch.arange(embeds.shape[1], device=embeds.device, dtype=embeds.dtype)
    img_ids = embeds.new_zeros(rows, columns, 3)
    img_ids[..., 1] += torch.arange(rows, device=embeds.device)[:, None]
    img_ids[..., 2] += torch.arange(columns, device=embeds.device)[None, :]
    # words stand on the diagonal, and the image over the first of them
    txt_ids = torch.stack([torch.zeros_like(words), words, words], -1)
    return {"txt_ids": txt_ids, "img_ids": img_ids.flatten(0, 1)}


OVIS_IMAGE = Family(
    name="ovis_image",
    transformer="OvisImageTransformer2DModel",
    pipeline="OvisImagePipeline",
    published="",
    embedder="x_embedder",
    lora_targets=r"timestep_embedder\.linear_[12]"
    + r"|transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
    + r"|single_transformer_blocks\.\d+\.proj_(mlp|out)",
    lora_skip="",
    every=r"(timestep_embedder|(single_)?transformer_blocks)\..*",
    guidance=None,
    arguments=as_keywords,
    encode=_encode,
    places=_places,
    text_length=lambda pipe: 256,
    to_vae=shifted_to_vae,
    from_vae=shifted_from_vae,
    scale=5.0,
)
