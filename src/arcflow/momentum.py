"""The momentum mixture: a curved path that one network call describes and a closed formula walks.

Per token the network gives K basic velocities v_k (width D), K gating logits and K-1 log momentum factors g_k (one
value per latent pixel, P of them, shared by the D/P channels). Mode 0 has g_0 = 0, the straight line. With pi = softmax
of the logits over k, and a, b, s = noise level left behind since the call (sigma_src - sigma, so 0 <= a <= b),

    velocity       u(s)    = sum_k pi_k v_k exp(g_k s)                                                    (1)
    displacement   d(a, b) = sum_k pi_k v_k exp(g_k a) (b - a) phi(g_k (b - a)),   phi(z) = expm1(z)/z    (2)
    step           x_b     = x_a - d(a, b)                                                                (3)
    mean velocity  ubar    = d(a, b) / (b - a)                                                            (4)

(2) is the exact integral of (1). Tokens stay packed: D is channel-major, D = (c p), so exponentials are taken on P
values per mode and token, never on D. Computed in float32 or better. Source: arXiv 2602.09014, eqs. 6-9.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.system.seeds import Draws, uniform

Weights = Float[Tensor, "*batch pixels _"]
"""One number for each latent pixel and mode, or each mode but the straight one."""

BLOCK = 1024
"""Tokens whose velocities, in float32 and K = 16, D = 64, stay in the cache of a CPU."""


class _Phi(torch.autograd.Function):
    """expm1(z)/z is exact as it stands; its derivative by the quotient rule is not, hence a series below |z| = 1/4."""

    generate_vmap_rule = True
    # phi'(z) = sum_n z^n / (n! (n + 2)): eleven terms leave 1e-15 at |z| = 1/4
    series = (1 / 2, 1 / 3, 1 / 8, 1 / 30, 1 / 144, 1 / 840, 1 / 5760, 1 / 45360, 1 / 403200, 1 / 3991680, 1 / 43545600)

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return torch.expm1(z).div_(z).masked_fill_(z == 0, 1.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        small = z.abs() < 0.25
        near, slope = torch.where(small, z, 0.0), torch.zeros_like(z)
        for coefficient in reversed(_Phi.series):
            slope = slope * near + coefficient
        far = torch.where(small, 1.0, z)
        return grad * torch.where(small, slope, (far.exp() - _Phi.apply(far)) / far)


def phi(z: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """expm1(z)/z, with phi(0) = 1 and phi'(0) = 1/2. Exact to rounding for every z, and so is its gradient."""
    return _Phi.apply(z)


def without_modes(
    logits: Float[Tensor, "*batch modes pixels"], p: float, generator: Draws | None = None
) -> Float[Tensor, "*batch modes pixels"]:
    """Gating logits with a random subset of the modes shut, see `Mixture.drop_modes`."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability is {p}; expected 0 <= p < 1.")
    lead, modes = logits.shape[:-2][:1], logits.shape[-2]
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
        (*batch, modes, width), pixels = self.v.shape, self.logits.shape[-1]
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
        straight, bent, g = self._gates()
        return self._mix(straight, bent * torch.exp(g * self._column(s)))

    def displacement(self, a: float | Tensor, b: float | Tensor) -> Float[Tensor, "*batch width"]:
        """Path traveled from `a` to `b` (eq. 2). Exact: additive in [a, b]."""
        span = self._column(b - a)
        return self.mean_velocity(a, b) * (span.squeeze(-1) if isinstance(span, Tensor) else span)

    def mean_velocity(self, a: float | Tensor, b: float | Tensor) -> Float[Tensor, "*batch width"]:
        """Displacement over b - a (eq. 4), without the division: over an empty interval it is the velocity."""
        straight, bent, g = self._gates()
        if isinstance(a, Tensor) or a != 0:  # exp(0) is 1
            bent = bent * torch.exp(g * self._column(a))
        return self._mix(straight, bent * phi(g * self._column(b - a)))

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

    def _gates(self) -> tuple[Weights, Weights, Weights]:
        """Gates of mode 0, whose g is 0, and of the others, and their g, with the modes last, where softmax and the
        contraction want them."""
        pi = self.logits.transpose(-1, -2).to(self._dtype).softmax(-1)
        return pi[..., :1], pi[..., 1:], self.log_gamma.transpose(-1, -2).to(self._dtype)

    def _mix(self, straight: Weights, bent: Weights) -> Float[Tensor, "*batch width"]:
        """sum_k w_k v_k. Without gradients a CPU goes from block to block of tokens, which stay in its cache."""
        pixels, width = straight.shape[-2], self.v.shape[-1]
        v, w = (part.unsqueeze(0).flatten(0, -3) for part in (self.v, bent))
        total = (straight + bent.sum(-1, keepdim=True)).reshape(-1, 1, pixels)
        if torch.is_grad_enabled() or v.device.type != "cpu":
            return _contract(total, w, v).reshape(*self.v.shape[:-2], width)
        mixed = w.new_empty(len(v), width // pixels, pixels)
        differences, pairs = (w.new_empty(min(BLOCK, len(v)), n, width) for n in (w.shape[-1], pixels))
        for into, *block in zip(*(part.split(BLOCK) for part in (mixed, total, w, v)), strict=True):
            _contract(*block, differences[: len(into)], pairs[: len(into)], into)
        return mixed.view(*self.v.shape[:-2], width)


def _contract(
    total: Float[Tensor, "tokens 1 pixels"],
    w: Float[Tensor, "tokens pixels bends"],
    v: Float[Tensor, "tokens modes width"],
    *out: Tensor,
) -> Float[Tensor, "tokens channels pixels"]:
    """sum_k w_k v_k as (sum_k w_k) v_0 + sum_k w_k (v_k - v_0): equal velocities come out unrounded, so that a mixture
    without gain is plain Euler to the last bit. What is computed on the way goes into `out`, if given.

    One small matrix product per token makes all P x P pairs of pixels, of which the diagonal is read: P times the
    arithmetic, but v is read once where it lies, and that is what the time goes into.
    """
    differences, pairs, mixed = out or (None, None, None)
    pixels = (-1, total.shape[-1])
    v = v.to(w.dtype)
    every = torch.bmm(w, torch.sub(v[:, 1:], v[:, :1], out=differences), out=pairs)
    own = every.unflatten(-1, pixels).diagonal(dim1=-3, dim2=-1)
    return torch.addcmul(own, v[:, 0].unflatten(-1, pixels), total, out=mixed)


def packed_width(modes: int, width: int, pixels: int = 4) -> int:
    """Width of a packed token: K velocities, K logits, K-1 log momentum factors."""
    return modes * width + modes * pixels + (modes - 1) * pixels


def unpack(packed: Float[Tensor, "*batch packed"], modes: int, pixels: int = 4) -> Mixture:
    """The mixture that a head packed on the last axis. Views, no copy."""
    rest = packed.shape[-1] - (2 * modes - 1) * pixels
    if rest <= 0 or rest % (modes * pixels):
        raise ValueError(
            f"a packed output {packed.shape[-1]} wide does not hold {modes} modes of {pixels} pixels; expected "
            f"K*D + K*P + (K-1)*P with P dividing D. Is an adapter attached, and is the scheduler's num_modes its K?"
        )
    v, logits, log_gamma = packed.split([rest, modes * pixels, (modes - 1) * pixels], -1)
    return Mixture(
        v.unflatten(-1, (modes, rest // modes)),
        logits.unflatten(-1, (modes, pixels)),
        log_gamma.unflatten(-1, (modes - 1, pixels)),
    )


def pack(mixture: Mixture) -> Float[Tensor, "*batch packed"]:
    """Velocities, logits and log momentum factors on the last axis, in this order: the inverse of `unpack`."""
    return torch.cat([part.flatten(-2) for part in (mixture.v, mixture.logits, mixture.log_gamma)], -1)
