"""From a number for each image to a table: means, intervals, differences, diversity."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from arcflow.evaluation.results import Better, CategoryScore, Distance, Estimate, Lacking, SuiteScore
from arcflow.evaluation.suites.suite import Item
from arcflow.metrics import images as image_metrics
from arcflow.metrics import intervals, sets
from arcflow.metrics.streaming import Moments


def summed_up(
    items: Sequence[Item],
    draws: int,
    scores: Mapping[str, float],
    better: Better = "higher",
    *,
    share: bool = False,
) -> SuiteScore | Lacking:
    """Mean of the scores, prompt by prompt, with its interval; of each category; and the mean of those means.

    `scores` are by id of image, or of prompt where a scorer gives one number for all its images. Prompts without a
    score are left out and not counted. A `share` says of each image whether it is right: where every prompt is right
    or wrong as a whole the interval is Wilson's, which knows that all of few is not certain.
    """
    values: dict[str, float] = {}
    for item in items:
        found = [scores[name] for name in map(item.image, range(draws)) if name in scores]
        if found or item.id in scores:
            values[item.id] = sum(found) / len(found) if found else scores[item.id]
    scored = [item for item in items if item.id in values]
    if not scored:
        return Lacking(value=None, why="no prompt has a score", prompts=0, better=better)
    every = torch.tensor([values[item.id] for item in scored], dtype=torch.float64)
    mean = _interval(every, share=share)
    names = list(dict.fromkeys(item.category for item in scored))
    if len(names) < 2:
        return SuiteScore(**vars(mean), prompts=len(scored), better=better)
    of = torch.tensor([names.index(item.category) for item in scored])
    weights = len(scored) / (len(names) * torch.bincount(of).double())[of]  # each category counts the same
    return SuiteScore(
        **vars(mean),
        prompts=len(scored),
        better=better,
        category_mean=_interval(every * weights, over=weights, share=share and bool((every == every[0]).all())),
        categories={
            name: CategoryScore(**vars(_interval(every[of == place], share=share)), prompts=int((of == place).sum()))
            for place, name in enumerate(names)
        },
    )


def _interval(values: Tensor, over: Tensor | None = None, *, share: bool = False) -> Estimate:
    ratios = values if over is None else (values / over).round(decimals=12)
    if len(values) < 2:
        return Estimate(value=float(ratios.mean()), low=None, high=None)
    if share and set(ratios.tolist()) <= {0.0, 1.0}:
        mean, low, high = intervals.share_interval(float(ratios.mean()), len(values))
    else:
        mean, low, high = intervals.bootstrap(values, over)
    return Estimate(value=mean, low=low, high=high)


def between(x: Tensor, y: Tensor) -> dict[str, Distance | Lacking]:
    """Distances of the features y of a suite's images from those x of a reference."""
    size = min(1000, len(x), len(y))

    def of(better: Better, compute: Callable[[], float]) -> Distance | Lacking:
        try:
            return Distance(value=compute(), pictures=len(y), reference=len(x), better=better)
        except ValueError as error:
            return Lacking(value=None, why=str(error), pictures=len(y), reference=len(x), better=better)

    return {
        "frechet": of("lower", lambda: sets.frechet_distance(Moments.of(x), Moments.of(y))),
        "kernel": of("lower", lambda: sets.kernel_distance(x, y, subset_size=size).mean),
        "precision": of("higher", lambda: sets.precision_recall(x, y).precision),
        "recall": of("higher", lambda: sets.precision_recall(x, y).recall),
    }


def relative_diversity(items: Sequence[Item], draws: int, y: Tensor, x: Tensor | None) -> SuiteScore | Lacking:
    """Mean distance between the images of a prompt; with the features x of a reference, divided by its own."""
    better: Better = "as the reference" if x is None else "close to 1"
    try:
        theirs = None if x is None else image_metrics.diversity(x, draws)
        mean = _interval(image_metrics.diversity(y, draws), theirs)
    except ValueError as error:
        return Lacking(value=None, why=str(error), prompts=len(items), better=better)
    return SuiteScore(**vars(mean), prompts=len(items), better=better)
