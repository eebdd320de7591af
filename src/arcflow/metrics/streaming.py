"""Evaluation as a stream: what batches, processes and restarts leave behind adds up to the whole.

`Moments` keeps three sums of the features and no feature, all that a Frechet distance asks for. They are merged by
adding them: `merge`, or all_reduce over `vars(moments).values()`, in place. To disk and back, so that an evaluation can
go on where it was cut off: `save_file(vars(moments), path)`, `Moments(**load_file(path))`.

Moments are in float64: a Frechet distance is a small difference of large traces.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class Moments:
    """Count, sum and sum of outer products of features: all that a Frechet distance asks of a set of images."""

    count: Float[Tensor, ""]
    total: Float[Tensor, "width"]
    outer: Float[Tensor, "width width"]

    @classmethod
    def empty(cls, width: int) -> "Moments":
        zeros = torch.zeros(width, width, dtype=torch.float64)
        return cls(zeros.new_zeros(()), zeros.new_zeros(width), zeros)

    @classmethod
    def of(cls, features: Float[Tensor, "n width"]) -> "Moments":
        """Moments of features that are all there."""
        moments = cls.empty(features.shape[1])
        moments.update(features)
        return moments

    def update(self, features: Float[Tensor, "n width"]) -> None:
        """Take in some more images."""
        if features.shape[1] != len(self.total):
            raise ValueError(
                f"got features of width {features.shape[1]} after features of width {len(self.total)}; all images "
                "must go through the same feature network"
            )
        x = _finite(features).double().cpu()
        self.count += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x

    @property
    def mean(self) -> Float[Tensor, "width"]:
        return self.total / self.count

    @property
    def covariance(self) -> Float[Tensor, "width width"]:
        """Unbiased, as everyone's is who reports Frechet distances."""
        if self.count < 2:
            raise ValueError(f"a covariance takes two images or more, got {self.count:.0f}; update with some first")
        return (self.outer - self.count * self.mean.outer(self.mean)) / (self.count - 1)


def merge(first: Moments, *others: Moments) -> Moments:
    """The moments of all images that went into these."""
    states = [vars(part) for part in (first, *others)]
    shapes = {tuple(tuple(tensor.shape) for tensor in state.values()) for state in states}
    if len(shapes) > 1:
        raise ValueError(f"got parts of different shapes {sorted(shapes)}; merge parts of the same evaluation")
    return Moments(**{name: torch.stack([state[name] for state in states]).sum(0) for name in states[0]})


def _finite(values: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    wrong = (~values.isfinite().all(1)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(values)} images have values that are not finite, {wrong[0]} first")
    return values
