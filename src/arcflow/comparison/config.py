"""The rules of a comparison: who takes part, at how many calls, with how many trainings, on which budget."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from arcflow import recipes
from arcflow.config import Device, check
from arcflow.world.scene import HELD_OUT

USUAL = recipes.comparison()
"""What every training has in common."""

Study = Literal[
    "methods",
    "end",
    "start",
    "modes",
    "basis",
    "window",
    "states",
    "ratio",
    "rank",
    "gates",
    "shift",
    "last_step",
    "walk",
    "rates",
]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Few-step methods against each other on the shipped small teacher: one network, one budget, the same prompts."""

    out: str = "out/compare"
    """Folder for the runs, results.json and report.html. Called again, it does only what is missing."""
    study: Study = "methods"
    """What is compared: the methods, or variants of ArcFlow."""
    only: tuple[str, ...] = ()
    """Names of those that are wanted; none: all of the study."""
    calls: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of network calls."""
    seeds: Annotated[int, arg(name="trainings")] = 3
    """Trainings of each, from which the intervals come."""
    budget: int = USUAL.forwards
    """Forward-equivalents of one training: samples once through the transformer; a backward pass counts two."""
    batch: int = USUAL.run.optim.batch
    """Samples per iteration."""
    lr: float = USUAL.run.optim.lr
    """AdamW's rate, unless an entrant has its own."""
    rank: int = USUAL.run.model.rank
    """Rank of the LoRA, on all Linears."""
    prompts: Annotated[int, arg(name="captions")] = USUAL.run.data.count
    """Training captions."""
    count: int = HELD_OUT
    """Held-out captions, one image of each."""
    alike: int = 32
    """Held-out captions that are drawn more than once, for the diversity."""
    pictures: Annotated[int, arg(name="images")] = 4
    """Images of each caption that is drawn more than once."""
    model: str = "world"
    """The teacher; "world" is the shipped one."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    workers: int | None = None
    """Trainings side by side; None: one for each core, or one on a GPU."""

    def __post_init__(self) -> None:
        for name in ("seeds", "budget", "batch", "rank", "prompts", "count"):
            value = getattr(self, name)
            check(value >= 1, name, value, "1 or more", "leave it out to take the default")
        for name in ("alike", "pictures"):
            value = getattr(self, name)
            check(value >= 2, name, value, "2 or more", "leave it out to take the default")
        check(self.lr > 0, "lr", self.lr, "a positive number", "leave it out to take the default")
        known = bool(self.calls) and all(calls >= 1 for calls in self.calls)
        check(known, "calls", self.calls, "numbers of 1 or more", "say 1 2 4 8")


NAMES = {"seeds": "trainings", "prompts": "captions", "pictures": "images"}
"""Options that have another name than their field, for in other commands these words mean something else."""

SHOWN = 8
"""Images of the teacher and of each student that are kept to look at."""

MAIN = 2
"""The number of calls at which methods are ranked."""

FREE = ("only", "calls", "seeds", "out", "device", "workers", "study")
"""Settings that may change when a folder is taken up again: which runs there are, not what a run is."""


def comparison_command(plan: Plan, command: str, usually: Plan) -> str:
    """The command line that does the same again; `usually` is what the command does unless told."""
    usual = asdict(usually)
    changed = {k: v for k, v in asdict(plan).items() if v != usual[k] and k not in ("out", "workers", "device")}
    words = [f"--{NAMES.get(k, k)} {' '.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in changed.items()]
    return " ".join([command, *words])
