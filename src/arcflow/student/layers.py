"""What a student is made of: forks, LoRA layers, and the names of all that is trained."""

from dataclasses import dataclass, field
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from arcflow.config import Targets
from arcflow.families import family_of
from arcflow.families.weights import dense, lora_names
from arcflow.student.head import MomentumHead

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
class State:
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


def twins(transformer: nn.Module) -> list[str]:
    """Names of the blocks, and of the other top modules with weights but norm and head."""
    family, names = family_of(transformer), list[str]()
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList):
            names += [f"{name}.{i}" for i in range(len(child))]
        elif name not in (family.norm, family.head) and any(True for _ in child.parameters()):
            names.append(name)
    return names


def is_student(transformer: nn.Module) -> bool:
    """Whether `build` (or an adapter) has been at work on this transformer."""
    return hasattr(transformer, "_arcflow")


def modes(transformer: nn.Module) -> int:
    """K of a student."""
    return state_of(transformer).modes


def targets(transformer: nn.Module) -> Targets:
    """Which Linears of a student took the LoRA."""
    return state_of(transformer).targets


def lora_layers(transformer: nn.Module) -> dict[str, Any]:
    """The student's LoRA layers by the name of the Linear they wrap; also while fused."""
    return state_of(transformer).layers


def every_lora_layer(transformer: nn.Module) -> dict[str, Any]:
    """Those of a user's own adapters too."""
    modules: dict[str, Any] = {**dict(transformer.named_modules()), **stand_ins(transformer)}
    return {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}


def active_adapters(transformer: nn.Module) -> list[str]:
    """Names of the PEFT adapters in use."""
    layers = every_lora_layer(transformer).values()
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def other_adapters(transformer: nn.Module) -> list[str]:
    """Names of a user's own PEFT adapters in use."""
    return [name for name in active_adapters(transformer) if name != ADAPTER]


def trainable(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by their names in a published adapter. All else is the frozen base."""
    family, _ = family_of(transformer), state_of(transformer)
    named: dict[str, nn.Parameter] = {}
    for name, layer in lora_layers(transformer).items():
        named[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight
        named[f"{name}.lora_B.weight"] = layer.lora_B[ADAPTER].weight
    for name in state_of(transformer).twins:
        twin: Any = transformer.get_submodule(name).tuned
        named |= {f"{name}.{key}": parameter for key, parameter in twin.named_parameters()}
    norm, head = (unfused_module(transformer, name).tuned for name in (family.norm, family.head))
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
    for name in twins(transformer) if targets == "full" else []:
        found |= {f"{name}.{key}": tuple(p.shape) for key, p in frozen(transformer, name).named_parameters()}
    norm, base = (frozen(transformer, name) for name in (family.norm, family.head))
    found |= {f"{family.norm}.{name}": tuple(p.shape) for name, p in dense(norm).named_parameters()}
    head = MomentumHead(base.in_features, modes, base.out_features, family.pixels, device="meta")
    return found | {f"{family.head}_{name}": tuple(p.shape) for name, p in head.named_parameters()}


def frozen(transformer: nn.Module, name: str) -> Any:
    """The base's own module where a student may have a fork."""
    module = unfused_module(transformer, name)
    return module.frozen if isinstance(module, Fork) else module


def state_of(transformer: nn.Module) -> State:
    if not is_student(transformer):
        raise ValueError(
            f"this {type(transformer).__name__} is a plain base, not a student; attach an adapter "
            f"(arcflow.attach, arcflow.load_adapter) or make a student (arcflow.student.build) first."
        )
    return transformer._arcflow  # type: ignore[return-value]


def stand_ins(transformer: nn.Module) -> dict[str, nn.Module]:
    return transformer._arcflow.fused if is_student(transformer) else {}  # type: ignore[union-attr,return-value]


def unfused_module(transformer: nn.Module, name: str) -> Any:
    """A module as it is when not fused."""
    return stand_ins(transformer).get(name) or transformer.get_submodule(name)


def require_unfused(transformer: nn.Module, wish: str) -> None:
    if state_of(transformer).fused:
        raise ValueError(f"cannot {wish}: the student is fused. Call arcflow.student.unfuse(transformer) first.")
    require_unmerged(transformer, wish)


def require_unmerged(transformer: nn.Module, wish: str) -> None:
    if any(layer.merged for layer in lora_layers(transformer).values()):
        raise ValueError(f"cannot {wish}: its LoRA is merged into the base. Call pipe.unfuse_lora() first.")


def forks_of(transformer: nn.Module) -> list[Fork]:
    family = family_of(transformer)
    names = (*state_of(transformer).twins, family.norm, family.head)
    modules = (transformer.get_submodule(name) for name in names)
    return [module for module in modules if isinstance(module, Fork)]
