"""The output head of a student: three Linears, whose outputs are packed on the last axis or integrated.

A token's features become K velocities, K gating logits and K-1 log momentum factors, in this order (`momentum.unpack`
reads it). `mean_velocity` integrates them over the coming step (eq. 4): as wide as the base's own output, and all that
sampling needs. It starts as the teacher: every v_k is the teacher's own output but for a small constant per mode and
channel that tells the modes apart, all gates equal, momentum factors spread over 0.2 to 4. Source: the code released
with arXiv 2602.09014.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from arcflow import paper
from arcflow.momentum import unpack
from arcflow.portable import BLOCK, phi


class Affine(nn.Module):
    """Weight and bias of a Linear, by these names, and nothing else of one.

    It is no `nn.Linear`, so that what changes every Linear of a network (LoRA on all of them, storage in 8 bits) leaves
    the student's own weights alone; they never go below 16 bits.
    """

    def __init__(self, features: int, out: int, bias: bool = True, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, features, device=device, dtype=torch.float32))
        self.bias: nn.Parameter
        offset = nn.Parameter(torch.empty(out, device=device, dtype=torch.float32)) if bias else None
        self.register_parameter("bias", offset)

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        return F.linear(x, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Affine":
        return super()._apply(wide(fn), recurse)


def wide(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A conversion of tensors that takes none below 16 bits."""

    def converted(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return tensor.to(result.device) if result.dtype.itemsize < 2 else result

    return converted


class MomentumHead(nn.Module):
    """Features -> packed mixture."""

    def __init__(
        self, features: int, modes: int, width: int, pixels: int = 4, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.modes = modes
        self.width = width
        self.pixels = pixels
        self.means = Affine(features, modes * width, device=device)
        self.logweights = Affine(features, modes * pixels, device=device)
        self.loggamma = Affine(features, (modes - 1) * pixels, device=device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.means.weight.dtype

    @classmethod
    def from_linear(
        cls, base: nn.Linear, modes: int, pixels: int = 4, generator: torch.Generator | None = None
    ) -> "MomentumHead":
        """A float32 head that starts as the Linear it replaces (with or without bias)."""
        width = base.out_features
        if modes < 1:
            raise ValueError(
                f"modes is {modes}; a mixture has at least 1 mode ({paper.MODES} in the published adapters)."
            )
        if width % pixels:
            raise ValueError(f"{pixels} pixels per token do not divide the output width {width}.")
        device = base.weight.device
        head = cls(base.in_features, modes, width, pixels, device)
        apart = paper.APART * torch.randn(modes, width // pixels, 1, generator=generator)
        with torch.no_grad():
            bias = torch.zeros(width, device=device) if base.bias is None else base.bias.float()
            head.means.weight.copy_(base.weight.float().repeat(modes, 1))
            head.means.bias.copy_(bias.repeat(modes) + apart.expand(-1, -1, pixels).flatten().to(device))
            head.loggamma.bias.copy_(start_gains(modes).log().repeat_interleave(pixels))
            for zero in (head.logweights.weight, head.logweights.bias, head.loggamma.weight):
                zero.zero_()
        return head

    def forward(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch packed"]:
        return torch.cat([self.means(features), self.logweights(features), self.loggamma(features)], -1)

    def mean_velocity(
        self, features: Float[Tensor, "*batch features"], span: Float[Tensor, ""]
    ) -> Float[Tensor, "*batch width"]:
        """Mean velocity over the coming `span` of noise level (eq. 4), in float32."""
        return unpack(self(features), self.modes, self.pixels).mean_velocity(0.0, span)

    def packed(self) -> "PackedHead":
        """The same map as one product, for speed."""
        return PackedHead(self)


class Columns(Affine):
    """An `Affine` whose outputs come with the tokens last, as a step wants them."""

    def forward(self, x: Float[Tensor, "tokens features"]) -> Float[Tensor, "outputs tokens"]:
        return torch.addmm(self.bias[:, None], self.weight, x.t())


class PackedHead(nn.Module):
    """A `MomentumHead` as one product, not trainable.

    Its outputs stand as a step wants them: v_0, what the other velocities differ from it (so that equal ones come out
    equal), gates and momentum factors. The first mode has a factor too, of logarithm 0 whatever the features, so that
    all modes are weighed in one go.
    """

    def __init__(self, head: MomentumHead) -> None:
        super().__init__()
        self.modes = head.modes
        self.pixels = head.pixels
        every = head.modes * head.pixels
        self.sizes = (head.width, (head.modes - 1) * head.width, every, every)
        weight, bias = (self._rows(head, name) for name in ("weight", "bias"))
        self.all = Columns(weight.shape[1], weight.shape[0], device=weight.device).to(weight.dtype)
        with torch.no_grad():
            self.all.weight.copy_(weight)
            self.all.bias.copy_(bias)
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.all.weight.dtype

    @staticmethod
    def _rows(head: MomentumHead, name: str) -> Tensor:
        """Weights or biases of the three Linears in the order of the outputs."""
        means, logits, log_gamma = (
            getattr(part, name).detach() for part in (head.means, head.logweights, head.loggamma)
        )
        v = means.unflatten(0, (head.modes, head.width))
        none = torch.zeros_like(logits[: head.pixels])
        return torch.cat([v[0], (v[1:] - v[0]).flatten(0, 1), logits, none, log_gamma])

    def forward(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch packed"]:
        outputs = self.all(features.reshape(-1, features.shape[-1]))
        first, differences, logits, log_gamma = outputs.t().reshape(*features.shape[:-1], -1).split(self.sizes, -1)
        others = (differences.unflatten(-1, (self.modes - 1, self.sizes[0])) + first[..., None, :]).flatten(-2)
        return torch.cat([first, others, logits, log_gamma[..., self.pixels :]], -1)

    def mean_velocity(
        self, features: Float[Tensor, "*batch features"], span: Float[Tensor, ""]
    ) -> Float[Tensor, "*batch width"]:
        """Mean velocity over a step of length `span`. On a CPU it goes by blocks of tokens, which fit its cache."""
        rows = features.reshape(-1, features.shape[-1])
        if rows.device.type == "cpu" and len(rows) > BLOCK:
            mean = torch.cat([self._mean(block, span) for block in rows.split(BLOCK)], -1)
        else:
            mean = self._mean(rows, span)
        return mean.t().contiguous().view(*features.shape[:-1], self.sizes[0])

    def _mean(self, rows: Float[Tensor, "tokens features"], span: Float[Tensor, ""]) -> Float[Tensor, "width tokens"]:
        """The mean with the tokens last, so that what is weighed lies together: in a fourth less time than with them
        first."""
        outputs = self.all(rows)  # a call, so that offloading brings its weights
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        first, differences, logits, log_gamma = outputs.split(self.sizes)
        modes = self.modes
        pixels = self.pixels
        channels = self.sizes[0] // self.pixels
        w = logits.view(modes, pixels, -1).softmax(0) * phi(log_gamma.view(modes, pixels, -1) * span)
        bent = (w[1:, None] * differences.view(modes - 1, channels, pixels, len(rows))).sum(0)
        return torch.addcmul(bent, first.view(channels, pixels, -1), w.sum(0)).flatten(0, 1)


def start_gains(modes: int) -> Float[Tensor, " modes_less_one"]:
    """Momentum factors of a new head, the fixed first one left out."""
    low, high = torch.tensor(paper.GAINS).log10().tolist()  # in float32, whose rounding is the authors'
    return torch.logspace(low, high, modes - 1)
