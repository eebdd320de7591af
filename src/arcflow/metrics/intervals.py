"""Confidence intervals: bootstrap over prompts, Student's t over trainings."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor


def prompt_means(values: Float[Tensor, "n"], seeds: int) -> Float[Tensor, "prompts"]:
    """Mean over the seeds of each prompt: images of one prompt are alike, so an interval must count prompts."""
    return by_prompt(values, seeds).mean(1)


def by_prompt(values: Tensor, seeds: int) -> Tensor:
    if seeds < 1 or len(values) % seeds:
        raise ValueError(f"got {len(values)} images and seeds={seeds}; expected as many images of each prompt")
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

    def ratio(p: np.ndarray, q: np.ndarray, axis: int = -1) -> np.ndarray | np.floating:
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
    mean = float(np.mean(values))
    error = float(stats.sem(values))
    if not error:  # all alike
        return Interval(mean, mean, mean)
    low, high = stats.t.interval(confidence, len(values) - 1, loc=mean, scale=error)
    return Interval(mean, float(low), float(high))


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
    low, high = stats.t.interval(confidence, freedom, loc=mean, scale=sum(parts) ** 0.5)
    return Interval(mean, float(low), float(high))


def share_interval(share: float, count: int, *, confidence: float = 0.95) -> Interval:
    """A share of `count` trials, with Wilson's interval, which stays within 0 and 1 and knows that all of few is not
    certain."""
    found = stats.binomtest(round(share * count), count).proportion_ci(confidence, "wilson")
    return Interval(share, float(found.low), float(found.high))
