"""Tiny random pipelines of the families beyond FLUX and Qwen-Image, with the real classes."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.support.pipelines import PIPELINES, WORDS, tokenizer

CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}"


def image_autoencoder(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=channels,
        scaling_factor=0.36,
        shift_factor=0.11,
    ).eval()


def t5(width: int = 32) -> T5EncoderModel:
    sizes = dict(d_model=width, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(T5Config(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, **sizes)).eval()


def qwen3(width: int = 16, layers: int = 2) -> Qwen3Model:
    sizes = dict(hidden_size=width, intermediate_size=16, num_hidden_layers=layers, head_dim=8)
    text = dict(vocab_size=len(WORDS), num_attention_heads=2, num_key_value_heads=2)
    return Qwen3Model(Qwen3Config(**text, **sizes)).eval()


def chatting(length: int) -> Any:
    words = tokenizer(length)
    words.chat_template = CHAT
    return words


def euler(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.2, **settings)


def loud(transformer: Any, scale: float = 0.1) -> Any:
    """Weights at random where a new network has zeros, so that all of it acts."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any() or not parameter.isfinite().all():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return transformer.eval()


def sd3() -> DiffusionPipeline:
    def clip() -> CLIPTextModelWithProjection:
        text = dict(vocab_size=len(WORDS), num_hidden_layers=2, pad_token_id=0, eos_token_id=1, bos_token_id=1)
        sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, max_position_embeddings=77)
        return CLIPTextModelWithProjection(CLIPTextConfig(**text, **sizes, projection_dim=16)).eval()

    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        ),
        scheduler=euler(),
        vae=image_autoencoder(),
        text_encoder=clip(),
        text_encoder_2=clip(),
        text_encoder_3=t5(),
        tokenizer=tokenizer(77),
        tokenizer_2=tokenizer(77),
        tokenizer_3=tokenizer(256),
    )


def z_image() -> DiffusionPipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        for pad in (transformer.x_pad_token, transformer.cap_pad_token):
            pad.fill_(0.5)
    return ZImagePipeline(
        transformer=transformer,
        scheduler=euler(),
        vae=image_autoencoder(),
        text_encoder=qwen3(),
        tokenizer=chatting(512),
    )


def quiet(make: Callable[[], Any]) -> Callable[[], Any]:
    def made() -> Any:
        pipe = make()
        loud(pipe.transformer)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return made


MORE: dict[str, Callable[[], Any]] = {make.__name__: quiet(make) for make in (sd3, z_image)}

ALL = {**PIPELINES, **MORE}
"""A tiny pipeline of each family."""
