"""The network as it was: a target for the network as it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from arcflow.state import Ema


@contextmanager
def as_target(net: Any, weights: Ema) -> Iterator[None]:
    """The network has these weights, and neither dropout nor gradient, while the block runs. Ask the target before the
    student: weights that move after a call with gradient spoil its backward pass."""
    training = net.training
    net.eval()
    try:
        with torch.no_grad(), weights.applied():
            yield
    finally:
        net.train(training)
