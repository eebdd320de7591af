"""Conditioning as a dict of tensors, and its algebra: repeat, join, take rows.

The first axis of every tensor is the batch, but for position ids (`*_ids`), which all samples share."""

import torch
from torch import Tensor

Cond = dict[str, Tensor]


def shared(name: str) -> bool:
    """Whether a conditioning tensor is the same for all samples: position ids are, others have a row for each."""
    return name.endswith("_ids")


def repeat(cond: Cond, times: int) -> Cond:
    """Conditioning of `times` copies of a batch, one batch after the other."""
    return {
        name: value if shared(name) else value.repeat(times, *[1] * (value.ndim - 1)) for name, value in cond.items()
    }


def beside(one: Cond, other: Cond) -> Cond:
    """Conditioning of two batches as one."""
    return {name: value if shared(name) else torch.cat([one[name], value]) for name, value in other.items()}


def rows(cond: Cond, part: slice | list[int]) -> Cond:
    """Conditioning of some samples of a batch."""
    return {name: value if shared(name) else value[part] for name, value in cond.items()}
