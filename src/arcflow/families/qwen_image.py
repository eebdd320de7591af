"""Qwen-Image: its row and its conditioning."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from arcflow.families.autoencoder import frame_from_vae, frame_to_vae
from arcflow.families.conditioning import Cond, padded
from arcflow.families.family import TIME_EMBEDDERS, Arguments, EditedImages, Editing, Family, reads_512_tokens


def _arguments(cond: Cond) -> Arguments:
    mask = cond["encoder_hidden_states_mask"]
    return {
        "encoder_hidden_states": cond["encoder_hidden_states"],
        # as the stock pipeline: padding is masked, and without any there is no mask
        "encoder_hidden_states_mask": None if bool(mask.all()) else mask,
        "img_shapes": [list(map(tuple, shapes)) for shapes in cond["img_shapes"].tolist()],
    }


def _encode(pipe: DiffusionPipeline, prompts: list[str], length: int, device: str | torch.device | None) -> Cond:
    embeds, mask = pipe.encode_prompt(prompt=prompts, max_sequence_length=length, device=device)
    mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask.bool()}


def _places(text: Cond, rows: int, columns: int) -> Cond:
    return {"img_shapes": torch.tensor([[[1, rows, columns]]] * len(text["encoder_hidden_states"]))}


def _encode_edit(
    pipe: DiffusionPipeline, prompts: list[str], images: EditedImages, device: str | torch.device | None
) -> Cond:
    """What the text encoder makes of an instruction and its image. Edit-Plus (2509, 2511) shows it a smaller one."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus  # loads a vision model's code

    rows, where = [], torch.device(device) if device else None
    for prompt, pixels in zip(prompts, images, strict=True):
        image = Image.fromarray(pixels)
        shown: Any = image  # these pipelines take an image, or a list of them, where they say a tensor
        if isinstance(pipe, plus.QwenImageEditPlusPipeline):
            width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, image.width / image.height)
            shown = [pipe.image_processor.resize(image, height, width)]
        rows.append(pipe.encode_prompt(prompt=[prompt], image=shown, device=where)[0][0])
    return padded(rows)


def _places_beside(cond: Cond, rows: int, columns: int) -> Cond:
    """The image to edit is a second frame."""
    return {"img_shapes": cond["img_shapes"].repeat(1, 2, 1)}


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
    edit=Editing(places=_places_beside, encode=_encode_edit, draws=False),
)
