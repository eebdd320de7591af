"""Tiny random pipelines with the real classes: everything a test needs of FLUX and Qwen-Image but their size."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    MistralConfig,
    MistralModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from arcflow import student

SIDE = 16
"""Image side: 8 x 8 latent pixels, 4 x 4 tokens of width 16."""
WORDS = "<pad> </s> <unk> a red green blue cube ball on left of two".split()
SHAPE = dict(attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6))


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    """Whole words, an end mark behind them."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=length, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def flux_transformer(**changes) -> FluxTransformer2DModel:
    sizes = dict(in_channels=16, num_layers=2, num_single_layers=1, pooled_projection_dim=32, guidance_embeds=True)
    return FluxTransformer2DModel(**{**SHAPE, **sizes, **changes}).eval()


def qwen_transformer(**changes) -> QwenImageTransformer2DModel:
    sizes = dict(in_channels=16, out_channels=4, num_layers=2)
    return QwenImageTransformer2DModel(**{**SHAPE, **sizes, **changes}).eval()


def flux2_transformer(**changes) -> Flux2Transformer2DModel:
    sizes = dict(in_channels=16, num_layers=2, num_single_layers=1, timestep_guidance_channels=16)
    shape = {**SHAPE, "joint_attention_dim": 48, "axes_dims_rope": (4, 4, 4, 4)}
    return Flux2Transformer2DModel(**{**shape, **sizes, **changes}).eval()


def flux_pipeline() -> FluxPipeline:
    text = dict(vocab_size=len(WORDS), num_hidden_layers=1, pad_token_id=0, eos_token_id=1)
    clip = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, max_position_embeddings=16, bos_token_id=1)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.2),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            norm_num_groups=2,
            latent_channels=4,
            scaling_factor=0.36,
            shift_factor=0.11,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, **clip)).eval(),
        tokenizer=tokenizer(16),
        text_encoder_2=T5EncoderModel(T5Config(**text, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)).eval(),
        tokenizer_2=tokenizer(8),
        transformer=flux_transformer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def qwen_pipeline() -> QwenImagePipeline:
    """The text encoder is a plain Qwen2, which is what the pipeline uses of Qwen2.5-VL on text."""
    text = dict(vocab_size=len(WORDS), hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.2),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 2.0, 0.5, 1.0],
        ),
        text_encoder=Qwen2Model(Qwen2Config(**text, num_attention_heads=2, num_key_value_heads=2)).eval(),
        tokenizer=tokenizer(1024),
        transformer=qwen_transformer(),
    )
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "on {}", 1
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux2_pipeline() -> Flux2Pipeline:
    """The text encoder is a plain Mistral, which is what the pipeline uses of Mistral 3 on text: layers 10, 20, 30."""
    text = dict(vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=30)
    words = tokenizer(512)
    words.chat_template = "{% for m in messages %}{% for part in m.content %}{{ part.text }} {% endfor %}{% endfor %}"
    pipe = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.2),
        vae=AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            norm_num_groups=2,
            latent_channels=4,
        ),
        text_encoder=MistralModel(MistralConfig(**text, num_attention_heads=2, num_key_value_heads=2)).eval(),
        tokenizer=words,
        transformer=flux2_transformer(),
    )
    pipe.vae.bn.running_mean.normal_()
    pipe.vae.bn.running_var.uniform_(0.5, 2.0)
    pipe.system_message = "a"
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES: dict[str, Callable] = {"flux": flux_pipeline, "qwen_image": qwen_pipeline, "flux2": flux2_pipeline}


def fresh(pipe):
    """The same pipeline with a transformer and a scheduler of its own; text encoders and autoencoder are shared."""
    pipe = copy.copy(pipe)
    pipe.transformer, pipe.scheduler = copy.deepcopy(pipe.transformer), copy.deepcopy(pipe.scheduler)
    return pipe


def perturb(transformer, scale: float = 0.05, seed: int = 0) -> None:
    """Stands for training: every trainable weight moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.trainable(transformer).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def sample(pipe, prompt="a red cube", **more):
    """Latents of one image from the stock pipeline."""
    settings = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "latent", **more}
    if not isinstance(pipe, QwenImagePipeline):  # which does not pad
        settings.setdefault("max_sequence_length", 8)
    return pipe(prompt=prompt, generator=torch.Generator("cpu").manual_seed(0), **settings).images


STYLE = {
    "FluxPipeline": ["to_q", "to_v", "proj_mlp", "ff.net.2"],
    "QwenImagePipeline": ["to_q", "to_v", "img_mlp.net.2"],
    "Flux2Pipeline": ["to_q", "to_v", "to_qkv_mlp_proj", "ff.linear_out"],
}
"""Attention, which the student leaves alone, and layers that the student tunes too."""


def save_style(pipe, folder, layers: list[str]):
    """A LoRA file as style trainers write them, for a copy of the pipeline's transformer."""
    net = copy.deepcopy(pipe.transformer)
    torch.manual_seed(3)
    net.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=layers), "style")
    state = get_peft_model_state_dict(net, adapter_name="style")
    type(pipe).save_lora_weights(folder, transformer_lora_layers=state)
    return folder


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def torchrun(processes, *command, folder="."):
    """A command on several CPU processes, run in a folder."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*launch, *map(str, command)], env={**os.environ, **here}, cwd=folder, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def klein_pipeline(flux2: Flux2Pipeline, transformer: Flux2Transformer2DModel) -> Flux2KleinPipeline:
    """FLUX.2 klein base, which guides by a second call; scheduler and autoencoder are those of a FLUX.2 pipeline."""
    text = dict(vocab_size=len(WORDS), num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=28)
    words = tokenizer(512)
    words.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    pipe = Flux2KleinPipeline(
        scheduler=copy.deepcopy(flux2.scheduler),
        vae=flux2.vae,
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**text, **sizes)).eval(),
        tokenizer=words,
        transformer=transformer,
        is_distilled=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
