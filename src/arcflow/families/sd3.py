"""Stable Diffusion 3 and 3.5: its row and its conditioning."""

import torch
from diffusers import DiffusionPipeline

from arcflow.families.autoencoder import shifted_from_vae, shifted_to_vae
from arcflow.families.conditioning import Cond
from arcflow.families.family import SIZES, TIME_EMBEDDERS, Family, as_it_is, as_keywords, nowhere


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompt=prompts,
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=length,
        device=device,
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _text_length(pipe: DiffusionPipeline) -> int:
    return 256


SD3 = Family(
    name="sd3",
    transformer="SD3Transformer2DModel",
    pipeline="StableDiffusion3Pipeline",
    published="",
    embedder="pos_embed",
    lora_targets=TIME_EMBEDDERS + r"|transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
    # the text stream ends before its questions are answered
    lora_skip=r"transformer_blocks\.{last}\.attn\.add_q_proj",
    guidance=None,
    arguments=as_keywords,
    encode=_encode,
    places=nowhere,
    text_length=_text_length,
    to_vae=shifted_to_vae,
    from_vae=shifted_from_vae,
    folds=True,
    patch_first=True,
    enter=as_it_is,
    time=(0.0, 1000.0),
    scale=7.0,
    sizes=(*SIZES, "caption_projection_dim"),
)
