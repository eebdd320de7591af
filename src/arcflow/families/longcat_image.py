"""LongCat-Image: its row and its conditioning."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from arcflow.families.autoencoder import shifted_from_vae, shifted_to_vae
from arcflow.families.conditioning import Cond
from arcflow.families.family import Family, as_keywords


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    if length != pipe.tokenizer_max_length:
        raise ValueError(f"{length} text tokens: LongCat-Image reads {pipe.tokenizer_max_length}; leave the length out")
    return {"encoder_hidden_states": pipe.encode_prompt(prompt=prompts)[0]}


def _places(text: Cond, rows: int, columns: int) -> Cond:
    embeds = text["encoder_hidden_states"]
    count = embeds.shape[1]

    def counted(kind: int, down: Tensor, across: Tensor) -> Tensor:
        return torch.stack([torch.full_like(down, kind), down, across], -1).to(embeds.device)

    words = torch.arange(float(count))
    down, across = torch.meshgrid(torch.arange(float(rows)), torch.arange(float(columns)), indexing="ij")
    # the image stands behind the text, on the diagonal
    image = counted(1, down.flatten() + count, across.flatten() + count)
    return {"txt_ids": counted(0, words, words), "img_ids": image}


def _text_length(pipe: DiffusionPipeline) -> int:
    return pipe.tokenizer_max_length


LONGCAT_IMAGE = Family(
    name="longcat_image",
    transformer="LongCatImageTransformer2DModel",
    pipeline="LongCatImagePipeline",
    published="",
    embedder="x_embedder",
    lora_targets=r"time_embed\.timestep_embedder\.linear_[12]"
    + r"|transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
    + r"|single_transformer_blocks\.\d+\.proj_(mlp|out)",
    lora_skip="",
    every=r"(time_embed|(single_)?transformer_blocks)\..*",
    guidance=None,
    arguments=as_keywords,
    encode=_encode,
    places=_places,
    text_length=_text_length,
    reads="",
    to_vae=shifted_to_vae,
    from_vae=shifted_from_vae,
    scale=4.5,
    # a prompt is drawn as it was distilled: as it is written
    told={"enable_prompt_rewrite": False},
)
