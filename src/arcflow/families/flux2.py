"""FLUX.2: its row, its conditioning and its autoencoder."""

import torch
from diffusers import DiffusionPipeline
from einops import rearrange
from torch import Tensor

from arcflow.families.autoencoder import normalized_from_vae, normalized_to_vae
from arcflow.families.conditioning import Cond
from arcflow.families.family import TIME_EMBEDDERS, Editing, Family, as_keywords, reads_512_tokens


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    embeds, _ = pipe.encode_prompt(prompt=prompts, max_sequence_length=length, device=device)
    return {"encoder_hidden_states": embeds}


def _places(text: Cond, rows: int, columns: int) -> Cond:
    embeds = text["encoder_hidden_states"]

    def cells(*sizes: int) -> Tensor:
        return torch.cartesian_prod(*(torch.arange(n, device=embeds.device) for n in sizes))

    return {"txt_ids": cells(1, 1, 1, embeds.shape[1]), "img_ids": cells(1, rows, columns, 1)}


def _places_beside(cond: Cond, rows: int, columns: int) -> Cond:
    """The image to edit stands where x does, ten layers behind it."""
    behind = cond["img_ids"].clone()
    behind[..., 0] = 10
    return {"img_ids": torch.cat([cond["img_ids"], behind])}


def _to_vae(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    squares = rearrange(latents, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
    return normalized_to_vae(pipe, squares, pipe.vae.config.batch_norm_eps)


def _from_vae(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    squares = normalized_from_vae(pipe, images, pipe.vae.config.batch_norm_eps)
    return rearrange(squares, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)


FLUX2 = Family(
    name="flux2",
    transformer="Flux2Transformer2DModel",
    pipeline="Flux2Pipeline",
    published="",
    embedder="x_embedder",
    lora_targets=TIME_EMBEDDERS
    + r"|transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)"
    # attention and feed-forward share their Linears here
    + r"|single_transformer_blocks\.\d+\.attn\.to_(qkv_mlp_proj|out)",
    lora_skip="",
    guidance=4.0,
    arguments=as_keywords,
    encode=_encode,
    places=_places,
    text_length=reads_512_tokens,
    to_vae=_to_vae,
    from_vae=_from_vae,
    negative=False,
    packs=False,
    edit=Editing(places=_places_beside),
)
