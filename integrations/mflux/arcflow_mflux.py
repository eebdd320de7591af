"""A student in mflux: `--scheduler arcflow_mflux.ArcFlowScheduler` on a folder of `arcflow export --layout merged`.

mflux's own noise levels follow the image's size; these are the student's (docs/math.md, eq. 5), at the shift 3.2 of all
published adapters. A velocity takes an Euler step, which is all that a student in coefficients needs; a packed path of
K modes takes the exact one (eq. 4), in float32. Subclass it for another shift or last step.
"""

from typing import Any

import mlx.core as mx
from mflux.models.common.schedulers.base_scheduler import BaseScheduler


class ArcFlowScheduler(BaseScheduler):
    """What mflux asks for noise levels and steps."""

    shift = 3.2
    final_step_scale = 1.0
    pixels = 4

    def __init__(self, config: Any) -> None:
        self._sigmas = step_grid(config.num_inference_steps, self.shift, self.final_step_scale)
        self._timesteps = mx.arange(config.num_inference_steps, dtype=mx.float32)

    @property
    def sigmas(self) -> mx.array:
        """Noise levels from 1 to 0, one more than there are steps."""
        return self._sigmas

    @property
    def timesteps(self) -> mx.array:
        """Indices of the steps, as mflux counts them."""
        return self._timesteps

    def step(self, noise: mx.array, timestep: int, latents: mx.array, **kwargs: Any) -> mx.array:
        """Latents at the end of a step, in their dtype."""
        span = self._sigmas[timestep] - self._sigmas[timestep + 1]
        width = latents.shape[-1]
        if noise.shape[-1] == width:
            mean = noise.astype(mx.float32)
        else:
            mean = mean_velocity(noise.astype(mx.float32), width, self.pixels, span)
        return (latents.astype(mx.float32) - span * mean).astype(latents.dtype)


def step_grid(steps: int, shift: float, final_step_scale: float = 1.0) -> mx.array:
    """Noise levels of an n-step sampler, from 1 to 0 (eq. 5)."""
    step = 1 / (steps - 1 + final_step_scale)
    taus = [1 - step * i for i in range(steps)] + [0.0]
    return mx.array([shift * tau / (1 + (shift - 1) * tau) for tau in taus], dtype=mx.float32)


def mean_velocity(packed: mx.array, width: int, pixels: int, span: mx.array) -> mx.array:
    """Mean velocity (*batch, D) over the coming `span` of a packed mixture (*batch, K D + K P + (K - 1) P), eq. 4.

    Raises:
        ValueError: the last axis holds no whole number of modes.
    """
    modes, rest = divmod(packed.shape[-1] + pixels, width + 2 * pixels)
    if rest or modes < 1:
        raise ValueError(f"an output {packed.shape[-1]} wide is no path of width {width} with {pixels} pixels a token.")
    batch = packed.shape[:-1]
    v, logits, log_gamma = mx.split(packed, [modes * width, modes * (width + pixels)], axis=-1)
    v = v.reshape(*batch, modes, width // pixels, pixels)
    gates = mx.softmax(logits.reshape(*batch, modes, pixels), axis=-2)
    z = log_gamma.reshape(*batch, modes - 1, pixels) * span
    safe = mx.where(z == 0, 1.0, z)
    phi = mx.where(z == 0, 1.0, mx.expm1(safe) / safe)
    weights = mx.concatenate([gates[..., :1, :], gates[..., 1:, :] * phi], axis=-2)
    return (weights[..., None, :] * v).sum(-3).reshape(*batch, width)
