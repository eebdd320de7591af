"""The project's own objective, as the recipes have it: found on the small teacher by measurement (docs/log.md)."""

import dataclasses

from arcflow import paper
from arcflow.config import ALWAYS, Run

STATES = 12
"""States of the teacher's walk over the whole path."""


def own(run: Run) -> Run:
    """The same training with the project's own objective.

    The path in coefficients, which leaves as a plain LoRA; accurate walks of the teacher's, who leads them all; half of
    the loss on the end of the step; later segments from where the averaged student arrives.
    """
    replace = dataclasses.replace
    objective = replace(
        run.distill,
        states=segment_states(run.distill.steps, STATES),
        spread="systematic",
        solver="adams",
        handover="average",
        hold=ALWAYS,
        decay=0,
        end=0.5,
    )
    return replace(run, model=replace(run.model, form="coefficients", modes=4), distill=objective)


def segment_states(steps: int, path: int) -> int:
    """States of the walk in a segment where the whole path has `path`, and no fewer than the published method's."""
    return max(path // steps, paper.STATES)


def in_place_of(published: Run) -> Run:
    """A published training with the project's own objective, in as many iterations as cost its forward passes."""
    run = own(published)
    iterations = round(published.optim.iterations * forwards(published) / forwards(run))
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, iterations=iterations))


def forwards(run: Run) -> float:
    """Forward-equivalents of a trained sample: the teacher's walk and the averaged student's, shared by all uses of the
    walk, and the student's calls with their backward pass (with checkpointing, once more forward). Of a student of
    several numbers of calls, which take turns, it is the mean."""
    distill = run.distill
    guided = 2 if distill.teacher_cfg > 1 else 1

    def by(steps: int) -> float:
        walk = steps * distill.states * guided
        own_states = steps - 1 if distill.handover == "average" else 0
        student = steps * (4 if run.model.gradient_checkpointing else 3)
        return (walk + own_states) / distill.reuse + student

    return sum(map(by, distill.all_steps)) / len(distill.all_steps)
