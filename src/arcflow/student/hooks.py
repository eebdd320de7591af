"""What a student does at the calls of modules that stay the base's own: forward hooks.

A Linear adds its LoRA to what it gives; before a call of the network the span of the coming step is found out; before
the norm its inputs are made as wide as the weights that are tuned. Attentions whose Linears diffusers has joined into
one add the LoRA of each to its part.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, no_type_check

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from arcflow.families.weights import JOINED
from arcflow.student.checks import check_head_free, check_whole
from arcflow.student.layers import LowRank, Tuned, in_dtype, lows_of
from arcflow.student.places import base_linear, under_lora
from arcflow.student.span import hear
from arcflow.student.state import State, state_of


@no_type_check  # a compiler reads it in training, and cannot read shape checks
def _add_low_rank(linear: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Forward hook of a Linear: its LoRA, or those of the Linears that were joined to it, side by side."""
    lows: tuple[LowRank | None, ...] = linear._arcflow_low
    if not lows:
        return out
    if len(lows) == 1 and lows[0] is not None:
        return lows[0](inputs[0], out)
    parts = zip(lows, out.chunk(len(lows), -1), strict=True)
    return torch.cat([part if low is None else low(inputs[0], part) for low, part in parts], -1)


def add_at_calls(linear: nn.Module, adds: bool) -> None:
    """Whether a Linear adds its LoRA at every call; one that is merged does not, and is called like a plain one."""
    for key in [key for key, hook in linear._forward_hooks.items() if hook is _add_low_rank]:
        del linear._forward_hooks[key]
    if adds:
        linear.register_forward_hook(_add_low_rank)


def connect(linear: nn.Module, *lows: LowRank | None) -> None:
    """Give a Linear its LoRA, which it adds from now on; of several that were joined, one for each or None."""
    linear._arcflow_low = lows  # type: ignore[assignment]
    add_at_calls(linear, True)


def disconnect(module: nn.Module) -> None:
    """Take the LoRA off a module again; one that has none is left as it is."""
    if "_arcflow_low" in module.__dict__:
        del module._arcflow_low
        add_at_calls(module, False)


def beside_lora(transformer: nn.Module, state: State) -> list[nn.Module]:
    """Linears without a LoRA in whose place other blocks have one. They get the hook all the same: blocks of one kind
    share what is compiled, and a compiler asks what a hook reads, but not whether there is one."""
    found: dict[int, nn.Module] = {}
    for name in state.lows:
        top, _, rest = name.partition(".")
        blocks = transformer.get_submodule(top)
        for number in range(len(blocks)) if isinstance(blocks, nn.ModuleList) else ():
            with suppress(AttributeError):  # a block of another kind
                linear = base_linear(transformer, f"{top}.{number}.{rest.partition('.')[2]}")
                found[id(linear)] = linear
    return [linear for linear in found.values() if not hasattr(linear, "_arcflow_low")]


def _is_joined(attention: nn.Module) -> bool:
    """Whether what diffusers has made of several Linears has their LoRA: joined once more, it is made anew."""
    return all(hasattr(linear, "_arcflow_low") for _, linear in _joined(attention))


def _joined(attention: nn.Module) -> list[tuple[str, nn.Module]]:
    """What diffusers has made of several Linears of an attention, by its name, under a user's LoRA."""
    found = ((name, attention._modules.get(name)) for name in JOINED)
    return [(name, under_lora(module)) for name, module in found if module is not None]


def join(transformer: nn.Module) -> None:
    """LoRA on what diffusers made of several Linears of an attention."""
    for attention in state_of(transformer).attentions:
        if not getattr(attention, "fused_projections", False) or _is_joined(attention):
            continue
        for name, linear in _joined(attention):
            lows = [next(iter(lows_of(under_lora(getattr(attention, one)))), None) for one in JOINED[name]]
            if any(low is not None for low in lows):
                connect(linear, *lows)
            else:
                linear._arcflow_low = ()  # type: ignore[assignment]


def _unjoin(attention: nn.Module) -> None:
    """Take apart what diffusers has joined. Its older attentions, as Stable Diffusion 3's, cannot: they keep what was
    joined also when the network calls their Linears one by one again."""
    if hasattr(attention, "unfuse_projections"):
        attention.unfuse_projections()  # type: ignore[operator]
        return
    for name in JOINED:
        attention._modules.pop(name, None)
    attention.fused_projections = False  # type: ignore[assignment]


@contextmanager
def separate(transformer: nn.Module) -> Iterator[None]:
    """While the block runs, attentions have Linears of their own again, where diffusers has joined them."""
    joined = [module for module in transformer.modules() if getattr(module, "fused_projections", False)]
    for attention in joined:
        for name in JOINED:
            if isinstance(getattr(attention, name, None), BaseTunerLayer):
                raise ValueError(
                    f"a LoRA sits on {name!r}, which transformer.fuse_qkv_projections() made: expected none there. "
                    f"Delete that LoRA first (pipe.delete_adapters), or call transformer.unfuse_qkv_projections()."
                )
    for attention in joined:
        _unjoin(attention)
    try:
        yield
    finally:
        for attention in joined:
            attention.fuse_projections()  # type: ignore[operator]


def watch(
    transformer: nn.Module, inputs: tuple[object, ...], named: dict[str, Any]
) -> tuple[tuple[object, ...], dict[str, Any]]:
    """Before each call: the span of the coming step, if the head is to integrate over it."""
    state: State = transformer._arcflow  # type: ignore[assignment]
    if state.head.teacher:
        return inputs, named
    for attention in state.attentions:
        if getattr(attention, "fused_projections", False) and not _is_joined(attention):
            if torch.compiler.is_compiling():
                raise ValueError("attention was joined after the adapter was attached: call the student once first.")
            join(transformer)
    if state.head.integrates:
        name, place = state.family.clock
        given = named.get(name, inputs[place] if name not in named and len(inputs) > place else None)
        timestep, first = hear(given, named.get("guidance"), state.meant)
        if first:
            check_whole(transformer, state)
        if timestep is not None and name in named:
            return inputs, {**named, name: timestep}
        if timestep is not None:
            return (*inputs[:place], timestep, *inputs[place + 1 :]), named
    else:
        check_head_free(transformer, state.family.head)
    return inputs, named


def widened(
    norm: nn.Module, inputs: tuple[object, ...], named: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Before the norm: its inputs in the dtype of the tuned weights, as these are wider than the base's."""
    tuned = next((module for module in norm._modules.values() if isinstance(module, Tuned)), None)
    tuned = tuned or next((module for module in norm.modules() if isinstance(module, Tuned)), None)
    if tuned is None or tuned.teacher:
        return inputs, named
    dtype = tuned.dtype
    return tuple(in_dtype(x, dtype) for x in inputs), {name: in_dtype(x, dtype) for name, x in named.items()}
