"""Krea 2: its row and its conditioning. Guidance is off at 0: its scale is what the second call adds."""

import torch
from diffusers import DiffusionPipeline

from arcflow.families.autoencoder import frame_from_vae, frame_to_vae
from arcflow.families.conditioning import Cond
from arcflow.families.family import SIZES, Arguments, Family, divided_then_cast, reads_512_tokens


def _arguments(cond: Cond) -> Arguments:
    return {
        "encoder_hidden_states": cond["encoder_hidden_states"],
        "encoder_attention_mask": cond["encoder_hidden_states_mask"],
        "position_ids": cond["position_ids"],
    }


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    embeds, mask = pipe.encode_prompt(prompt=prompts, max_sequence_length=length, device=device)
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}


def _places(text: Cond, rows: int, columns: int) -> Cond:
    embeds = text["encoder_hidden_states"]
    image = torch.zeros(rows, columns, 3, device=embeds.device)
    image[..., 1] = torch.arange(rows, device=embeds.device)[:, None]
    image[..., 2] = torch.arange(columns, device=embeds.device)
    # all of the text stands at the origin
    words = torch.zeros(embeds.shape[1], 3, device=embeds.device)
    return {"position_ids": torch.cat([words, image.flatten(0, 1)])}


KREA2 = Family(
    name="krea2",
    transformer="Krea2Transformer2DModel",
    pipeline="Krea2Pipeline",
    published="",
    embedder="img_in",
    head="final_layer.linear",
    norm="",
    lora_targets=r"time_embed\.linear_[12]|transformer_blocks\.\d+\.ff\.(gate|up|down)",
    lora_skip="",
    every=r"(time_embed|transformer_blocks)\..*",
    guidance=None,
    arguments=_arguments,
    encode=_encode,
    places=_places,
    text_length=reads_512_tokens,
    to_vae=frame_to_vae,
    from_vae=frame_from_vae,
    enter=divided_then_cast,
    scale=4.5,
    off=0.0,
    sizes=(*SIZES, "num_key_value_heads", "text_hidden_dim", "num_text_layers"),
)
