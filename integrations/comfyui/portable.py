"""What a sampler needs of a student's path, with torch alone: the grid, the mean velocity over a step, and names.

Programs that cannot install this package (ComfyUI, vLLM-Omni, SGLang) carry a copy of this file; `momentum` and `path`
read the same functions, so each formula stands once. Equations are numbered as in docs/math.md. Of a tensor (*batch,
modes, width), `modes` is K, `width` D, the numbers of a token, channel-major; gates and momentum factors come in P
values a mode, one for each latent pixel of the token, shared by its channels.
"""

import re
from math import comb
from typing import Any, TypeVar

import torch
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
