"""What a student consists of, and what can be asked of a transformer that is one.

A `State` hangs on its transformer; `attached` connects and disconnects it, `build` and `adapter` make one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from arcflow.config import Form, Targets
from arcflow.families.family import Family
from arcflow.student.coefficients import CoefficientHead, Grids
from arcflow.student.layers import Fork, Head, LowRank, Tuned
from arcflow.student.span import Meant

Place = tuple[nn.Module | None, str, nn.Module]
"""A module, its name, and what it is in; None for the network itself, which nothing of a student holds."""


@dataclass
class State:
    """What a student consists of; hangs on its transformer as `_arcflow`."""

    family: Family
    """What its base is; asked once, when the student is made."""
    modes: int
    pixels: int
    """Latent pixels per token."""
    targets: Targets
    form: Form
    rank: int
    alpha: float
    lows: dict[str, LowRank]
    """The LoRA by the name of the Linear it is added to."""
    tuned: dict[str, Tuned]
    """The head, and in a mixture the norm's Linears, by name."""
    twins: dict[str, Fork]
    """Other modules, where every weight is tuned."""
    head: Head
    meant: Meant = field(default_factory=Meant)
    attentions: list[nn.Module] = field(default_factory=list)
    """Attentions whose Linears, with a LoRA, can be joined."""
    fused: bool = False
    places: list[Place] = field(default_factory=list)
    """Where all of it was when it was last looked at part by part: still there, it is whole."""
    trainable_before: list[nn.Parameter] = field(default_factory=list)
    training_before: bool = False

    @property
    def grids(self) -> Grids:
        """Noise levels of the student's own steps, where its form knows of any."""
        head = self.head.whole or self.head.tuned
        return head.grids if isinstance(head, CoefficientHead) else ()


def is_student(transformer: nn.Module) -> bool:
    """Whether `build` (or an adapter) has been at work on this transformer."""
    return hasattr(transformer, "_arcflow")


def state_of(transformer: nn.Module) -> State:
    """What the student of this transformer consists of."""
    if not is_student(transformer):
        raise ValueError(
            f"this {type(transformer).__name__} is a plain base, not a student; attach an adapter "
            f"(arcflow.attach, arcflow.load_adapter) or make a student (arcflow.student.build) first."
        )
    return transformer._arcflow  # type: ignore[return-value]


def uncompiled(transformer: nn.Module) -> ModelMixin:
    """The module that `torch.compile` has wrapped, or this one."""
    return getattr(transformer, "_orig_mod", transformer)  # type: ignore[return-value]  # a model of diffusers


def trainable(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by their names in a published adapter. All else is the frozen base."""
    return parameters_of(state_of(transformer))


def parameters_of(state: State) -> dict[str, nn.Parameter]:
    """`trainable` of a student that need not be on a transformer."""
    named: dict[str, nn.Parameter] = {}
    for name, low in state.lows.items():
        named[f"{name}.lora_A.weight"] = low.down
        named[f"{name}.lora_B.weight"] = low.up
    for name, twin in state.twins.items():
        named |= {f"{name}.{key}": parameter for key, parameter in twin.tuned.named_parameters()}
    for name, tuned in state.tuned.items():
        if isinstance(tuned, Head):
            named |= {f"{name}_{key}": parameter for key, parameter in (tuned.whole or tuned.tuned).named_parameters()}
        else:
            named |= {f"{name}.{key}": parameter for key, parameter in tuned.tuned.named_parameters()}
    return named


def trained_modules(state: State) -> list[nn.Module]:
    """The modules whose weights are trained."""
    tuned = [part.whole if isinstance(part, Head) and part.whole else part.tuned for part in state.tuned.values()]
    return [*state.lows.values(), *(twin.tuned for twin in state.twins.values()), *tuned]


def learn(transformer: nn.Module) -> None:
    """Put the student in training mode, and nothing but the student: the teacher draws no random numbers, though a LoRA
    of the user's own may have a dropout."""
    transformer.eval()
    for part in trained_modules(state_of(transformer)):
        part.train()


@contextmanager
def at_rest(transformer: nn.Module) -> Iterator[None]:
    """Neither dropout nor gradient while the block runs; then every module is in the mode that it was in."""
    modes = {module: module.training for module in transformer.modules()}
    transformer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def lora_layers(transformer: nn.Module) -> dict[str, LowRank]:
    """The student's LoRA by the name of the Linear it is added to."""
    return state_of(transformer).lows


def other_adapters(transformer: nn.Module) -> list[str]:
    """Names of a user's own PEFT adapters in use."""
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def refuse_to_save(*_: object, **__: object) -> None:
    """Raises ValueError: a student is saved as an adapter. Stands in the place of `save_pretrained`."""
    raise ValueError(
        "a student is on this transformer, and what would be written could not be loaded: keep the student with "
        "arcflow.save_adapter(transformer, folder), and save the base after arcflow.detach(pipe)."
    )
