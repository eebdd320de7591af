"""Who takes part in a comparison: the methods, and ArcFlow with one thing changed.

The first entrant of a study is the one that the others are held against."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import get_args

from arcflow import paper, recipes
from arcflow.comparison.config import Plan, Study
from arcflow.config import PARTS, Budget
from arcflow.distillation.method import Method
from arcflow.methods import arcflow, consistency, dmd2, piflow, progressive, reflow, scfm, series, twinflow

Changes = dict[str, object]
"""Settings by name, as `dataclasses.replace` takes them; some of them may be functions of the number of calls."""

PUBLISHED: Changes = {"hold": 0, "decay": PARTS * paper.FLUX_DECAY // paper.FLUX_ITERATIONS}
"""The teacher's share falls over the first fifth: 2000 of 10 000 iterations (FLUX)."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A method, and its own settings where they differ from those of all."""

    method: Method
    name: str = ""
    """Name in files; by default the method's."""
    title: str = ""
    distill: Changes = field(default_factory=dict)
    model: Changes = field(default_factory=dict)
    optim: Changes = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    """Parts of the head that are not trained: "logweights", "loggamma"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.method.name)
        object.__setattr__(self, "title", self.title or self.method.title)


def settings(plan: Plan, entrant: Entrant, calls: int, seed: int) -> Budget:
    """The training of this entrant: `recipes.comparison`, with what plan and entrant change in it."""
    recipe = recipes.comparison()
    run = recipe.run
    model = replace(run.model, base=plan.model, rank=plan.rank, modes=entrant.method.modes)
    common: Changes = {"steps": calls, "states": recipes.states(calls), "reuse": recipes.reuse(plan.budget)}
    optim = replace(run.optim, batch=plan.batch, lr=plan.lr, lr_log_gamma=plan.lr / 100)
    own = {name: value(calls) if callable(value) else value for name, value in entrant.distill.items()}
    run = replace(
        run,
        seed=seed,
        model=replace(model, **entrant.model),
        distill=replace(run.distill, **(common | own)),
        data=replace(run.data, count=plan.prompts),
        optim=replace(optim, **entrant.optim),
    )
    return replace(recipe, run=run, forwards=plan.budget)


def arc(
    name: str = "arcflow",
    title: str = "ArcFlow",
    *,
    distill: Changes | None = None,
    model: Changes | None = None,
    optim: Changes | None = None,
    frozen: tuple[str, ...] = (),
) -> Entrant:
    """ArcFlow with something changed."""
    return Entrant(
        method=arcflow.ARCFLOW,
        name=name,
        title=title,
        distill=distill or {},
        model=model or {},
        optim=optim or {},
        frozen=frozen,
    )


OURS: Changes = {"handover": "average", "end": recipes.end}
"""Own states of the averaged student, and a part of the loss on the end of the step."""


def ours(
    name: str = "coefficients", title: str = "", *, distill: Changes | None = None, optim: Changes | None = None
) -> Entrant:
    """The project's own objective: the path in coefficients, a part of the loss on the end of the step, later
    segments from where the averaged student arrives; with something changed."""
    return Entrant(
        method=series.COEFFICIENTS,
        name=name,
        title=title,
        model={"form": "coefficients"},
        distill=OURS | (distill or {}),
        optim=optim or {},
    )


SLOW: Changes = {"lr": 5e-4, "lr_log_gamma": 5e-6}
"""A quarter of the rate of all."""

WARM: Changes = {"warm_start": True}


def _start() -> list[Entrant]:
    """Where a training starts, and at what rate it goes on: a high one forgets a good start."""
    straight = Entrant(method=arcflow.LINEAR)
    return [
        ours(),
        ours("coefficients_slow", "ours, a quarter of the rate", optim=SLOW),
        ours("coefficients_warm", "ours, warm start, a quarter of the rate", distill=WARM, optim=SLOW),
        ours("coefficients_fast", "ours, warm start, the rate of all", distill=WARM),
        straight,
        replace(straight, name="linear_slow", title="Linear, a quarter of the rate", optim=SLOW),
        replace(
            straight, name="linear_warm", title="Linear, warm start, a quarter of the rate", distill=WARM, optim=SLOW
        ),
    ]


def _end() -> list[Entrant]:
    straight = Entrant(
        method=arcflow.LINEAR,
        name="linear_end",
        title="straight line, end and own states",
        distill=OURS,
    )
    bent = arc("arcflow_end", "exponentials, end and own states", distill=OURS)
    return [
        ours(),
        ours("coefficients_plain", "neither end nor own states", distill={"handover": "walk", "end": 0.0}),
        ours("coefficients_own", "own states, no end", distill={"end": 0.0}),
        ours("coefficients_fifth", "a fifth on the end", distill={"end": 0.2}),
        ours("coefficients_half", "half on the end", distill={"end": 0.5}),
        ours("coefficients_walk", "end, no own states", distill={"handover": "walk"}),
        straight,
        bent,
    ]


def _methods() -> list[Entrant]:
    return [
        arc(),
        ours(),
        Entrant(method=arcflow.LINEAR),
        Entrant(method=progressive.METHOD),
        Entrant(method=reflow.METHOD),
        Entrant(method=scfm.METHOD),
        Entrant(method=consistency.METHOD),
        Entrant(method=twinflow.METHOD),
        Entrant(method=dmd2.METHOD),
        Entrant(method=piflow.GM),
        Entrant(method=piflow.DX),
        Entrant(method=series.ORTHOGONAL),
    ]


def _modes() -> list[Entrant]:
    return [arc(), *(arc(f"modes_{k}", f"K = {k}", model={"modes": k}) for k in (1, 2, 4, 8, 32))]


def _basis() -> list[Entrant]:
    turned = arc("directions", "exponentials, the optimizer's directions", optim={"directions": "segment"})
    return [arc(), turned, Entrant(method=series.LEGENDRE), Entrant(method=series.ORTHOGONAL)]


def _window() -> list[Entrant]:
    return [arc(), *(arc(f"window_{n}", f"window {n}/128", distill={"window": n}) for n in (0, 8, 16))]


def _states() -> list[Entrant]:
    return [arc(), *(arc(f"states_{n}", f"{n} states", distill={"states": n}) for n in (2, 6, 8))]


def _ratio() -> list[Entrant]:
    return [
        arc(),
        arc("ratio_published", "teacher's part falls in the first fifth", distill=PUBLISHED),
        arc("ratio_late", "teacher's part falls from 0.7 to 0.8", distill={"hold": 700, "decay": 100}),
        arc("ratio_none", "on its own path from the start", distill={"hold": 0, "decay": 0}),
        Entrant(method=arcflow.LINEAR),
        Entrant(
            method=arcflow.LINEAR,
            name="linear_published",
            title="Linear, teacher's part falls in the first fifth",
            distill=PUBLISHED,
        ),
    ]


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
    plain = arc("published", "all as published", distill=PUBLISHED | published)
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
    "end": _end,
    "start": _start,
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
