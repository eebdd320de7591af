"""Chroma: its row and its conditioning. One network says the modulation of all layers, so no norm has Linears."""

import torch
from diffusers import DiffusionPipeline

from arcflow.families.autoencoder import shifted_from_vae, shifted_to_vae
from arcflow.families.conditioning import Cond
from arcflow.families.family import SIZES, Arguments, Family, reads_512_tokens


def _arguments(cond: Cond) -> Arguments:
    embeds, mask = cond["encoder_hidden_states"], cond["encoder_hidden_states_mask"]
    image = mask.new_ones(len(mask), len(cond["img_ids"]))
    return {
        "encoder_hidden_states": embeds,
        "attention_mask": torch.cat([mask, image], 1).to(embeds.dtype),
        "txt_ids": cond["txt_ids"],
        "img_ids": cond["img_ids"],
    }


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    embeds, _, mask, *_ = pipe.encode_prompt(
        prompt=prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=device
    )
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask.bool()}


def _places(text: Cond, rows: int, columns: int) -> Cond:
    embeds = text["encoder_hidden_states"]
    image = embeds.new_zeros(rows, columns, 3)
    image[..., 1] += torch.arange(rows, device=embeds.device)[:, None]
    image[..., 2] += torch.arange(columns, device=embeds.device)
    return {"txt_ids": embeds.new_zeros(embeds.shape[1], 3), "img_ids": image.flatten(0, 1)}


CHROMA = Family(
    name="chroma",
    transformer="ChromaTransformer2DModel",
    pipeline="ChromaPipeline",
    published="",
    embedder="x_embedder",
    norm="",
    lora_targets=r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
    + r"|single_transformer_blocks\.\d+\.proj_(mlp|out)",
    lora_skip="",
    every=r"(single_)?transformer_blocks\..*",
    guidance=None,
    arguments=_arguments,
    encode=_encode,
    places=_places,
    text_length=reads_512_tokens,
    to_vae=shifted_to_vae,
    from_vae=shifted_from_vae,
    scale=5.0,
    sizes=(*SIZES, "approximator_hidden_dim", "approximator_layers"),
)
