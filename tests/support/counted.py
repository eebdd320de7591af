"""A tiny FLUX as student and as teacher that counts what it is asked."""

from types import SimpleNamespace

import torch

from arcflow import student
from arcflow.distillation.method import Cost
from arcflow.families import network
from arcflow.student import views
from tests.support.pipelines import SIDE, draws


def counted(flux):
    """Network, student and teacher, counting what they cost as a trainer does; four samples to train on."""
    net, cost = student.build(flux.transformer, modes=1, rank=2, targets="all", generator=draws()), Cost()

    def pupil(x, sigma, cond):
        cost.add(len(x), backward=torch.is_grad_enabled())
        return student.predict(net, x, sigma, cond)

    def base(x, sigma, cond):
        cost.add(len(x))
        return views.teacher_velocity(net, x, sigma, cond)

    cond = network.encode_prompts(flux, ["a red cube", "a blue ball"] * 2, height=SIDE, width=SIDE)
    x, trained = network.noise(flux, list(range(4)), SIDE, SIDE), student.trainable(net)
    return SimpleNamespace(net=net, student=pupil, teacher=base, x=x, cond=cond, cost=cost, trained=trained)


def learned(tiny):
    """Names of what has a gradient. At the start a LoRA's A has none, its B being zero, and one mode has no gates."""
    return {name for name, p in tiny.trained.items() if p.grad is not None and p.grad.any()}


def learnable(tiny):
    """Names of what must have one."""
    return {name for name in tiny.trained if not any(part in name for part in ("lora_A", "logweights", "loggamma"))}
