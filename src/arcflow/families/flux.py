"""FLUX.1: its row and its conditioning."""

import torch
from diffusers import DiffusionPipeline

from arcflow import paper
from arcflow.families.autoencoder import shifted_from_vae, shifted_to_vae
from arcflow.families.conditioning import Cond
from arcflow.families.family import TIME_EMBEDDERS, Editing, Family, as_keywords


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    embeds, pooled, _ = pipe.encode_prompt(prompt=prompts, prompt_2=None, max_sequence_length=length, device=device)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _places(text: Cond, rows: int, columns: int) -> Cond:
    embeds = text["encoder_hidden_states"]
    img_ids = embeds.new_zeros(rows, columns, 3)
    img_ids[..., 1] += torch.arange(rows, device=embeds.device)[:, None]
    img_ids[..., 2] += torch.arange(columns, device=embeds.device)[None, :]
    return {"txt_ids": embeds.new_zeros(embeds.shape[1], 3), "img_ids": img_ids.flatten(0, 1)}


def _places_beside(cond: Cond, rows: int, columns: int) -> Cond:
    """The image to edit stands where x does, a layer behind it."""
    behind = cond["img_ids"].clone()
    behind[..., 0] = 1
    return {"img_ids": torch.cat([cond["img_ids"], behind])}


def _text_length(pipe: DiffusionPipeline) -> int:
    return min(512, pipe.tokenizer_2.model_max_length)


FLUX = Family(
    name="flux",
    transformer="FluxTransformer2DModel",
    pipeline="FluxPipeline",
    published="ArcFluxTransformer2DModel",
    embedder="x_embedder",
    lora_targets=TIME_EMBEDDERS
    + r"|transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
    + r"|single_transformer_blocks\.\d+\.proj_(mlp|out)",
    lora_skip="",
    guidance=paper.GUIDANCE,
    arguments=as_keywords,
    encode=_encode,
    places=_places,
    text_length=_text_length,
    to_vae=shifted_to_vae,
    from_vae=shifted_from_vae,
    second="true_cfg_scale",
    edit=Editing(places=_places_beside),
)
