"""A scheduler for folders whose transformer is a whole mixture: it takes the exact step along the path that comes out.

`arcflow export --layout merged` puts this file, with `arcflow.portable` in front, beside the configuration, so that
diffusers loads it by `trust_remote_code=True` where no arcflow is; the plugins for other engines carry the same. The
scheduler of this package's own pipelines is `sampling.scheduler`.
"""

import re
from math import comb
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

SHIFT = 3.2
"""Shift between raw time and noise level in the published adapters."""

BLOCK = 1024
"""Tokens whose velocities, in float32 and K = 16, D = 64, stay in the cache of a CPU."""

ROUNDING = 1e-4
"""Noise levels this near are the same point of a grid."""

COMFYUI: dict[str, tuple[tuple[str, str], ...]] = {
    "flux2": (
        (r"^transformer_blocks\.(\d+)\.ff\.linear_in$", r"double_blocks.\1.img_mlp.0"),
        (r"^transformer_blocks\.(\d+)\.ff\.linear_out$", r"double_blocks.\1.img_mlp.2"),
        (r"^transformer_blocks\.(\d+)\.ff_context\.linear_in$", r"double_blocks.\1.txt_mlp.0"),
        (r"^transformer_blocks\.(\d+)\.ff_context\.linear_out$", r"double_blocks.\1.txt_mlp.2"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj$", r"single_blocks.\1.linear1"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_out$", r"single_blocks.\1.linear2"),
        (r"^time_guidance_embed\.timestep_embedder\.linear_1$", "time_in.in_layer"),
        (r"^time_guidance_embed\.timestep_embedder\.linear_2$", "time_in.out_layer"),
        (r"^time_guidance_embed\.guidance_embedder\.linear_1$", "guidance_in.in_layer"),
        (r"^time_guidance_embed\.guidance_embedder\.linear_2$", "guidance_in.out_layer"),
    ),
    "longcat_image": (
        (r"^time_embed\.timestep_embedder\.linear_1$", "time_in.in_layer"),
        (r"^time_embed\.timestep_embedder\.linear_2$", "time_in.out_layer"),
    ),
    "lumina2": (
        (r"^time_caption_embed\.timestep_embedder\.linear_1$", "t_embedder.mlp.0"),
        (r"^time_caption_embed\.timestep_embedder\.linear_2$", "t_embedder.mlp.2"),
        (r"\.feed_forward\.linear_([123])$", r".feed_forward.w\1"),
        (r"\.norm1\.linear$", ".adaLN_modulation.1"),
        (r"\.attn\.to_out\.0$", ".attention.out"),
        (r"^norm_out\.linear_1$", "final_layer.adaLN_modulation.1"),
        (r"^norm_out\.linear_2$", "final_layer.linear"),
    ),
    "wan": (
        (r"^condition_embedder\.time_embedder\.linear_1$", "time_embedding.0"),
        (r"^condition_embedder\.time_embedder\.linear_2$", "time_embedding.2"),
        (r"\.attn1\.to_([qkv])$", r".self_attn.\1"),
        (r"\.attn2\.to_([qkv])$", r".cross_attn.\1"),
        (r"\.attn1\.to_out\.0$", ".self_attn.o"),
        (r"\.attn2\.to_out\.0$", ".cross_attn.o"),
        (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
        (r"\.ffn\.net\.2$", ".ffn.2"),
        (r"^proj_out$", "head.head"),
    ),
    "ltx": ((r"^time_embed\.emb\.", "adaln_single.emb."),),
}
"""Layers by their names in diffusers and in ComfyUI, which keeps those of a model's authors: of each family those that
no version of ComfyUI finds by diffusers' name, or some do not. Where the authors join the parts of attention the parts
keep diffusers' names."""

Time = TypeVar("Time", float, Tensor)

Grids = tuple[tuple[float, ...], ...]
"""Noise levels of a student's own steps, for each number of steps that it was trained for."""


def shift_sigma(tau: Time, shift: float = SHIFT) -> Time:
    """Noise level sigma at raw time tau (eq. 5)."""
    return shift * tau / (1 + (shift - 1) * tau)


def unshift_sigma(sigma: Time, shift: float = SHIFT) -> Time:
    """Raw time tau at noise level sigma: the inverse of eq. 5."""
    return sigma / (shift - (shift - 1) * sigma)


def tau_grid(steps: int, final_step_scale: float = 1.0) -> Tensor:
    """Raw times of an n-step sampler, n + 1 of them from 1 to 0, in float64."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; a sampler takes at least 1 step.")
    if not final_step_scale > 0:
        raise ValueError(f"final_step_scale is {final_step_scale}; the last step needs a length above 0 (1.0 = equal).")
    step = 1 / (steps - 1 + final_step_scale)
    taus = 1 - step * torch.arange(steps + 1, dtype=torch.float64)
    taus[-1] = 0
    return taus


def step_grid(steps: int, shift: float = SHIFT, final_step_scale: float = 1.0) -> Tensor:
    """Noise levels of an n-step sampler, from 1 to 0, in float32: rounded as the stock Euler scheduler rounds."""
    if not shift > 0:
        raise ValueError(f"shift is {shift}; it must be above 0 (1 = no shift, 3.2 in the published adapters).")
    return shift_sigma(tau_grid(steps, final_step_scale).float(), shift)


def step_end(sigma: Tensor, sigmas: Tensor) -> Tensor:
    """Noise levels (batch,) at which the steps that start at `sigma` (batch,) end, on the grid `sigmas` (points,)."""
    grid = sigmas.to(sigma)
    return torch.where(grid < sigma[:, None] - ROUNDING, grid, grid[-1]).amax(-1)


def own_length(sigma: Tensor, grids: Grids) -> Tensor:
    """Noise levels (batch,) that the longest steps which a student was trained for leave behind from `sigma` (batch,)
    on."""
    ends = [step_end(sigma, torch.tensor(grid, dtype=sigma.dtype, device=sigma.device)) for grid in grids]
    return sigma - torch.stack(ends).amin(0)


def bend_means(count: int, share: Tensor) -> Tensor:
    """Means (*any, count - 1) of the Legendre polynomials P_1 ... P_(count-1) over the first `share` (*any, 0 to 1) of
    a step, exactly 0 over all of it (eq. 13).

    They are those of `series.legendre_means` as polynomials, (-1)^k sum_j (k over j) (k + j over j) (-share)^j /
    (j + 1), in the dtype of `share`: for a network's own device and graph."""
    means = [
        (-1) ** k * sum(comb(k, j) * comb(k + j, j) / (j + 1) * (-share) ** j for j in range(k + 1))
        for k in range(1, count)
    ]
    bends = torch.stack(means, -1) if means else share.new_empty((*share.shape, 0))
    return torch.where((share == 1)[..., None], 0.0, bends)


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


def phi(z: Tensor) -> Tensor:
    """expm1(z)/z, with phi(0) = 1 and phi'(0) = 1/2. Exact to rounding for every z, and so is its gradient."""
    return _Phi.apply(z) if torch.is_grad_enabled() else _Phi.forward(z)


def split(packed: Tensor, modes: int, pixels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Velocities (*batch, K, D), logits (*batch, K, P) and log momentum factors (*batch, K - 1, P) of a packed output,
    whose last axis holds them in this order. Views, no copy.

    Raises:
        ValueError: the last axis cannot hold so many modes.
    """
    rest = packed.shape[-1] - (2 * modes - 1) * pixels
    if rest <= 0 or rest % (modes * pixels):
        raise ValueError(
            f"a packed output {packed.shape[-1]} wide does not hold {modes} modes of {pixels} pixels; expected "
            f"K*D + K*P + (K-1)*P with P dividing D. Is an adapter attached, and is the scheduler's num_modes its K?"
        )
    v, logits, log_gamma = packed.split([rest, modes * pixels, (modes - 1) * pixels], -1)
    return (
        v.unflatten(-1, (modes, rest // modes)),
        logits.unflatten(-1, (modes, pixels)),
        log_gamma.unflatten(-1, (modes - 1, pixels)),
    )


def gates(logits: Tensor, log_gamma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gates of mode 0, whose g is 0, and of the others, and their g, with the modes last, where softmax and the
    contraction want them: (*batch, P, 1), (*batch, P, K - 1) twice."""
    pi = logits.transpose(-1, -2).to(dtype).softmax(-1)
    return pi[..., :1], pi[..., 1:], log_gamma.transpose(-1, -2).to(dtype)


def mean_velocity(v: Tensor, logits: Tensor, log_gamma: Tensor, a: float | Tensor, span: float | Tensor) -> Tensor:
    """Mean velocity (*batch, D) of a mixture from `a` to `a + span` (eq. 4), `a` and `span` in noise level left behind
    since the call, as numbers or as tensors that broadcast over (*batch, P, K - 1). Over an empty interval it is the
    velocity. In float32 or better."""
    straight, bent, g = gates(logits, log_gamma, torch.promote_types(v.dtype, torch.float32))
    if isinstance(a, Tensor) or a != 0:  # exp(0) is 1
        bent = bent * torch.exp(g * a)
    return mix(straight, bent * phi(g * span), v)


def mix(straight: Tensor, bent: Tensor, v: Tensor) -> Tensor:
    """sum_k w_k v_k, (*batch, D), with w_0 (*batch, P, 1) and the others (*batch, P, K - 1). Without gradients a CPU
    goes from block to block of tokens, which stay in its cache."""
    pixels, width = straight.shape[-2], v.shape[-1]
    rows, w = (part.unsqueeze(0).flatten(0, -3) for part in (v, bent))
    total = (straight + bent.sum(-1, keepdim=True)).reshape(-1, 1, pixels)
    if torch.is_grad_enabled() or v.device.type != "cpu":
        return _contract(total, w, rows).reshape(*v.shape[:-2], width)
    mixed = w.new_empty(len(rows), width // pixels, pixels)
    differences, pairs = (w.new_empty(min(BLOCK, len(rows)), n, width) for n in (w.shape[-1], pixels))
    for into, *block in zip(*(part.split(BLOCK) for part in (mixed, total, w, rows)), strict=True):
        _contract(*block, differences[: len(into)], pairs[: len(into)], into)
    return mixed.view(*v.shape[:-2], width)


def _contract(total: Tensor, w: Tensor, v: Tensor, *out: Tensor) -> Tensor:
    """sum_k w_k v_k as (sum_k w_k) v_0 + sum_k w_k (v_k - v_0): equal velocities come out unrounded, so that a mixture
    without gain is plain Euler to the last bit. What is computed on the way goes into `out`, if given.

    `total` is (tokens, 1, P), `w` (tokens, P, K - 1), `v` (tokens, K, D); the answer is (tokens, channels, P).

    One small matrix product per token makes all P x P pairs of pixels, of which the diagonal is read: P times the
    arithmetic, but v is read once where it lies, and that is what the time goes into.
    """
    differences, pairs, mixed = out or (None, None, None)
    v = v.to(w.dtype)
    return contract(total, w, v[:, 0], torch.sub(v[:, 1:], v[:, :1], out=differences), pairs, mixed)


def contract(
    total: Tensor, w: Tensor, first: Tensor, differences: Tensor, pairs: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """total v_0 + sum_k w_k (v_k - v_0), (tokens, channels, P), of velocities that are given as `first`, (tokens, D),
    and `differences`, (tokens, K - 1, D)."""
    pixels = (-1, total.shape[-1])
    every = torch.bmm(w, differences, out=pairs)
    own = every.unflatten(-1, pixels).diagonal(dim1=-3, dim2=-1)
    return torch.addcmul(own, first.unflatten(-1, pixels), total, out=out)


def comfyui_name(name: str, family: str) -> str:
    """ComfyUI's name of a layer by diffusers' own: the same one where ComfyUI knows that too."""
    for pattern, replacement in COMFYUI.get(family, ()):
        name = re.sub(pattern, replacement, name)
    return name


class ArcFlowScheduler(SchedulerMixin, ConfigMixin):
    """Exact steps: x - (sigma - sigma') ubar, with the mean velocity ubar of a packed path (eq. 4), in float32."""

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_modes: int = 16,
        shift: float = 3.2,
        final_step_scale: float = 1.0,
        pixels: int = 4,
        num_train_timesteps: int = 1000,
        steps: int = 2,
    ) -> None:
        self.num_modes, self.pixels, self.num_train_timesteps = num_modes, pixels, num_train_timesteps
        self.shift, self.final_step_scale, self.steps = shift, final_step_scale, steps
        self.set_timesteps(steps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | np.ndarray | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """The student's grid of a number of steps. `sigmas` are raw times, shifted here; the uniform ones that stock
        pipelines pass mean no more than their count. `mu`, a shift by the size of the image, is not used."""
        given = None if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float32).cpu()
        count = num_inference_steps or (self.steps if given is None else len(given))
        if given is None or np.allclose(given, np.linspace(1, 1 / count, count), atol=1e-5):
            grid = step_grid(count, self.shift, self.final_step_scale)
        else:
            grid = torch.cat([shift_sigma(given, self.shift), torch.zeros(1)])
        if len(grid) != count + 1 or not (grid.diff() < 0).all() or grid[0] > 1:
            raise ValueError(f"sigmas are {sigmas}; expected {count} of them, falling, from at most 1, above 0.")
        self.sigmas = grid  # on the CPU: a step reads two numbers
        self.timesteps = (grid[:-1] * self.num_train_timesteps).to(device)
        self.num_inference_steps = count
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> tuple[Tensor] | dict[str, Tensor]:
        """Latents at the end of the step that starts at `timestep`, in the dtype of `sample`."""
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        here, there = self.sigmas[self._step_index : self._step_index + 2].tolist()
        path = split(model_output.float(), self.num_modes, self.pixels)
        if path[0].shape[-1] != sample.shape[-1]:
            raise ValueError(
                f"the model output is {model_output.shape[-1]} wide, a path of width {path[0].shape[-1]}; the latents "
                f"have width {sample.shape[-1]}. This scheduler is for the transformer that it was exported with."
            )
        x = (sample.float() - (here - there) * mean_velocity(*path, 0.0, here - there)).to(sample.dtype)
        self._step_index += 1
        return {"prev_sample": x} if return_dict else (x,)

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Index of the step that starts at a time."""
        at = float(torch.as_tensor(timestep).flatten()[0])
        return int((self.sigmas[:-1] * self.num_train_timesteps - at).abs().argmin())

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """Clean latents taken to the noise level of `timestep` (image-to-image, inpainting)."""
        if self._begin_index is None:
            index = [self.index_for_timestep(one) for one in torch.as_tensor(timestep).flatten()]
        else:
            index = [self._begin_index if self._step_index is None else self._step_index]
        sigma = self.sigmas[index].to(sample.device, sample.dtype).view(-1, *[1] * (sample.ndim - 1))
        return sigma * noise + (1.0 - sigma) * sample

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The latents: this path needs no scaling."""
        return sample

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this step of the grid (image-to-image)."""
        self._begin_index = begin_index

    def set_shift(self, shift: float) -> None:
        """The adapter's own shift stays; engines that set one for every model may call this."""

    @property
    def step_index(self) -> int | None:
        """Index of the coming step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, if a pipeline set one."""
        return self._begin_index

    def __len__(self) -> int:
        return self.num_train_timesteps
