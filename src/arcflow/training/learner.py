"""A student while it learns: what every training has in common, whoever decides what is learned.

    learner = Learner.on(net, run)
    learner.gradients(objective, sample, draws)        # losses, a backward pass for each part of them
    norm = learner.update(progress)                    # clip, AdamW, average; or a skipped step

`arcflow train`, the comparison of methods, the laboratory and the benchmarks take their steps here and nowhere else.
They differ in the objective, in the batches, in what they measure and in when they stop. Settings: `config.Run`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from diffusers import ModelMixin
from torch import Generator, Tensor, nn

from arcflow import student
from arcflow.config import Run
from arcflow.data.batches import micro_batches
from arcflow.data.prefetch import Prepared
from arcflow.distillation.kept import asked_before
from arcflow.distillation.objective import Part, distill, teacher_ratio
from arcflow.distillation.policy import Policy, Student, Teacher
from arcflow.distillation.walk import guided, sampler_grid
from arcflow.distillation.warm_start import Levels, Piece, nearest_levels, tell
from arcflow.families.conditioning import Cond, rows
from arcflow.runs.checkpoint import Progress
from arcflow.runs.ema import Ema, ema_beta
from arcflow.student.state import at_rest
from arcflow.student.views import teacher_velocity
from arcflow.system import processes
from arcflow.system.processes import Ranks
from arcflow.system.seeds import Draws, seed_of
from arcflow.training.optimizer import accepted, adamw, diagnosis, rate, set_rate, step_directions

Losing = Callable[[Prepared, Draws], Iterable[Part]]
"""(samples, their random numbers) -> losses, each for a backward pass of its own before the next is asked for."""


def build_student(net: ModelMixin, config: Run, ranks: Ranks) -> dict[str, nn.Parameter]:
    """The trainable parameters, once head and LoRA are on the transformer and it is shared out."""
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


def views(net: nn.Module, negative: Cond | None = None, scale: float = 1.0) -> tuple[Student, Teacher]:
    """The network as the two callables that everything else sees; the teacher under true guidance with `negative`."""

    def walker(x: Tensor, sigma: Tensor, cond: Cond) -> Policy:
        return student.predict(net, x, sigma, cond)

    def teacher(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return teacher_velocity(net, x, sigma, cond)

    return walker, teacher if negative is None else guided(teacher, negative, scale)


class Learner:
    """Trained parameters with their average and their optimizer."""

    def __init__(self, parameters: dict[str, nn.Parameter], run: Run, ranks: Ranks | None = None) -> None:
        """`parameters` learn by the settings of `run.optim`; names as in a published adapter."""
        self.parameters, self.run, self.ranks = parameters, run, ranks or Ranks()
        self.average = Ema(parameters)
        self.optimizer = adamw(parameters, run.optim)
        self.directions = step_directions(parameters, run)
        self.losses = Losses()

    @classmethod
    def on(cls, net: ModelMixin, run: Run, ranks: Ranks | None = None, frozen: Sequence[str] = ()) -> "Learner":
        """The student that is built on `net`, in place, as `run.model` says.

        `frozen` parts of its head ("logweights", "loggamma") keep the values that they start with.
        """
        ranks = ranks or Ranks()
        parameters = build_student(net, run, ranks)
        for name in [name for name in parameters if any(f"_{part}." in name for part in frozen)]:
            parameters.pop(name).requires_grad_(False)
        return cls(parameters, run, ranks)

    def start_warm(self, net: nn.Module, student: Student, teacher: Teacher, sample: Prepared, draws: Draws) -> Levels:
        """Let the new student on `net` start warm, fitted on these samples, and its average with it; processes fit on
        all that they have.

        Raises:
            ValueError: this network cannot; nothing has changed then.
        """
        pieces = [Piece(share, one.x, one.cond, own) for share, one, own in self._pieces(sample, draws)]
        with at_rest(net):
            levels = nearest_levels(student, teacher, pieces, self.run.distill, self.ranks)
            tell(net, student, sample.x[:1], rows(sample.cond, slice(1)), levels)
        self.average.update(0.0)
        return levels

    def gradients(self, objective: Losing, sample: Prepared, draws: Draws) -> "Losses":
        """The losses of a batch, whose gradients are added to the parameters: one backward pass for each part of the
        objective and each micro-batch. `draws` are the batch's random numbers, or each sample's own."""
        return self.backward((share, objective(piece, own)) for share, piece, own in self._pieces(sample, draws))

    def _pieces(self, sample: Prepared, draws: Draws) -> Iterator[tuple[float, Prepared, Draws]]:
        """The micro-batches, each with its share of the batch and its random numbers."""
        for piece in micro_batches(len(sample.x), self.run.optim):
            own = draws if isinstance(draws, Generator) else draws[piece]
            yield len(sample.x[piece]) / len(sample.x), _rows(sample, piece), own

    def backward(self, pieces: Iterable[tuple[float, Iterable[Part]]]) -> "Losses":
        """The losses of micro-batches, each with its share of the batch, whose gradients are added to the parameters:
        one backward pass for each part, before the next is asked for."""
        self.losses = Losses()
        for share, parts in pieces:
            for i, part in enumerate(parts):
                (share * part.loss).backward()
                self.losses.add(i, part, share)
        return self.losses

    def update(self, progress: Progress, at: int | None = None) -> float:
        """The gradient norm, once the optimizer has taken its step, the average has followed, and `progress` is one
        iteration on. A step whose norm is not finite, or a spike, is left out and counted.

        The learning rate is that of iteration `at`, by default the one that `progress` stands at. Raises ValueError
        with a diagnosis when `optim.most_skipped` steps in a row were left out.
        """
        optim, step = self.run.optim, progress.step
        self.ranks.average(self.parameters.values())
        limit = optim.clip if step >= optim.clip_from else math.inf
        norm = float(processes.whole(nn.utils.clip_grad_norm_(self.parameters.values(), limit)))

        if accepted(progress, norm, step, optim):
            set_rate(self.optimizer, rate(step if at is None else at, optim))
            with self.directions():
                self.optimizer.step()
            self.average.update(ema_beta(step, optim.ema_from, optim.ema_power))
        elif progress.in_a_row >= optim.most_skipped:
            raise ValueError(diagnosis(progress, norm, self.losses.logs(), self.parameters))
        self.optimizer.zero_grad()

        progress.step += 1
        progress.samples += optim.batch
        return norm


def arcflow_objective(
    run: Run, step: int, student: Student, teacher: Teacher, average: Student | None = None
) -> Losing:
    """ArcFlow's objective at iteration `step`: the number of calls whose turn it is, and the teacher's share then.
    `average` is the averaged student, for the handover of that name."""
    config = run.distill
    calls = config.all_steps[asked_before(step, config) % len(config.all_steps)]
    settings = replace(config, steps=calls, also_steps=())
    ratio = teacher_ratio(step, config.decay, config.hold)

    def objective(sample: Prepared, draws: Draws) -> Iterable[Part]:
        return distill(
            student,
            teacher,
            sample.x,
            sample.cond,
            config=settings,
            ratio=ratio,
            generator=draws,
            clean=sample.clean,
            average=average,
        )

    return objective


def sample_draws(seeds: Iterable[int]) -> list[Generator]:
    """A generator for each sample, so that its numbers do not depend on the batch it is in."""
    return [Generator().manual_seed(seed) for seed in seeds]


def _rows(sample: Prepared, piece: slice) -> Prepared:
    clean = None if sample.clean is None else sample.clean[piece]
    return Prepared(sample.x[piece], rows(sample.cond, piece), sample.position, clean)


class Losses:
    """Losses of an iteration by segment, summed over micro-batches."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.errors: list[Tensor] = []

    def add(self, i: int, part: Part, share: float) -> None:
        """Take in segment `i` of a micro-batch that is this share of the batch."""
        for sums, value in ((self.losses, part.logs["loss"]), (self.errors, part.logs["distance"])):
            if i == len(sums):
                sums.append(torch.zeros_like(value))
            sums[i] = sums[i] + share * value

    def logs(self) -> dict[str, float]:
        """`loss` in all, `loss_1` and on by segment, and the mean `velocity_error`, for the log."""
        losses, errors = torch.stack(self.losses), torch.stack(self.errors)
        by_segment = {f"loss_{i}": loss for i, loss in enumerate(losses.tolist(), 1)}
        return {"loss": float(losses.sum()), **by_segment, "velocity_error": float(errors.mean())}
