"""Z-Image: its row and its conditioning. The network takes lists, knows 1 - sigma, and gives the negative velocity."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from arcflow.families.autoencoder import shifted_from_vae, shifted_to_vae
from arcflow.families.conditioning import Cond, masked, padded
from arcflow.families.family import Arguments, Family, nowhere, reads_512_tokens


def _enter(x: Tensor, time: Tensor, dtype: torch.dtype) -> Arguments:
    return {"x": list(x.to(dtype).unsqueeze(2).unbind()), "t": (1000 - time) / 1000}


def _arguments(cond: Cond) -> Arguments:
    return {"cap_feats": masked(cond)}


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    embeds, _ = pipe.encode_prompt(
        prompt=list(prompts), do_classifier_free_guidance=False, max_sequence_length=length, device=device
    )
    return padded(embeds)


Z_IMAGE = Family(
    name="z_image",
    transformer="ZImageTransformer2DModel",
    pipeline="ZImagePipeline",
    published="",
    embedder="all_x_embedder.2-1",
    head="all_final_layer.2-1.linear",
    norm="all_final_layer.2-1.adaLN_modulation",
    blocks="layers",
    lora_targets=r"t_embedder\.mlp\.[02]|(layers|noise_refiner|context_refiner)\.\d+\.feed_forward\.w[123]",
    lora_skip="",
    every=r"(t_embedder|layers|noise_refiner|context_refiner)\..*",
    guidance=None,
    arguments=_arguments,
    encode=_encode,
    places=nowhere,
    text_length=reads_512_tokens,
    to_vae=shifted_to_vae,
    from_vae=shifted_from_vae,
    folds=True,
    patch_first=True,
    enter=_enter,
    sign=-1.0,
    time=(1.0, -1.0),
    clock=("t", 1),
    scale=4.0,
    off=0.0,
    wide=True,
    sizes=("dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "in_channels", "cap_feat_dim", "axes_dims"),
)
