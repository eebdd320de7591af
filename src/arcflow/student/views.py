"""The teacher's view and the student's view of one network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from arcflow.families.conditioning import Cond
from arcflow.families.network import call
from arcflow.momentum import Mixture, unpack
from arcflow.student.layers import ADAPTER, Fork, forks_of, lora_layers, require_unfused, stand_ins, state_of


@contextmanager
def teacher(transformer: nn.Module) -> Iterator[nn.Module]:
    """The teacher view: our LoRA off (a user's own adapters stay), forks on the frozen side; what it was before comes
    back at the end."""
    require_unfused(transformer, "take the teacher view")
    forks, layers = forks_of(transformer), list(lora_layers(transformer).values())
    before = [fork.teacher for fork in forks], [layer._active_adapter for layer in layers]
    others = [[name for name in layer.active_adapters if name != ADAPTER] for layer in layers]
    _flip(forks, layers, [True] * len(forks), others)
    try:
        yield transformer
    finally:
        _flip(forks, layers, *before)


def in_teacher_view(transformer: nn.Module) -> bool:
    """Whether a `teacher` block is open on this transformer."""
    return any(fork.teacher for fork in forks_of(transformer))


def is_whole(transformer: nn.Module) -> bool:
    """Whether the student's own LoRA, if it has one, is in use."""

    def used(layer: Any) -> bool:
        names = layer.merged_adapters or layer.active_adapters  # once something is merged, the rest is ignored
        return ADAPTER in names and not layer.disable_adapters

    return bool(stand_ins(transformer)) or all(used(layer) for layer in lora_layers(transformer).values())


def predict(
    transformer: nn.Module, x: Float[Tensor, "batch tokens width"], sigma: float | Tensor, cond: Cond
) -> Mixture:
    """The student's path from noise level `sigma` on."""
    state = state_of(transformer)
    return unpack(call(transformer, x, sigma, cond), state.modes, state.pixels)


@torch.no_grad()
def teacher_velocity(
    transformer: nn.Module, x: Float[Tensor, "batch tokens width"], sigma: float | Tensor, cond: Cond
) -> Float[Tensor, "batch tokens width"]:
    """The teacher's velocity at noise level `sigma`, float32, without gradient."""
    with teacher(transformer):
        return call(transformer, x, sigma, cond).float()


def _flip(forks: list[Fork], layers: list[Any], as_teacher: list[bool], active: list[Any]) -> None:
    # PEFT's own switches (set_adapter, enable_adapters) also touch requires_grad; the names alone do not.
    for fork, value in zip(forks, as_teacher, strict=True):
        fork.teacher = value
    for layer, names in zip(layers, active, strict=True):
        layer._active_adapter = names
