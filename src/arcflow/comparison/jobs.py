"""Which runs a comparison is made of."""

from dataclasses import dataclass

from arcflow.comparison.config import MAIN, Plan, Study
from arcflow.comparison.entrants import Entrant, entrants
from arcflow.distillation.solvers import SOLVERS


@dataclass(frozen=True)
class Job:
    """One training, or one solver that needs none."""

    study: Study
    entrant: str
    calls: tuple[int, ...]
    """Numbers of calls that its student is measured at."""
    seed: int
    any_calls: bool = False
    """Whether the training is for any number of calls."""

    @property
    def name(self) -> str:
        calls = "any" if self.any_calls else "".join(map(str, self.calls))
        return f"{self.entrant}/{calls}-{self.seed}"

    @property
    def trained_for(self) -> int:
        """Number of calls that the objective is told."""
        return MAIN if self.any_calls else self.calls[0]


def jobs(plan: Plan) -> list[Job]:
    """All runs of a plan. Those at the main number of calls come first: there is something to see after a while."""
    field, seeds = wanted(plan), range(plan.seeds)
    found = [Job(plan.study, name, (n,), 0) for name in solvers(plan) for n in plan.calls]
    order = sorted(plan.calls, key=lambda n: (n != MAIN, n))
    for n in order:
        named = [entrant.name for entrant in field if entrant.method.per_calls]
        found += [Job(plan.study, name, (n,), seed) for seed in seeds for name in named]
        if n == order[0]:
            named = [entrant.name for entrant in field if not entrant.method.per_calls]
            found += [Job(plan.study, name, tuple(plan.calls), seed, True) for seed in seeds for name in named]
    return found


def solvers(plan: Plan) -> list[str]:
    """The teacher's own solvers, which take part wherever methods are compared."""
    if plan.study != "methods":
        return ["euler"]
    return [name for name in SOLVERS if not plan.only or name in plan.only or name == "euler"]


def wanted(plan: Plan) -> list[Entrant]:
    """The entrants of the study that are asked for."""
    field = {entrant.name: entrant for entrant in entrants(plan.study)}
    unknown = [name for name in plan.only if name not in field and name not in SOLVERS]
    if unknown:
        raise ValueError(
            f"no {', '.join(unknown)} in the study {plan.study!r}: expected some of {', '.join([*field, *SOLVERS])}"
        )
    return [entrant for name, entrant in field.items() if not plan.only or name in plan.only]
