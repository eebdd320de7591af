"""A short training of a tiny pipeline."""

import dataclasses

import torch
from safetensors.torch import load_file

from arcflow.config import Data, Distill, Model, Optim, Run

ITERATIONS = 12


def tiny_pipe():
    """A stock FluxPipeline with random weights: 4 tokens of width 16, one block of each kind."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    from arcflow.world.teacher import assemble
    from arcflow.world.text import WIDTH, build_clip, build_t5

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return assemble(transformer, vae, build_t5(), build_clip()).to("cpu")


def config(out, **changes):
    run = Run(
        out=str(out),
        device="cpu",
        eval_every=4,
        save_every=3,
        model=Model(modes=4, rank=4, dropout=0.1),
        distill=Distill(decay=5),
        data=Data(count=16, held_out_count=3, teacher_steps=6, height=8, width=8),
        optim=Optim(iterations=ITERATIONS, batch=4, warmup=3, lr=1e-3, lr_log_gamma=1e-4, clip_from=3, ema_from=3),
    )
    for key, value in changes.items():
        part, _, name = key.partition("__")
        value = dataclasses.replace(getattr(run, part), **{name: value}) if name else value
        run = dataclasses.replace(run, **{part: value})
    return run


def newest_tensors(folder) -> dict[str, torch.Tensor]:
    """What the newest checkpoint of a run holds."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    return {name: value for file in newest.glob("*.safetensors") for name, value in load_file(file).items()}


def quiet(message):
    pass
