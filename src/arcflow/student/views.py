"""The teacher's view and the student's view of one network."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from arcflow.families.conditioning import Cond
from arcflow.families.network import call, raw_output
from arcflow.momentum import Mixture, unpack
from arcflow.series import Series
from arcflow.student.coefficients import path_of
from arcflow.student.layers import Fork, LowRank, Tuned
from arcflow.student.state import state_of


@contextmanager
def teacher(transformer: nn.Module) -> Iterator[nn.Module]:
    """The teacher view: the student off (a user's own adapters stay); what it was before comes back at the end."""
    parts = _switches(transformer)
    fused = state_of(transformer).fused
    if fused:
        raise ValueError(
            "cannot take the teacher view: the student is fused. Call arcflow.student.unfuse(transformer) first."
        )
    before = [part.teacher for part in parts]
    for part in parts:
        part.teacher = True
    try:
        yield transformer
    finally:
        for part, value in zip(parts, before, strict=True):
            part.teacher = value


def in_teacher_view(transformer: nn.Module) -> bool:
    """Whether a `teacher` block is open on this transformer."""
    return state_of(transformer).head.teacher


def predict(
    transformer: nn.Module, x: Float[Tensor, "batch tokens width"], sigma: float | Tensor, cond: Cond
) -> Mixture | Series:
    """The student's path from noise level `sigma` on."""
    state = state_of(transformer)
    family = state.family
    integrates = state.head.integrates
    state.head.integrates = False
    try:
        if family.folds:
            with state.head.keeping() as paths:
                raw_output(transformer, x, sigma, cond, family)
            (output,) = paths
        else:
            output = raw_output(transformer, x, sigma, cond, family)
    finally:
        state.head.integrates = integrates
    assert isinstance(output, Tensor)  # lists are of networks that fold
    packed = family.leaves(output, x.shape[1], cond)
    if state.form == "coefficients":
        return path_of(family.sign * packed if family.sign != 1 else packed, state.modes, sigma, state.grids)
    mixture = unpack(packed, state.modes, state.pixels)
    return mixture if family.sign == 1 else replace(mixture, v=family.sign * mixture.v)


@torch.no_grad()
def teacher_velocity(
    transformer: nn.Module, x: Float[Tensor, "batch tokens width"], sigma: float | Tensor, cond: Cond
) -> Float[Tensor, "batch tokens width"]:
    """The teacher's velocity at noise level `sigma`, float32, without gradient."""
    family = state_of(transformer).family
    with teacher(transformer):
        return call(transformer, x, sigma, cond, family).float()


def _switches(transformer: nn.Module) -> list[LowRank | Tuned | Fork]:
    state = state_of(transformer)
    return [*state.lows.values(), *state.tuned.values(), *state.twins.values()]
