"""Lumina Image 2: its row and its conditioning. The network knows 1 - sigma and gives the negative velocity."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from arcflow.families.autoencoder import shifted_from_vae, shifted_to_vae
from arcflow.families.conditioning import Cond
from arcflow.families.family import Arguments, Family, nowhere


def _enter(x: Tensor, time: Tensor, dtype: torch.dtype) -> Arguments:
    return {"hidden_states": x.to(dtype), "timestep": 1 - time / 1000}


def _leaves(tokens: Tensor, count: int, cond: Cond) -> Tensor:
    """The image stands behind the text, which has a length of its own in each row."""
    lengths = cond["encoder_hidden_states_mask"].sum(1).tolist()
    return torch.stack([row[n : n + count] for row, n in zip(tokens, lengths, strict=True)])


def _arguments(cond: Cond) -> Arguments:
    return {
        "encoder_hidden_states": cond["encoder_hidden_states"],
        "encoder_attention_mask": cond["encoder_hidden_states_mask"].long(),
    }


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    # the empty prompt is what its pipeline guides away from, and has no system prompt there
    whole = [prompt and f"{pipe.system_prompt} <Prompt Start> {prompt}" for prompt in prompts]
    embeds, mask = pipe._get_gemma_prompt_embeds(whole, device, length)
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask.bool()}


def _text_length(pipe: DiffusionPipeline) -> int:
    return 256


LUMINA2 = Family(
    name="lumina2",
    transformer="Lumina2Transformer2DModel",
    pipeline="Lumina2Pipeline",
    published="",
    embedder="x_embedder",
    head="norm_out.linear_2",
    norm="norm_out.linear_1",
    blocks="layers",
    lora_targets=r"time_caption_embed\.timestep_embedder\.linear_[12]"
    + r"|(layers|noise_refiner|context_refiner)\.\d+\.feed_forward\.linear_[123]",
    lora_skip="",
    every=r"(time_caption_embed\.timestep_embedder|layers|noise_refiner|context_refiner)\..*",
    guidance=None,
    arguments=_arguments,
    encode=_encode,
    places=nowhere,
    text_length=_text_length,
    to_vae=shifted_to_vae,
    from_vae=shifted_from_vae,
    folds=True,
    patch_first=True,
    enter=_enter,
    leaves=_leaves,
    sign=-1.0,
    time=(1.0, -1.0),
    clock=("timestep", 1),
    sizes=("hidden_size", "num_layers", "num_attention_heads", "num_kv_heads", "in_channels", "cap_feat_dim"),
)
