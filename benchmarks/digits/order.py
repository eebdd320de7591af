"""Whether two benches put methods in the same order, and which pairs they tell apart the other way round."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from scipy import stats

from arcflow.comparison.results import Comparison, Means, Rows, SeedMean
from arcflow.metrics.intervals import seed_difference
from arcflow.reports.table import Line, Table

Measure = Literal["distance", "accuracy"]

MEASURES: tuple[Measure, ...] = ("distance", "accuracy")


@dataclass(frozen=True)
class Agreement:
    """How far two benches agree on the order of the entrants that both have at a number of calls."""

    calls: int
    measure: Measure
    count: int
    """Entrants."""
    kendall: float
    spearman: float
    same: int
    """Pairs that both tell apart by more than noise, the same way round."""
    opposite: list[tuple[str, str]]
    """Pairs that both tell apart, the other way round: the first bench has the first one lower."""


def agreement(first: Comparison, second: Comparison, calls: int, measure: Measure) -> Agreement | None:
    """How two benches agree; None where they have fewer than three entrants in common."""
    names = [name for name in first.rows if _has(first.rows, name, calls) and _has(second.rows, name, calls)]
    if len(names) < 3:
        return None
    ours, theirs = (
        {name: _value(bench.rows[name].calls[calls], measure) for name in names} for bench in (first, second)
    )
    means, others = ([each[name].mean for name in names] for each in (ours, theirs))
    kendall: Any = stats.kendalltau(means, others)
    spearman: Any = stats.spearmanr(means, others)

    same, opposite = 0, list[tuple[str, str]]()
    for a, b in combinations(names, 2):
        one, other = _sign(ours[a], ours[b]), _sign(theirs[a], theirs[b])
        same += one * other > 0
        if one * other < 0:
            opposite.append((a, b) if one < 0 else (b, a))
    return Agreement(calls, measure, len(names), float(kendall[0]), float(spearman[0]), same, opposite)


def _has(rows: Rows, name: str, calls: int) -> bool:
    return name in rows and calls in rows[name].calls


def _value(means: Means, measure: Measure) -> SeedMean:
    return means.distance if measure == "distance" else means.accuracy


def _sign(a: SeedMean, b: SeedMean) -> int:
    """-1 where `a` is lower by more than noise, 1 where it is higher, 0 where that cannot be said."""
    if len(a.seeds) < 2 and len(b.seeds) < 2:
        return 0
    apart = seed_difference(a.seeds, b.seeds)
    if apart.low is None or apart.high is None or apart.low <= 0 <= apart.high:
        return 0
    return -1 if apart.high < 0 else 1


def table(first: Comparison, second: Comparison, calls: list[int]) -> Table:
    """A row for each number of calls and measure."""
    titles = {name: row.title for bench in (second, first) for name, row in bench.rows.items()}
    lines = []
    for n in calls:
        for measure in MEASURES:
            found = agreement(first, second, n, measure)
            if found:
                apart = "; ".join(f"{titles[a]} below {titles[b]} there, above here" for a, b in found.opposite)
                numbers = f"{found.kendall:.2f}", f"{found.spearman:.2f}", found.same, len(found.opposite), apart
                lines.append(Line.of(measure, n, found.count, *numbers))
    heads = ["", "calls", "entrants", "Kendall", "Spearman", "pairs in the same order", "the other way round", "which"]
    return Table(heads, lines)
