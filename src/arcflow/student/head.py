"""The output head of a student: in place of the last Linear, three, packed on the last axis.

A token's features become K velocities, K gating logits and K-1 log momentum factors, in this order (`momentum.unpack`
reads it). It starts as the teacher: every v_k is the teacher's own output but for a small constant per mode and channel
that tells the modes apart, all gates equal, momentum factors spread over 0.2 to 4. Source: the code released with
arXiv 2602.09014.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class MomentumHead(nn.Module):
    """Features -> packed mixture."""

    def __init__(
        self, features: int, modes: int, width: int, pixels: int = 4, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.modes, self.width, self.pixels = modes, width, pixels
        self.means = _linear(features, modes * width, device)
        self.logweights = _linear(features, modes * pixels, device)
        self.loggamma = _linear(features, (modes - 1) * pixels, device)

    @classmethod
    def from_linear(
        cls, base: nn.Linear, modes: int, pixels: int = 4, generator: torch.Generator | None = None
    ) -> "MomentumHead":
        """A float32 head that starts as the Linear it replaces (with or without bias)."""
        width = base.out_features
        if modes < 1:
            raise ValueError(f"modes is {modes}; a mixture has at least 1 mode (16 in the published adapters).")
        if width % pixels:
            raise ValueError(f"{pixels} pixels per token do not divide the output width {width}.")
        device = base.weight.device
        head = cls(base.in_features, modes, width, pixels, device)
        apart = 0.05 * torch.randn(modes, width // pixels, 1, generator=generator)
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

    def packed(self) -> nn.Linear:
        """The same map as one Linear: the three stacked in packed order."""
        parts = (self.means, self.logweights, self.loggamma)
        weight = torch.cat([part.weight.detach() for part in parts])
        linear = _linear(weight.shape[1], weight.shape[0], weight.device).to(weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(torch.cat([part.bias.detach() for part in parts]))
        return linear.requires_grad_(False)


def start_gains(modes: int) -> Float[Tensor, " modes_less_one"]:
    """Momentum factors of a new head, the fixed first one left out."""
    return torch.logspace(torch.tensor(0.2).log10().item(), torch.tensor(4.0).log10().item(), modes - 1)


def _linear(features: int, out: int, device: torch.device | str | None) -> nn.Linear:
    """A float32 Linear whose weights are yet to be written: no draw from the global generator, and `out` may be 0."""
    linear = nn.Linear(features, 1, device="meta")
    linear.out_features = out
    linear.weight = nn.Parameter(torch.empty(out, features, device=device, dtype=torch.float32))
    linear.bias = nn.Parameter(torch.empty(out, device=device, dtype=torch.float32))
    return linear
