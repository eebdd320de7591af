"""A student as plain Linears, for speed, and back.

The merged weights lie where the base's were, in the same Linears: what a user loads onto them meanwhile stays there.
The base's own weights wait in the LoRA, and follow it to another device or dtype.
"""

import torch
from torch import Tensor, nn

from arcflow.families.weights import quantized
from arcflow.student.attached import refresh
from arcflow.student.checks import check_at_hand
from arcflow.student.hooks import add_at_calls, separate
from arcflow.student.layers import LowRank
from arcflow.student.places import base_linear
from arcflow.student.state import State, state_of

SEEN = 64
"""Numbers of a merged weight that are kept, to notice whether it was changed."""


@torch.no_grad()
def fuse(transformer: nn.Module) -> nn.Module:
    """The student as plain Linears, for speed: LoRA added into copies of the base weights, the head one product.
    Costs those copies in memory; there is no teacher view and no training until `unfuse`, which is exact.

    Raises:
        ValueError: the base is quantized, or its weights are offloaded. Nothing is changed then.
    """
    state = state_of(transformer)
    if state.fused:
        return transformer
    check_fusible(transformer, list(state.lows))
    try:
        with separate(transformer):
            for name, low in state.lows.items():
                linear = base_linear(transformer, name)
                merged = _merged(linear.weight, low)
                low.kept = linear.weight
                low.seen = _glimpse(merged)
                linear.weight = nn.Parameter(merged, requires_grad=False)
                add_at_calls(linear, False)
        head = state.head
        head.whole, head.tuned = head.tuned, head.tuned.packed()  # type: ignore[operator,assignment]
        state.fused = True
    except BaseException:
        _restore(transformer, state)
        raise
    refresh(transformer)
    return transformer


@torch.no_grad()
def unfuse(transformer: nn.Module) -> nn.Module:
    """The trainable student again, bit for bit what it was before `fuse`. What was merged into the weights since (a
    user's LoRA) is kept, to rounding.

    Raises:
        ValueError: weights are offloaded. Nothing is changed then.
    """
    state = state_of(transformer)
    if state.fused:
        check_at_hand(transformer)
        weights = [base_linear(transformer, name).weight for name in state.lows]
        if any(weight.is_meta for weight in weights):
            raise ValueError(
                "cannot take a fused student off or apart: weights of the base are offloaded, and not there. Call "
                "pipe.remove_all_hooks() first."
            )
        _restore(transformer, state)
        refresh(transformer)
    return transformer


def check_fusible(transformer: nn.Module, names: list[str]) -> None:
    """Whether LoRA can be added into the weights of these Linears."""
    check_at_hand(transformer)
    linears = [base_linear(transformer, name) for name in names]
    if any(quantized(linear) for linear in linears):
        raise ValueError(
            "cannot fuse: the base is quantized, and plain copies of its weights would need the memory that this "
            "saves. Sample unfused (attach without fuse=True)."
        )
    if any(linear.weight.is_meta for linear in linears):
        raise ValueError(
            "cannot fuse: weights of the base are offloaded, and not there. Fuse before offloading, or call "
            "pipe.remove_all_hooks() first."
        )


def _restore(transformer: nn.Module, state: State) -> None:
    with separate(transformer):
        for name, low in state.lows.items():
            if low.kept is None:
                continue
            linear = base_linear(transformer, name)
            if not _same(linear.weight, low.seen):
                low.kept.data += linear.weight - _merged(low.kept, low)
            linear.weight = low.kept
            add_at_calls(linear, True)
            low.kept = None
            low.seen = ()
    head = state.head
    if head.whole is not None:
        head.tuned = head.whole
        head.whole = None
    state.fused = False


def _merged(weight: Tensor, low: LowRank) -> Tensor:
    change = low.up.float() @ low.down.float() * low.scale
    return (weight.float() + change).to(weight.dtype)


def _glimpse(weight: Tensor) -> tuple[float, ...]:
    flat = weight.detach().flatten()
    return tuple(flat[:: max(1, flat.numel() // SEEN)][:SEEN].float().tolist())


def _same(weight: Tensor, seen: tuple[float, ...]) -> bool:
    """Whether a weight is still the one that was seen, but for a change of dtype."""
    now = torch.tensor(_glimpse(weight))
    then = torch.tensor(seen)
    return torch.allclose(now, then, rtol=2 * torch.finfo(weight.dtype).eps, atol=1e-30)
