"""ERNIE-Image: its row and its conditioning. A token is one latent pixel, and tokens stand before the batch."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from arcflow.families.autoencoder import normalized_from_vae, normalized_to_vae
from arcflow.families.conditioning import Cond, padded
from arcflow.families.family import Arguments, Family, nowhere, reads_512_tokens

SMALLEST = 1e-5
"""What its pipeline adds to variances of the autoencoder, whose config says another number."""


def _enter(x: Tensor, time: Tensor, dtype: torch.dtype) -> Arguments:
    return {"hidden_states": x.to(dtype), "timestep": time.to(dtype)}


def _leaves(tokens: Tensor, count: int, cond: Cond) -> Tensor:
    """The image stands before the text."""
    return tokens[:count].transpose(0, 1)


def _arguments(cond: Cond) -> Arguments:
    return {
        "text_bth": cond["encoder_hidden_states"],
        "text_lens": cond["encoder_hidden_states_mask"].sum(1),
    }


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    return padded(pipe.encode_prompt(prompts, device or pipe._execution_device))


def _to_vae(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    return normalized_to_vae(pipe, latents, SMALLEST)


def _from_vae(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    return normalized_from_vae(pipe, images, SMALLEST)


ERNIE_IMAGE = Family(
    name="ernie_image",
    transformer="ErnieImageTransformer2DModel",
    pipeline="ErnieImagePipeline",
    published="",
    embedder="x_embedder.proj",
    head="final_linear",
    norm="final_norm",
    blocks="layers",
    lora_targets=r"time_embedding\.linear_[12]|layers\.\d+\.mlp\.(gate_proj|up_proj|linear_fc2)",
    lora_skip="",
    every=r"(time_embedding|layers)\..*",
    guidance=None,
    arguments=_arguments,
    encode=_encode,
    places=nowhere,
    text_length=reads_512_tokens,
    reads="",
    to_vae=_to_vae,
    from_vae=_from_vae,
    patch=(1, 1),
    folds=True,
    patch_first=True,
    enter=_enter,
    leaves=_leaves,
    time=(0.0, 1000.0),
    clock=("timestep", 1),
    packs=False,
    # a prompt is drawn as it was distilled: as it is written
    told={"use_pe": False},
    sizes=("num_layers", "num_attention_heads", "hidden_size", "ffn_hidden_size", "in_channels", "text_in_dim"),
)
