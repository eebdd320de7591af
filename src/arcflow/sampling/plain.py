"""How far the images of a plain LoRA are from those of the student that it was made of."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from arcflow.families import family_of
from arcflow.sampling.attach import attach, detach
from arcflow.sampling.open import open_pipe, size_of
from arcflow.student.adapter import read_info
from arcflow.student.plain_lora import raw_times, stock_scheduler

PROMPTS = ("a red cube on a blue sphere", "a photo of a cat", "two green balls")


def latent_difference(
    pipe: DiffusionPipeline,
    adapter: str | Path,
    lora: Path,
    *,
    prompts: Sequence[str] = PROMPTS,
    **settings: int | float | None,
) -> float:
    """Root mean square of the difference of the latents, over that of the student's: 0 for the same images.

    The pipeline ends as it came.

    Args:
        lora: file of the plain LoRA, in diffusers' names.
        settings: further arguments of the pipeline's call: height, width, guidance_scale.
    """
    info = read_info(adapter)
    stock = pipe.scheduler
    attach(pipe, adapter)
    try:
        wanted = _latents(pipe, prompts, num_inference_steps=info.fewest, **settings)
    finally:
        detach(pipe)
    name = "arcflow_plain"
    pipe.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name=name)
    try:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(stock_scheduler(info))
        times = raw_times(info)
        if times is None:
            drawn = _latents(pipe, prompts, num_inference_steps=info.fewest, **settings)
        else:
            drawn = _latents(pipe, prompts, sigmas=times, **settings)
    finally:
        pipe.scheduler = stock
        pipe.delete_adapters(name)
    return float((drawn - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def drawn_apart(model: str, adapter: str | Path, lora: Path) -> float:
    """`latent_difference` on the base itself, at its own size."""
    pipe = open_pipe(model, "auto", "auto")
    pipe.set_progress_bar_config(disable=True)
    height, width = size_of(model, None, None)
    guided = family_of(pipe.transformer).guidance
    if guided is None:
        return latent_difference(pipe, adapter, lora, height=height, width=width)
    scale = read_info(adapter).guidance
    return latent_difference(pipe, adapter, lora, height=height, width=width, guidance_scale=scale)


def _latents(pipe: DiffusionPipeline, prompts: Sequence[str], **settings: int | float | list[float] | None) -> Tensor:
    drawn = []
    for seed, prompt in enumerate(prompts):
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.no_grad():
            drawn.append(pipe.__call__(prompt=prompt, generator=generator, output_type="latent", **settings).images)
    return torch.cat(drawn).float().cpu()
