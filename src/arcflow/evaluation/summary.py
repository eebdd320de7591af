"""From a number for each picture to a table: means, intervals, differences, diversity."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arcflow.evaluation.suites.suite import Item
from arcflow.metrics import intervals, sets
from arcflow.metrics import pictures as picture_metrics
from arcflow.metrics.streaming import Moments


def summary(items: Sequence[Item], draws: int, scores: Mapping[str, float], better: str = "higher") -> dict[str, Any]:
    """Mean of the scores, prompt by prompt, with its interval; of each category; and the mean of those means.

    `scores` are by id of picture, or of prompt where a scorer gives one number for all its pictures. Prompts without a
    score are left out and not counted.
    """
    values: dict[str, float] = {}
    for item in items:
        found = [scores[name] for name in map(item.picture, range(draws)) if name in scores]
        if found or item.id in scores:
            values[item.id] = sum(found) / len(found) if found else scores[item.id]
    scored = [item for item in items if item.id in values]
    if not scored:
        return {"value": None, "why": "no prompt has a score", "prompts": 0, "better": better}
    every = torch.tensor([values[item.id] for item in scored], dtype=torch.float64)
    result = {**_interval(every), "prompts": len(scored), "better": better}
    names = list(dict.fromkeys(item.category for item in scored))
    if len(names) < 2:
        return result
    of = torch.tensor([names.index(item.category) for item in scored])
    weights = len(scored) / (len(names) * torch.bincount(of).double())[of]  # each category counts the same
    result["category_mean"] = _interval(every * weights, over=weights)
    result["categories"] = {
        name: {**_interval(every[of == place]), "prompts": int((of == place).sum())} for place, name in enumerate(names)
    }
    return result


def _interval(values: Tensor, over: Tensor | None = None) -> dict[str, Any]:
    if len(values) < 2:
        return {"value": float(values.mean()), "low": None, "high": None}
    mean, low, high = intervals.bootstrap(values, over)
    return {"value": mean, "low": low, "high": high}


def between(x: Tensor, y: Tensor) -> dict[str, dict[str, Any]]:
    """Distances of the features y of a suite's pictures from those x of a reference."""
    counts = {"pictures": len(y), "reference": len(x)}
    size = min(1000, len(x), len(y))

    def of(better: str, compute: Callable[[], float]) -> dict[str, Any]:
        return {**_if_possible(lambda: {"value": compute()}), **counts, "better": better}

    return {
        "frechet": of("lower", lambda: sets.frechet_distance(Moments.of(x), Moments.of(y))),
        "kernel": of("lower", lambda: sets.kernel_distance(x, y, subset_size=size).mean),
        "precision": of("higher", lambda: sets.precision_recall(x, y).precision),
        "recall": of("higher", lambda: sets.precision_recall(x, y).recall),
    }


def diversity(items: Sequence[Item], draws: int, y: Tensor, x: Tensor | None) -> dict[str, Any]:
    """Mean distance between the pictures of a prompt; with the features x of a reference, divided by its own."""

    def compute() -> dict[str, Any]:
        return _interval(
            picture_metrics.diversity(y, draws), None if x is None else picture_metrics.diversity(x, draws)
        )

    better = "as the reference" if x is None else "close to 1"
    return {**_if_possible(compute), "prompts": len(items), "better": better}


def _if_possible(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A number, or why there is none: too few pictures, for example."""
    try:
        return compute()
    except ValueError as error:
        return {"value": None, "why": str(error)}
