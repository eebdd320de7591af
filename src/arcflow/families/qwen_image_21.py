"""Qwen-Image 2.1: its row and its conditioning. A token is one latent pixel, and text stands before the image."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from arcflow.families.conditioning import Cond
from arcflow.families.family import SIZES, Arguments, Family, last_tokens, reads_512_tokens

SLOT = 4
"""Tokens of the image for which the text has one place."""


def _arguments(cond: Cond) -> Arguments:
    mask, shapes = cond["encoder_hidden_states_mask"], cond["img_shapes"].tolist()
    slots = shapes[0][1] * shapes[0][2] // SLOT
    image = torch.cat([torch.zeros_like(mask), mask.new_ones(len(mask), slots)], 1)
    return {
        "encoder_hidden_states": cond["encoder_hidden_states"],
        "encoder_hidden_states_mask": None if bool(mask.all()) else mask,
        "img_shapes": [[tuple(shape)] for shape in shapes],
        "img_mask": image,
    }


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    embeds, mask, _ = pipe.encode_prompt(prompt=prompts, device=device)
    mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask.bool()}


def _places(text: Cond, rows: int, columns: int) -> Cond:
    if rows % 2 or columns % 2:
        raise ValueError(f"{rows} x {columns} tokens: expected even numbers; take a size of multiples of 32")
    return {"img_shapes": torch.tensor([[1, rows, columns]] * len(text["encoder_hidden_states"]))}


def _statistics(pipe: DiffusionPipeline, latents: Tensor) -> tuple[Tensor, Tensor]:
    config = pipe.vae.config
    mean, std = (torch.tensor(v).to(latents)[:, None, None, None] for v in (config.latents_mean, config.latents_std))
    return mean, std


def _to_vae(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    latents = latents.unsqueeze(2).to(pipe.vae.device, pipe.vae.dtype)
    mean, std = _statistics(pipe, latents)
    return pipe.vae.decode(latents * std + mean, return_dict=False)[0][:, :3, 0]


def _from_vae(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    opaque = torch.cat([images, torch.ones_like(images[:, :1])], 1)
    latents = pipe.vae.encode(opaque.unsqueeze(2)).latent_dist.mode()
    mean, std = _statistics(pipe, latents)
    return ((latents - mean) / std)[:, :, 0]


QWEN_IMAGE_21 = Family(
    name="qwen_image_21",
    transformer="QwenImage21Transformer2DModel",
    pipeline="QwenImage21Pipeline",
    published="",
    embedder="img_in",
    lora_targets=r"time_text_embed\.timestep_embedder\.linear_[12]|transformer_blocks\.\d+\.img_mlp\.(proj|gate_layer|out)",
    lora_skip="",
    every=r"(time_text_embed|transformer_blocks)\..*",
    guidance=None,
    arguments=_arguments,
    encode=_encode,
    places=_places,
    text_length=reads_512_tokens,
    reads="",
    to_vae=_to_vae,
    from_vae=_from_vae,
    patch=(1, 1),
    leaves=last_tokens,
    second="true_cfg_scale",
    sizes=(*SIZES, "context_in_dim", "causal_condition"),
)
