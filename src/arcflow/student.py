"""One network that is teacher and student.

`build` turns a stock transformer into a student in place: the base is frozen, the last Linear and the norm before it
become a `Fork` (the frozen module beside a tuned one, under the same name), and the feed-forward Linears get a LoRA
through PEFT. Nothing is subclassed, so stock pipelines go on working, and no second copy of the base is held.

    student  = predict(net, x, sigma, cond)                 # a Mixture, with gradient
    with teacher(net): u = net(...)                         # the untouched base, bit for bit

The teacher view flips flags and leaves `requires_grad` alone. Be back in the student view before `backward()`:
checkpointed blocks are computed again there. Parameters go by the names of the published adapters
(`proj_out_means.weight`, `<module>.lora_A.weight`, ...). Source: arXiv 2602.09014, section 4.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from arcflow.backbone import Cond, call, dense, family_of, lora_names, quantized
from arcflow.config import Targets
from arcflow.head import MomentumHead
from arcflow.momentum import Mixture, unpack

ADAPTER = "arcflow"


class Fork(nn.Module):
    """A frozen module and its tuned twin under one name; `teacher` says which one answers."""

    def __init__(self, frozen: nn.Module, tuned: nn.Module) -> None:
        super().__init__()
        self.frozen, self.tuned = frozen, tuned
        self.teacher = False

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if self.teacher:
            return self.frozen(*inputs, **named)
        # the twin is float32 also over a bfloat16 base, and gives float32 to what follows
        dtype = next(self.tuned.parameters()).dtype

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return self.tuned(*map(cast, inputs), **{name: cast(value) for name, value in named.items()})


@dataclass
class _State:
    """What `remove` and `unfuse` need to undo the work; hangs on the transformer as `_arcflow`."""

    modes: int
    pixels: int
    targets: Targets
    trainable_before: list[nn.Parameter]
    layers: dict[str, Any] = field(default_factory=dict)
    """The LoRA layers by the name of the Linear they wrap, so that a call need not look for them."""
    twins: list[str] = field(default_factory=list)
    """Names of the forks beside those of norm and head, where every weight is tuned."""
    fused: dict[str, nn.Module] = field(default_factory=dict)
    """The head's fork and the LoRA layers by name, while plain Linears stand in for them."""


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
    state = _State(modes, family.pixels, targets, [p for p in transformer.parameters() if p.requires_grad])
    base: Any = getattr(transformer, family.head)
    head = MomentumHead.from_linear(dense(base), modes, family.pixels, generator)
    transformer.requires_grad_(False)
    if targets == "full":
        state.twins = _twins(transformer)
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
    for fork in _forks(transformer):
        fork.train(transformer.training)
    return transformer


def _twins(transformer: nn.Module) -> list[str]:
    """Names of the blocks, and of the other top modules with weights but norm and head."""
    family, names = family_of(transformer), list[str]()
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList):
            names += [f"{name}.{i}" for i in range(len(child))]
        elif name not in (family.norm, family.head) and any(True for _ in child.parameters()):
            names.append(name)
    return names


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
    others = _active(transformer)
    with warnings.catch_warnings():  # other adapters may be there
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(config, transformer, ADAPTER, low_cpu_mem_usage=True)
    transformer._hf_peft_config_loaded = True  # type: ignore[assignment]  # diffusers' set_adapters asks for it
    for layer in _all_lora_layers(transformer).values():
        layer._active_adapter = [*others, ADAPTER]
    layers: dict[str, Any] = {name: transformer.get_submodule(name) for name in names}
    for layer in layers.values():
        weight: Any = layer.get_base_layer().weight
        down = torch.randn(rank, layer.in_features, generator=generator) / rank
        layer.lora_A[ADAPTER].weight = nn.Parameter(down.to(weight.device))
        layer.lora_B[ADAPTER].weight = nn.Parameter(torch.zeros(layer.out_features, rank, device=weight.device))
    return layers


def is_student(transformer: nn.Module) -> bool:
    """Whether `build` (or an adapter) has been at work on this transformer."""
    return hasattr(transformer, "_arcflow")


def modes(transformer: nn.Module) -> int:
    """K of a student."""
    return _state(transformer).modes


def targets(transformer: nn.Module) -> Targets:
    """Which Linears of a student took the LoRA."""
    return _state(transformer).targets


def lora_layers(transformer: nn.Module) -> dict[str, Any]:
    """The student's LoRA layers by the name of the Linear they wrap; also while fused."""
    return _state(transformer).layers


def _all_lora_layers(transformer: nn.Module) -> dict[str, Any]:
    """Those of a user's own adapters too."""
    modules: dict[str, Any] = {**dict(transformer.named_modules()), **_fused(transformer)}
    return {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}


def _active(transformer: nn.Module) -> list[str]:
    """Names of the PEFT adapters in use."""
    layers = _all_lora_layers(transformer).values()
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def other_adapters(transformer: nn.Module) -> list[str]:
    """Names of a user's own PEFT adapters in use."""
    return [name for name in _active(transformer) if name != ADAPTER]


def trainable(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by their names in a published adapter. All else is the frozen base."""
    family, _ = family_of(transformer), _state(transformer)
    named: dict[str, nn.Parameter] = {}
    for name, layer in lora_layers(transformer).items():
        named[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight
        named[f"{name}.lora_B.weight"] = layer.lora_B[ADAPTER].weight
    for name in _state(transformer).twins:
        twin: Any = transformer.get_submodule(name).tuned
        named |= {f"{name}.{key}": parameter for key, parameter in twin.named_parameters()}
    norm, head = (_whole(transformer, name).tuned for name in (family.norm, family.head))
    named |= {f"{family.norm}.{name}": parameter for name, parameter in norm.named_parameters()}
    named |= {f"{family.head}_{name}": parameter for name, parameter in head.named_parameters()}
    return named


def shapes(
    transformer: nn.Module, modes: int, rank: int, targets: Targets = "feed_forward"
) -> dict[str, tuple[int, ...]]:
    """Names and shapes that `trainable` would have after `build` with the same arguments; rank 0 means no LoRA.
    Touches nothing."""
    family = family_of(transformer)
    found: dict[str, tuple[int, ...]] = {}
    for name in lora_names(transformer, targets) if rank else []:
        linear: Any = transformer.get_submodule(name)
        found[f"{name}.lora_A.weight"] = (rank, linear.in_features)
        found[f"{name}.lora_B.weight"] = (linear.out_features, rank)
    for name in _twins(transformer) if targets == "full" else []:
        found |= {f"{name}.{key}": tuple(p.shape) for key, p in frozen(transformer, name).named_parameters()}
    norm, base = (frozen(transformer, name) for name in (family.norm, family.head))
    found |= {f"{family.norm}.{name}": tuple(p.shape) for name, p in dense(norm).named_parameters()}
    head = MomentumHead(base.in_features, modes, base.out_features, family.pixels, device="meta")
    return found | {f"{family.head}_{name}": tuple(p.shape) for name, p in head.named_parameters()}


@contextmanager
def teacher(transformer: nn.Module) -> Iterator[nn.Module]:
    """The teacher view: our LoRA off (a user's own adapters stay), forks on the frozen side; what it was before comes
    back at the end."""
    _unfused(transformer, "take the teacher view")
    forks, layers = _forks(transformer), list(lora_layers(transformer).values())
    before = [fork.teacher for fork in forks], [layer._active_adapter for layer in layers]
    others = [[name for name in layer.active_adapters if name != ADAPTER] for layer in layers]
    _flip(forks, layers, [True] * len(forks), others)
    try:
        yield transformer
    finally:
        _flip(forks, layers, *before)


def in_teacher_view(transformer: nn.Module) -> bool:
    """Whether a `teacher` block is open on this transformer."""
    return any(fork.teacher for fork in _forks(transformer))


def is_whole(transformer: nn.Module) -> bool:
    """Whether the student's own LoRA, if it has one, is in use."""

    def used(layer: Any) -> bool:
        names = layer.merged_adapters or layer.active_adapters  # once something is merged, the rest is ignored
        return ADAPTER in names and not layer.disable_adapters

    return bool(_fused(transformer)) or all(used(layer) for layer in lora_layers(transformer).values())


def predict(
    transformer: nn.Module, x: Float[Tensor, "batch tokens width"], sigma: float | Tensor, cond: Cond
) -> Mixture:
    """The student's path from noise level `sigma` on."""
    state = _state(transformer)
    return unpack(call(transformer, x, sigma, cond), state.modes, state.pixels)


@torch.no_grad()
def teacher_velocity(
    transformer: nn.Module, x: Float[Tensor, "batch tokens width"], sigma: float | Tensor, cond: Cond
) -> Float[Tensor, "batch tokens width"]:
    """The teacher's velocity at noise level `sigma`, float32, without gradient."""
    with teacher(transformer):
        return call(transformer, x, sigma, cond).float()


@torch.no_grad()
def fuse(transformer: nn.Module) -> nn.Module:
    """The student as plain Linears, for speed: LoRA added into copies of the base weights, the head one product.
    Costs those copies in memory; there is no teacher view and no training until `unfuse`, which is exact."""
    state, family = _state(transformer), family_of(transformer)
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
    state = _state(transformer)
    for name, module in state.fused.items():
        device = next(transformer.get_submodule(name).parameters()).device
        transformer.set_submodule(name, module.to(device))
    state.fused = {}
    return transformer


def remove(transformer: nn.Module) -> nn.Module:
    """The untouched base again, bit for bit."""
    state, family = _state(transformer), family_of(transformer)
    unfuse(transformer)
    _unmerged(transformer, "take the student off")
    others = other_adapters(transformer)
    for layer in lora_layers(transformer).values():
        layer.delete_adapter(ADAPTER)
    for name, layer in _all_lora_layers(transformer).items():
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


def frozen(transformer: nn.Module, name: str) -> Any:
    """The base's own module where a student may have a fork."""
    module = _whole(transformer, name)
    return module.frozen if isinstance(module, Fork) else module


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


def _state(transformer: nn.Module) -> _State:
    if not is_student(transformer):
        raise ValueError(
            f"this {type(transformer).__name__} is a plain base, not a student; attach an adapter "
            f"(arcflow.attach, arcflow.load_adapter) or make a student (arcflow.student.build) first."
        )
    return transformer._arcflow  # type: ignore[return-value]


def _fused(transformer: nn.Module) -> dict[str, nn.Module]:
    return transformer._arcflow.fused if is_student(transformer) else {}  # type: ignore[union-attr,return-value]


def _whole(transformer: nn.Module, name: str) -> Any:
    """A module as it is when not fused."""
    return _fused(transformer).get(name) or transformer.get_submodule(name)


def _unfused(transformer: nn.Module, wish: str) -> None:
    if _state(transformer).fused:
        raise ValueError(f"cannot {wish}: the student is fused. Call arcflow.student.unfuse(transformer) first.")
    _unmerged(transformer, wish)


def _unmerged(transformer: nn.Module, wish: str) -> None:
    if any(layer.merged for layer in lora_layers(transformer).values()):
        raise ValueError(f"cannot {wish}: its LoRA is merged into the base. Call pipe.unfuse_lora() first.")


def _forks(transformer: nn.Module) -> list[Fork]:
    family = family_of(transformer)
    names = (*_state(transformer).twins, family.norm, family.head)
    modules = (transformer.get_submodule(name) for name in names)
    return [module for module in modules if isinstance(module, Fork)]


def _flip(forks: list[Fork], layers: list[Any], as_teacher: list[bool], active: list[Any]) -> None:
    # PEFT's own switches (set_adapter, enable_adapters) also touch requires_grad; the names alone do not.
    for fork, value in zip(forks, as_teacher, strict=True):
        fork.teacher = value
    for layer, names in zip(layers, active, strict=True):
        layer._active_adapter = names
