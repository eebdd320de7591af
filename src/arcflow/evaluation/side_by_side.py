"""Teacher, plain Euler and student side by side: the same prompts, the same noise, the same stock pipeline.

Each row of `ROWS` is one way to sample. For all of them are reported: the network calls (`nfe`, counted, not assumed),
the time per image and of each part, the mean squared distance of the final latents to those of the 50-step teacher
(`mse_to_teacher`), and the share of images that show what their prompts say, per skill. Distances compare like with
like, for both ends start from the same noise; accuracy needs no reference image.

`tracks` records what the report draws: the teacher's path, Euler's chords, the student's arcs. An arc is known at every
point from one call, x(s) = x_src - d(0, s), so it is drawn from the closed form and not from extra calls.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, UInt8
from torch import Tensor

from arcflow import student
from arcflow.evaluation.results import Result
from arcflow.families import conditioning
from arcflow.families.network import decode, encode_prompts, noise
from arcflow.path import step_grid
from arcflow.sampling import attach
from arcflow.sampling.generate import Samples, generate, stock_euler, trajectory
from arcflow.student.adapter import read_info
from arcflow.student.state import other_adapters

ROWS = {
    "teacher_50": ("teacher", 50),
    "euler_2": ("teacher", 2),
    "euler_4": ("teacher", 4),
    "euler_8": ("teacher", 8),
    "arcflow_1": ("student", 1),
    "arcflow_2": ("student", 2),
    "arcflow_4": ("student", 4),
}
"""Name of the row: which network samples, and in how many steps."""

REFERENCE = "teacher_50"

Accuracy = Callable[[np.ndarray, Sequence[str]], dict[str, float]]
"""Images and their prompts to "overall" and one entry per skill, each from 0 to 1."""


def compare(
    pipe: DiffusionPipeline,
    folder: str | Path,
    prompts: Sequence[str],
    *,
    accuracy: Accuracy,
    height: int,
    width: int,
    seeds: int = 1,
    first_seed: int = 0,
    batch_size: int = 64,
    fuse: bool | None = None,
    progress: bool = False,
) -> tuple[dict[str, Result], dict[str, Samples]]:
    """Results and samples of every row, at the guidance the adapter was distilled with; the pipeline is left as the
    teacher it came as.

    Args:
        folder: the adapter that makes the pipeline a student.
        seeds: how many images of each prompt; every image has a noise of its own, shared by all rows.
        fuse: whether the student is added into the weights; by default where no other LoRA is.
    """
    words = [prompt for prompt in prompts for _ in range(seeds)]
    numbers = list(range(first_seed, first_seed + len(words)))
    guidance = read_info(folder).guidance
    samples: dict[str, Samples] = {}

    def run(network: str) -> None:
        for row, (owner, steps) in ROWS.items():
            if owner == network:
                samples[row] = generate(
                    pipe,
                    words,
                    numbers,
                    steps=steps,
                    height=height,
                    width=width,
                    batch_size=batch_size,
                    guidance=guidance,
                    progress=progress,
                )

    with stock_euler(pipe):
        run("teacher")
    attach.attach(pipe, folder, fuse=not other_adapters(pipe.transformer) if fuse is None else fuse)
    try:
        run("student")
    finally:
        attach.detach(pipe)
    samples = {row: samples[row] for row in ROWS}
    return {row: _result(drawn, samples[REFERENCE], accuracy, words, seeds) for row, drawn in samples.items()}, samples


def _result(drawn: Samples, reference: Samples, accuracy: Accuracy, words: list[str], seeds: int) -> Result:
    """The numbers of one row; `words` has the prompt of each image."""
    return Result(
        nfe=drawn.nfe,
        seconds_per_image=drawn.seconds_per_image,
        seconds={part: total / len(words) for part, total in drawn.seconds.items()},
        mse_to_teacher=float((drawn.latents - reference.latents).square().mean()),
        accuracy=accuracy(drawn.images, words),
        prompts=len(words) // seeds,
        seeds=seeds,
    )


@dataclass(frozen=True)
class Tracks:
    """One image's way from noise to image, as each method walks it; every point a flat latent."""

    prompt: str
    teacher: Float[Tensor, "_ size"]
    chords: Float[Tensor, "_ size"]
    arcs: list[Float[Tensor, "_ size"]]
    """One curve for each call of the student."""
    ends: dict[str, UInt8[np.ndarray, "rows columns 3"]]
    """The images they arrive at: "teacher", "chords", "arcs"."""


def tracks(pipe: DiffusionPipeline, folder: str | Path, prompt: str, seed: int, *, height: int, width: int) -> Tracks:
    """The teacher's path, Euler's chords and the student's arcs of one prompt from one noise, in the student's own
    number of steps."""
    eps = noise(pipe, [seed], height, width)
    info = read_info(folder)
    steps, guidance = info.steps, info.guidance
    walk = {"height": height, "width": width, "guidance": guidance}
    with stock_euler(pipe):
        teacher = torch.cat([eps, trajectory(pipe, prompt, seed, steps=ROWS[REFERENCE][1], **walk)])
        chords = torch.cat([eps, trajectory(pipe, prompt, seed, steps=steps, **walk)])
    attach.attach(pipe, folder)
    try:
        cond = encode_prompts(pipe, [prompt], height=height, width=width, guidance=guidance)
        arcs = _arcs(pipe, cond, eps, steps)
    finally:
        attach.detach(pipe)
    last = torch.stack([teacher[-1], chords[-1], arcs[-1][-1]])
    images = decode(pipe, last, height, width)
    ends = {"teacher": images[0], "chords": images[1], "arcs": images[2]}
    return Tracks(prompt, teacher.flatten(1), chords.flatten(1), [arc.flatten(1) for arc in arcs], ends)


@torch.no_grad()
def _arcs(pipe: DiffusionPipeline, cond: conditioning.Cond, eps: Tensor, steps: int, points: int = 33) -> list[Tensor]:
    grid = step_grid(steps, pipe.scheduler.config.shift, pipe.scheduler.config.final_step_scale).tolist()
    x = eps.to(pipe.transformer.device)
    arcs = []
    for src, dst in itertools.pairwise(grid):
        mixture = student.predict(pipe.transformer, x, src, cond)
        left = np.linspace(0.0, src - dst, points).tolist()
        arcs.append(torch.cat([x - mixture.displacement(0.0, s) for s in left]).cpu())
        x = arcs[-1][-1:].to(x.device)
    return arcs
