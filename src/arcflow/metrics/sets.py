"""Distances between sets of images: Frechet, kernel, precision and recall."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.metrics.streaming import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): FID, whatever the features.

    With C = R R^T, the trace of the root is the sum of the singular values of R_a^T R_b. R comes from the eigenvalues
    of a symmetric matrix, those at rounding level left out. C_a C_b itself is not symmetric, and singular where there
    are fewer images than features: the roots of its eigenvalues are complex, and wrong by the root of the rounding.
    """
    _same_width(a.total, b.total)
    root_a, root_b = _root(a.covariance), _root(b.covariance)
    shared = torch.linalg.svdvals(root_a.T @ root_b).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * shared
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))


def _same_width(a: Tensor, b: Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"got features of widths {a.shape[-1]} and {b.shape[-1]}; use the same feature network for both sets"
        )


def _root(covariance: Float[Tensor, "width width"]) -> Float[Tensor, "width rank"]:
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


class KernelDistance(NamedTuple):
    """Mean and standard deviation over the subsets."""

    mean: float
    std: float


def kernel_distance(
    a: Float[Tensor, "n width"],
    b: Float[Tensor, "m width"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy with the kernel (x . y / width + 1)^3: KID, whatever the features.

    The subsets are those of torch-fidelity for the same seed; numpy keeps the stream of its old generator for ever.
    """
    _same_width(a, b)
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(
            f"got {len(a)} and {len(b)} images and subset_size={subset_size}; a subset has two images or more and "
            f"no more than there are, here subset_size={min(len(a), len(b))} at most"
        )
    rng = np.random.RandomState(seed)
    x, y = a.double(), b.double()
    values = []
    for _ in range(subsets):
        rows = [torch.from_numpy(rng.choice(len(part), subset_size, replace=False)).to(a.device) for part in (x, y)]
        values.append(float(_discrepancy(x[rows[0]], y[rows[1]])))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _discrepancy(x: Float[Tensor, "n width"], y: Float[Tensor, "n width"]) -> Float[Tensor, ""]:
    count, width = x.shape

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        return (p @ q.T / width + 1) ** 3

    xx, yy = kernel(x, x), kernel(y, y)
    within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return within / (count * (count - 1)) - 2 * kernel(x, y).mean()


class PrecisionRecall(NamedTuple):
    """Share of the generated images among the real ones, share of the real ones among the generated."""

    precision: float
    recall: float


def precision_recall(
    real: Float[Tensor, "n width"], generated: Float[Tensor, "m width"], *, neighbors: int = 3
) -> PrecisionRecall:
    """Improved precision and recall: an image is among those of a set if it is no farther from one of them than that
    one's nearest neighbor of order `neighbors` in the set.
    """
    _same_width(real, generated)
    if not 1 <= neighbors < min(len(real), len(generated)):
        raise ValueError(
            f"got {len(real)} and {len(generated)} images and neighbors={neighbors}; expected 1 or more, and fewer "
            "than there are images in either set"
        )
    return PrecisionRecall(_covered(generated, real, neighbors), _covered(real, generated, neighbors))


def _covered(x: Float[Tensor, "n width"], points: Float[Tensor, "m width"], neighbors: int) -> float:
    """Share of x inside the balls around the points."""
    center = points.double().mean(0)  # near which the expanded square below is most exact
    x, points = x.double() - center, points.double() - center
    radii = torch.cat([_squared_distances(part, points).kthvalue(neighbors + 1).values for part in points.split(1024)])
    reach = radii + 1e-12 * points.square().sum(1).max()  # rounding must not part an image from its equal
    inside = [(_squared_distances(part, points) <= reach).any(1) for part in x.split(1024)]
    return float(torch.cat(inside).double().mean())


def _squared_distances(x: Float[Tensor, "n width"], y: Float[Tensor, "m width"]) -> Float[Tensor, "n m"]:
    """Squared distances of all pairs, by one matrix product: many times faster than the difference of every pair."""
    return x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T
