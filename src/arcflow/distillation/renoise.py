"""Back to noise and on again: the step that consistency models, DMD2 and TwinFlow share."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.config import Distill
from arcflow.distillation.policy import Student, level
from arcflow.distillation.walk import sampler_grid
from arcflow.families.conditioning import Cond
from arcflow.path import column, noised
from arcflow.system.seeds import Draws, normal


def guess(
    u: Float[Tensor, "batch *rest"], x: Float[Tensor, "batch *rest"], sigma: Float[Tensor, " batch"]
) -> Float[Tensor, "batch *rest"]:
    """The image that a velocity at `x` points to."""
    return x - column(sigma, x) * u


def clean(
    student: Student, x: Float[Tensor, "batch *rest"], sigma: Float[Tensor, " batch"], cond: Cond
) -> Float[Tensor, "batch *rest"]:
    """f, the image that the network sees."""
    return guess(student(x, sigma, cond).velocity(0.0), x, sigma)


@torch.no_grad()
def simulate(
    student: Student, x: Float[Tensor, "batch *rest"], cond: Cond, sigmas: Sequence[float], draws: Draws
) -> Float[Tensor, "batch *rest"]:
    """The sampler's state at the last of `sigmas`, from noise at the first: guess, noise again, guess, ..."""
    for here, there in pairwise(sigmas):
        x = noised(clean(student, x, level(here, x), cond), normal(x, draws), there)
    return x


@torch.no_grad()
def sample_renoised(
    student: Student, x: Tensor, cond: Cond, steps: int, config: Distill, generator: torch.Generator
) -> Tensor:
    """The last guess of a sampler that noises its guesses again."""
    *sigmas, _ = sampler_grid(steps, config).tolist()
    x = simulate(student, x, cond, sigmas, generator)
    return clean(student, x, level(sigmas[-1], x), cond)
