"""Tiny random pipelines that edit an image, with the real classes."""

from typing import Any

import diffusers
import torch
from transformers import BatchEncoding, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.support.pipelines import WORDS, flux2_pipeline, flux2_transformer, fresh, klein_pipeline, tokenizer

IMAGE, START, END = len(WORDS), len(WORDS) + 1, len(WORDS) + 2
"""Tokens for a piece of an image, and around one."""


class Seeing:
    """What the pipelines use of Qwen2.5-VL's processor: words to tokens, and a place for each piece of the image."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer(1024)
        self.images = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 8 * 8}
        )

    def __call__(self, text: list[str], images: Any, **how: Any) -> BatchEncoding:
        seen = self.images(images, return_tensors="pt")
        pieces = int(seen["image_grid_thw"][0].prod()) // 4
        rows = [[START, *[IMAGE] * pieces, END, *self.tokenizer(row)["input_ids"]] for row in text]
        ids = torch.tensor(rows)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids), **seen})


def sight() -> Qwen2_5_VLForConditionalGeneration:
    text = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, patch_size=4, spatial_merge_size=2)
    config = Qwen2_5_VLConfig(
        text_config={
            **text,
            "vocab_size": len(WORDS) + 3,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        },
        vision_config={**vision, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [0]},
        image_token_id=IMAGE,
        video_token_id=END,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def editing_pipeline(name: str, pristine: dict[str, Any]) -> Any:
    """A pipeline of this class, made of a family's parts."""
    if name == "Flux2KleinPipeline":
        torch.manual_seed(0)
        return klein_pipeline(flux2_pipeline(), flux2_transformer(guidance_embeds=False))
    kind = getattr(diffusers, name)
    source = fresh(pristine["qwen_image" if "Qwen" in name else "flux"])
    parts = {part: value for part, value in source.components.items() if value is not None}
    if "Qwen" in name:
        torch.manual_seed(0)
        parts |= {"text_encoder": sight(), "processor": Seeing()}
    pipe = kind(**parts)
    if "Qwen" in name:
        pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "on {}", 1
    pipe.set_progress_bar_config(disable=True)
    return pipe
