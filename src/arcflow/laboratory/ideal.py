"""What an ideal student could reach: the mixture fitted to every single path of the teacher, without a network.

From a noise the teacher's path is one curve, and a student that had learned it perfectly would lay down, over each
segment, the best curve that K modes can make. That one is found here: with its log momentum factors g_k where a new
head has them, a mixture is linear in what is left, c_k = pi_k v_k, and the best c_k are a least-squares solution. They
are free for every channel of every token, so the gates need not bend anything and stay equal.

The path is given at noise levels sigma_0 > sigma_1 > ... > 0 that contain the segments' ends. Between two of them the
teacher's mean velocity is the slope of the chord, and that of a mode is eq. 4: no quadrature. The matching objective
asks at times that are uniform in raw time, so its minimizer weighs an interval by the raw time it spans (`raw_time`).
(It matches means over a window of 3/128, about the step of a 50-step teacher, which the chords' are.) What it leaves is

    velocity error   mean of (ubar - u)^2, over raw time, tokens and channels: `velocity_error` of a training's log
    end error        mean of (x_fit - x)^2 at the segment's end, walked exactly from its true start

and the second is what sampling shows. Weighed by noise level instead (`noise_level`) the fit ends exactly right for
every K, a straight line too: the constant is among the functions, so what is left has no mean. Then the velocity error
alone tells modes apart. By raw time the straight line ends wrong; three modes and more nearly right, for the weight
between the two, dsigma/dtau = (shift - (shift - 1) sigma)^2 / shift, is a quadratic in s, which they can say.

The functions exp(g_k s) are nearly dependent. The solution is by singular values in float64, those below `CUTOFF` of
the largest left out: `directions` counts what remains. Source of the class of paths: arXiv 2602.09014, section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from arcflow.methods.series import gains
from arcflow.momentum import Mixture
from arcflow.path import SHIFT, segments, shift_sigma, unshift_sigma
from arcflow.portable import phi

CUTOFF = 1e-6
"""Singular values below this share of the largest are left out: float32 rounding, which a network's output does not
reach beyond."""

Measure = Callable[[Tensor, float], Tensor]
"""(noise levels, shift) -> what the interval between each two of them weighs in the fit."""


def raw_time(sigmas: Float[Tensor, " points"], shift: float) -> Float[Tensor, " intervals"]:
    """Raw time between noise levels: how often the matching objective asks there."""
    return -unshift_sigma(sigmas, shift).diff()


def noise_level(sigmas: Float[Tensor, " points"], shift: float) -> Float[Tensor, " intervals"]:
    """Noise level between noise levels: how far a velocity there carries."""
    return -sigmas.diff()


@dataclass(frozen=True)
class Errors:
    """What K modes leave of a path; all are mean squares over samples, tokens and channels."""

    velocity: list[float]
    """Error of the velocity in each segment, averaged over raw time."""
    end: list[float]
    """Error of the end of each segment, walked from its true start."""
    walked: float
    """Error of the image: all arcs, one after the other, from the noise."""
    directions: list[int]
    """Independent curves that the modes of each segment make at their start, up to the cutoff."""


def ideal_errors(
    path: Float[Tensor, "points batch *rest width"],
    sigmas: Float[Tensor, " points"],
    *,
    modes: int,
    steps: int,
    shift: float = SHIFT,
    pixels: int = 1,
    measure: Measure = raw_time,
    refine: int = 0,
    cutoff: float = CUTOFF,
) -> Errors:
    """Errors of the best K-mode mixtures on the teacher's `path`, one for every segment of a sampler of n `steps`.

    `refine` also fits the momentum factors, of every token and pixel by themselves, by so many steps of gradient
    descent. The width of a token is that of the channels times `pixels`.
    """
    path, sigmas = path.double(), sigmas.double()
    x = path[0]
    found = Errors([], [], 0.0, [])
    for here, there in pairwise(_borders(sigmas, steps, shift)):
        s = sigmas[here] - sigmas[here : there + 1]
        part = path[here : there + 1]
        u = -part.diff(dim=0) / s.diff().view(-1, *[1] * (part.ndim - 1))
        weight = measure(sigmas[here : there + 1], shift)
        arc = fit_mixture(u, s, weight / weight.sum(), modes=modes, pixels=pixels, refine=refine, cutoff=cutoff)
        left = torch.stack([arc.mean_velocity(a, b) for a, b in pairwise(s.tolist())]) - u
        asked = raw_time(sigmas[here : there + 1], shift)
        found.velocity.append(float((asked / asked.sum()) @ left.square().flatten(1).mean(1)))
        moved = arc.displacement(0.0, float(s[-1]))
        x = x - moved
        found.end.append(float((part[0] - moved - part[-1]).square().mean()))
        found.directions.append(int(torch.linalg.matrix_rank(_curves(gains(modes), s), rtol=cutoff)))
    return Errors(found.velocity, found.end, float((x - path[-1]).square().mean()), found.directions)


def fit_mixture(
    u: Float[Tensor, "intervals *batch width"],
    s: Float[Tensor, " points"],
    weight: Float[Tensor, " intervals"],
    *,
    modes: int,
    pixels: int = 1,
    refine: int = 0,
    cutoff: float = CUTOFF,
) -> Mixture:
    """The mixture whose mean velocities between the noise levels `s` left behind are closest to `u`, float64."""
    y = rearrange(u.double(), "n ... (c p) -> ... p n c", p=pixels)
    g = gains(modes).to(u.device)
    root = weight.double().sqrt()[:, None]
    if refine and modes > 1:
        g = _refined(y, s, root, g.repeat(*y.shape[:-2], 1), refine, cutoff)
    c = _best(y, s, root, g, cutoff)
    v = rearrange(modes * c, "... p k c -> ... k (c p)")
    log_gamma = g[..., 1:].expand(*c.shape[:-2], -1).transpose(-1, -2)
    return Mixture(v, torch.zeros(*v.shape[:-1], pixels).to(v), log_gamma)


def _best(y: Tensor, s: Tensor, root: Tensor, g: Tensor, cutoff: float) -> Tensor:
    """The coefficients c_k, for modes that all tokens share or for those of every token and pixel."""
    return torch.linalg.pinv(root * _curves(g, s), rtol=cutoff) @ (root * y)


@torch.enable_grad()
def _refined(y: Tensor, s: Tensor, root: Tensor, g: Tensor, steps: int, cutoff: float) -> Tensor:
    """Momentum factors that fit better, every token and pixel's by themselves: Adam on what the best coefficients
    leave. At the minimum over the coefficients their own slope is zero, so they may be held fixed in the gradient."""
    free = g[..., 1:].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([free], lr=0.1)
    best = g
    least = torch.full(g.shape[:-1], torch.inf, dtype=g.dtype, device=g.device)
    for _ in range(steps + 1):
        now = torch.cat([torch.zeros_like(free[..., :1]), free], -1)
        c = _best(y, s, root, now.detach(), cutoff)
        left = (root * (_curves(now, s) @ c - y)).square().sum((-2, -1))
        better = left.detach() < least
        best = torch.where(better[..., None], now.detach(), best)
        least = torch.where(better, left.detach(), least)
        optimizer.zero_grad()
        left.sum().backward()
        optimizer.step()
    return best


def _curves(g: Float[Tensor, "*batch modes"], s: Float[Tensor, " points"]) -> Float[Tensor, "*batch intervals modes"]:
    """Mean of exp(g_k s) over every interval (eq. 4)."""
    start = s[:-1, None].to(g)
    length = s.diff()[:, None].to(g)
    g = g[..., None, :]
    return torch.exp(g * start) * phi(g * length)


def _borders(sigmas: Tensor, steps: int, shift: float) -> list[int]:
    """Where in the path the segments of a sampler of so many steps begin and end."""
    taus = unshift_sigma(sigmas, shift)
    parts = segments(steps)
    wanted = [1.0, *[segment.tau_dst for segment in parts]]
    nearest = [int((taus - tau).abs().argmin()) for tau in wanted]
    if any(abs(float(taus[i]) - tau) > 1e-5 for i, tau in zip(nearest, wanted, strict=True)):
        levels = ", ".join(f"{shift_sigma(tau, shift):.4f}" for tau in wanted)
        raise ValueError(
            f"the path has {len(sigmas)} points from sigma {float(sigmas[0]):.4f} to {float(sigmas[-1]):.4f}, and not "
            f"all of the {steps} segments' ends are among them: expected {levels}; walk it in a multiple of {steps} "
            f"steps with shift {shift}."
        )
    return nearest
