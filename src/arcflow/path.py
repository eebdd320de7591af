"""The straight path between noise and image, and the grid of noise levels a sampler visits.

Time runs from noise to image: `tau` is raw time, uniform, from 1 to 0; `sigma` is the noise level,

    x_sigma = (1 - sigma) x0 + sigma eps                        u = dx/dsigma = eps - x0
    sigma   = shift tau / (1 + (shift - 1) tau)                 shift = 3.2, whatever the resolution       (5)

A sampler of n steps visits tau = 1, 1 - h, 1 - 2h, ..., 0 with h = 1 / (n - 1 + final_step_scale); the last step has
length final_step_scale h. For two steps: sigma 1 -> 0.7619 -> 0. Source: arXiv 2602.09014 and its code.
"""

from dataclasses import dataclass

from jaxtyping import Float, Shaped
from torch import Tensor

from arcflow.portable import ROUNDING, SHIFT, shift_sigma, step_end, step_grid, tau_grid, unshift_sigma

__all__ = [
    "ROUNDING", "SHIFT", "Segment", "column", "noised", "segments", "shift_sigma", "step_end", "step_grid", "tau_grid",
    "unshift_sigma",
]  # fmt: skip


def noised(
    x0: Float[Tensor, "*shape"], eps: Float[Tensor, "*shape"], sigma: float | Float[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    """The point of the straight path at noise level sigma, one for all or one for each sample (see `column`)."""
    return (1 - sigma) * x0 + sigma * eps


@dataclass(frozen=True)
class Segment:
    """One step of the student in raw time: the network is called at `tau_src`, the path ends at `tau_dst`."""

    tau_src: float
    tau_dst: float

    @property
    def length(self) -> float:
        """Raw time the segment spans."""
        return self.tau_src - self.tau_dst


def segments(steps: int, final_step_scale: float = 1.0) -> list[Segment]:
    """The steps of an n-step sampler as segments of raw time, noise first."""
    taus = tau_grid(steps, final_step_scale).tolist()
    return [Segment(src, dst) for src, dst in zip(taus[:-1], taus[1:], strict=True)]


def column(value: Shaped[Tensor, " batch"], like: Float[Tensor, "batch *rest"]) -> Shaped[Tensor, "batch *ones"]:
    """Per-sample numbers, shaped to multiply `like`."""
    return value.reshape(-1, *[1] * (like.ndim - 1))
