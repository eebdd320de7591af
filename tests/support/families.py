"""Tiny random pipelines of the families beyond FLUX and Qwen-Image, with the real classes."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    BatchEncoding,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

from arcflow import ArcFlowScheduler
from tests.support.pipelines import (
    PIPELINES,
    SHAPE,
    SIDE,
    WORDS,
    flux2_pipeline,
    flux2_transformer,
    klein_pipeline,
    tokenizer,
)

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
            in_channels=16,
            out_channels=16,
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
        vae=image_autoencoder(16),
        text_encoder=clip(),
        text_encoder_2=clip(),
        text_encoder_3=t5(),
        tokenizer=tokenizer(77),
        tokenizer_2=tokenizer(77),
        tokenizer_3=tokenizer(256),
    )


def z_image() -> DiffusionPipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=8,
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
        vae=image_autoencoder(8),
        text_encoder=qwen3(),
        tokenizer=chatting(512),
    )


def flux2_klein() -> DiffusionPipeline:
    return klein_pipeline(flux2_pipeline(), flux2_transformer(guidance_embeds=False))


def krea2() -> DiffusionPipeline:
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    sight = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    config = Qwen3VLConfig(text_config={**text, "head_dim": 8, "vocab_size": len(WORDS)}, vision_config=sight)
    pipe = Krea2Pipeline(
        transformer=Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            timestep_embed_dim=8,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 2, 2),
        ),
        scheduler=euler(),
        vae=qwen_autoencoder(),
        text_encoder=Qwen3VLModel(config).eval(),
        tokenizer=tokenizer(64),
        text_encoder_select_layers=(0, 1, 2),
    )
    pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_suffix = "", "on"
    pipe.prompt_template_encode_start_idx, pipe.prompt_template_encode_num_suffix_tokens = 0, 2
    return pipe


def qwen_autoencoder() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.5, 1.0],
    ).eval()


def chroma() -> DiffusionPipeline:
    return ChromaPipeline(
        transformer=ChromaTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=1,
            **SHAPE,
            approximator_hidden_dim=32,
            approximator_layers=1,
            approximator_num_channels=16,
        ),
        scheduler=euler(),
        vae=image_autoencoder(),
        text_encoder=t5(),
        tokenizer=tokenizer(512),
    )


def longcat_image() -> DiffusionPipeline:
    text = dict(vocab_size=len(WORDS), hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    pipe = LongCatImagePipeline(
        transformer=LongCatImageTransformer2DModel(in_channels=64, num_layers=2, num_single_layers=1, **SHAPE),
        scheduler=euler(),
        vae=image_autoencoder(16),
        text_encoder=Qwen2ForCausalLM(Qwen2Config(**text, num_attention_heads=2, num_key_value_heads=2)).eval(),
        tokenizer=tokenizer(512),
        text_processor=None,
    )
    pipe.tokenizer_max_length = 12
    return pipe


def lumina2() -> DiffusionPipeline:
    sizes = dict(head_dim=4, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2)
    text = Gemma2Model(Gemma2Config(vocab_size=len(WORDS), num_key_value_heads=2, sliding_window=64, **sizes))
    pipe = Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 4, 4),
            cap_feat_dim=16,
        ),
        scheduler=euler(),
        vae=image_autoencoder(),
        text_encoder=text.eval(),
        tokenizer=tokenizer(256),
    )
    pipe.vae_scale_factor, pipe.system_prompt = 2, "a"
    return pipe


class Words:
    """What a pipeline uses of Qwen's processor on text."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer(64)

    def __call__(self, text: list[str], **how: Any) -> BatchEncoding:
        return self.tokenizer(text, **how)

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0, 0]]


def qwen_image_21() -> DiffusionPipeline:
    text = dict(vocab_size=len(WORDS), num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    sizes = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=2)
    vae = AutoencoderKLQwenImage21(
        base_dim=2,
        decoder_base_dim=2,
        z_dim=8,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1] * 8,
        latents_std=[1.5] * 8,
    )
    pipe = QwenImage21Pipeline(
        transformer=QwenImage21Transformer2DModel(
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=euler(),
        vae=vae.eval(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**text, **sizes)).eval(),
        processor=Words(),
    )
    pipe._img_token_id = -1
    return pipe


def wan() -> DiffusionPipeline:
    return WanPipeline(
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=euler(),
        vae=AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 2.0, 0.5, 1.0],
        ).eval(),
        text_encoder=t5(),
        tokenizer=tokenizer(512),
    )


def ltx() -> DiffusionPipeline:
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        encoder_causal=True,
        decoder_causal=False,
    )
    return LTXPipeline(
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
        scheduler=euler(),
        vae=vae.eval(),
        text_encoder=t5(),
        tokenizer=tokenizer(128),
    )


def ovis_image() -> DiffusionPipeline:
    pipe = OvisImagePipeline(
        transformer=OvisImageTransformer2DModel(
            in_channels=16, out_channels=16, num_layers=2, num_single_layers=1, **SHAPE
        ),
        scheduler=euler(),
        vae=image_autoencoder(),
        text_encoder=qwen3(width=32),
        tokenizer=chatting(512),
    )
    pipe.system_prompt, pipe.user_prompt_begin_id = "on ", 1
    return pipe


def ernie_image() -> DiffusionPipeline:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return ErnieImagePipeline(
        transformer=ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=16,
            out_channels=16,
            text_in_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        scheduler=euler(),
        vae=vae.eval(),
        text_encoder=qwen3(),
        tokenizer=tokenizer(512),
    )


def quiet(make: Callable[[], Any]) -> Callable[[], Any]:
    def made() -> Any:
        pipe = make()
        loud(pipe.transformer)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return made


MAKERS = (
    sd3,
    z_image,
    flux2_klein,
    krea2,
    chroma,
    longcat_image,
    lumina2,
    qwen_image_21,
    wan,
    ltx,
    ovis_image,
    ernie_image,
)

MORE: dict[str, Callable[[], Any]] = {make.__name__: quiet(make) for make in MAKERS}

ALL = {**PIPELINES, **MORE}
"""A tiny pipeline of each family."""

SIDES = {"qwen_image_21": 64, "ltx": 64, "wan": 32}
"""Side of a picture, where the smallest is larger than FLUX's."""

FRAMES = {"wan": 5, "ltx": 9}
"""Of a video, as many as make two latent ones."""

EXACT: dict[str, dict[str, Any]] = {"qwen_image_21": {"use_kv_cache": False}}
"""What a pipeline is told to call its network the same way in every step."""


SHIFT = 3.2


class OnOurGrid(FlowMatchEulerDiscreteScheduler):
    """Euler's own steps on the grid of a student, whatever the pipeline hands over."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        count = num_inference_steps or len(sigmas)
        ours = ArcFlowScheduler(shift=SHIFT)
        ours.set_timesteps(count)
        self.sigmas, self.timesteps = ours.sigmas, ours.timesteps
        self.num_inference_steps = count
        self._step_index = self._begin_index = None


def side(family: str) -> int:
    return SIDES.get(family, SIDE)
