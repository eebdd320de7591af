"""The momentum mixture: a curved path that one network call describes and a closed formula walks.

Per token the network gives K basic velocities v_k (width D), K gating logits and K-1 log momentum factors g_k (one
value per latent pixel, P of them, shared by the D/P channels). Mode 0 has g_0 = 0, the straight line. With pi = softmax
of the logits over k, and a, b, s = noise level left behind since the call (sigma_src - sigma, so 0 <= a <= b),

    velocity       u(s)    = sum_k pi_k v_k exp(g_k s)                                                    (1)
    displacement   d(a, b) = sum_k pi_k v_k exp(g_k a) (b - a) phi(g_k (b - a)),   phi(z) = expm1(z)/z    (2)
    step           x_b     = x_a - d(a, b)                                                                (3)
    mean velocity  ubar    = d(a, b) / (b - a)                                                            (4)

(2) is the exact integral of (1). Tokens stay packed: D is channel-major, D = (c p), so exponentials are taken on P
values per mode and token, never on D. Computed in float32 or better (`arcflow.portable` has the formulas). Source:
arXiv 2602.09014, eqs. 6-9.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.portable import gates, mean_velocity, mix, split
from arcflow.system.seeds import Draws, uniform


def without_modes(
    logits: Float[Tensor, "*batch modes pixels"], p: float, generator: Draws | None = None
) -> Float[Tensor, "*batch modes pixels"]:
    """Gating logits with a random subset of the modes shut, see `Mixture.drop_modes`."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability is {p}; expected 0 <= p < 1.")
    *batch, modes, _ = logits.shape
    lead = batch[:1]  # modes are shut in a sample, in all its tokens at once
    dropped = uniform((*lead, modes), generator) < p
    dropped = dropped & ~dropped.all(-1, keepdim=True)
    between = [1] * (logits.ndim - 2 - len(lead))
    return logits.masked_fill(dropped.view(*lead, *between, modes, 1).to(logits.device), -torch.inf)


@dataclass(frozen=True)
class Mixture:
    """K velocities whose gates and momentum factors bend them along the step (eqs. 1-4)."""

    v: Float[Tensor, "*batch modes width"]
    logits: Float[Tensor, "*batch modes pixels"]
    log_gamma: Float[Tensor, "*batch modes-1 pixels"]

    def __post_init__(self) -> None:
        *batch, modes, width = self.v.shape
        pixels = self.logits.shape[-1]
        expected = {"logits": (*batch, modes, pixels), "log_gamma": (*batch, modes - 1, pixels)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(
                    f"{name} has shape {tuple(getattr(self, name).shape)}, expected {shape} beside v of shape "
                    f"{tuple(self.v.shape)}: v (*batch, K, D), logits (*batch, K, P), log_gamma (*batch, K-1, P)."
                )
        if width % pixels:
            raise ValueError(f"{pixels} pixels do not divide the width {width} of v; D must be channels times P.")

    def velocity(self, s: float | Tensor) -> Float[Tensor, "*batch width"]:
        """Velocity after the noise level has fallen by `s` since the call (eq. 1)."""
        straight, bent, g = gates(self.logits, self.log_gamma, self._dtype)
        return mix(straight, bent * torch.exp(g * self._column(s)), self.v)

    def displacement(self, a: float | Tensor, b: float | Tensor) -> Float[Tensor, "*batch width"]:
        """Path traveled from `a` to `b` (eq. 2). Exact: additive in [a, b]."""
        span = self._column(b - a)
        return self.mean_velocity(a, b) * (span.squeeze(-1) if isinstance(span, Tensor) else span)

    def mean_velocity(self, a: float | Tensor, b: float | Tensor) -> Float[Tensor, "*batch width"]:
        """Displacement over b - a (eq. 4), without the division: over an empty interval it is the velocity."""
        return mean_velocity(self.v, self.logits, self.log_gamma, self._column(a), self._column(b - a))

    def drop_modes(self, p: float, generator: Draws | None = None) -> "Mixture":
        """The mixture without a random subset of its modes: each is dropped with probability `p` for a whole sample
        (first axis of the batch). A sample that would lose all of them keeps all."""
        return Mixture(self.v, without_modes(self.logits, p, generator), self.log_gamma)

    def detach(self) -> "Mixture":
        """The same path, cut from the graph."""
        return Mixture(self.v.detach(), self.logits.detach(), self.log_gamma.detach())

    def at(self, x: Tensor) -> "Mixture":
        """The same path: it was laid down at the call."""
        return self

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.v.dtype, torch.float32)

    def _column(self, s: float | Tensor) -> float | Tensor:
        """`s` shaped to broadcast over (*batch, P, K-1), its own axes being the leading ones of the batch."""
        if not isinstance(s, Tensor):
            return s
        batch = self.v.shape[:-2]
        if s.ndim > len(batch) or any(n not in (1, m) for n, m in zip(s.shape, batch, strict=False)):
            raise ValueError(
                f"interval of shape {tuple(s.shape)} for a batch {tuple(batch)}: give a float or a tensor "
                f"of the leading batch size."
            )
        return s.to(self.v.device, self._dtype).reshape(*s.shape, *[1] * (len(batch) - s.ndim + 2))


def unpack(packed: Float[Tensor, "*batch packed"], modes: int, pixels: int = 4) -> Mixture:
    """The mixture that a head packed on the last axis. Views, no copy."""
    return Mixture(*split(packed, modes, pixels))


def pack(mixture: Mixture) -> Float[Tensor, "*batch packed"]:
    """Velocities, logits and log momentum factors on the last axis, in this order: the inverse of `unpack`."""
    return torch.cat([part.flatten(-2) for part in (mixture.v, mixture.logits, mixture.log_gamma)], -1)
