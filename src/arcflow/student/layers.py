"""What a student is made of, and where it sits in a network.

A student leaves the base's modules where they are. Each Linear with a LoRA keeps its class, its weight and its name,
and gets a forward hook that adds a `LowRank`; that lies in the block around the Linear, so that whatever moves, shares
out or casts a block takes it along. A `Tuned` stands in the place of the last Linear and of the norm's, and
says it is the Linear that it holds. LoRAs of a user, which PEFT puts around
Linears, therefore find what they expect, and nothing that is done to them touches the student.

`State` says what a student consists of; `put_on` and `take_off` connect and disconnect it and do nothing else, so that
one can be taken off and put on again, bit for bit.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, no_type_check

import torch
from diffusers import ModelMixin
from diffusers.hooks.group_offloading import (
    _get_top_level_group_offload_hook,
    _maybe_remove_and_reapply_group_offloading,
)
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from arcflow.config import Form, Targets
from arcflow.families import family_of
from arcflow.families.family import Family
from arcflow.families.weights import JOINED, lora_names
from arcflow.student.coefficients import CoefficientHead, Grids
from arcflow.student.head import MomentumHead, PackedHead, wide
from arcflow.student.span import Meant, hear, heard
from arcflow.system.text import few


class LowRank(nn.Module):
    """The student's LoRA on one Linear: adds scale * up(down(x)) to what that gives."""

    def __init__(self, down: Tensor, up: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.down, self.up, self.scale = nn.Parameter(down), nn.Parameter(up), scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.teacher = False
        self.kept: Tensor | None
        self.register_parameter("kept", None)
        self.seen: tuple[float, ...] = ()

    @no_type_check  # a compiler reads it in training, and cannot read shape checks
    def forward(
        self, x: Float[Tensor, "*batch features"], out: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch width"]:
        if self.teacher or self.kept is not None:
            return out
        # A matrix of rows: on several axes PyTorch asks whether the weights want a gradient, which a user's LoRA
        # changes, and multiplies otherwise then, with other last bits.
        rows = self.dropout(x.to(self.down.dtype)).reshape(-1, x.shape[-1])
        change = F.linear(F.linear(rows, self.down), self.up).view(out.shape)
        return torch.add(out, change, alpha=self.scale).to(out.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LowRank":
        return super()._apply(wide(fn), recurse)


@no_type_check  # as above
def _add_low_rank(linear: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Forward hook of a Linear: its LoRA, or those of the Linears that were joined to it, side by side."""
    lows: tuple[LowRank | None, ...] = linear._arcflow_low
    if not lows:
        return out
    if len(lows) == 1 and lows[0] is not None:
        return lows[0](inputs[0], out)
    parts = zip(lows, out.chunk(len(lows), -1), strict=True)
    return torch.cat([part if low is None else low(inputs[0], part) for low, part in parts], -1)


class Tuned(nn.Linear):
    """A frozen Linear and its tuned twin under one name; `teacher` says which one answers.

    To those who look for a Linear of this name it is one, with the weights of the base.
    """

    def __init__(self, frozen: nn.Linear, tuned: nn.Module) -> None:
        nn.Module.__init__(self)  # no weights of its own
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.frozen, self.tuned = frozen, tuned
        self.teacher = False

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The base's."""
        return self.frozen.weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The base's."""
        return self.frozen.bias

    @property
    def dtype(self) -> torch.dtype:
        """Of the tuned weights."""
        return self.tuned.weight.dtype  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        if self.teacher:
            return self.frozen(input)
        # the twin is float32 also over a bfloat16 base, and gives float32 to what follows
        with as_wide_as_it_is(input):
            return self.tuned(input.to(self.dtype))

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As of any module, but for the base's Linear: its weights are found, a Linear is not. Who puts a LoRA on all
        Linears puts one around this one, and none into it."""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            yield name, _veiled(module) if module is self.frozen else module

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        # loaders of LoRAs look the base's weights up by these names
        for name in ("weight", "bias"):
            value = getattr(self, name)
            if value is not None:
                destination[f"{prefix}{name}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(self, *_: object) -> None:
        """Nothing: both Linears load what is theirs."""


class _Veiled(nn.Module):
    """Another module, to those who ask for its weights and hooks, but not for its kind."""


def _veiled(module: nn.Module) -> nn.Module:
    veiled = _Veiled.__new__(_Veiled)
    veiled.__dict__ = module.__dict__
    return veiled


def as_wide_as_it_is(like: Tensor) -> AbstractContextManager[object]:
    """Without autocast: the student's own weights are float32, and its path is integrated in float32."""
    if like.is_meta:  # shapes alone, for which there is no autocast
        return nullcontext()
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(like.device.type):
        return nullcontext()  # a quarter of the time
    return torch.autocast(like.device.type, enabled=False)


class Head(Tuned):
    """The last Linear: packed paths, or, with `integrates`, mean velocities over the coming step.

    A path has the channel first in each token. Where the base's rows go by the place in the patch first, with so many
    pixels a token, `patch_first` says it, and mean velocities are put in that order.
    """

    def __init__(self, frozen: nn.Linear, tuned: MomentumHead | CoefficientHead, patch_first: int = 0) -> None:
        super().__init__(frozen, tuned)
        self.patch_first = patch_first
        self.integrates = False
        self.paths: list[Tensor] | None = None
        """Keeps the paths while it is a list; what follows the head then gets a velocity (`keeping`)."""
        self.whole: MomentumHead | CoefficientHead | None = None
        """The trainable head, while a faster one stands in for it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the tuned weights."""
        return self.tuned.dtype  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        if self.teacher:
            return self.frozen(input)
        head: MomentumHead | PackedHead = self.tuned  # type: ignore[assignment]
        features = input.to(self.dtype)
        with as_wide_as_it_is(features):
            if not self.integrates:
                return self._kept(head(features))
            mean = head.mean_velocity(features, heard(features)[0])
            return swapped(mean, self.patch_first) if self.patch_first else mean

    def _kept(self, packed: Tensor) -> Tensor:
        """What goes on from here: the path, unless it is kept."""
        if self.paths is None:
            return packed
        self.paths.append(packed)
        return packed[..., : self.out_features]

    @contextmanager
    def keeping(self) -> Iterator[list[Tensor]]:
        """The paths of the calls in this block: for a network that folds what follows the head into an image."""
        self.paths = []
        try:
            yield self.paths
        finally:
            self.paths = None


def swapped(x: Tensor, inner: int) -> Tensor:
    """The last axis with its two parts, the second of this length, in the other order."""
    return x.unflatten(-1, (-1, inner)).mT.flatten(-2)


class BentHead(Head):
    """The last Linear of a student in coefficients: the base's, with a LoRA, and what bends the path beside it."""

    def forward(self, input: Tensor) -> Tensor:
        straight = self.frozen(input)
        if self.teacher:
            return straight
        head: CoefficientHead = self.tuned  # type: ignore[assignment]
        features = input.to(self.dtype)
        with as_wide_as_it_is(features):
            if self.integrates:
                return head.mean_velocity(features, straight, *heard(features))
            packed = head(features, straight)
            if self.patch_first:
                packed = swapped(packed.unflatten(-1, (head.modes, -1)), head.width // self.patch_first).flatten(-2)
            return self._kept(packed)


class Fork(nn.Module):
    """A frozen module and its tuned twin under one name, for modules that are tuned whole."""

    def __init__(self, frozen: nn.Module, tuned: nn.Module) -> None:
        super().__init__()
        self.frozen, self.tuned = frozen, tuned
        self.teacher = False

    def forward(self, *inputs: object, **named: object) -> object:
        if self.teacher:
            return self.frozen(*inputs, **named)
        dtype = next(self.tuned.parameters()).dtype
        return self.tuned(*(_cast(x, dtype) for x in inputs), **{name: _cast(x, dtype) for name, x in named.items()})


def _cast(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class _Extras(nn.Module):
    """Holds the LoRA of the Linears of a block."""


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


def put_on(transformer: nn.Module, state: State) -> None:
    """Connect a student: its transformer is one now. Nothing of the base is changed."""
    state.trainable_before = [p for p in transformer.parameters() if p.requires_grad]
    state.training_before = transformer.training
    with separate(transformer):
        transformer.requires_grad_(False)
        for name, twin in state.twins.items():
            transformer.set_submodule(name, twin)
        for name, low in state.lows.items():
            _connect(base_linear(transformer, name), low)
            extras = _extras(transformer, name)
            extras.add_module(f"{len(extras._modules)}-lora", low)  # no Linear's name: who looks for one finds it alone
        for linear in _beside(transformer, state):
            _connect(linear)
        for name, tuned in state.tuned.items():
            _replace(transformer, name, tuned)
    names = [name.rpartition(".")[0] for name in state.lows]
    around = (transformer.get_submodule(name) for name in dict.fromkeys(names))
    state.attentions = [module for module in around if hasattr(module, "fuse_projections")]
    state.places = []
    transformer._arcflow = state  # type: ignore[assignment]
    transformer.register_forward_pre_hook(_watch, with_kwargs=True)
    norm = _norm_of(transformer, state.family)
    if norm is not None:
        norm.register_forward_pre_hook(_widened, with_kwargs=True)
    transformer.save_pretrained = refuse_to_save  # type: ignore[assignment]
    _join(transformer)
    for part in trained_modules(state):
        for parameter in part.parameters():
            parameter.requires_grad_(True)
        part.train(transformer.training)
    refresh(transformer)


def take_off(transformer: nn.Module) -> State:
    """Disconnect the student: the untouched base again. The student is whole, and can be put on again."""
    state = state_of(transformer)
    with separate(transformer):
        for module in transformer.modules():
            _disconnect(module)
        for name in state.tuned:
            _replace(transformer, name, state.tuned[name].frozen)
        for name, twin in state.twins.items():
            transformer.set_submodule(name, twin.frozen)
    for name in state.lows:
        block = transformer.get_submodule(_block(transformer, name))
        block._modules.pop("student", None)
    for module, hook in ((transformer, _watch), (_norm_of(transformer, state.family), _widened)):
        if module is None:
            continue
        for key in [key for key, known in module._forward_pre_hooks.items() if known is hook]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for parameter in state.trainable_before:
        if not parameter.is_inference():  # of a base that was made in inference mode, outside of which none may learn
            parameter.requires_grad_(True)
    del transformer._arcflow, transformer.save_pretrained
    transformer.train(state.training_before)
    refresh(transformer)
    return state


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


def _watch(
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
            _join(transformer)
    if state.head.integrates:
        name, place = state.family.clock
        given = named.get(name, inputs[place] if name not in named and len(inputs) > place else None)
        timestep, first = hear(given, named.get("guidance"), state.meant)
        if first:
            _check_whole(transformer, state)
        if timestep is not None and name in named:
            return inputs, {**named, name: timestep}
        if timestep is not None:
            return (*inputs[:place], timestep, *inputs[place + 1 :]), named
    else:
        _check_head_free(transformer, state.family.head)
    return inputs, named


def _norm_of(transformer: nn.Module, family: Family) -> nn.Module | None:
    """The norm around the Linears that are tuned, if there is one: a Linear that stands alone needs no one's help."""
    norm = transformer.get_submodule(family.norm) if family.norm else None
    return None if isinstance(norm, nn.Linear | BaseTunerLayer) else norm


def _widened(
    norm: nn.Module, inputs: tuple[object, ...], named: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Before the norm: its inputs in the dtype of the tuned weights, as these are wider than the base's."""
    tuned = next((module for module in norm._modules.values() if isinstance(module, Tuned)), None)
    tuned = tuned or next((module for module in norm.modules() if isinstance(module, Tuned)), None)
    if tuned is None or tuned.teacher:
        return inputs, named
    dtype = tuned.dtype
    return tuple(_cast(x, dtype) for x in inputs), {name: _cast(x, dtype) for name, x in named.items()}


def refuse_to_save(*_: object, **__: object) -> None:
    """Raises ValueError: a student is saved as an adapter. Stands in the place of `save_pretrained`."""
    raise ValueError(
        "a student is on this transformer, and what would be written could not be loaded: keep the student with "
        "arcflow.save_adapter(transformer, folder), and save the base after arcflow.detach(pipe)."
    )


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


def modes(transformer: nn.Module) -> int:
    """K of a student."""
    return state_of(transformer).modes


def targets(transformer: nn.Module) -> Targets:
    """Which Linears of a student took the LoRA."""
    return state_of(transformer).targets


def lora_layers(transformer: nn.Module) -> dict[str, LowRank]:
    """The student's LoRA by the name of the Linear it is added to."""
    return state_of(transformer).lows


def other_adapters(transformer: nn.Module) -> list[str]:
    """Names of a user's own PEFT adapters in use."""
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


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


def shapes(
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
        found |= {f"{name}.{key}": tuple(p.shape) for key, p in frozen(transformer, name).named_parameters()}
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


def end_ranks(transformer: nn.Module, rank: int) -> dict[str, int]:
    """Ranks of the LoRA that a student in coefficients has on the norm's Linears and on the last one: no more than
    these have rows, which is the whole of them."""
    names = [*norm_linears(transformer), family_of(transformer).head]
    linears = {name: base_linear(transformer, name) for name in names}
    return {name: min(rank, linear.in_features, linear.out_features) for name, linear in linears.items()}


def twin_names(transformer: nn.Module) -> list[str]:
    """Names of the blocks, and of the other top modules with weights but norm and head."""
    family, names = family_of(transformer), list[str]()
    ends = {family.norm.partition(".")[0], family.head.partition(".")[0], "student"}
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList):
            names += [f"{name}.{i}" for i in range(len(child))]
        elif name not in ends and any(True for _ in child.parameters()):
            names.append(name)
    return names


def norm_linears(transformer: nn.Module) -> list[str]:
    """Names of the Linears of the norm before the head, if it has any: all the weights that it has."""
    norm = family_of(transformer).norm
    if not norm:
        return []
    names = [name for name, module in transformer.get_submodule(norm).named_modules() if isinstance(module, nn.Linear)]
    own = ("." + name for name in names if "lora_" not in name)
    plain = (name.removesuffix(".frozen").removesuffix(".base_layer").removeprefix(".") for name in own)
    return [f"{norm}.{name}".rstrip(".") for name in dict.fromkeys(plain)]


def frozen(transformer: nn.Module, name: str) -> nn.Module:
    """The base's own module where a student may have a twin."""
    module = transformer.get_submodule(name)
    if isinstance(module, Fork):
        return module.frozen
    return base_linear(transformer, name) if isinstance(module, nn.Linear | BaseTunerLayer) else module


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
        module = module.frozen if isinstance(module, Tuned) else _inside(module)
    return module  # type: ignore[return-value]  # every name asked for is a Linear's


def _replace(transformer: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of a Linear (or of its twin), under a user's LoRA on it."""
    parent, _, leaf = name.rpartition(".")
    around = transformer.get_submodule(parent)
    module: nn.Module = getattr(around, leaf)
    while isinstance(module, BaseTunerLayer):
        around = module  # PEFT's layer, which is a module too
        leaf = "base_layer"
        module = _inside(module)
    setattr(around, leaf, new)


def _block(transformer: nn.Module, name: str) -> str:
    """The name of the block a module is in, or of the top module; a Linear that stands alone is in the network."""
    top, _, rest = name.partition(".")
    if not rest:
        return ""
    return f"{top}.{rest.partition('.')[0]}" if isinstance(transformer.get_submodule(top), nn.ModuleList) else top


def _extras(transformer: nn.Module, name: str) -> nn.Module:
    block = transformer.get_submodule(_block(transformer, name))
    if not hasattr(block, "student"):
        block.add_module("student", _Extras())
    return block.get_submodule("student")


def _connect(linear: nn.Module, *lows: LowRank | None) -> None:
    linear._arcflow_low = lows  # type: ignore[assignment]
    add_at_calls(linear, True)


def _beside(transformer: nn.Module, state: State) -> list[nn.Module]:
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


def _disconnect(module: nn.Module) -> None:
    if "_arcflow_low" in module.__dict__:
        del module._arcflow_low
        add_at_calls(module, False)


def add_at_calls(linear: nn.Module, adds: bool) -> None:
    """Whether a Linear adds its LoRA at every call; one that is merged does not, and is called like a plain one."""
    for key in [key for key, hook in linear._forward_hooks.items() if hook is _add_low_rank]:
        del linear._forward_hooks[key]
    if adds:
        linear.register_forward_hook(_add_low_rank)


def _is_joined(attention: nn.Module) -> bool:
    """Whether what diffusers has made of several Linears has their LoRA: joined once more, it is made anew."""
    return all(hasattr(linear, "_arcflow_low") for _, linear in _joined(attention))


def _joined(attention: nn.Module) -> list[tuple[str, nn.Module]]:
    """What diffusers has made of several Linears of an attention, by its name, under a user's LoRA."""
    found = ((name, attention._modules.get(name)) for name in JOINED)
    return [(name, _under_lora(module)) for name, module in found if module is not None]


def _join(transformer: nn.Module) -> None:
    """LoRA on what diffusers made of several Linears of an attention."""
    for attention in state_of(transformer).attentions:
        if not getattr(attention, "fused_projections", False) or _is_joined(attention):
            continue
        for name, linear in _joined(attention):
            lows = [next(iter(_lows_of(_under_lora(getattr(attention, one)))), None) for one in JOINED[name]]
            if any(low is not None for low in lows):
                _connect(linear, *lows)
            else:
                linear._arcflow_low = ()  # type: ignore[assignment]


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
        attention.unfuse_projections()  # type: ignore[operator]
    try:
        yield
    finally:
        for attention in joined:
            attention.fuse_projections()  # type: ignore[operator]


def _check_head_free(transformer: nn.Module, head: str) -> None:
    """A user's LoRA on the last layer adds a velocity, which a packed path has no place for."""
    layer = module_of(transformer, head)
    if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters and layer.active_adapters:
        raise ValueError(
            f"the LoRA {layer.active_adapters} sits on {head!r} and adds to a velocity, but a "
            f"whole path was asked for: expected that layer free. Switch it off (pipe.disable_lora())."
        )


def _check_whole(transformer: nn.Module, state: State) -> None:
    """What was put on is still there, and nothing was merged in a place where the student has weights of its own."""
    if state.places and all(
        (transformer if around is None else around)._modules.get(name) is module
        for around, name, module in state.places
    ):
        return
    gone = [name for name, low in state.lows.items() if low not in _lows_of(base_linear(transformer, name))]
    gone += [name for name, tuned in state.tuned.items() if tuned is not _under_lora(module_of(transformer, name))]
    if gone:
        raise ValueError(
            f"modules of the student were replaced since it was put on: {few(gone)}. Attach the adapter again "
            f"(arcflow.attach), after what replaced them (quantization, say)."
        )
    merged = [name for name in state.tuned if getattr(module_of(transformer, name), "merged_adapters", None)]
    if merged:
        raise ValueError(
            f"a LoRA is merged into {few(merged)}, where the student has weights of its own: it would not be seen. "
            f"Call pipe.unfuse_lora() and draw with it unmerged, or merge it before arcflow.attach."
        )
    state.places = _places(transformer, state)


def _places(transformer: nn.Module, state: State) -> list[Place]:
    """Every step of the way to what the student consists of; none while a user's LoRA lies around one of its own
    Linears, which may be merged at any time."""
    if any(isinstance(module_of(transformer, name), BaseTunerLayer) for name in state.tuned):
        return []
    places: dict[tuple[int, str], Place] = {}
    for name in (*state.lows, *state.tuned):
        module = transformer
        for part in name.split("."):
            around, module = module, module_of(module, part)
            places[id(around), part] = (None if around is transformer else around, part, module)
        while isinstance(module, BaseTunerLayer):
            around, module = module, _inside(module)
            places[id(around), "base_layer"] = (around, "base_layer", module)
    return list(places.values())


def _lows_of(linear: nn.Module) -> tuple[LowRank | None, ...]:
    return getattr(linear, "_arcflow_low", ())


def kept_weight(linear: nn.Module) -> Tensor | None:
    """The base's own weight of a Linear into which a student's LoRA is merged; None where none is."""
    return next((low.kept for low in _lows_of(linear) if low is not None and low.kept is not None), None)


def _inside(lora: Any) -> nn.Module:
    """What PEFT has put a LoRA around."""
    return lora.base_layer


def _under_lora(module: nn.Module) -> nn.Module:
    """A module without a user's LoRA around it."""
    while isinstance(module, BaseTunerLayer):
        module = _inside(module)
    return module


def uncompiled(transformer: nn.Module) -> ModelMixin:
    """The module that `torch.compile` has wrapped, or this one."""
    return getattr(transformer, "_orig_mod", transformer)  # type: ignore[return-value]  # a model of diffusers


def refresh(transformer: nn.Module) -> None:
    """What was made of the modules as they were is made again: compiled blocks do not notice hooks that come or go, and
    group offloading brings the weights to a call that it knew when it was switched on."""
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in transformer.modules()):
        torch.compiler.reset()
    _maybe_remove_and_reapply_group_offloading(transformer)


def check_at_hand(transformer: nn.Module) -> None:
    """Whether the weights can be read: between calls, offloading to a disk leaves numbers of no meaning in their place.

    Raises:
        ValueError: they cannot.
    """
    hook = _get_top_level_group_offload_hook(transformer)
    if hook is not None and hook.config.offload_to_disk_path is not None:
        raise ValueError(
            f"weights of this transformer are on a disk ({hook.config.offload_to_disk_path}), as group offload leaves "
            f"them: attach, fuse and detach before enable_group_offload, or offload without offload_to_disk_path."
        )
