"""Who takes part in a comparison: the methods, and ArcFlow with one thing changed.

The first entrant of a study is the one that the others are held against.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from arcflow.baselines import arcflow, bases, consistency, dmd, linear, piflow, progressive, reflow, twinflow
from arcflow.baselines.arcflow import LED, PUBLISHED, Lead
from arcflow.contest import Entrant
from arcflow.rules import Study


def arc(name: str = "arcflow", title: str = "ArcFlow", lead: Lead = LED, **changes: Any) -> Entrant:
    """ArcFlow with something changed."""
    method = replace(arcflow.METHOD, objective=partial(arcflow.matching, lead=lead))
    return Entrant(method=method, name=name, title=title, **changes)


def _methods() -> list[Entrant]:
    others = (linear, progressive, reflow, consistency, twinflow, dmd)
    return [
        arc(),
        *(Entrant(method=module.METHOD) for module in others),
        Entrant(method=piflow.GM),
        Entrant(method=piflow.DX),
        Entrant(method=bases.ORTHOGONAL),
    ]


def _modes() -> list[Entrant]:
    return [arc(), *(arc(f"modes_{k}", f"K = {k}", model={"modes": k}) for k in (1, 2, 4, 8, 32))]


def _basis() -> list[Entrant]:
    turned = arc("directions", "exponentials, the optimizer's directions", optim={"directions": "segment"})
    return [arc(), turned, Entrant(method=bases.LEGENDRE), Entrant(method=bases.ORTHOGONAL)]


def _window() -> list[Entrant]:
    return [arc(), *(arc(f"window_{n}", f"window {n}/128", distill={"window": n}) for n in (0, 8, 16))]


def _states() -> list[Entrant]:
    return [arc(), *(arc(f"states_{n}", f"{n} states", distill={"states": n}) for n in (2, 6, 8))]


def _ratio() -> list[Entrant]:
    return [
        arc(),
        arc("ratio_published", "teacher's part falls in the first fifth", lead=PUBLISHED),
        arc("ratio_late", "teacher's part falls from 0.7 to 0.8", lead=(0.7, 0.1)),
        arc("ratio_none", "on its own path from the start", lead=(0.0, 0.0)),
        Entrant(method=linear.METHOD),
        _straight("linear_published", "Linear, teacher's part falls in the first fifth", PUBLISHED),
    ]


def _straight(name: str, title: str, lead: Lead) -> Entrant:
    objective = partial(arcflow.matching, modes_drop=False, lead=lead)
    return Entrant(method=replace(linear.METHOD, objective=objective), name=name, title=title)


def _rank() -> list[Entrant]:
    ranks = [arc(f"rank_{r}", f"rank {r}", model={"rank": r}) for r in (4, 64)]
    narrow = arc("feed_forward", "no attention layers", model={"targets": "feed_forward"})
    return [arc(), *ranks, narrow, arc("full", "every weight", model={"targets": "full"}, optim={"lr": 5e-4})]


def _gates() -> list[Entrant]:
    return [
        arc(),
        arc("gates_frozen", "gates frozen", frozen=("logweights",)),
        arc("gammas_frozen", "momentum factors frozen", frozen=("loggamma",)),
        arc("both_frozen", "both frozen", frozen=("logweights", "loggamma")),
    ]


def _shift() -> list[Entrant]:
    return [arc(), *(arc(f"shift_{n:g}", f"shift {n:g}", distill={"shift": n}) for n in (1.0, 2.0, 5.0, 8.0, 14.0))]


def _last_step() -> list[Entrant]:
    scales = (0.5, 1.3, 2.0)
    return [arc(), *(arc(f"last_{n:g}", f"last step {n:g}", distill={"final_step_scale": n}) for n in scales)]


def _walk() -> list[Entrant]:
    published = {"spread": "uniform", "solver": "euler", "handover": "walk"}
    plain = arc("published", "all as published", lead=PUBLISHED, distill=published)
    return [arc(), arc("sorted", "sorted uniform times", distill={"spread": "uniform"}), plain]


def _rates() -> list[Entrant]:
    rates = (5e-4, 1e-3, 4e-3)
    first = _methods()
    more = [
        Entrant(
            method=e.method,
            name=f"{e.name}_{rate:g}",
            title=f"{e.title}, rate {rate:g}",
            optim=e.optim | {"lr": rate, "lr_log_gamma": rate / 100},
        )
        for e in first
        for rate in rates
    ]
    return [*first, *more]


STUDIES: dict[str, Callable[[], list[Entrant]]] = {
    "methods": _methods,
    "modes": _modes,
    "basis": _basis,
    "window": _window,
    "states": _states,
    "ratio": _ratio,
    "rank": _rank,
    "gates": _gates,
    "shift": _shift,
    "last_step": _last_step,
    "walk": _walk,
    "rates": _rates,
}


def entrants(study: Study) -> list[Entrant]:
    """Who takes part in this study."""
    if study not in STUDIES:
        raise ValueError(f"no study {study!r}: expected one of {', '.join(get_args(Study))}")
    return STUDIES[study]()
