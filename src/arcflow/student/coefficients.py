"""The second form of head: the path in coefficients (docs/math.md, eqs. 10 to 13).

The first coefficient, the mean velocity over the student's own step, is what the base's last Linear says, with a LoRA
on it; a head of its own says how the path bends on the way, and starts at zero. A step of the student's own grid takes
the first alone: what is left is the base with a LoRA. The bends are for learning, and for steps that are shorter.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from arcflow.portable import Grids, bend_means, own_length
from arcflow.series import Series, legendre_means
from arcflow.student.head import Affine

MOST = 8
"""Coefficients of a path, at most: far more than a step has bends, and their means are exact in float32."""


class CoefficientHead(nn.Module):
    """Features -> the K - 1 coefficients that bend the path."""

    def __init__(
        self,
        features: int,
        modes: int,
        width: int,
        grids: Grids = (),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= modes <= MOST:
            raise ValueError(f"modes is {modes}; a path in coefficients has 1 to {MOST} of them (4 is a good number).")
        self.modes = modes
        self.width = width
        self.grids = grids
        self.bends = Affine(features, (modes - 1) * width, device=device)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.bends.weight.dtype

    def forward(
        self, features: Float[Tensor, "*batch features"], straight: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch packed"]:
        """All coefficients on the last axis, the first, `straight`, in front; float32."""
        return torch.cat([straight.to(self.dtype), self.bends(features)], -1)

    def mean_velocity(
        self,
        features: Float[Tensor, "*batch features"],
        straight: Float[Tensor, "*batch width"],
        span: Float[Tensor, ""],
        start: Float[Tensor, ""],
    ) -> Float[Tensor, "*batch width"]:
        """Mean velocity over the coming `span` of noise level from `start` on (eq. 11), in float32 at least.

        A step that is longer than the student's own goes on straight, at that one's mean (`own_means`).
        """
        share = (span / own_length(start[None], self.grids)[0]).clamp(max=1.0)
        bends = self.bends(features).unflatten(-1, (self.modes - 1, self.width))
        bent = (bend_means(self.modes, share).to(bends)[:, None] * bends).sum(-2)
        return straight.to(bent.dtype) + bent

    def packed(self) -> "CoefficientHead":
        """Itself: it is one product."""
        return self


def path_of(packed: Float[Tensor, "batch tokens packed"], modes: int, sigma: float | Tensor, grids: Grids) -> Series:
    """The path that a packed output describes from noise level `sigma` on."""
    level = torch.as_tensor(sigma, dtype=torch.float32, device=packed.device).expand(len(packed))
    return Series(packed.unflatten(-1, (modes, -1)), own_length(level, grids), own_means)


def own_means(
    count: int, length: Float[Tensor, " samples"], a: Float[Tensor, " samples"], b: Float[Tensor, " samples"]
) -> Float[Tensor, "samples count"]:
    """`series.legendre_means` on a step of the student's own. Behind its end the path goes on straight, at its mean
    velocity, as a call that integrates has it: polynomials are for the step they were learned on."""
    means = legendre_means(count, length, torch.minimum(a, length), torch.minimum(b, length))
    share = (torch.minimum(b, length) - torch.minimum(a, length)) / torch.where(b > a, b - a, 1.0)
    bent = torch.where(b > length * (1 + 1e-6), share, 1.0)  # noise levels are rounded: the end itself is inside
    return torch.cat([means[:, :1], means[:, 1:] * bent[:, None]], -1)
