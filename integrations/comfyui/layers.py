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
        return mean_velocity(*mixture, 0.0, span).to(features.dtype)


class FluxLast(nn.Module):
    """The last norm and head of FLUX.1 and FLUX.2."""

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.norm_final, self.linear, self.adaLN_modulation = base.norm_final, base.linear, base.adaLN_modulation
        self.modulation = _linear(*adapter.norm())
        self.head = Head(base.linear, adapter)

    def forward(self, x: Tensor, vec: Tensor, modulation_dims: list[tuple[int, int, int]] | None = None) -> Tensor:
        """Mean velocities of `x` (batch, tokens, features), modulated by `vec` (batch, features), or (batch, n,
        features) with `modulation_dims` that say from which token to which each of the n holds."""
        vec = vec if vec.ndim == 3 else vec[:, None]
        scale, shift = _applied(self.modulation, F.silu(vec.float())).chunk(2, -1)
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
        if modulation_dims is None:
            return self.head(torch.addcmul(shift, normed, 1 + scale)).to(x.dtype)
        for first, last, row in modulation_dims:
            part = normed[:, first:last]
            normed[:, first:last] = torch.addcmul(shift[:, row : row + 1], part, 1 + scale[:, row : row + 1])
        return self.head(normed).to(x.dtype)


class QwenNorm(nn.Module):
    """The last norm of Qwen-Image."""

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.linear, self.norm = base.linear, base.norm
        self.modulation = _linear(*adapter.norm())

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """`x` (batch, tokens, features), modulated by `conditioning` (batch, features), in float32."""
        scale, shift = _applied(self.modulation, F.silu(conditioning.float()))[:, None].chunk(2, -1)
        return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=1e-6), 1 + scale)


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
