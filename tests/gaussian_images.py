"""Pictures whose every number is drawn from one Gaussian: all velocities are known. And a tiny FLUX that counts."""

from types import SimpleNamespace

import torch
from tiny import SIDE

from arcflow import backbone, student
from arcflow.baselines.method import Cost, Training
from arcflow.momentum import Mixture
from arcflow.state import Ema

MEAN, STD = 0.7, 0.4


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def velocity(x, sigma, mean=MEAN, std=STD):
    """At `x`, of pictures of that mean and spread."""
    s = sigma[:, None, None]
    expected = mean + (1 - s) * std**2 / ((1 - s) ** 2 * std**2 + s**2) * (x - (1 - s) * mean)
    return (x - expected) / s


def teacher(x, sigma, cond):
    return velocity(x, sigma)


def straight(v):
    """A plain velocity as a policy."""
    return Mixture(v.unsqueeze(-2), torch.zeros(*v.shape[:-1], 1, 1), torch.zeros(*v.shape[:-1], 0, 1))


def training(net=None, parameters=None):
    return Training(net, Ema(parameters or {}), Cost())


def counted(flux):
    """A tiny FLUX as student and as teacher, counting what it costs as a trainer does; four samples to train on."""
    net, cost = student.build(flux.transformer, modes=1, rank=2, targets="all", generator=draws()), Cost()

    def pupil(x, sigma, cond):
        cost.add(len(x), backward=torch.is_grad_enabled())
        return student.predict(net, x, sigma, cond)

    def base(x, sigma, cond):
        cost.add(len(x))
        return student.teacher_velocity(net, x, sigma, cond)

    cond = backbone.encode_prompts(flux, ["a red cube", "a blue ball"] * 2, height=SIDE, width=SIDE)
    x, trained = backbone.noise(flux, list(range(4)), SIDE, SIDE), student.trainable(net)
    return SimpleNamespace(net=net, student=pupil, teacher=base, x=x, cond=cond, cost=cost, trained=trained)


def learned(tiny):
    """Names of what has a gradient. At the start a LoRA's A has none, its B being zero, and one mode has no gates."""
    return {name for name, p in tiny.trained.items() if p.grad is not None and p.grad.any()}


def learnable(tiny):
    """Names of what must have one."""
    return {name for name in tiny.trained if not any(part in name for part in ("lora_A", "logweights", "loggamma"))}
