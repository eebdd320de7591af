"""Evaluation as a stream: what batches, processes and restarts leave behind adds up to the whole.

`Moments` keeps three sums of the features and no feature, all that a Frechet distance asks for. A `Table` has one row
for each image, zero until it is filled, for what does need every feature and for scores. The tensors of both are
merged by adding them: `merge`, or all_reduce over `vars(moments).values()`, in place. To disk and back, so that an
evaluation can go on where it was cut off: `save_file(vars(moments), path)`, `Moments(**load_file(path))`.

Moments are in float64: a Frechet distance is a small difference of large traces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
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


@dataclass
class Table:
    """One row for each image of an evaluation, filled in any order, by any process: features, or a score each."""

    values: Float[Tensor, "n width"]
    filled: Int[Tensor, "n"]

    @classmethod
    def empty(cls, count: int, width: int) -> "Table":
        return cls(torch.zeros(count, width), torch.zeros(count, dtype=torch.int64))

    def put(self, rows: Sequence[int], values: Float[Tensor, "_ width"]) -> None:
        """Fill the rows of some images; a score each is of width 1."""
        expected = (len(rows), self.values.shape[1])
        if values.shape != expected:
            raise ValueError(f"got values {tuple(values.shape)}, expected {expected}: one row for each image named")
        self.values[rows] = _finite(values).float().cpu()
        self.filled[rows] = 1

    def missing(self) -> list[int]:
        """Numbers of the images that are still to do."""
        return _numbers(self.filled == 0)

    def complete(self) -> Float[Tensor, "n width"]:
        """All rows.

        Raises:
            ValueError: a row was not filled yet, or by more than one process.
        """
        for rows, state in ((self.missing(), "not filled"), (_numbers(self.filled > 1), "filled more than once")):
            if rows:
                raise ValueError(
                    f"{len(rows)} of {len(self.filled)} rows are {state}, row {rows[0]} first; every image has to be "
                    "put by one process, and by one only"
                )
        return self.values


Sums = TypeVar("Sums", Moments, Table)


def merge(first: Sums, *others: Sums) -> Sums:
    """What one object would hold that had seen all that these have seen."""
    states = [vars(part) for part in (first, *others)]
    shapes = {tuple(tuple(tensor.shape) for tensor in state.values()) for state in states}
    if len(shapes) > 1:
        raise ValueError(f"got parts of different shapes {sorted(shapes)}; merge parts of the same evaluation")
    return type(first)(**{name: torch.stack([state[name] for state in states]).sum(0) for name in states[0]})


def _finite(values: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    wrong = _numbers(~values.isfinite().all(1))
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(values)} images have values that are not finite, {wrong[0]} first")
    return values


def _numbers(mask: Bool[Tensor, "n"]) -> list[int]:
    return mask.nonzero().flatten().tolist()
