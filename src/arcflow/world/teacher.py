"""The small teacher: a genuine diffusers `FluxPipeline` that draws this world, and its transformer's losses.

Stage one is flow matching (x_sigma = (1 - sigma) x0 + sigma eps, target eps - x0), captions dropped at times, guidance
input fixed at 1. Stage two distils guidance into the network, as FLUX.1-dev was (arXiv 2210.03142): with its own frozen
copy as teacher it learns u_empty + w (u_caption - u_empty), given w.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

from arcflow.path import SHIFT
from arcflow.world.autoencoder import CELLS, CHANNELS
from arcflow.world.text import WIDTH, build_tokenizer

GRID, TOKEN = CELLS // 2, 4 * CHANNELS


def build_transformer() -> FluxTransformer2DModel:
    """An untrained small FLUX: 16 tokens of width 32, guidance embedding, 3 double and 9 single blocks.

    Narrow and deep: a student has to do in two calls what the teacher does in fifty, one block after the other.
    """
    net = FluxTransformer2DModel(
        in_channels=TOKEN,
        num_layers=3,
        num_single_layers=9,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 10, 10),
    )
    return as_identity(net)


def as_identity(net: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The same network, whose modulations and output start at zero, so that every block starts as the identity
    (adaLN-Zero, arXiv 2212.09748)."""
    for name, module in net.named_modules():
        if name == "proj_out" or (name.endswith(".linear") and "norm" in name):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return net


def assemble(
    transformer: FluxTransformer2DModel,
    vae: AutoencoderKL,
    t5: T5EncoderModel,
    clip: CLIPTextModel,
    tokenizer: Any = None,
) -> FluxPipeline:
    """The parts as one stock pipeline, sampling on the grid of shift 3.2; the tokenizer is the world's unless told."""
    tokenizer = tokenizer or build_tokenizer()
    for part in (transformer, vae):  # else the folder it was trained in goes out with it
        part.register_to_config(_name_or_path="")
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def teacher_folder() -> Path:
    """Where the shipped teacher lies: an ordinary `FluxPipeline` folder."""
    return Path(str(files("arcflow") / "assets" / "teacher"))


def load_teacher(folder: str | Path | None = None) -> FluxPipeline:
    """The shipped teacher (or another folder's), on the CPU in float32.

    Raises:
        ValueError: the folder holds no pipeline.
    """
    path = Path(folder) if folder else teacher_folder()
    if not (path / "model_index.json").is_file():
        raise ValueError(f"no teacher in {path}: expected a FluxPipeline folder; train one with `arcflow world train`")
    return FluxPipeline.from_pretrained(path, dtype=torch.float32)
