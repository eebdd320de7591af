"""Measures of single images and of several of one prompt: PSNR, squared error, CLIP score, diversity."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from arcflow.metrics.intervals import by_prompt


def clip_score(images: Float[Tensor, "n width"], texts: Float[Tensor, "n width"]) -> Float[Tensor, "n"]:
    """100 times the cosine between the embeddings of each image and its prompt."""
    _paired(images, texts)
    return 100 * torch.cosine_similarity(images, texts)


def squared_error(a: Float[Tensor, "n *shape"], b: Float[Tensor, "n *shape"]) -> Float[Tensor, "n"]:
    """Mean squared difference of each pair, of final latents for example."""
    _paired(a, b)
    return (a - b).square().flatten(1).mean(1)


def psnr(a: UInt8[np.ndarray, "n rows columns 3"], b: UInt8[np.ndarray, "n rows columns 3"]) -> Float[Tensor, "n"]:
    """Peak signal-to-noise ratio of each pair of images, in dB; infinite for equal ones."""
    _paired(a, b)
    errors = [np.square(p.astype(np.float64) - q).mean() for p, q in zip(a, b, strict=True)]
    return 10 * torch.log10(255**2 / torch.tensor(errors, dtype=torch.float64))


def _paired(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(f"got {tuple(a.shape)} and {tuple(b.shape)}; expected pairs of the same shape")


def diversity(x: Float[Tensor, "n *shape"], seeds: int) -> Float[Tensor, "prompts"]:
    """Mean distance between two images of one prompt, for each prompt; x are features or latents, a prompt's
    `seeds` images one after the other.
    """
    grouped = by_prompt(x.flatten(1), seeds)
    if seeds < 2:
        raise ValueError("a distance takes two images of each prompt, got seeds=1; draw each prompt with more seeds")
    pairs = torch.cdist(grouped, grouped, compute_mode="donot_use_mm_for_euclid_dist")  # 0 for equal ones
    return pairs.sum((1, 2)) / (seeds * (seeds - 1))
