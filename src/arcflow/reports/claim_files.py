"""The files of results that the claims are held against, and the commands that write them."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

from arcflow.comparison.results import Comparison
from arcflow.evaluation.results import Evaluation
from arcflow.system import records
from arcflow.system.packages import About

FILES = {
    "methods": "arcflow compare",
    "rank": "arcflow compare --study rank --calls 2",
    "shipped": "arcflow evaluate --count 1024",
    "one": "arcflow evaluate --adapter world-one --count 1024",
    "ideal": "python -m benchmarks.ideal",
    "policies": "python -m benchmarks.policies",
    "digits": "python -m benchmarks.digits compare",
    "third": "arcflow compare --only arcflow coefficients --calls 2 --budget 8000",
    "fourfold": "arcflow compare --only arcflow coefficients linear piflow_dx --calls 2 --budget 96000",
}
"""What is read, and the command that makes it."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Both steps of a 2-call sampler at FLUX size."""

    seconds: float
    ratio: float
    """Over the time of ours."""


@dataclass(frozen=True, kw_only=True)
class Policies:
    """What `benchmarks.policies` writes."""

    arcflow: Timing
    gm: Timing
    dx: Timing
    about: About


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Squared distance to the teacher's image at the end of paths that are fitted to the teacher's own."""

    euler: float
    """Error of plain Euler at the end."""
    modes: dict[int, float]
    """Error of mixtures at the end, by the number of modes."""


@dataclass(frozen=True, kw_only=True)
class Ideal:
    """What `benchmarks.ideal` writes."""

    calls: dict[int, Bound]
    about: About


@dataclass(frozen=True, kw_only=True)
class Results:
    """Every file of `FILES`; None for one that is not there."""

    methods: Comparison | None = None
    rank: Comparison | None = None
    shipped: Evaluation | None = None
    one: Evaluation | None = None
    """The shipped one-step student."""
    ideal: Ideal | None = None
    policies: Policies | None = None
    digits: Comparison | None = None
    third: Comparison | None = None
    """The methods on a third of the budget."""
    fourfold: Comparison | None = None
    """Those that lead, on four times the budget."""


KINDS = {name: get_args(kind)[0] for name, kind in get_type_hints(Results).items()}
"""What each file holds."""


def read_results(folder: Path) -> Results:
    """The results in a folder.

    Raises:
        ValueError: a file is not what its command writes; the message names the key.
    """
    there = {name: folder / f"{name}.json" for name in FILES if (folder / f"{name}.json").is_file()}
    return Results(**{name: records.read(KINDS[name], path) for name, path in there.items()})
