"""Does each family learn? A tiny random teacher of the real classes, 150 iterations, and where its student ends.

    python -m benchmarks.families            # all families; a minute or two on a core for each
    python -m benchmarks.families wan sd3

Mean squared distance to the end of 64 Euler steps of the teacher, from held-out noise, of Euler in 2, 4 and 8 steps and
of the student in two. The teacher's weights are made half as large again, so that its paths bend. Rows go to
`benchmarks/results/families.json` and `families.md`; those of other families stay.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arcflow.config import Data, Distill, Model, Optim, Run
from arcflow.data.prefetch import Prepared
from arcflow.distillation.walk import arcs, euler, sampler_grid
from arcflow.families import network
from arcflow.path import step_grid
from arcflow.runs.checkpoint import Progress
from arcflow.system import records
from arcflow.system.files import write_text
from arcflow.training.learner import Learner, arcflow_objective, views
from tests.support.families import ALL, FRAMES, side

ITERATIONS, BATCH, HELD_OUT = 150, 4, 8
LOUDER = 1.5
"""Of the teacher's weights."""
STEPS = (2, 4, 8)
"""Of Euler."""


RESULTS = Path(__file__).parent / "results" / "families"


def recipe() -> Run:
    """Of the small teachers' trainings, the same for all families: `world` for 150 iterations, at twice the rate."""
    return Run(
        model=Model(rank=8, modes=8, dropout=0.0, targets="all"),
        distill=Distill(
            states=6,
            spread="stratified",
            solver="adams",
            handover="student",
            hold=ITERATIONS,
            decay=0,
            mode_dropout=0.0,
        ),
        data=Data(cache=False),
        optim=Optim(
            iterations=ITERATIONS,
            batch=BATCH,
            lr=4e-3,
            lr_log_gamma=2e-5,
            directions="segment",
            warmup=10,
            cooldown="cosine",
            cooldown_iterations=ITERATIONS - 10,
            clip_from=0,
            ema_from=10,
        ),
    )


def measure(name: str) -> dict[str, float]:
    """Distances of Euler and of the student, by name."""
    torch.manual_seed(0)
    pipe, run = ALL[name](), recipe()
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(LOUDER)
    size: dict[str, Any] = {"height": side(name), "width": side(name)} | (
        {"frames": FRAMES[name]} if name in FRAMES else {}
    )
    prompts = ["a red cube", "a blue ball", "two green ball", "a ball on a cube"]
    cond = network.encode_prompts(pipe, prompts, **size)
    learner = Learner.on(pipe.transformer, run)
    student, teacher = views(pipe.transformer)
    progress = Progress()
    for step in range(ITERATIONS):
        x = network.noise(pipe, list(range(BATCH * step, BATCH * (step + 1))), **size)
        objective = arcflow_objective(run, step, student, teacher)
        learner.gradients(objective, Prepared(x, cond, {}, None), torch.Generator().manual_seed(step))
        learner.update(progress)

    pipe.transformer.eval()
    errors: dict[str, float] = {}
    with torch.no_grad(), learner.average.applied():
        for first in range(0, HELD_OUT, BATCH):
            x = network.noise(pipe, list(range(10**6 + first, 10**6 + first + BATCH)), **size)
            end = euler(teacher, x, cond, step_grid(64, run.distill.shift))
            ends = {f"Euler {n}": euler(teacher, x, cond, step_grid(n, run.distill.shift)) for n in STEPS}
            ends["student 2"] = arcs(student, x, cond, sampler_grid(2, run.distill))
            for way, reached in ends.items():
                errors[way] = errors.get(way, 0.0) + float((reached - end).square().mean()) * BATCH / HELD_OUT
    return errors


@dataclass(frozen=True)
class Measured:
    """Mean squared distances to the teacher's end by family and way."""

    errors: dict[str, dict[str, float]]


def table(rows: dict[str, dict[str, float]]) -> str:
    """All rows, in the order of the families; the smallest error of each stands out."""
    ways = [*(f"Euler {n}" for n in STEPS), "student 2"]
    lines = [
        "Mean squared distance to the end of 64 Euler steps of a tiny random teacher, from held-out noise; the student",
        f"after {ITERATIONS} iterations of {BATCH}. Made by `python -m benchmarks.families`.",
        "",
        "| family | " + " | ".join(ways) + " |",
        "|---|" + "---|" * len(ways),
    ]
    for name in (name for name in ALL if name in rows):
        best = min(rows[name].values())
        cells = [f"**{rows[name][way]:.4f}**" if rows[name][way] == best else f"{rows[name][way]:.4f}" for way in ways]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    kept = RESULTS.with_suffix(".json")
    for name in names or list(ALL):
        errors = measure(name)
        found = records.read(Measured, kept) if kept.exists() else Measured(errors={})
        found.errors[name] = errors
        records.write(kept, found)
        write_text(RESULTS.with_suffix(".md"), table(found.errors))
        print(f"{name}: " + ", ".join(f"{way} {error:.4f}" for way, error in errors.items()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
