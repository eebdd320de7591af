"""Wan 2.1 and 2.2, text to video: its row and its conditioning.

Wan 2.2 A14B has two networks, the second of which takes over below a noise level (`boundary_ratio`): each can be a
student of its own, with its own share of the steps."""

import torch
from diffusers import DiffusionPipeline

from arcflow.families.autoencoder import video_from_vae, video_to_vae
from arcflow.families.conditioning import Cond
from arcflow.families.family import Family, as_it_is, as_keywords, nowhere, reads_512_tokens


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    embeds, _ = pipe.encode_prompt(
        prompt=prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=device
    )
    return {"encoder_hidden_states": embeds}


def _compression(pipe: DiffusionPipeline) -> tuple[int, ...]:
    return (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_spatial)


WAN = Family(
    name="wan",
    transformer="WanTransformer3DModel",
    pipeline="WanPipeline",
    published="",
    embedder="patch_embedding",
    norm="",
    blocks="blocks",
    lora_targets=r"condition_embedder\.time_embedder\.linear_[12]|blocks\.\d+\.ffn\.net\.(0\.proj|2)",
    lora_skip="",
    every=r"(condition_embedder\.time_embedder|blocks)\..*",
    guidance=None,
    arguments=as_keywords,
    encode=_encode,
    places=nowhere,
    text_length=reads_512_tokens,
    to_vae=video_to_vae,
    from_vae=video_from_vae,
    patch=(1, 2, 2),
    folds=True,
    patch_first=True,
    enter=as_it_is,
    time=(0.0, 1000.0),
    clock=("timestep", 1),
    compression=_compression,
    frames=81,
    scale=5.0,
    sizes=(
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "text_dim",
        "ffn_dim",
        "image_dim",
    ),
)
