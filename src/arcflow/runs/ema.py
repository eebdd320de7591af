"""Averaged weights (EMA): a plain copy at first, then from iteration `start` on

w <- beta w + (1 - beta) net,   beta = (1 - 1/t)^power,   t = 1, 2, ..."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from arcflow.system.processes import local

Parameters = Mapping[str, nn.Parameter]


def ema_beta(iteration: int, start: int = 100, power: float = 8.0) -> float:
    """Share of the old average kept after the step of `iteration` (counted from 0); 0 copies the weights."""
    t = iteration + 1 - start
    return (1 - 1 / t) ** power if t > 0 else 0.0


class Ema:
    """Running average of the trained weights, and only of them."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.weights = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, beta: float) -> None:
        weights = [local(w) for w in self.weights.values()]
        nets = [local(p.detach()) for p in self.parameters.values()]
        if beta == 0:
            torch._foreach_copy_(weights, nets)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_lerp_(weights, nets, 1 - beta)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the network's weights and the average. Values move, not tensors: FSDP knows these by their place.

        If memory does not suffice, nothing is exchanged.
        """
        done = list[str]()
        try:
            for name in self.parameters:
                self._exchange(name)
                done.append(name)
        except BaseException:
            for name in done:
                self._exchange(name)
            raise

    def _exchange(self, name: str) -> None:
        net = local(self.parameters[name].detach())
        average = local(self.weights[name])
        kept = net.clone()
        net.copy_(average)
        average.copy_(kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averaged weights while the block runs."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
