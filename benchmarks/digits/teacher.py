"""The teacher of the digits: a small stock `FluxPipeline`, trained from nothing on half of the pictures.

    text  ->  flow  ->  guidance  ->  teacher/

Text encoders learn to tell the digit of a prompt; then the stages of the first bench's teacher (`training.pretrain`)
follow. There is no autoencoder to train: its weights are written down, and it gives back what it is given.
"""

import random
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from arcflow.distillation.policy import Teacher
from arcflow.families.conditioning import Cond
from arcflow.families.network import folded, unfolded
from arcflow.system import files
from arcflow.training import flow
from arcflow.training.pretrain import (
    PATCH,
    Batches,
    Lessons,
    TextLesson,
    draw,
    finish,
    train_flow,
    train_guidance,
    train_text,
)
from arcflow.world.autoencoder import to_images, to_tensor, vae_decode, vae_encode
from arcflow.world.teacher import as_identity, assemble
from arcflow.world.text import build_clip, build_t5, build_tokenizer, tokenize
from benchmarks.digits import words
from benchmarks.digits.pictures import SIZE, distance_to_real, pictures, right

GRID, TOKEN = SIZE // 2, 4
"""Tokens along a side, and numbers of a token: four pixels."""
WIDTH = 32
"""Of the text encoders."""
LOUD = 100.0
"""Constant channels of the autoencoder, beside which an image's own are small."""
TOLD = 8
"""Captions of each picture."""
PROBED = 120
"""Images on which a training is watched."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long the stages train: minutes on one core."""

    text_steps: int = 120
    """Steps of 64 prompts."""
    flow_steps: int = 1000
    """Steps of flow matching."""
    guidance_steps: int = 200
    """Steps of guidance distillation."""
    batch: int = 64
    """Images a step for the transformer."""


def train(out: Path, lengths: Lengths) -> Path:
    """Train every stage that is not finished; returns the folder of the pipeline, `out/teacher`."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(words.VOCABULARY, words.MAX_LENGTH)
    t5, clip = train_text(out, lengths.text_steps, text_lesson)
    vae = build_autoencoder()
    lessons = _Digits(vae, partial(flow.encode, t5, clip, tokenizer=tokenizer, grid=GRID), lengths.batch)
    frozen = train_flow(out, lengths.flow_steps, lessons.taught, build_transformer)
    net = train_guidance(out, lengths.guidance_steps, lessons.taught, frozen)

    def save(folder: Path) -> None:
        assembled(net, vae, t5, clip).save_pretrained(folder)
        files.write_text(folder / "captions.txt", "\n".join(words.captions(10**6)) + "\n")

    return finish(out / "teacher", save)


def assembled(net: FluxTransformer2DModel, vae: AutoencoderKL, t5: T5EncoderModel, clip: CLIPTextModel) -> FluxPipeline:
    """The parts as one stock pipeline."""
    return assemble(net, vae, t5, clip, build_tokenizer(words.VOCABULARY, words.MAX_LENGTH))


class _Digits:
    """What the transformer learns from, and how far it is."""

    def __init__(self, vae: AutoencoderKL, encode: partial[Cond], batch: int) -> None:
        self.vae, self.encode, self.batch = vae, encode, batch

    @cached_property
    def taught(self) -> Lessons:
        images, digits = pictures("teacher")
        with torch.no_grad():
            latents = unfolded(vae_encode(self.vae, to_tensor(images)), PATCH)
        rng = random.Random("captions")
        texts = [rng.choice(words.prompts(int(digit), held_out=False)) for _ in range(TOLD) for digit in digits]
        return Lessons(Batches(latents.repeat(TOLD, 1, 1), texts, self.encode, self.batch), self.watch)

    @torch.no_grad()
    def watch(self, teacher: Teacher, guidance: float) -> dict[str, float]:
        """Share of images that the checker takes for what was asked for, and the distance of all to real ones."""
        texts = words.held_out(PROBED)
        latents = draw(self.taught.batches, teacher, texts, guidance)
        images = np.concatenate([to_images(vae_decode(self.vae, folded(x, [GRID, GRID], PATCH))) for x in latents])
        return {"accuracy": float(np.mean(right(images, texts))), "kid": distance_to_real(images)}


def build_transformer() -> FluxTransformer2DModel:
    """An untrained FLUX, smaller still: 16 tokens of width 4; 1 double and 3 single blocks, 32 wide."""
    net = FluxTransformer2DModel(
        in_channels=TOKEN,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return as_identity(net)


def build_text() -> tuple[T5EncoderModel, CLIPTextModel]:
    """Untrained text encoders."""
    count = len(words.VOCABULARY)
    clip = build_clip(count, width=WIDTH, layers=1, max_length=words.MAX_LENGTH)
    return build_t5(count, width=WIDTH, layers=1), clip


def text_lesson() -> TextLesson:
    """Text encoders from which a linear map is to tell the digit of a prompt: from the T5's mean token, and from CLIP's
    pooled vector."""
    t5, clip = build_text()
    probes = nn.ModuleList([nn.Linear(WIDTH, 10), nn.Linear(WIDTH, 10)])
    tokenizer, texts = build_tokenizer(words.VOCABULARY, words.MAX_LENGTH), words.captions(10**6)

    def loss(step: int) -> Tensor:
        told = random.Random(f"text-{step}").choices(texts, k=64)
        ids, asked = tokenize(tokenizer, told), torch.tensor([words.digit_of(text) for text in told])
        read = probes[0](t5(ids)[0].mean(1)), probes[1](clip(ids).pooler_output)
        return nn.functional.cross_entropy(read[0], asked) + nn.functional.cross_entropy(read[1], asked)

    return TextLesson(t5, clip, probes, loss)


def build_autoencoder() -> AutoencoderKL:
    """A stock autoencoder whose latents are the gray of the pixels, with mean 0 and variance 1 over the teacher's half.

    Its weights say so: an image enters as two channels, x and -x, beside two constants, 100 and -100. Residual blocks
    add nothing. The last normalization divides by the deviation of all four, which the constants decide (to 1 in
    20 000), and silu(z) - silu(-z) = z undoes the activation.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.fill_(float(name.endswith(("norm1.weight", "norm2.weight"))))
        encoder: Any = vae.encoder
        _pass_through(encoder, channels=1)
        encoder.conv_out.bias[1] = -30.0  # the logarithm of a variance: none
        _pass_through(vae.decoder, channels=3)
    gray = to_tensor(pictures("teacher").images)
    vae.register_to_config(shift_factor=round(gray.mean().item(), 4), scaling_factor=round(1 / gray.std().item(), 4))
    return vae.eval().requires_grad_(False)


def _pass_through(part: Any, channels: int) -> None:
    """Let half of an autoencoder give the mean of its input in the first so many channels of its output."""
    first, last = part.conv_in, part.conv_out
    center = first.kernel_size[0] // 2
    for channel, sign in ((0, 1.0), (1, -1.0)):
        first.weight[channel, :, center, center] = sign / first.in_channels
        first.bias[2 + channel] = sign * LOUD
        last.weight[:channels, channel, center, center] = sign
    part.conv_norm_out.weight.fill_(LOUD / 2**0.5)
