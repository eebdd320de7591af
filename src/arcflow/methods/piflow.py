"""pi-Flow: a call gives a policy, which says the velocity at every later state; it is trained to imitate the teacher.

Both of its policies are read from the same head as ArcFlow's and trained by the same objective. Each of the K
velocities v_k stands for a clean image x0_k = x - sigma v_k, so that a new student is the teacher's Euler step (the
mixture but for its spread). With sigma the noise level of the call, r = sigma - s a later one, A = 1 - sigma and
a = 1 - r:

GM policy. Per latent pixel, the images that may lie behind the state x' of the call are a mixture of Gaussians with
means x0_k, weights pi_k and a common standard deviation d. Given a later state x they are q(x0) N(x; a x0, r^2) /
N(x'; A x0, sigma^2), a mixture too, whose mean gives the velocity:

    w       = r^2 + d^2 h                                h = s (a sigma + A r) / sigma^2
    H       = a x - A (r / sigma)^2 x'
    weights ~ pi_k exp((x0_k . H - h |x0_k|^2 / 2) / w)                           m = sum of weights times x0_k
    u       = (r (x - m) - d^2 (a x + A r / sigma^2 (A x - x'))) / w

Nothing is divided by r or by s: at s = 0 this is (x - m) / sigma, m the mixture's mean, and at r = 0 it is -x. The
policy looks at the state, so its path is walked in Euler sub-steps, 128 over raw time.

DX policy. The image moves along the step: x0(r) is linear between x0_k at K evenly spaced noise levels, and u =
(x - x0(r)) / r. That is linear in x, so the path has a closed form, and no sub-steps are taken. Per piece it is

    x_b = r_b / r_a x_a + r_b (integral of x0(r) / r^2 from r_b to r_a)

Source: arXiv 2510.14974; its released FLUX students have K = 8 (GM). The even spacing of the DX levels is ours.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.config import Distill
from arcflow.distillation.matching import along, matching
from arcflow.distillation.method import Method
from arcflow.distillation.objective import SUBSTEPS
from arcflow.distillation.walk import sampler_grid
from arcflow.momentum import Mixture, without_modes
from arcflow.path import SHIFT, column, shift_sigma, step_end, unshift_sigma
from arcflow.series import ByMeans, float64_ends
from arcflow.student.head import start_gains
from arcflow.system.seeds import Draws

SPREAD, RANGE = 0.1, 10.0
"""Standard deviation of a new student's Gaussians, and the factor by which it may grow or shrink."""


@dataclass(frozen=True)
class GaussianMixture(ByMeans):
    """The images behind the state of a call, and the velocity that they give a later state."""

    means: Float[Tensor, "*batch modes width"]
    logits: Float[Tensor, "*batch modes pixels"]
    std: Float[Tensor, " samples"]
    source: Float[Tensor, "*batch width"]
    """The state of the call."""
    sigma: Float[Tensor, " samples"]
    """Noise level of the source."""
    x: Float[Tensor, "*batch width"]
    """The state that is looked at; it is where an interval starts."""
    shift: float = SHIFT

    def mean_velocity(self, a: float | Tensor, b: float | Tensor) -> Float[Tensor, "*batch width"]:
        """Displacement over b - a, without the division: over an empty interval it is the velocity."""
        x, source = self._by_pixel(self.x), self._by_pixel(self.source)
        means = self._by_pixel(self.means).transpose(-3, -2).contiguous()  # *batch pixels modes channels
        logits, half_squares = self.logits.to(x).transpose(-1, -2), means.square().sum(-1) / 2
        mean = torch.zeros_like(x)
        for step in zip(*self._substeps(a, b, x), strict=True):
            length, share, sees_x, sees_source, sees_size, of_x, of_source, of_mean = step
            seen = sees_x * x + sees_source * source
            fit = logits + (means @ seen.unsqueeze(-1)).squeeze(-1) - sees_size * half_squares
            weights = (fit - fit.detach().amax(-1, keepdim=True)).exp()  # softmax is slow over so few
            m = (weights.unsqueeze(-2) @ means).squeeze(-2) / weights.sum(-1, keepdim=True)
            u = of_x * x + of_source * source - of_mean * m
            mean, x = mean + share * u, x - length * u
        return mean.transpose(-1, -2).flatten(-2)

    def drop_modes(self, p: float, generator: Draws | None = None) -> "GaussianMixture":
        """The mixture without a random subset of its Gaussians, as `Mixture.drop_modes`."""
        return replace(self, logits=without_modes(self.logits, p, generator))

    def detach(self) -> "GaussianMixture":
        """The same policy, cut from the graph."""
        cut = {name: getattr(self, name).detach() for name in ("means", "logits", "std", "source", "x")}
        return replace(self, **cut)

    def at(self, x: Tensor) -> "GaussianMixture":
        """What it says from the state `x` on."""
        return replace(self, x=x)

    def _by_pixel(self, value: Float[Tensor, "*any width"]) -> Float[Tensor, "*any pixels channels"]:
        """Tokens are channel-major; float32 or better."""
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        return wide.unflatten(-1, (-1, self.logits.shape[-1])).transpose(-1, -2)

    def _substeps(self, a: float | Tensor, b: float | Tensor, x: Tensor) -> list[Float[Tensor, "steps samples *ones"]]:
        """The sub-steps from `a` to `b`: lengths, shares of the interval, and all that the formulas multiply (H and
        h over w, u by its parts), shaped to multiply `x`."""
        sigma = self.sigma.detach().cpu().double()
        start, end = float64_ends(a, b, sigma)
        above, below = (unshift_sigma((sigma - s).clamp(min=0), self.shift) for s in (start, end))
        count = max(math.ceil(SUBSTEPS * float((above - below).max()) - 1e-3), 1)
        taus = above + (below - above) * torch.arange(count + 1, dtype=above.dtype)[:, None] / count
        s = torch.cat([start[None], (sigma - shift_sigma(taus, self.shift))[1:-1], end[None]])
        lengths, span, s = s.diff(dim=0), end - start, s[:-1]
        shares = torch.where(span > 0, lengths / span, 1 / count)
        r, away = sigma - s, 1 - sigma
        here, ratio, h = 1 - r, r / sigma.square(), s * ((1 - r) * sigma + away * r) / sigma.square()
        known = [lengths, shares, r, here, away * r * ratio, away * ratio, here + away.square() * ratio, h]
        lengths, shares, r, here, there, drawn, pushed, h = (value.to(x) for value in known)
        variance = self.std.to(x).square()
        w = r.square() + variance * h
        parts = here / w, -there / w, h / w, (r - variance * pushed) / w, variance * drawn / w, r / w
        return [value.reshape(*value.shape, *[1] * (x.ndim - 1)) for value in (lengths, shares, *parts)]


@dataclass(frozen=True)
class DenoisedCurve(ByMeans):
    """An image that moves while the noise level falls, and the velocity towards it."""

    x0: Float[Tensor, "*batch modes width"]
    """Where it is at evenly spaced noise levels of the step, the first at its start, the last at its end."""
    sigma: Float[Tensor, " samples"]
    end: Float[Tensor, " samples"]
    x: Float[Tensor, "*batch width"]
    """The state that is looked at; it is where an interval starts."""

    def __post_init__(self) -> None:
        if self.x0.shape[-2] < 2:
            raise ValueError(f"{self.x0.shape[-2]} image is no curve: expected 2 or more modes (10 in `DX`).")

    def mean_velocity(self, a: float | Tensor, b: float | Tensor) -> Float[Tensor, "*batch width"]:
        """Displacement over b - a, without the division: over an empty interval it is the velocity."""
        sigma, end = (level.detach().cpu().double() for level in (self.sigma, self.end))
        there = float64_ends(a, b, sigma)
        levels = sigma + (end - sigma) * torch.linspace(0, 1, self.x0.shape[-2], dtype=sigma.dtype)[:, None]
        weights = pull_weights(levels.T, *(sigma - s for s in there))
        x = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
        w = weights.to(x).view(len(weights), *[1] * (x.ndim - 2), -1, 1)
        return w.sum(-2) * x - (w * self.x0).sum(-2)

    def detach(self) -> "DenoisedCurve":
        """The same policy, cut from the graph."""
        return replace(self, x0=self.x0.detach(), x=self.x.detach())

    def at(self, x: Tensor) -> "DenoisedCurve":
        """What it says from the state `x` on."""
        return replace(self, x=x)


def pull_weights(
    levels: Float[Tensor, "samples points"], start: Float[Tensor, " samples"], end: Float[Tensor, " samples"]
) -> Float[Tensor, "samples points"]:
    """How strongly the state is drawn to the image at each level, averaged from noise level `start` down to `end`:
    the mean velocity is the sum of these weights times (x - x0_k). In float64."""
    tiny = torch.finfo(levels.dtype).tiny
    start, end = start[:, None].clamp(min=tiny), end[:, None].clamp(min=0)
    above, below = levels[:, :-1], levels[:, 1:]
    high = above.clamp(max=start).maximum(end)
    low = below.clamp(max=start).maximum(end)
    last, low = low == end, low.clamp(min=tiny)
    # over each piece, times the last level: integrals of 1 / r^2 and of 1 / r
    squares = torch.where(last, 1.0, end / low) * (high - low) / high.clamp(min=tiny)
    inverses = end * torch.log1p((high - low) / low)
    width, span = above - below, start - end
    whole = _hats((inverses - below * squares) / width, (above * squares - inverses) / width) / span.clamp(min=tiny)
    inside = (start <= above) & (start > below)
    inside[:, -1] |= start[:, 0] <= below[:, -1]
    share = ((start - below) / width).where(inside, 0.0)
    instant = _hats(share, inside.to(share) - share) / start
    return torch.where(span > 1e-9, whole, instant)


def _hats(left: Float[Tensor, "samples pieces"], right: Float[Tensor, "samples pieces"]) -> Tensor:
    """Each point's share in the pieces on both its sides."""
    zero = torch.zeros_like(left[:, :1])
    return torch.cat([left, zero], -1) + torch.cat([zero, right], -1)


def gaussian_mixture(mixture: Mixture, x: Tensor, sigma: Tensor, config: Distill) -> GaussianMixture:
    """The head's output as the GM policy: gates as weights, and one standard deviation for a sample, 0.1 at the start
    and between 0.01 and 1, from the mean of its log momentum factors."""
    gains = mixture.log_gamma.flatten(1)
    moved = gains.mean(1) - start_gains(mixture.v.shape[-2]).log().mean().to(gains) if gains.shape[1] else 0 * sigma
    std = SPREAD * torch.exp(math.log(RANGE) * torch.tanh(moved))
    return GaussianMixture(images(mixture, x, sigma), mixture.logits, std, x, sigma, x, config.shift)


def denoised_curve(mixture: Mixture, x: Tensor, sigma: Tensor, config: Distill) -> DenoisedCurve:
    """The head's output as the DX policy over the step that starts at `sigma`; gates and momentum factors go unused."""
    end = step_end(sigma, sampler_grid(config.steps, config))
    return DenoisedCurve(images(mixture, x, sigma), sigma, end, x)


def images(mixture: Mixture, x: Tensor, sigma: Tensor) -> Float[Tensor, "*batch modes width"]:
    """The clean images x0_k = x - sigma v_k that the head's velocities point to."""
    return x.unsqueeze(-2) - column(sigma, mixture.v) * mixture.v


GM = Method(
    name="piflow_gm",
    title="pi-Flow (GM)",
    paper="2510.14974",
    modes=8,
    objective=partial(matching, lay=gaussian_mixture),
    sample=along(gaussian_mixture),
)

DX = Method(
    name="piflow_dx",
    title="pi-Flow (DX)",
    paper="2510.14974",
    modes=10,
    objective=partial(matching, lay=denoised_curve, modes_drop=False),
    sample=along(denoised_curve),
)
