"""One network that is teacher and student.

`build` turns a stock transformer into a student in place: the base is frozen, the last Linear and the norm before it
become a `Fork` (the frozen module beside a tuned one, under the same name), and Linears get a LoRA. Nothing is
subclassed, so stock pipelines go on working, and no second copy of the base is held.

    student  = predict(net, x, sigma, cond)                 # a Mixture, with gradient
    with teacher(net): u = net(...)                         # the untouched base, bit for bit

The teacher view flips flags and leaves `requires_grad` alone. Be back in the student view before `backward()`:
checkpointed blocks are computed again there. Parameters go by the names of the published adapters
(`proj_out_means.weight`, `<module>.lora_A.weight`, ...). Source: arXiv 2602.09014, section 4."""

import re
import warnings
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from arcflow.config import Targets
from arcflow.families import family_of
from arcflow.families.weights import dense, lora_names
from arcflow.student.fuse import unfuse
from arcflow.student.head import MomentumHead
from arcflow.student.layers import (
    ADAPTER,
    Fork,
    State,
    active_adapters,
    every_lora_layer,
    forks_of,
    frozen,
    is_student,
    lora_layers,
    other_adapters,
    require_unmerged,
    state_of,
    twins,
)


def build(
    transformer: nn.Module,
    *,
    modes: int = 16,
    rank: int = 256,
    alpha: float | None = None,
    dropout: float = 0.05,
    lora: bool = True,
    targets: Targets = "feed_forward",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """The same transformer, now a student that starts as its teacher. Without `lora` only head and norm are tuned; with
    `targets` "full" there is none, and every weight has a tuned twin in float32. `alpha` is the rank unless given. All
    draws are from `generator`, in float32 on the CPU."""
    family = family_of(transformer)
    if is_student(transformer):
        raise ValueError("this transformer is a student already; call arcflow.student.remove(transformer) first.")
    if lora and rank < 1:
        raise ValueError(f"rank is {rank}; expected at least 1 (256 in the published adapters), or lora=False.")
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError(
            "this transformer's work is split over processes already, and the student's head would not gather its "
            "share; attach the adapter first, then call enable_parallelism."
        )
    if isinstance(getattr(transformer, family.head), LoraLayer):
        raise ValueError(
            f"a LoRA sits on {family.head!r}, the layer that the student's head replaces; expected it free. Delete "
            f"that LoRA first (pipe.delete_adapters)."
        )
    state = State(modes, family.pixels, targets, [p for p in transformer.parameters() if p.requires_grad])
    base: Any = getattr(transformer, family.head)
    head = MomentumHead.from_linear(dense(base), modes, family.pixels, generator)
    transformer.requires_grad_(False)
    if targets == "full":
        state.twins = twins(transformer)
        for name in state.twins:
            module = transformer.get_submodule(name)
            transformer.set_submodule(name, Fork(module, dense(module).requires_grad_(True)))
    elif lora:
        names = lora_names(transformer, targets)
        state.layers = _add_lora(transformer, names, rank, float(alpha or rank), dropout, generator)
    norm: Any = getattr(transformer, family.norm)
    setattr(transformer, family.norm, Fork(norm, dense(norm).requires_grad_(True)))
    setattr(transformer, family.head, Fork(base, head))
    transformer._arcflow = state  # type: ignore[assignment]
    for fork in forks_of(transformer):
        fork.train(transformer.training)
    return transformer


def _add_lora(
    transformer: nn.Module,
    names: list[str],
    rank: int,
    alpha: float,
    dropout: float,
    generator: torch.Generator | None,
) -> dict[str, Any]:
    # A full-match expression over exact names: a bare "proj_out" would also hit the output head.
    pattern = "|".join(re.escape(name) for name in names)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern)  # type: ignore[arg-type]
    others = active_adapters(transformer)
    with warnings.catch_warnings():  # other adapters may be there
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(config, transformer, ADAPTER, low_cpu_mem_usage=True)
    transformer._hf_peft_config_loaded = True  # type: ignore[assignment]  # diffusers' set_adapters asks for it
    for layer in every_lora_layer(transformer).values():
        layer._active_adapter = [*others, ADAPTER]
    layers: dict[str, Any] = {name: transformer.get_submodule(name) for name in names}
    for layer in layers.values():
        weight: Any = layer.get_base_layer().weight
        down = torch.randn(rank, layer.in_features, generator=generator) / rank
        layer.lora_A[ADAPTER].weight = nn.Parameter(down.to(weight.device))
        layer.lora_B[ADAPTER].weight = nn.Parameter(torch.zeros(layer.out_features, rank, device=weight.device))
    return layers


def remove(transformer: nn.Module) -> nn.Module:
    """The untouched base again, bit for bit."""
    state, family = state_of(transformer), family_of(transformer)
    unfuse(transformer)
    require_unmerged(transformer, "take the student off")
    others = other_adapters(transformer)
    for layer in lora_layers(transformer).values():
        layer.delete_adapter(ADAPTER)
    for name, layer in every_lora_layer(transformer).items():
        if layer.lora_A:
            layer._active_adapter = others
        else:
            transformer.set_submodule(name, layer.get_base_layer())
    for name in (*state.twins, family.norm, family.head):
        transformer.set_submodule(name, frozen(transformer, name))
    configs: Any = getattr(transformer, "peft_config", {})
    configs.pop(ADAPTER, None)
    if not configs and hasattr(transformer, "peft_config"):
        del transformer.peft_config
        transformer._hf_peft_config_loaded = False  # type: ignore[assignment]
    for parameter in state.trainable_before:
        parameter.requires_grad_(True)
    del transformer._arcflow
    return transformer
