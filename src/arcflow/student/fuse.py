"""A student as plain Linears, for speed, and back."""

from typing import Any

import torch
from torch import nn

from arcflow.families import family_of
from arcflow.families.weights import quantized
from arcflow.student.layers import ADAPTER, Fork, lora_layers, state_of


@torch.no_grad()
def fuse(transformer: nn.Module) -> nn.Module:
    """The student as plain Linears, for speed: LoRA added into copies of the base weights, the head one product.
    Costs those copies in memory; there is no teacher view and no training until `unfuse`, which is exact."""
    state, family = state_of(transformer), family_of(transformer)
    if state.fused:
        return transformer
    layers, head = lora_layers(transformer), getattr(transformer, family.head)
    others = sorted({name for layer in layers.values() for name in layer.lora_A} - {ADAPTER})
    if others:
        raise ValueError(
            f"cannot fuse: the PEFT adapters {others} share layers with the student's LoRA and would be lost. Delete "
            f"them first (pipe.delete_adapters), or sample unfused."
        )
    if any(quantized(layer.get_base_layer()) for layer in layers.values()):
        raise ValueError(
            "cannot fuse: the base is quantized, and plain copies of its weights would need the memory that this "
            "saves. Sample unfused (attach without fuse=True)."
        )
    fast: dict[str, nn.Module] = {name: _merged(layer) for name, layer in layers.items()}
    fast[family.head] = Fork(head.frozen, head.tuned.packed())
    state.fused = {**layers, family.head: head}
    for name, module in fast.items():
        transformer.set_submodule(name, module)
    return transformer


def unfuse(transformer: nn.Module) -> nn.Module:
    """The trainable student again, bit for bit what it was before `fuse`."""
    state = state_of(transformer)
    for name, module in state.fused.items():
        device = next(transformer.get_submodule(name).parameters()).device
        transformer.set_submodule(name, module.to(device))
    state.fused = {}
    return transformer


@torch.no_grad()
def _merged(layer: Any) -> nn.Linear:
    base: Any = layer.get_base_layer()
    linear: Any = nn.utils.skip_init(
        nn.Linear, base.in_features, base.out_features, base.bias is not None, device=base.weight.device
    ).to(base.weight.dtype)
    up, down = layer.lora_B[ADAPTER].weight.float(), layer.lora_A[ADAPTER].weight.float()
    linear.weight.copy_(base.weight.float() + up @ down * layer.scaling[ADAPTER])
    if base.bias is not None:
        linear.bias.copy_(base.bias)
    return linear.requires_grad_(False)
