"""`arcflow recipes`: what a training needs and costs, before it is spent."""

import json
from dataclasses import asdict, dataclass

from arcflow import recipes

SECONDS = 4.45
"""Seconds of an H100 for a sample of FLUX.1 at 1024 x 1024: benchmarks/results/on_gpu.md, on the student's own path."""


def operations(height: int, width: int) -> float:
    """Multiplications of a call of FLUX.1 for a sample: Linears at every token, attention between all of them."""
    tokens = height * width // 256 + 512
    return tokens * 11.9e9 + 57 * 2 * tokens**2 * 3072


@dataclass(frozen=True, kw_only=True)
class RecipeCost:
    """What a recipe asks for."""

    recipe: str
    base: str
    card: str
    gigabytes: float | None
    """Memory of one card, computed at the true shapes (benchmarks/training_memory.py); None on CPU cores."""
    iterations: int
    batch: int
    hours: float | None
    """Hours of one such card (of two CPU cores for the small world); None where nobody has timed it."""
    unit: str
    measured: str
    """What the hours come from."""
    expected: str
    """What its student is expected to reach; "" where nobody knows."""
    sure: str
    """What that rests on."""

    @property
    def tenth(self) -> str:
        """What a tenth of the iterations takes."""
        return "not timed" if self.hours is None else _hours(self.hours / 10)


CARDS = {
    "world": ("two CPU cores", None),
    "world-one": ("two CPU cores", None),
    "world-quick": ("two CPU cores", None),
    "flux": ("80 GB, several", 51.2),
    "flux-published": ("80 GB, several", 51.3),
    "flux-day": ("48 GB", 42.3),
    "flux-48gb": ("48 GB", 41.1),
    "flux-24gb": ("24 GB", 20.2),
    "qwen-image": ("80 GB, several", 69.6),
    "qwen-image-published": ("80 GB, several", 68.1),
    "qwen-image-48gb": ("48 GB", 36.0),
}
"""Card and memory by recipe, as in docs/training.md; a recipe that is missing was not looked at."""

HOURS = {
    "world": (75 / 60, "this recipe, on two cores"),
    "world-one": (
        117 / 60,
        "this recipe, compiled, on one core of two that had other work; as many forward passes as world",
    ),
    "world-quick": (8 / 60, "this recipe, on two cores"),
}
"""Hours of recipes that were timed as a whole."""

SMALL = "the small bench alone: no real weights were trained"

EXPECTED = {
    "world": ("distance 0.080, 92.3 % right in two calls", "1024 held-out captions, one training"),
    "world-one": ("distance 0.102, 71.5 % right in one call", "1024 held-out captions, one training"),
    "world-quick": (
        "distance 0.087, 89.6 % right in two calls",
        "384 held-out captions, one training; two more have 0.086 and 0.100, 90.6 and 87.8 %",
    ),
    "flux": ("as near as flux-published, right as often or more", SMALL),
    "flux-day": ("behind flux: a hundredth of its walks", SMALL),
    "flux-48gb": ("behind flux: a twelfth of its samples", SMALL),
    "flux-24gb": ("behind flux: a twelfth of its samples", SMALL),
    "qwen-image": ("as near as qwen-image-published, right as often or more", SMALL),
    "qwen-image-48gb": ("behind qwen-image: a twelfth of its samples", SMALL),
    "flux-published": ("what its authors report", "arXiv 2602.09014"),
    "qwen-image-published": ("what its authors report", "arXiv 2602.09014"),
}
"""What a recipe's student is expected to reach, and what that rests on."""


def costs() -> list[RecipeCost]:
    """The cost of every recipe, in their order."""
    found = []
    for name, make in recipes.RECIPES.items():
        run = make()
        card, gigabytes = CARDS.get(name, ("not tried", None))
        hours, measured = HOURS.get(name, (None, "not timed"))
        if run.model.base.endswith("FLUX.1-dev") and run.model.quantize == "none":
            known = recipes.flux_published()
            smaller = operations(run.data.height, run.data.width) / operations(known.data.height, known.data.width)
            cheaper = recipes.forwards(run) / recipes.forwards(known)
            hours = run.optim.iterations * run.optim.batch * SECONDS * smaller * cheaper / 3600
            measured = f"{SECONDS} s a sample of flux-published on an H100, random weights, times the samples"
            if cheaper != 1:
                measured += f", times {cheaper:.2f} for the calls of a sample"
            if smaller < 1:
                measured += f", times {smaller:.2f} for the size by its operations"
        expected, sure = EXPECTED.get(name, ("", "not tried"))
        row = RecipeCost(
            recipe=name,
            base=run.model.base,
            card=card,
            gigabytes=gigabytes,
            iterations=run.optim.iterations,
            batch=run.optim.batch,
            hours=hours,
            unit="hours" if run.model.base == "world" else "GPU-hours",
            measured=measured,
            expected=expected,
            sure=sure,
        )
        found.append(row)
    return found


def _hours(hours: float) -> str:
    return f"{60 * hours:.0f} min" if hours < 2 else f"{float(f'{hours:.2g}'):,.0f} h"


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the recipes of `arcflow train`: card, memory, GPU-hours, and what the hours were measured on."""

    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        from arcflow.reports.table import Line, Table

        found = costs()
        if self.json:
            print(json.dumps([asdict(one) for one in found], indent=2))
            return
        rows = [
            Line.of(
                one.recipe,
                one.card,
                f"{one.gigabytes:.0f} GB" if one.gigabytes else "-",
                f"{one.iterations} x {one.batch}",
                "not timed" if one.hours is None else _hours(one.hours),
                one.tenth,
            )
            for one in found
        ]
        print(Table(["", "card", "memory", "iterations x batch", "GPU-hours", "a tenth"], rows).text())
        print("\nGPU-hours are those of one H100; of two CPU cores for the recipes of the world. Measured on:")
        for one in found:
            if one.hours is not None:
                print(f"  {one.recipe:<16} {one.measured}")
        print("\nExpected, and what that rests on:")
        for one in found:
            if one.expected:
                print(f"  {one.recipe:<20} {one.expected} ({one.sure})")
        print("\nA tenth: --optim.iterations N; the schedule is shortened with it. Nobody has trained the real weights")
        print("with these recipes yet: what a tenth gives on FLUX is not known.")
