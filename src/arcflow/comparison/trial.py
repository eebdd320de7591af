"""One training of one entrant on the common bench, until its budget is spent."""

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arcflow import student
from arcflow.comparison.bench import Bench, End, Reference, captions
from arcflow.comparison.entrants import PARTS, Entrant, settings
from arcflow.config import Distill, Run
from arcflow.distillation.method import Cost, Sampler, Training, Turn
from arcflow.distillation.policy import Student
from arcflow.families.conditioning import Cond
from arcflow.runs.ema import Ema, ema_beta
from arcflow.system.seeds import seed_of
from arcflow.training.optimizer import adamw, rate, set_rate, step_directions

MEASURED = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the budget at which it is."""


def ender(sample: Sampler, walker: Student, distill: Distill, calls: int) -> End:
    """A sampler of a student, as `Bench.judge` wants it."""

    def end(x: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
        return sample(walker, x, cond, calls, distill, generator)

    return end


@dataclass
class Trained:
    """A student at the end of its budget, with the averaged weights in it."""

    net: Any
    walker: Student
    run: Run
    curve: list[tuple[int, float]]
    """Forward-equivalents spent, and the distance then."""
    iterations: int
    skipped: int
    seconds: float
    trained: int
    """Numbers that were trained."""


def train(bench: Bench, entrant: Entrant, calls: int, seed: int, reference: Reference) -> Trained:
    """Train until the budget is spent, measurements not counted."""
    contest, method, started = bench.contest, entrant.method, time.monotonic()
    run = settings(contest, entrant, calls, seed)
    net = copy.deepcopy(bench.base)
    torch.manual_seed(seed_of(seed, "contest"))
    student.build(
        net,
        modes=run.model.modes,
        rank=run.model.rank,
        dropout=run.model.dropout,
        targets=run.model.targets,
        generator=torch.Generator().manual_seed(seed_of(seed, "student")),
    )
    parameters = {
        n: p for n, p in student.trainable(net).items() if not any(f"_{part}." in n for part in entrant.frozen)
    }
    for name, parameter in student.trainable(net).items():
        parameter.requires_grad_(name in parameters)
    average, optimizer, turned = Ema(parameters), adamw(parameters, run.optim), step_directions(parameters, run)
    cost = Cost()

    def walker(x: Tensor, sigma: Tensor, cond: Cond) -> Any:
        cost.add(len(x), backward=torch.is_grad_enabled())
        return student.predict(net, x, sigma, cond)

    objective = method.objective(run.distill, Training(net, average, cost))
    data = captions(contest, run.optim.batch)
    data.seed = seed  # their order, and the noise
    teacher, end = bench.teacher(net, cost), ender(method.sample, walker, run.distill, calls)
    curve, skipped, step, apart = list[tuple[int, float]](), 0, 0, 0.0
    net.train()
    while cost.spent < contest.budget:
        batch, done = data.batch(step), cost.spent / contest.budget
        generator = torch.Generator().manual_seed(seed_of(seed, "draws", step))
        for part in objective(
            walker, teacher, bench.noise(batch.seeds), bench.cond(batch.prompts), Turn(done, generator)
        ):
            part.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), run.optim.clip)
        if bool(norm.isfinite()):
            set_rate(optimizer, rate(int(done * PARTS), run.optim))
            with turned():
                optimizer.step()
            average.update(ema_beta(step, 20, run.optim.ema_power))
        else:
            skipped += 1
        optimizer.zero_grad()
        step += 1
        due = [share for share in MEASURED[len(curve) :] if cost.spent >= share * contest.budget]
        if due:
            kept, measured = cost.spent, time.monotonic()
            net.eval()
            with average.applied(), torch.no_grad():
                curve += [(kept, bench.distance(end, reference))] * len(due)
            net.train()
            cost.spent, apart = kept, apart + time.monotonic() - measured
    average.swap()
    net.eval()
    seconds = time.monotonic() - started - apart
    return Trained(net, walker, run, curve, step, skipped, seconds, sum(p.numel() for p in parameters.values()))
