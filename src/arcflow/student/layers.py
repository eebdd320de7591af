"""The layers that a student adds to a network, or puts in the place of some.

Each Linear with a LoRA keeps its class, its weight and its name, and gets a forward hook (`hooks`) that adds a
`LowRank`; that lies in the block around the Linear, so that whatever moves, shares out or casts a block takes it along.
A `Tuned` stands in the place of the last Linear and of the norm's, and says it is the Linear that it holds. LoRAs of a
user, which PEFT puts around Linears, therefore find what they expect, and nothing that is done to them touches the
student.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from arcflow.student.coefficients import CoefficientHead
from arcflow.student.head import MomentumHead, PackedHead, wide
from arcflow.student.span import heard


class LowRank(nn.Module):
    """The student's LoRA on one Linear: adds scale * up(down(x)) to what that gives."""

    def __init__(self, down: Tensor, up: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.scale = scale
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


class Tuned(nn.Linear):
    """A frozen Linear and its tuned twin under one name; `teacher` says which one answers.

    To those who look for a Linear of this name it is one, with the weights of the base.
    """

    def __init__(self, frozen: nn.Linear, tuned: nn.Module) -> None:
        nn.Module.__init__(self)  # no weights of its own
        self.in_features = frozen.in_features
        self.out_features = frozen.out_features
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
        """The dtype of the tuned weights."""
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
        """The modules as of any other, but for the base's Linear: its weights are found, a Linear is not. Who puts a
        LoRA on all Linears puts one around this one, and none into it."""
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
        """The dtype of the tuned weights."""
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
        return self.tuned(
            *(in_dtype(x, dtype) for x in inputs), **{name: in_dtype(x, dtype) for name, x in named.items()}
        )


def in_dtype(value: object, dtype: torch.dtype) -> object:
    """A value in this dtype, if it is a tensor of floating point; any other as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class Extras(nn.Module):
    """Holds the LoRA of the Linears of a block."""


def lows_of(linear: nn.Module) -> tuple[LowRank | None, ...]:
    """The student's LoRA on a Linear: one, or of several Linears that were joined one each; empty without a student."""
    return getattr(linear, "_arcflow_low", ())


def kept_weight(linear: nn.Module) -> Tensor | None:
    """The base's own weight of a Linear into which a student's LoRA is merged; None where none is."""
    return next((low.kept for low in lows_of(linear) if low is not None and low.kept is not None), None)
