"""What decides each claim: functions of results, which say whether it holds, what was measured, and why.

A difference counts only if its interval over the trainings leaves out 0. The claims themselves: `reports.claims`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
import torch

from arcflow import paper
from arcflow.comparison.results import Comparison, Mean, Means, SeedMean, Verdict, verdict
from arcflow.evaluation.results import Evaluation, Result
from arcflow.metrics.intervals import seed_difference
from arcflow.reports.claim_files import Ideal, Policies
from arcflow.student.places import trainable_shapes

Holds = Literal["holds", "holds in part", "does not hold", "not measured"]

KEPT = 0.95
"""Share of the teacher's diversity, or accuracy, from which it counts as kept."""

KEPT_BY_ONE = 0.90
"""Share of the teacher's accuracy from which one call counts as enough."""

ARCFLOW = "arcflow"
"""The published form in the comparison of the methods."""

MENDED = "orthogonal"
"""Its variant there with exponentials made orthogonal."""

COEFFICIENTS = "coefficients"
"""The project's own form there."""

NO_RIVALS = (ARCFLOW, MENDED, COEFFICIENTS)
"""Forms of one method."""


@dataclass(frozen=True)
class Network:
    """A diffusers class, with its own defaults but for those that are named."""

    transformer: str
    changes: dict[str, bool] = field(default_factory=dict)


LARGE = {
    "FLUX.1-dev": Network("FluxTransformer2DModel", {"guidance_embeds": True}),
    "Qwen-Image": Network("QwenImageTransformer2DModel"),
}
"""The large models."""


class NotMeasured(Exception):
    """What a claim needs is not among the results: a comparison of some entrants, or of some numbers of calls."""


def at(comparison: Comparison, name: str, calls: int = 2) -> Means:
    """An entrant's means at a number of calls.

    Raises:
        NotMeasured: it was not run.
    """
    if name not in comparison.rows:
        raise NotMeasured(f"the results have no {name!r}")
    if calls not in comparison.rows[name].calls:
        raise NotMeasured(f"the results have {name!r} at no {calls} call{'s' * (calls > 1)}")
    return comparison.rows[name].calls[calls]


@dataclass(frozen=True)
class Finding:
    """What came out."""

    holds: Holds
    measured: str
    why: str = ""


Claim = Callable[..., Finding]
"""A function of the files that `CLAIMS` names beside it."""


def two_calls(shipped: Evaluation) -> Finding:
    """Two network calls draw what took the teacher 50."""
    ours, teacher = shipped.arcflow_2, shipped.teacher_50
    share = ours.right / teacher.right
    why = f"The shipped student reaches {share:.1%} of the teacher's accuracy; {KEPT:.0%} would count as its quality."
    return Finding("holds" if share >= KEPT else "holds in part", _quality(shipped, ours), why)


def one_call(one: Evaluation) -> Finding:
    """A student that was trained for one call keeps nine tenths of the teacher's accuracy."""
    ours, teacher = one.rows[one.own], one.teacher_50
    share = ours.right / teacher.right
    why = f"The shipped one-step student reaches {share:.1%} of the teacher's accuracy."
    return Finding("holds" if share >= KEPT_BY_ONE else "does not hold", _quality(one, ours), why)


def _quality(results: Evaluation, ours: Result) -> str:
    teacher = results.teacher_50
    return (
        f"{ours.nfe} call{'s' * (ours.nfe > 1)} instead of {teacher.nfe}; accuracy {ours.right:.1%} of the teacher's "
        f"{teacher.right:.1%}, distance {ours.mse_to_teacher:.3f} "
        f"(Euler in 4 calls {results.euler_4.mse_to_teacher:.3f})"
    )


def faster(shipped: Evaluation) -> Finding:
    """About 40 times faster."""
    ours, teacher = shipped.arcflow_2, shipped.teacher_50
    network = teacher.transformer / ours.transformer
    whole = teacher.seconds_per_image / ours.seconds_per_image
    measured = f"transformer {network:.0f} times, the whole pipeline {whole:.0f} times less time an image"
    fewer = paper.TEACHER_STEPS // paper.STEPS
    why = (
        f"Calls are {fewer} times fewer for FLUX.1 ({paper.TEACHER_STEPS} to {paper.STEPS}) and {2 * fewer} times for "
        f"Qwen-Image, whose teacher takes two a step for its guidance: {paper.SPEEDUP} is between them. "
        "Text encoders and decoder stay, and bound what the pipeline gains."
    )
    return Finding("holds in part" if network < paper.SPEEDUP else "holds", measured, why)


def few_parameters() -> Finding:
    """Under 5 % of the parameters are trained."""
    shares = _trained_shares()
    measured = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
    under = [share < paper.TRAINED for share in shares.values()]
    holds: Holds = "holds" if all(under) else "holds in part" if any(under) else "does not hold"
    why = f"Counted on the networks at full size, LoRA of rank {paper.RANK} and {paper.MODES} modes as published."
    return Finding(holds, measured, why)


@cache
def _trained_shares() -> dict[str, float]:
    """Of each large model, counted once: no file has a say in it."""
    return {name: trained_share(model) for name, model in LARGE.items()}


def trained_share(model: Network) -> float:
    """Trained numbers over those of the base, from shapes alone."""
    import diffusers

    with torch.device("meta"):
        net = getattr(diffusers, model.transformer)(**model.changes)
    trained = sum(int(np.prod(shape)) for shape in trainable_shapes(net, modes=paper.MODES, rank=paper.RANK).values())
    return trained / sum(p.numel() for p in net.parameters())


def stands(theirs: SeedMean, ours: SeedMean) -> Verdict:
    """How a number of another entrant stands to ours, over the trainings of both."""
    return verdict(Mean(**seed_difference(theirs.seeds, ours.seeds)._asdict()))


@dataclass(frozen=True)
class Standing:
    """Who of the others is better than an entrant by more than noise, and who cannot be told from it; their titles."""

    nearer: list[str]
    truer: list[str]
    level: list[str]
    """As near, within noise."""

    @classmethod
    def of(cls, methods: Comparison, name: str, calls: int, leaving_out: Sequence[str]) -> "Standing":
        """That of an entrant among all that have no second network, at a number of calls."""
        ours = at(methods, name, calls)
        rows = [row for other, row in methods.rows.items() if other not in leaving_out and not row.second_network]
        others = {row.title: row.calls[calls] for row in rows if calls in row.calls}
        distances = {title: stands(means.distance, ours.distance) for title, means in others.items()}
        rights = {title: stands(means.accuracy, ours.accuracy) for title, means in others.items()}
        return cls(
            nearer=[title for title, apart in distances.items() if apart == "lower"],
            truer=[title for title, apart in rights.items() if apart == "higher"],
            level=[title for title, apart in distances.items() if apart == "same"],
        )

    def __str__(self) -> str:
        return (
            f"beyond noise nearer: {_list(self.nearer)}; more often right: {_list(self.truer)}; "
            f"as near within noise: {_list(self.level)}"
        )


def _list(titles: Sequence[str]) -> str:
    return ", ".join(titles) or "none"


def ahead(methods: Comparison) -> Finding:
    """At equal training, every method without a second network is farther from the teacher, by more than noise. Held in
    part if none is nearer or right more often by more than noise."""
    standing = Standing.of(methods, ARCFLOW, 2, NO_RIVALS)
    level = standing.truer or standing.level
    holds: Holds = "does not hold" if standing.nearer else "holds in part" if level else "holds"
    return Finding(holds, f"{_both(at(methods, ARCFLOW))}; {standing}", mended(methods))


def first_or_tied(methods: Comparison, calls: int) -> Finding:
    """At equal training no other method without a second network is nearer, or right more often, by more than noise."""
    standing = Standing.of(methods, COEFFICIENTS, calls, [COEFFICIENTS])
    better = bool(standing.nearer) + bool(standing.truer)
    holds: Holds = "holds" if not better else "holds in part" if better == 1 else "does not hold"
    return Finding(holds, f"{_both(at(methods, COEFFICIENTS, calls))}; {standing}")


def _both(means: Means) -> str:
    return f"distance {_number(means.distance)}, accuracy {means.accuracy.mean:.1%}"


def mended(methods: Comparison) -> str:
    """What the same method reaches with functions of time that are independent over the step."""
    if MENDED not in methods.rows:
        return ""
    means = at(methods, MENDED)
    return (
        f"Sixteen exponentials are nearly the same function over a step, which an optimizer feels: four of them, made "
        f"orthogonal over it, reach {_number(means.distance)} and {means.accuracy.mean:.1%}."
    )


STRAIGHT = "The same network, objective and budget; only the path of a call is straight."


def momentum_helps(methods: Comparison) -> Finding:
    """Momentum beats straight lines at 2 calls."""
    return _against(methods, ARCFLOW, "linear", STRAIGHT)


def bends_help(methods: Comparison) -> Finding:
    """The project's own objective beats straight lines at 2 calls."""
    return _against(methods, COEFFICIENTS, "linear", "The straight line has neither bends nor the end of the step.")


def _against(methods: Comparison, name: str, other: str, why: str, calls: int = 2) -> Finding:
    ours = at(methods, name, calls)
    theirs = at(methods, other, calls)
    apart = stands(theirs.distance, ours.distance)
    holds: Holds = "holds" if apart == "higher" else "does not hold"
    more = f"; within noise ({len(ours.distance.seeds)} trainings)" if apart == "same" else ""
    measured = (
        f"distance {_number(ours.distance)} against {_number(theirs.distance)}, accuracy "
        f"{ours.accuracy.mean:.1%} against {theirs.accuracy.mean:.1%}{more}"
    )
    return Finding(holds, measured, why)


def _number(value: SeedMean) -> str:
    if value.low is None:
        return f"{value.mean:.4f}"
    return f"{value.mean:.4f} [{value.low:.4f}, {value.high:.4f}]"


def closed_form(methods: Comparison, policies: Policies) -> Finding:
    """The closed form beats sub-stepped policies in time at equal quality."""
    gm, dx = (_against(methods, ARCFLOW, name, "") for name in ("piflow_gm", "piflow_dx"))
    measured = (
        f"a step at FLUX size takes {policies.gm.ratio:.0f} (GMFlow) and {policies.dx.ratio:.0f} times (DX) "
        f"ours; quality: {gm.measured} (GMFlow), {dx.measured} (DX)"
    )
    faster_step = min(policies.gm.ratio, policies.dx.ratio) > 1
    ours = at(methods, ARCFLOW).distance
    as_good = all(stands(at(methods, name).distance, ours) != "lower" for name in ("piflow_gm", "piflow_dx"))
    holds: Holds = "holds" if faster_step and as_good else "holds in part" if faster_step else "does not hold"
    return Finding(holds, measured, "The step is a small part of a call on a large network in either case.")


def converges(methods: Comparison) -> Finding:
    """It converges over four times faster than TwinFlow at equal training."""
    return _sooner(methods, ARCFLOW, "twinflow", paper.SOONER)


def sooner_than_full(rank: Comparison) -> Finding:
    """A LoRA and a head converge faster than training every weight."""
    return _sooner(rank, ARCFLOW, "full", 1.0)


def fewer_passes(methods: Comparison, third: Comparison) -> Finding:
    """The project's own objective ends after a third of the forward passes where the published form ends after all."""
    ours, theirs = at(third, COEFFICIENTS), at(methods, ARCFLOW)
    apart = stands(ours.distance, theirs.distance)
    near = ours.distance.mean <= theirs.distance.mean
    holds: Holds = "holds" if near else "holds in part" if apart == "same" else "does not hold"
    measured = (
        f"{_both(ours)} after {third.about.budget:,} forward-equivalents, against {_both(theirs)} after "
        f"{methods.about.budget:,}; the published form after {third.about.budget:,}: {_both(at(third, ARCFLOW))}"
    )
    return Finding(holds, measured, "Farther by its mean, within noise." if holds == "holds in part" else "")


def _sooner(comparison: Comparison, name: str, other: str, factor: float) -> Finding:
    ours, theirs = at(comparison, name), at(comparison, other)
    if not (ours.curve and theirs.curve):
        raise NotMeasured(f"the results have no curves of {name!r} and {other!r}")
    spent, end = theirs.curve[-1]
    reached = [cost for cost, distance in ours.curve if distance <= end]
    if not reached:
        best = min(distance for _, distance in ours.curve)
        return Finding("does not hold", f"it ends at {best:.4f}, the other at {end:.4f} on the same budget")
    ratio = spent / reached[0]
    measured = (
        f"after {reached[0]:,.0f} of {spent:,.0f} forward-equivalents it is where the other is at the end "
        f"({end:.4f}): " + (f"at least {ratio:.1f} times sooner" if ratio > 1 else "no sooner")
    )
    holds: Holds = "does not hold" if ratio <= 1 else "holds" if ratio >= factor else "holds in part"
    return Finding(holds, measured, "Measured at a few points of the budget.")


def diverse(methods: Comparison, name: str = ARCFLOW) -> Finding:
    """Diversity is kept."""
    ours = at(methods, name).diversity
    others = ", ".join(
        f"{row.title} {at(methods, other).diversity.mean:.2f}" for other, row in methods.rows.items() if other != name
    )
    measured = f"{ours.mean:.3f} of the teacher's, at 2 calls (others: {others})"
    return Finding("holds" if ours.mean >= KEPT else "does not hold", measured, "1 is the teacher's own.")


def on_digits(digits: Comparison) -> Finding:
    """On pictures that nothing was tuned on, the project's own objective is nearer than the published form."""
    one, two = (_against(digits, COEFFICIENTS, ARCFLOW, "", calls) for calls in (1, 2))
    holding = [one.holds, two.holds].count("holds")
    holds: Holds = "holds" if holding == 2 else "holds in part" if holding else "does not hold"
    standing = Standing.of(digits, COEFFICIENTS, 2, [COEFFICIENTS])
    measured = f"1 call: {one.measured}; 2 calls: {two.measured}; there {standing}"
    return Finding(holds, measured, "Handwritten digits, another teacher; no setting was changed for them.")


def weak_at_one(methods: Comparison) -> Finding:
    """One call is weak, the open problem the authors name."""
    one = at(methods, ARCFLOW, 1)
    two = at(methods, ARCFLOW)
    rows = [row for row in methods.rows.values() if 1 in row.calls and not row.second_network]
    best = min(rows, key=lambda row: row.calls[1].distance.mean)
    measured = (
        f"trained for 1 call: distance {_number(one.distance)}, accuracy {one.accuracy.mean:.1%}; for 2: "
        f"{_number(two.distance)}, {two.accuracy.mean:.1%}. Nearest at 1 call: {best.title}, "
        f"{_number(best.calls[1].distance)}"
    )
    low = one.distance.low
    high = two.distance.high
    weaker = low is None or high is None or low > high
    return Finding("holds" if weaker else "does not hold", measured)


def ideal(bounds: Ideal, shipped: Evaluation) -> Finding:
    """K modes can follow the teacher's path, were it not for the network."""
    bound = bounds.calls.get(2)
    ours = shipped.arcflow_2.mse_to_teacher
    if bound is None or not {1, 16} <= bound.modes.keys():
        raise NotMeasured("the results have no mixtures of 1 and of 16 modes at 2 calls")
    modes = ", ".join(f"K = {k} {end:.1g}" for k, end in bound.modes.items())
    measured = f"mixtures fitted to single paths end at {modes} in 2 calls; the shipped student at {ours:.3f}"
    why = "What is missing is what the network has not learned; even an ideal straight line is far closer than it."
    holds: Holds = "holds" if bound.modes[16] < ours else "does not hold"
    return Finding(holds, measured, why if bound.modes[1] < ours else "")
