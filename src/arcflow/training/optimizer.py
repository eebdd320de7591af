"""The optimizer: AdamW, its rates, which steps it accepts, and the directions it steps along."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.config import Optim, Run
from arcflow.distillation.walk import sampler_grid
from arcflow.runs.checkpoint import Progress
from arcflow.runs.ema import Parameters
from arcflow.student.head import start_gains
from arcflow.system.packages import need
from arcflow.system.processes import in_parts, shared_like, whole

MEMORY = 0.98
"""Share of the past in the usual gradient norm."""


def adamw(parameters: dict[str, torch.nn.Parameter], optim: Optim) -> torch.optim.Optimizer:
    """AdamW with a rate of its own for the head's log-gamma part; its moments in 8 bits if wanted (bitsandbytes)."""
    gammas = [p for name, p in parameters.items() if "_loggamma." in name]
    others = [p for name, p in parameters.items() if "_loggamma." not in name]
    rates = ((others, optim.lr), (gammas, optim.lr_log_gamma))
    groups = [{"params": params, "peak": peak} for params, peak in rates if params]
    if optim.bits == 8:
        return _eight_bit(parameters)(groups, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    fused = others[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, betas=optim.betas, weight_decay=optim.weight_decay, fused=fused)


def _eight_bit(parameters: Parameters) -> Callable[..., torch.optim.Optimizer]:
    if in_parts(parameters.values()):
        raise ValueError(
            "optim.bits = 8 needs whole weights, not parts: expected one process to a copy; set shard to 1"
        )
    return need("bitsandbytes.optim", asked="optim.bits = 8", install="bitsandbytes").AdamW8bit


def step_directions(
    parameters: dict[str, torch.nn.Parameter], config: Run
) -> Callable[[], AbstractContextManager[None]]:
    """What an optimizer step runs in, see `optim.directions`."""
    if config.optim.directions == "modes":
        return nullcontext
    grid = sampler_grid(min(config.distill.all_steps), config.distill)
    means = [p for name, p in parameters.items() if "_means." in name]
    mix = directions(config.model.modes, float((grid[:-1] - grid[1:]).max()))
    return lambda: preconditioned(mix, means)


def rate(iteration: int, optim: Optim) -> float:
    """Fraction of the learning rate at an iteration counted from 0: warm-up, constant, cooldown if there is one."""
    if iteration < optim.warmup:
        return 1 - (1 - iteration / optim.warmup) * (1 - optim.warmup_start)
    left = (optim.iterations - iteration) / max(optim.cooldown_iterations, 1)
    if optim.cooldown == "none" or left >= 1:
        return 1.0
    return left if optim.cooldown == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def set_rate(optimizer: torch.optim.Optimizer, fraction: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * fraction


def accepted(progress: Progress, norm: float, step: int, optim: Optim) -> bool:
    """Whether a step with this gradient norm is taken; keeps count in `progress`."""
    usual = progress.usual_norm
    spike = optim.spike is not None and step >= optim.clip_from and 0 < optim.spike * usual < norm
    taken = math.isfinite(norm) and not spike
    progress.in_a_row = 0 if taken else progress.in_a_row + 1
    progress.skipped += not taken
    if taken and norm > 0:
        progress.usual_norm = usual**MEMORY * norm ** (1 - MEMORY) if usual else norm
    return taken


def diagnosis(progress: Progress, norm: float, logs: dict[str, float], parameters: Parameters) -> str:
    """Why a run ends that skips step after step, and what to do."""
    told = ", ".join(f"{name} {value:.3g}" for name, value in logs.items() if name.startswith("loss"))
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if not math.isfinite(norm):
        where = f"; not finite in {len(broken)} of {len(gradients)} tensors, the first {broken[0]}" if broken else ""
        remedy = (
            "lower optim.lr and optim.lr_log_gamma, lengthen optim.warmup, or set model.dtype to bfloat16 or float32"
        )
    else:
        where = f"; usual is {progress.usual_norm:.3g}"
        remedy = "raise optim.spike or leave it out, or lower optim.lr"
    return (
        f"{progress.in_a_row} iterations in a row were skipped, the last with {told} and gradient norm {norm:.3g}"
        f"{where}: expected finite gradients of the usual size; {remedy}, and start again in a new folder"
    )


COUNT = 4
"""Shapes that are brought to equal effect; the rest is rounding."""

MOST = 60.0
"""The most that a shape is enlarged."""


def directions(modes: int, span: float) -> Float[Tensor, "modes modes"]:
    """T, for the momentum factors gamma that a head starts with and noise levels 0 to `span` left behind; float64.

    The shapes are those of exp(gamma s), which bend more than the mixture's exp(log gamma s): several times worse for
    a bend of second order, several times better for one of first order (docs/log.md, 2026-11-25)."""
    s = torch.linspace(0, span, 256, dtype=torch.float64)
    curves = torch.exp(torch.cat([torch.zeros(1), start_gains(modes)]).double() * s[:, None]) / modes
    _, size, shapes = torch.linalg.svd(curves, full_matrices=False)
    scale = torch.ones(modes, dtype=torch.float64)
    scale[:COUNT] = (size[0] / size[:COUNT]).clamp(max=MOST)
    return shapes.T * scale


@contextmanager
def preconditioned(mix: Float[Tensor, "modes modes"], parameters: Sequence[Tensor]) -> Iterator[None]:
    """The optimizer's step inside moves the head's means by T r instead of r: gradients are turned before it, the move
    after it. Weight decay would decay the move, so there must be none."""

    def turned(by: Tensor, value: Tensor) -> Tensor:
        rows = whole(value).reshape(len(by), -1)
        return shared_like((by.to(rows) @ rows).reshape(value.shape), value)

    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = turned(mix.T, parameter.grad)
            parameter.zero_()
        yield
        for parameter, kept in zip(parameters, before, strict=True):
            parameter.copy_(kept + turned(mix, parameter))
