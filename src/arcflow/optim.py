"""AdamW, its rate at every iteration, and the coordinates of a step. Settings: arXiv 2602.09014."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from arcflow import basis
from arcflow.config import Optim, Run
from arcflow.path import step_grid


def adamw(parameters: dict[str, torch.nn.Parameter], optim: Optim) -> torch.optim.AdamW:
    """AdamW with a rate of its own for the head's log-gamma part."""
    gammas = [p for name, p in parameters.items() if "_loggamma." in name]
    others = [p for name, p in parameters.items() if "_loggamma." not in name]
    groups = [{"params": others, "peak": optim.lr}, {"params": gammas, "peak": optim.lr_log_gamma}]
    fused = others[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, betas=optim.betas, weight_decay=optim.weight_decay, fused=fused)


def step_directions(
    parameters: dict[str, torch.nn.Parameter], config: Run
) -> Callable[[], AbstractContextManager[None]]:
    """What an optimizer step runs in, see `optim.directions`."""
    if config.optim.directions == "modes":
        return nullcontext
    grid = step_grid(config.distill.steps, config.distill.shift, config.distill.final_step_scale)
    means = [p for name, p in parameters.items() if "_means." in name]
    mix = basis.directions(config.model.modes, float((grid[:-1] - grid[1:]).max()))
    return lambda: basis.along(mix, means)


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
