"""Random numbers as functions of what they are for, the same on every machine."""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed for one purpose, the same on every machine: `seed_of(run seed, "noise", sample)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


Draws = torch.Generator | Sequence[torch.Generator]
"""Where random numbers come from: one generator for a batch, or one for each of its samples, as in diffusers. Then a
sample's numbers do not depend on the batch it is in."""


def uniform(shape: tuple[int, ...], draws: Draws | None) -> Float[Tensor, "*shape"]:
    """Numbers from 0 to 1; the first axis is that of the samples."""
    if isinstance(draws, Sequence):
        return torch.stack([uniform(shape[1:], one) for one in draws])
    return torch.rand(shape, generator=draws, device=draws.device if draws else "cpu")


def normal(x: Float[Tensor, "batch *rest"], draws: Draws) -> Float[Tensor, "batch *rest"]:
    """Noise in the shape of `x`."""
    if isinstance(draws, Sequence):
        return torch.stack([normal(row, one) for row, one in zip(x, draws, strict=True)])
    return torch.randn(x.shape, generator=draws, device=draws.device).to(x)
