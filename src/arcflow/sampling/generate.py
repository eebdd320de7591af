"""Prompts and seeds in, images out: always through the stock pipeline, teacher and student alike.

`generate` calls an unmodified diffusers pipeline. What it samples is decided before: with `stock_euler(pipe)` the
teacher walks straight pieces on the grid `sigma = shift tau / (1 + (shift - 1) tau)`; after `arcflow.attach` the
student walks arcs on the same grid (with `fuse=True` its calls are as cheap as the teacher's). Every image starts from
the noise of its own CPU generator, so a seed means the same noise for every method, batch size and device.

Forward hooks measure where the time goes (text encoders, transformer, VAE decoder) and count the network calls; nothing
is estimated. `sample_folder` writes PNG files that carry their own recipe and a manifest; a second run does only what
is missing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from arcflow.data.images import read_images
from arcflow.families import family_of
from arcflow.path import SHIFT
from arcflow.sampling.editing import told_of_images
from arcflow.student.state import is_student, uncompiled
from arcflow.system.timing import now

PARTS = ("text_encoder", "transformer", "vae")
"""The parts of a pipeline whose time is reported, in the order they run."""

Told = Mapping[str, float | int | list[str] | Image.Image | list[Image.Image]]
"""What a pipeline is told besides prompt and size."""


@dataclass(frozen=True)
class Samples:
    """Images, the latents they were decoded from, and what they cost."""

    images: UInt8[np.ndarray, "n *frames rows columns 3"]
    """Images, or videos of a video model."""
    latents: Float[Tensor, "n *tokens size"]
    """Final latents as the pipeline has them: tokens, or images."""
    nfe: int
    seconds: dict[str, float]
    """Wall time of each part of `PARTS` over all images."""

    @property
    def seconds_per_image(self) -> float:
        return sum(self.seconds.values()) / len(self.images)


@dataclass(frozen=True)
class Guide:
    """How images are guided; None is the model's own way."""

    scale: float | None = None
    """The scale that the model embeds; of a teacher that embeds none, that of its second call."""
    negative: str | None = None
    """Text to guide away from by a second call."""
    true_cfg: float | None = None
    """Scale of that call."""


@dataclass
class Meter:
    """Time and calls of each part, filled while a `metered` block runs."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))


@contextmanager
def metered(pipe: DiffusionPipeline) -> Iterator[Meter]:
    """Measure the parts of a pipeline while the block runs."""
    meter = Meter()
    handles = []
    for part, module in _modules(pipe):
        handles += _meter(meter, part, module)
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()


def _modules(pipe: DiffusionPipeline) -> Iterator[tuple[str, nn.Module]]:
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name.startswith(("text_encoder", "transformer")):
            yield name.rstrip("_0123456789"), part
    yield "vae", pipe.vae.decoder


def _meter(meter: Meter, part: str, module: nn.Module) -> list[RemovableHandle]:
    start = 0.0

    def before(module: nn.Module, inputs: object) -> None:
        nonlocal start
        start = now()

    def after(module: nn.Module, inputs: object, output: object) -> None:
        meter.seconds[part] += now() - start
        meter.calls[part] += 1

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


@contextmanager
def stock_euler(pipe: DiffusionPipeline, shift: float = SHIFT) -> Iterator[None]:
    """Let the stock Euler scheduler drive the pipeline on the fixed-shift grid while the block runs."""
    kept = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)
    try:
        yield
    finally:
        pipe.scheduler = kept


@contextmanager
def _quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    kept = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**kept)


def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    height: int,
    width: int,
    frames: int = 1,
    batch_size: int = 64,
    guidance: float | None = None,
    negative: str | None = None,
    true_cfg: float | None = None,
    sources: Sequence[str] = (),
    progress: bool = False,
) -> Samples:
    """One image for each pair of prompt and seed, from the stock pipeline as it is set up now.

    Args:
        guidance: the scale that the model embeds; of a teacher that embeds none, that of its second call.
        negative: text to guide away from by a second call.
        true_cfg: scale of that call, of teacher or student; without it and `negative` a student makes none.
        sources: files of images to edit, one for each prompt, which is an instruction for it; drawn one by one.

    Raises:
        ValueError: as many seeds as prompts are needed, and at least one; a part of the pipeline is not there.
    """
    _check_drawable(pipe, prompts, seeds)
    guide = Guide(guidance, negative, true_cfg)
    batch_size = 1 if sources else batch_size
    starts = range(0, len(prompts), batch_size)
    images, latents = [], []
    with metered(pipe) as meter, _quiet(pipe):
        for start in tqdm(starts, desc=f"{steps} steps", disable=None if progress else True):
            batch = slice(start, start + batch_size)
            told = _arguments(pipe, len(prompts[batch]), guide)
            if sources:
                read = [Image.fromarray(image) for image in read_images(sources[batch], (height, width))]
                told = {**told, **told_of_images(pipe, read, height, width)}
            image, path = _call(pipe, prompts[batch], seeds[batch], steps, (height, width, frames), told)
            images.append(np.round(image * 255).astype(np.uint8))
            latents.append(path[-1])
    nfe = meter.calls["transformer"] // len(images)
    return Samples(np.concatenate(images), torch.cat(latents), nfe, meter.seconds)


def _check_drawable(pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuse what no image can be drawn with.

    Raises:
        ValueError: prompts and seeds do not go together, or a part of the pipeline is not there.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(
            f"got {len(prompts)} prompts and {len(seeds)} seeds; give one seed for each prompt (repeat a prompt "
            "to draw it with several seeds)"
        )
    lacking = [part for part in PARTS if getattr(pipe, part, None) is None]
    if lacking:
        raise ValueError(
            f"this {type(pipe).__name__} has no {', '.join(lacking)}: expected a whole pipeline, from prompts to "
            f"images; load it with all its parts. Embeddings of one's own are given to the pipeline itself, as "
            f"prompt_embeds"
        )


def trajectory(
    pipe: DiffusionPipeline,
    prompt: str,
    seed: int,
    *,
    steps: int,
    height: int,
    width: int,
    guidance: float | None = None,
) -> Float[Tensor, "steps tokens width"]:
    """The latents of one image after each step, without the noise it started from."""
    with _quiet(pipe):
        _, path = _call(pipe, [prompt], [seed], steps, (height, width, 1), _arguments(pipe, 1, Guide(guidance)))
    return torch.cat(path)


def _call(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    size: tuple[int, int, int],
    told: Told,
) -> tuple[np.ndarray, list[Tensor]]:
    """Images in [0, 1], and the latents after each step; `size` is height, width and frames."""
    path: list[Tensor] = []
    height, width, frames = size
    video = {"num_frames": frames} if family_of(pipe.transformer).video else {}
    with _kept(pipe, path):
        # diffusers leaves `__call__` to each pipeline
        output = pipe.__call__(
            prompt=list(prompts),
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",
            **video,
            **told,
        )
    return (output.frames if video else output.images)[..., :3], path


@contextmanager
def _kept(pipe: DiffusionPipeline, path: list[Tensor]) -> Iterator[None]:
    """Keep the latents after each step: not every pipeline calls back, and every one asks its scheduler."""
    step = pipe.scheduler.step

    def noted(*given: Any, **named: Any) -> Any:  # noqa: ANN401 - as each scheduler has it
        output = step(*given, **named)
        path.append(output[0].detach().float().cpu())
        return output

    pipe.scheduler.step = noted
    try:
        yield
    finally:
        del pipe.scheduler.step


def _arguments(pipe: DiffusionPipeline, count: int, guide: Guide) -> Told:
    """What a pipeline must be told besides prompt and size: its guidance, and no more text than its encoder reads."""
    guidance, negative, true_cfg = guide.scale, guide.negative, guide.true_cfg
    family = family_of(pipe.transformer)
    embeds = pipe.transformer.config.get("guidance_embeds")
    learned = is_student(uncompiled(pipe.transformer))
    second = true_cfg if true_cfg is not None or negative is None else family.scale
    against = {"negative_prompt": [negative or ""] * count}
    if family.guidance is None and family.second == "true_cfg_scale":
        if second is None:  # a student has learned the guided teacher
            second = 1.0 if learned else family.scale if guidance is None else guidance
        return {"true_cfg_scale": second, **(against if second != 1 or not learned else {})}
    told: dict[str, float | int | list[str]] = {**family.told_to(pipe)}
    own = family.guidance or family.scale if guidance is None else guidance
    scale = own if embeds or not learned else family.off
    if family.second == "true_cfg_scale":
        told["guidance_scale"] = scale
        return told if second is None else {**told, "true_cfg_scale": second, **against}
    told["guidance_scale"] = scale if second is None else second
    return {**told, **against} if family.negative and told["guidance_scale"] > family.off else told
