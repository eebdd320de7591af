"""Where a student sits in a network: its modules by name, under a user's LoRA and under the student's own layers.

Nothing here changes a weight; `put_at` and `extras_of` are how layers get to their places.
"""

import math
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from arcflow.config import Form, Targets
from arcflow.families import family_of
from arcflow.families.family import Family
from arcflow.families.weights import lora_names
from arcflow.student.coefficients import CoefficientHead
from arcflow.student.head import MomentumHead
from arcflow.student.layers import Extras, Fork, Tuned


def module_of(transformer: nn.Module, name: str) -> nn.Module:
    """The module of this name: `get_submodule`, at a fifth of its time, for what is asked at every image.

    Raises:
        AttributeError: there is none, or the block does without.
    """
    module = transformer
    for part in name.split("."):
        module = module._modules.get(part) or getattr(module, part)
        if module is None:
            raise AttributeError(f"{name}: {part} is not in this block")
    return module


def base_linear(transformer: nn.Module, name: str) -> nn.Linear:
    """The base's own Linear of this name, under a user's LoRA and the student's twin."""
    module = module_of(transformer, name)
    while isinstance(module, BaseTunerLayer | Tuned):
        module = module.frozen if isinstance(module, Tuned) else wrapped(module)
    return module  # type: ignore[return-value]  # every name asked for is a Linear's


def wrapped(lora: Any) -> nn.Module:
    """What PEFT has put a LoRA around."""
    return lora.base_layer


def under_lora(module: nn.Module) -> nn.Module:
    """A module without a user's LoRA around it."""
    while isinstance(module, BaseTunerLayer):
        module = wrapped(module)
    return module


def put_at(transformer: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of a Linear (or of its twin), under a user's LoRA on it."""
    parent, _, leaf = name.rpartition(".")
    around = transformer.get_submodule(parent)
    module: nn.Module = getattr(around, leaf)
    while isinstance(module, BaseTunerLayer):
        around = module  # PEFT's layer, which is a module too
        leaf = "base_layer"
        module = wrapped(module)
    setattr(around, leaf, new)


def extras_of(transformer: nn.Module, name: str) -> nn.Module:
    """What holds the LoRA of the block that a module is in; made where there is none yet."""
    block = transformer.get_submodule(block_of(transformer, name))
    if not hasattr(block, "student"):
        block.add_module("student", Extras())
    return block.get_submodule("student")


def block_of(transformer: nn.Module, name: str) -> str:
    """The name of the block a module is in, or of the top module; a Linear that stands alone is in the network."""
    top, _, rest = name.partition(".")
    if not rest:
        return ""
    return f"{top}.{rest.partition('.')[0]}" if isinstance(transformer.get_submodule(top), nn.ModuleList) else top


def frozen_module(transformer: nn.Module, name: str) -> nn.Module:
    """The base's own module where a student may have a twin."""
    module = transformer.get_submodule(name)
    if isinstance(module, Fork):
        return module.frozen
    return base_linear(transformer, name) if isinstance(module, nn.Linear | BaseTunerLayer) else module


def norm_linears(transformer: nn.Module) -> list[str]:
    """Names of the Linears of the norm before the head, if it has any: all the weights that it has."""
    norm = family_of(transformer).norm
    if not norm:
        return []
    names = [name for name, module in transformer.get_submodule(norm).named_modules() if isinstance(module, nn.Linear)]
    own = ("." + name for name in names if "lora_" not in name)
    plain = (name.removesuffix(".frozen").removesuffix(".base_layer").removeprefix(".") for name in own)
    return [f"{norm}.{name}".rstrip(".") for name in dict.fromkeys(plain)]


def norm_of(transformer: nn.Module, family: Family) -> nn.Module | None:
    """The norm around the Linears that are tuned, if there is one: a Linear that stands alone needs no one's help."""
    norm = transformer.get_submodule(family.norm) if family.norm else None
    return None if isinstance(norm, nn.Linear | BaseTunerLayer) else norm


def twin_names(transformer: nn.Module) -> list[str]:
    """Names of the blocks, and of the other top modules with weights but norm and head."""
    family = family_of(transformer)
    names = list[str]()
    ends = {family.norm.partition(".")[0], family.head.partition(".")[0], "student"}
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList):
            names += [f"{name}.{i}" for i in range(len(child))]
        elif name not in ends and any(True for _ in child.parameters()):
            names.append(name)
    return names


def end_ranks(transformer: nn.Module, rank: int) -> dict[str, int]:
    """Ranks of the LoRA that a student in coefficients has on the norm's Linears and on the last one: no more than
    these have rows, which is the whole of them."""
    names = [*norm_linears(transformer), family_of(transformer).head]
    linears = {name: base_linear(transformer, name) for name in names}
    return {name: min(rank, linear.in_features, linear.out_features) for name, linear in linears.items()}


def trainable_shapes(
    transformer: nn.Module, modes: int, rank: int, targets: Targets = "feed_forward", form: Form = "mixture"
) -> dict[str, tuple[int, ...]]:
    """Names and shapes that `trainable` would have after `build` with the same arguments; rank 0 means no LoRA.
    Touches nothing."""
    family = family_of(transformer)
    found: dict[str, tuple[int, ...]] = {}
    ranks = dict.fromkeys(lora_names(transformer, targets), rank) if rank else {}
    if form == "coefficients":
        ranks |= end_ranks(transformer, rank)
    for name, own in ranks.items():
        linear = base_linear(transformer, name)
        found[f"{name}.lora_A.weight"] = (own, linear.in_features)
        found[f"{name}.lora_B.weight"] = (linear.out_features, own)
    for name in twin_names(transformer) if targets == "full" else []:
        found |= {f"{name}.{key}": tuple(p.shape) for key, p in frozen_module(transformer, name).named_parameters()}
    for name in norm_linears(transformer) if form == "mixture" else []:
        linear = base_linear(transformer, name)
        found[f"{name}.weight"] = (linear.out_features, linear.in_features)
        if linear.bias is not None:
            found[f"{name}.bias"] = (linear.out_features,)
    base = base_linear(transformer, family.head)
    if form == "mixture":
        pixels = math.prod(family.patch_of(transformer))
        head = MomentumHead(base.in_features, modes, base.out_features, pixels, device="meta")
    else:
        head = CoefficientHead(base.in_features, modes, base.out_features, device="meta")
    return found | {f"{family.head}_{name}": tuple(p.shape) for name, p in head.named_parameters()}
