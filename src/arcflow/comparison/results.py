"""The numbers of a comparison: means with intervals over the trainings, rank, what is more than noise.

A `TrialResult` is what one training came to, a `Comparison` what all of them say. Both are files of JSON, which
`system.records` reads and writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from arcflow.comparison.config import MAIN, Plan, comparison_command
from arcflow.comparison.jobs import Job, wanted
from arcflow.comparison.subject import WORLD, Subject
from arcflow.metrics.intervals import Interval, seed_difference, seed_interval
from arcflow.system.packages import About, about

TITLES = {"euler": "plain Euler", "heun": "Heun", "dpmpp": "DPM-Solver++"}
"""Titles of the teacher's own solvers."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One number for each held-out image that a student draws."""

    distance: list[float]
    """Squared distance to the teacher's final latents from the same noise."""
    right: list[bool]
    """Whether the image shows what its prompt says."""
    diversity: float
    """Distance between images of one prompt, over the teacher's."""
    broken: int
    """Images whose latents are not finite."""
    to_real: float | None = None
    """Distance of the images as a set to real ones, on a subject that has some."""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What one training, or one solver, came to."""

    entrant: str
    seed: int
    results: dict[int, Measured]
    """Numbers of the images, by the number of calls."""
    title: str
    spent: int
    """Forward-equivalents; 0 for a solver."""
    curve: list[tuple[int, float]]
    """Forward-equivalents spent, and the distance then."""
    trained: int
    """Numbers that were trained."""
    iterations: int | None = None
    skipped: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean, and the ends of its 95 % interval; of one training there is none."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class SeedMean(Mean):
    """A mean over trainings that differ in their seed."""

    seeds: list[float]


@dataclass(frozen=True, kw_only=True)
class Apart:
    """How far an entrant's means lie above the first entrant's; None where the first was not run."""

    distance: Mean | None = None
    accuracy: Mean | None = None
    diversity: Mean | None = None


@dataclass(frozen=True, kw_only=True)
class Means:
    """An entrant at one number of calls, over its trainings."""

    distance: SeedMean
    accuracy: SeedMean
    diversity: SeedMean
    skills: dict[str, float]
    """Accuracy, skill by skill."""
    curve: list[tuple[float, float]]
    """Forward-equivalents spent, and the distance then; empty for a solver."""
    broken: int
    """Images that were not finite, of all trainings."""
    pictures: list[str]
    """Where its runs keep their images."""
    less_first: Apart
    to_real: SeedMean | None = None
    """Distance of the images as a set to real ones, on a subject that has some."""


@dataclass(frozen=True, kw_only=True)
class EntrantRow:
    """One entrant."""

    title: str
    trained: int
    """Numbers that were trained; 0 for a solver."""
    calls: dict[int, Means]
    second_network: bool
    """Whether it trains a second network beside the student, which the others do not have."""


Rows = dict[str, EntrantRow]


@dataclass(frozen=True, kw_only=True)
class ComparisonAbout(About):
    """What a comparison was made with."""

    budget: int
    seeds: int
    count: int
    batch: int
    prompts: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All entrants of a study."""

    rows: Rows
    first: str
    """The entrant that the others are held against."""
    about: ComparisonAbout


def summary(plan: Plan, records: dict[Job, TrialResult], subject: Subject = WORLD) -> Comparison:
    """For each entrant and number of calls the means over its trainings with their intervals, and how they differ from
    those of the study's first."""
    skills: dict[str, list[int]] = {}
    for place, text in enumerate(subject.held_out(plan.count)):
        skills.setdefault(subject.skill(text), []).append(place)
    field = wanted(plan)
    first = field[0].name
    doubled = {entrant.name for entrant in field if entrant.method.second_network}

    runs: dict[str, list[Job]] = {}
    for job in records:
        runs.setdefault(job.entrant, []).append(job)
    means = {
        name: {
            n: _means({job.name: records[job] for job in of if n in job.calls}, n, skills)
            for n in sorted({n for job in of for n in job.calls})
        }
        for name, of in runs.items()
    }
    rows = {
        name: EntrantRow(
            title=records[of[0]].title,
            trained=records[of[0]].trained,
            calls={n: replace(m, less_first=_apart(m, means[first].get(n))) for n, m in means[name].items()},
            second_network=name in doubled,
        )
        for name, of in runs.items()
    }
    sizes = {name: getattr(plan, name) for name in ("budget", "seeds", "count", "batch", "prompts")}
    command = comparison_command(plan, subject.command, subject.usual)
    return Comparison(rows=rows, first=first, about=ComparisonAbout(**about(command=command, **sizes)))


def _means(runs: dict[str, TrialResult], calls: int, skills: dict[str, list[int]]) -> Means:
    measured = [run.results[calls] for run in runs.values()]
    curves = [run.curve for run in runs.values() if run.curve]
    right = np.mean([one.right for one in measured], 0)
    to_real = [one.to_real for one in measured if one.to_real is not None]
    return Means(
        distance=_around([float(np.mean(one.distance)) for one in measured]),
        accuracy=_around([float(np.mean(one.right)) for one in measured]),
        diversity=_around([one.diversity for one in measured]),
        skills={skill: float(right[rows].mean()) for skill, rows in skills.items()},
        curve=[(spent, distance) for spent, distance in np.mean(curves, 0).tolist()] if curves else [],
        broken=sum(one.broken for one in measured),
        pictures=list(runs),
        less_first=Apart(),
        to_real=_around(to_real) if to_real else None,
    )


def _around(values: Sequence[float]) -> SeedMean:
    if len(values) < 2:
        return SeedMean(mean=values[0], low=None, high=None, seeds=list(values))
    return SeedMean(**seed_interval(values)._asdict(), seeds=list(values))


def _apart(means: Means, first: Means | None) -> Apart:
    if first is None:
        return Apart()
    return Apart(
        distance=_mean(seed_difference(means.distance.seeds, first.distance.seeds)),
        accuracy=_mean(seed_difference(means.accuracy.seeds, first.accuracy.seeds)),
        diversity=_mean(seed_difference(means.diversity.seeds, first.diversity.seeds)),
    )


def _mean(interval: Interval) -> Mean:
    return Mean(mean=interval.mean, low=interval.low, high=interval.high)


def counts(rows: Rows) -> list[int]:
    """Every number of calls that some entrant was run at."""
    return sorted({calls for row in rows.values() for calls in row.calls})


def main_calls(rows: Rows) -> int:
    """The number of calls at which entrants are ranked."""
    return MAIN if MAIN in counts(rows) else counts(rows)[0]


def ranked(rows: Rows, calls: int) -> list[str]:
    """Names, nearest to the teacher first; those that were not run at this number of calls are left out."""
    there = [name for name, row in rows.items() if calls in row.calls]
    return sorted(there, key=lambda name: rows[name].calls[calls].distance.mean)


Verdict = Literal["same", "lower", "higher"]


def verdict(apart: Mean | None) -> Verdict:
    """How an entrant stands to the first, by their difference: "same" is all that noise leaves."""
    if apart is None or apart.low is None or apart.high is None or apart.low <= 0 <= apart.high:
        return "same"
    return "lower" if apart.high < 0 else "higher"
