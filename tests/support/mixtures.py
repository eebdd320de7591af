"""Random mixtures."""

import torch

from arcflow import Mixture


def mixture(*batch, modes=4, width=8, pixels=4, gain=3.0, dtype=torch.float64, seed=0) -> Mixture:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64).to(dtype)

    return Mixture(draw(modes, width), draw(modes, pixels), gain * draw(modes - 1, pixels))
