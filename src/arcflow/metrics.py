"""How far one set of pictures is from another, and how sure that is.

Three kinds of numbers, each a function of tensors; docs/metrics.md says what they mean, and from how many pictures on:

* between two sets of pictures, given their features: Frechet and kernel distance, precision and recall;
* between one picture and another, or its prompt: squared error, PSNR, CLIP score;
* between the seeds of one prompt: diversity.

Features come from any callable (`features` has some), the moments of a Frechet distance from `streaming`. Distances are
in float64. A mean over prompts gets its confidence interval from `bootstrap`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from scipy import stats
from torch import Tensor

from arcflow.streaming import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): FID, whatever the features.

    With C = R R^T, the trace of the root is the sum of the singular values of R_a^T R_b. R comes from the eigenvalues
    of a symmetric matrix, those at rounding level left out. C_a C_b itself is not symmetric, and singular where there
    are fewer pictures than features: the roots of its eigenvalues are complex, and wrong by the root of the rounding.
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
            f"got {len(a)} and {len(b)} pictures and subset_size={subset_size}; a subset has two pictures or more and "
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
    """Share of the generated pictures among the real ones, share of the real ones among the generated."""

    precision: float
    recall: float


def precision_recall(
    real: Float[Tensor, "n width"], generated: Float[Tensor, "m width"], *, neighbors: int = 3
) -> PrecisionRecall:
    """Improved precision and recall: a picture is among those of a set if it is no farther from one of them than that
    one's nearest neighbor of order `neighbors` in the set.
    """
    _same_width(real, generated)
    if not 1 <= neighbors < min(len(real), len(generated)):
        raise ValueError(
            f"got {len(real)} and {len(generated)} pictures and neighbors={neighbors}; expected 1 or more, and fewer "
            "than there are pictures in either set"
        )
    return PrecisionRecall(_covered(generated, real, neighbors), _covered(real, generated, neighbors))


def _covered(x: Float[Tensor, "n width"], points: Float[Tensor, "m width"], neighbors: int) -> float:
    """Share of x inside the balls around the points."""
    center = points.double().mean(0)  # near which the expanded square below is most exact
    x, points = x.double() - center, points.double() - center
    radii = torch.cat([_squared_distances(part, points).kthvalue(neighbors + 1).values for part in points.split(1024)])
    reach = radii + 1e-12 * points.square().sum(1).max()  # rounding must not part a picture from its equal
    inside = [(_squared_distances(part, points) <= reach).any(1) for part in x.split(1024)]
    return float(torch.cat(inside).double().mean())


def _squared_distances(x: Float[Tensor, "n width"], y: Float[Tensor, "m width"]) -> Float[Tensor, "n m"]:
    """By one matrix product, which is many times faster than the difference of every pair."""
    return x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T


def clip_score(images: Float[Tensor, "n width"], texts: Float[Tensor, "n width"]) -> Float[Tensor, "n"]:
    """100 times the cosine between the embeddings of each picture and its prompt."""
    _paired(images, texts)
    return 100 * torch.cosine_similarity(images, texts)


def squared_error(a: Float[Tensor, "n *shape"], b: Float[Tensor, "n *shape"]) -> Float[Tensor, "n"]:
    """Mean squared difference of each pair, of final latents for example."""
    _paired(a, b)
    return (a - b).square().flatten(1).mean(1)


def psnr(a: UInt8[np.ndarray, "n rows columns 3"], b: UInt8[np.ndarray, "n rows columns 3"]) -> Float[Tensor, "n"]:
    """Peak signal-to-noise ratio of each pair of pictures, in dB; infinite for equal ones."""
    _paired(a, b)
    errors = [np.square(p.astype(np.float64) - q).mean() for p, q in zip(a, b, strict=True)]
    return 10 * torch.log10(255**2 / torch.tensor(errors, dtype=torch.float64))


def _paired(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(f"got {tuple(a.shape)} and {tuple(b.shape)}; expected pairs of the same shape")


def diversity(x: Float[Tensor, "n *shape"], seeds: int) -> Float[Tensor, "prompts"]:
    """Mean distance between two pictures of one prompt, for each prompt; x are features or latents, a prompt's
    `seeds` pictures one after the other.
    """
    grouped = _by_prompt(x.flatten(1), seeds)
    if seeds < 2:
        raise ValueError("a distance takes two pictures of each prompt, got seeds=1; draw each prompt with more seeds")
    pairs = torch.cdist(grouped, grouped, compute_mode="donot_use_mm_for_euclid_dist")  # 0 for equal ones
    return pairs.sum((1, 2)) / (seeds * (seeds - 1))


def prompt_means(values: Float[Tensor, "n"], seeds: int) -> Float[Tensor, "prompts"]:
    """Mean over the seeds of each prompt: pictures of one prompt are alike, so an interval must count prompts."""
    return _by_prompt(values, seeds).mean(1)


def _by_prompt(values: Tensor, seeds: int) -> Tensor:
    if seeds < 1 or len(values) % seeds:
        raise ValueError(f"got {len(values)} pictures and seeds={seeds}; expected as many pictures of each prompt")
    return values.unflatten(0, (-1, seeds))


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval; `f"{interval:.3f}"` reads "0.912 [0.894, 0.931]"."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap(
    values: Float[Tensor, "prompts"],
    over: Float[Tensor, "prompts"] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over the prompts, and where it lies in `confidence` of the redraws of as many prompts (percentiles).

    With `over`, the mean divided by its mean over the same prompts: diversity over the teacher's, for example.
    """
    top, bottom = (x.double().cpu().numpy() for x in (values, torch.ones_like(values) if over is None else over))
    if len(top) < 2 or len(top) != len(bottom) or not np.isfinite([top, bottom]).all() or not bottom.any():
        raise ValueError(
            f"got {len(top)} values over {len(bottom)}; expected one finite value for each of two prompts or more, and "
            "something other than 0 to divide by"
        )

    def ratio(p: np.ndarray, q: np.ndarray, axis: int = -1) -> Any:
        return p.mean(axis) / q.mean(axis)

    drawn = stats.bootstrap(
        (top, bottom),
        ratio,
        n_resamples=resamples,
        batch=max(1, 10**7 // len(top)),  # numbers in memory at once
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(ratio(top, bottom)), float(drawn.low), float(drawn.high))


def seed_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean over trainings that differ in their seed alone, with Student's interval for it."""
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"got {list(values)}; an interval takes the finite numbers of two trainings or more")
    mean, error = float(np.mean(values)), float(stats.sem(values))
    reach = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1)) * error
    return Interval(mean, mean - reach, mean + reach)


def seed_difference(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean of `a` less that of `b`, with Welch's interval; a single number is taken as exact. They differ by more than
    noise if the interval leaves out 0."""
    mean = float(np.mean(a) - np.mean(b))
    if len(a) == 1 or len(b) == 1:
        if len(a) == len(b):
            return Interval(mean, mean, mean)
        many, one, sign = (b, a, -1) if len(a) == 1 else (a, b, 1)
        around = seed_interval([sign * (value - one[0]) for value in many], confidence=confidence)
        return Interval(mean, around.low, around.high)
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (a, b)]
    if not sum(parts):
        return Interval(mean, mean, mean)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, (a, b), strict=True))
    reach = float(stats.t.ppf(0.5 + confidence / 2, freedom)) * sum(parts) ** 0.5
    return Interval(mean, mean - reach, mean + reach)
