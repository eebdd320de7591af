"""FLUX.3: its row and its conditioning. diffusers has it as modular blocks, guided by a guider."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from arcflow.families.autoencoder import normalized_from_vae, normalized_to_vae
from arcflow.families.conditioning import Cond
from arcflow.families.family import Family, as_keywords, divided_then_cast

SCALE = 0.5
"""Scale of the image's places: half a step from token to token."""


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    """Each prompt in a window of whole multiples of 80 tokens, which the network reads to its end."""
    from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep  # loads a vision model's code

    told: dict[str, Any] = {"device": device, "max_sequence_length": length}
    rows = [
        Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds(pipe.text_encoder, pipe.tokenizer, prompt, **told)[0]
        for prompt in prompts
    ]
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise ValueError(
            f"prompts in windows of {' and '.join(map(str, sorted(lengths)))} tokens: FLUX.3 takes a batch of equally "
            f"long ones; set optim.micro_batch and optim.batch to 1, or give prompts of about one length"
        )
    return {"encoder_hidden_states": torch.stack(rows)}


def _places(text: Cond, rows: int, columns: int) -> Cond:
    embeds = text["encoder_hidden_states"]

    def cells(*sizes: int) -> Tensor:
        return torch.cartesian_prod(*(torch.arange(n, device=embeds.device, dtype=torch.float32) for n in sizes))

    return {"txt_ids": cells(1, 1, 1, embeds.shape[1]), "img_ids": SCALE * cells(1, rows, columns, 1)}


def _to_vae(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    return normalized_to_vae(pipe, latents, pipe.vae.config.batch_norm_eps)


def _from_vae(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    return normalized_from_vae(pipe, images, pipe.vae.config.batch_norm_eps)


FLUX3 = Family(
    name="flux3",
    transformer="Flux3Transformer2DModel",
    pipeline="Flux3ModularPipeline",
    published="",
    embedder="x_embedders.image",
    blocks="single_transformer_blocks",
    lora_targets=r"timestep_embedder\.linear_[12]"
    r"|(mode_blocks\.image|txt_mode_blocks|single_transformer_blocks)\.\d+\.ff\.linear_(in|out)",
    lora_skip="",
    every=r"(timestep_embedder|mode_blocks\.image|txt_mode_blocks|single_transformer_blocks)\..*",
    guidance=None,
    arguments=as_keywords,
    encode=_encode,
    places=_places,
    text_length=lambda pipe: 8192,
    to_vae=_to_vae,
    from_vae=_from_vae,
    patch=(1, 1),
    packs=False,
    enter=divided_then_cast,
    clock=("timestep", 2),
    compression=lambda pipe: (2 * pipe.vae_scale_factor, 2 * pipe.vae_scale_factor),
    scale=3.5,
    sizes=("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "in_channels", "flow_map"),
)
