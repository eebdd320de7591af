"""The parts of a training: building the student, its two views, gradients over micro-batches, sums for the log."""

import dataclasses
from typing import Any

import torch
from torch import Generator, Tensor

from arcflow import student
from arcflow.config import Run
from arcflow.data.batches import micro_batches
from arcflow.data.prefetch import Sample
from arcflow.distillation.objective import Part, distill, teacher_ratio
from arcflow.distillation.policy import Student, Teacher
from arcflow.distillation.walk import guided, sampler_grid
from arcflow.families.conditioning import Cond, rows
from arcflow.student.views import teacher_velocity
from arcflow.system import processes
from arcflow.system.processes import Ranks
from arcflow.system.seeds import seed_of


def build_student(net: Any, config: Run, ranks: Ranks) -> dict[str, torch.nn.Parameter]:
    """Put head and LoRA on the transformer and share it out; the trainable parameters."""
    model, start = config.model, Generator().manual_seed(seed_of(config.seed, "student"))
    student.build(
        net,
        modes=model.modes,
        rank=model.rank,
        dropout=model.dropout,
        lora=model.lora,
        targets=model.targets,
        form=model.form,
        grids=tuple(tuple(sampler_grid(n, config.distill).tolist()) for n in config.distill.all_steps),
        generator=start,
    )
    if model.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    if model.compile:
        net.compile_repeated_blocks()
    return student.trainable(processes.shard(net, ranks))


def views(net: Any, negative: Cond | None, scale: float) -> tuple[Student, Teacher]:
    """The network as the two callables that everything else sees."""

    def walker(x: Tensor, sigma: Tensor, cond: Cond) -> Any:
        return student.predict(net, x, sigma, cond)

    def teacher(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return teacher_velocity(net, x, sigma, cond)

    return walker, teacher if negative is None else guided(teacher, negative, scale)


def accumulate(
    walker: Student, teacher: Teacher, sample: Sample, *, config: Run, step: int, draws: list[int]
) -> dict[str, float]:
    """Add a batch's gradient to the parameters, one backward pass per segment and micro-batch: the losses to log.
    `draws` seeds the random numbers of each sample."""
    x, ratio = sample.x, teacher_ratio(step, config.distill.decay, config.distill.hold)
    steps = config.distill.all_steps[step % len(config.distill.all_steps)]
    settings = dataclasses.replace(config.distill, steps=steps, also_steps=())
    if config.model.form == "coefficients":
        settings = dataclasses.replace(settings, mode_dropout=0.0)  # there are no modes that could be left out
    tally = Tally(steps, x.device)
    for part in micro_batches(len(x), config.optim):
        own = [Generator().manual_seed(seed) for seed in draws[part]]
        objective = distill(
            walker,
            teacher,
            x[part],
            rows(sample.cond, part),
            config=settings,
            ratio=ratio,
            generator=own,
            clean=None if sample.clean is None else sample.clean[part],
        )
        share = len(x[part]) / len(x)
        for i, segment in enumerate(objective):
            (share * segment.loss).backward()
            tally.add(i, segment, share)
    return tally.logs(ratio)


class Tally:
    """Losses of an iteration, by segment."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.losses, self.errors = [torch.zeros(steps, device=device) for _ in range(2)]

    def add(self, i: int, part: Part, share: float) -> None:
        self.losses[i] += share * part.logs["loss"]
        self.errors[i] += share * part.logs["distance"]

    def logs(self, ratio: float) -> dict[str, float]:
        by_segment = {f"loss_{i}": loss for i, loss in enumerate(self.losses.tolist(), 1)}
        total, error = float(self.losses.sum()), float(self.errors.mean())
        return {"loss": total, **by_segment, "velocity_error": error, "teacher_ratio": ratio}
