"""One training of one entrant on the common bench, until its budget is spent."""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arcflow.comparison.bench import Bench, End, TeacherImages
from arcflow.comparison.entrants import Entrant, settings
from arcflow.config import PARTS, Distill, Run
from arcflow.data.prefetch import Prepared
from arcflow.distillation.method import Cost, Objective, Sampler, Training, Turn
from arcflow.distillation.objective import Part
from arcflow.distillation.policy import Policy, Student, Teacher
from arcflow.families.conditioning import Cond
from arcflow.runs.checkpoint import Progress
from arcflow.system.seeds import Draws, seed_of
from arcflow.training.learner import Learner, Losing, views

MEASURED = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the budget at which the distance to the teacher is measured."""


def ender(sample: Sampler, walker: Student, distill: Distill, calls: int) -> End:
    """A sampler of a student, as `Bench.measure` wants it."""

    def end(x: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
        return sample(walker, x, cond, calls, distill, generator)

    return end


@dataclass
class Trained:
    """A student at the end of its budget, with the averaged weights in it."""

    net: nn.Module
    walker: Student
    run: Run
    curve: list[tuple[int, float]]
    """Forward-equivalents spent, and the distance then."""
    iterations: int
    skipped: int
    seconds: float
    trained: int
    """Numbers that were trained."""


def train_entrant(bench: Bench, entrant: Entrant, calls: int, seed: int, reference: TeacherImages) -> Trained:
    """Train until the budget is spent, measurements not counted."""
    started, method = time.monotonic(), entrant.method
    budget = settings(bench.plan, entrant, calls, seed)
    run = budget.run

    net = copy.deepcopy(bench.base)
    torch.manual_seed(seed_of(seed, "contest"))
    learner = Learner.on(net, run, frozen=entrant.frozen)
    cost, progress = Cost(), Progress()
    student, teacher = counted(views(net)[0], cost), bench.teacher(net, cost)
    training = Training(net, learner.average, cost)
    objective = method.objective(run.distill, training)
    data = bench.captions(seed, run.optim.batch)
    end = ender(method.sample, student, run.distill, calls)

    def sample_of(number: int) -> Prepared:
        batch = data.batch(number)
        return Prepared(bench.noise(batch.seeds), bench.cond(batch.prompts), {})

    if run.distill.warm_start:
        draws = torch.Generator().manual_seed(seed_of(seed, "warm"))
        learner.start_warm(net, student, teacher, sample_of(0), draws)

    curve: list[tuple[int, float]] = []
    measuring = 0.0
    net.train()
    while cost.spent < budget.forwards:
        done = cost.spent / budget.forwards
        draws = torch.Generator().manual_seed(seed_of(seed, "draws", progress.step))
        learner.gradients(at_turn(objective, student, teacher, done), sample_of(progress.step), draws)
        learner.update(progress, at=int(done * PARTS))

        due = [share for share in MEASURED[len(curve) :] if cost.spent >= share * budget.forwards]
        if due:
            spent, began = cost.spent, time.monotonic()
            net.eval()
            with learner.average.applied(), torch.no_grad():
                curve += [(spent, bench.distance(end, reference))] * len(due)
            net.train()
            cost.spent = spent
            measuring += time.monotonic() - began

    learner.average.swap()
    net.eval()
    return Trained(
        net=net,
        walker=student,
        run=run,
        curve=curve,
        iterations=progress.step,
        skipped=progress.skipped,
        seconds=time.monotonic() - started - measuring,
        trained=sum(p.numel() for p in learner.parameters.values()),
    )


def counted(student: Student, cost: Cost) -> Student:
    """The same student, whose calls are paid for: three forward-equivalents where a backward pass follows."""

    def call(x: Tensor, sigma: Tensor, cond: Cond) -> Policy:
        cost.add(len(x), backward=torch.is_grad_enabled())
        return student(x, sigma, cond)

    return call


def at_turn(objective: Objective, student: Student, teacher: Teacher, done: float) -> Losing:
    """A method's objective when a share `done` of the budget is spent."""

    def now(sample: Prepared, draws: Draws) -> Iterator[Part]:
        return objective(student, teacher, sample.x, sample.cond, Turn(done, draws))

    return now
