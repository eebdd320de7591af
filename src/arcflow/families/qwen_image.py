"""Qwen-Image: its row and its conditioning."""

import torch
from diffusers import DiffusionPipeline

from arcflow.families.autoencoder import frame_from_vae, frame_to_vae
from arcflow.families.conditioning import Cond
from arcflow.families.family import TIME_EMBEDDERS, Arguments, Family, reads_512_tokens


def _arguments(cond: Cond) -> Arguments:
    mask = cond["encoder_hidden_states_mask"]
    return {
        "encoder_hidden_states": cond["encoder_hidden_states"],
        # as the stock pipeline: padding is masked, and without any there is no mask
        "encoder_hidden_states_mask": None if bool(mask.all()) else mask,
        "img_shapes": [[tuple(shape)] for shape in cond["img_shapes"].tolist()],
    }


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    embeds, mask = pipe.encode_prompt(prompt=prompts, max_sequence_length=length, device=device)
    mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask.bool()}


def _places(text: Cond, rows: int, columns: int) -> Cond:
    return {"img_shapes": torch.tensor([[1, rows, columns]] * len(text["encoder_hidden_states"]))}


QWEN_IMAGE = Family(
    name="qwen_image",
    transformer="QwenImageTransformer2DModel",
    pipeline="QwenImagePipeline",
    published="ArcQwenImageTransformer2DModel",
    embedder="img_in",
    lora_targets=TIME_EMBEDDERS + r"|transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2)",
    # the text stream ends before these
    lora_skip=r"transformer_blocks\.{last}\.(txt_mlp\..*|attn\.(add_q_proj|to_add_out))",
    guidance=None,
    arguments=_arguments,
    encode=_encode,
    places=_places,
    text_length=reads_512_tokens,
    to_vae=frame_to_vae,
    from_vae=frame_from_vae,
    second="true_cfg_scale",
)
