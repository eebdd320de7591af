"""Last layers of a student: from a token's features to its mean velocity over the coming step.

A stock Euler step along the mean velocity (eq. 4) is the exact step, so everything behind these layers stays stock:
sampler, guidance, masks, previews. They compute in float32 whatever the model does, and keep the layers that they
stand for under their own names, so that other LoRAs still find what they are for.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Adapter
from .portable import bend_means, mean_velocity, own_length, split


class Head(nn.Module):
    """Features -> mean velocity over `span`, as wide as the base's last Linear, whose weights it keeps."""

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.modes, self.pixels, self.name = adapter.modes, adapter.pixels, adapter.name
        self.patch_first = adapter.ends.patch_first
        weight, bias = adapter.packed()
        self.packed = _linear(weight, bias)
        self.spans: dict[torch.device, Tensor] = {}
        """Noise level that the coming step leaves behind, on each device that draws: tensors, since a compiled model
        would be compiled anew for every number."""

    def tell(self, start: Tensor, span: Tensor) -> None:
        """The next call, on the device of `span`, covers this much."""
        self.spans[span.device] = span.float()

    def forward(self, features: Tensor) -> Tensor:
        """(*batch, tokens, features) -> (*batch, tokens, width), in the dtype of the features."""
        span = self.spans.get(features.device)
        if span is None:
            raise ValueError(
                f"{self.name} was called outside of a sampler, which says how far a step goes. Use KSampler."
            )
        mixture = split(_applied(self.packed, features), self.modes, self.pixels)
        mean = mean_velocity(*mixture, 0.0, span)
        if self.patch_first:  # a path says the channel first
            mean = mean.unflatten(-1, (-1, self.pixels)).mT.flatten(-2)
        return mean.to(features.dtype)


class Tuned(nn.Module):
    """The last norm's Linear with the adapter's weights, beside the base's own."""

    def __init__(self, base: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.tuned = _linear(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """In float32, so that what it scales and shifts, and the head behind, are computed in that too."""
        return _applied(self.tuned, x)


class Bent(nn.Module):
    """What a base's last Linear becomes with `bent`: its own answer, and the mean of the bends over the coming step."""

    def tell(self, start: Tensor, span: Tensor) -> None:
        """The next call, on the device of `span`, goes this far from noise level `start`."""
        share = (span / own_length(start[None], self.grids)[0]).clamp(max=1.0)
        self.shares[span.device] = share.float()

    def forward(self, features: Tensor) -> Tensor:
        """(*batch, tokens, features) -> (*batch, tokens, width), in the dtype of the base's answer."""
        straight = super().forward(features)
        share = self.shares.get(features.device)
        if share is None:
            raise ValueError(
                f"{self.name} was called outside of a sampler, which says how far a step goes. Use KSampler."
            )
        weight, bias = (tensor.to(features.device) for tensor in self.bends)
        bends = F.linear(features.float(), weight, bias).unflatten(-1, (-1, straight.shape[-1]))
        means = bend_means(bends.shape[-2] + 1, share)
        return (straight.float() + (means[:, None] * bends).sum(-2)).to(straight.dtype)


def bent(base: nn.Module, adapter: Adapter) -> "Bent":
    """The base's last Linear once more, of its own class and over the same parameters, so that ComfyUI patches, casts
    and moves it as ever. The bends are no parameters: ComfyUI leaves those of a module with parts alone."""
    module = copy.copy(base)
    module.__dict__.pop("comfy_patched_weights", None)  # the base's, if it is in use now
    for functions in ("weight_function", "bias_function"):
        if hasattr(module, functions):
            setattr(module, functions, [])
    module.__class__ = type(f"Bent{type(base).__name__}", (Bent, type(base)), {})
    module.name, module.grids, module.bends = adapter.name, adapter.grids, adapter.bends()
    module.shares = {}
    return module  # type: ignore[return-value]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear


def _applied(linear: nn.Linear, x: Tensor) -> Tensor:
    """In float32, on the device of `x`: where memory is short ComfyUI leaves layers that it does not know behind."""
    weight, bias = linear.weight.to(x.device), linear.bias
    return F.linear(x.float(), weight.float(), None if bias is None else bias.to(x.device).float())
