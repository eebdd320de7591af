"""What a training iteration costs beyond the network calls in it, and what it saves against the authors' way.

    python -m benchmarks.iteration [--repeats 9] [--batch 32]

The shipped small teacher, a student of sixteen modes with the LoRA of the `world` recipe, the published objective on
the student's own path (teacher ratio 0), with six states a segment. Five things are timed in turn, so that whatever
else the machine does falls on all of them:

    bare       the same network calls alone: the teacher's, the student's forward and backward passes
    ours       an iteration of the loop: objective, backward passes, clipping, optimizer, average
    authors'   the same with the teacher asked state by state, and one backward pass for both segments
    encoded    ours, the text of each batch encoded on the fly, one batch ahead
    safe       ours, in a run's folder: two lines of log, and the looks at signals, failed writes and the owner

Medians of the ratios are printed, and the activations at their peak, counted tensor by tensor. What the last one adds
is less than what the machine's other work makes of an iteration; it is timed by itself as well, a thousand times.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from arcflow import config, paper, recipes
from arcflow.data.prefetch import Prefetcher, Prepared
from arcflow.distillation.objective import distill
from arcflow.distillation.pairs import averaged
from arcflow.families import network
from arcflow.families.conditioning import Cond, repeat, rows
from arcflow.families.loading import load_pipe
from arcflow.path import segments, shift_sigma
from arcflow.runs.checkpoint import Checkpoints, Progress
from arcflow.runs.log import Log
from arcflow.student import views as student_views
from arcflow.system.processes import Ranks
from arcflow.system.signals import stop_signals
from arcflow.training.home import home
from arcflow.training.learner import Learner, arcflow_objective, sample_draws, views
from benchmarks.exact_step import seconds
from benchmarks.memory import Alive


class Loop:
    """Iterations as a training makes them, of one batch."""

    def __init__(self, net: Any, run: config.Run, x: Tensor, cond: Cond) -> None:
        self.net, self.run = net, run
        self.sample = Prepared(x, cond, {})
        self.learner, self.progress = Learner.on(net, run), Progress()
        self.student, self.teacher = views(net)
        self.average = averaged(net, self.learner.average, self.student)
        net.train()

    def gradients(self, step: int = 1) -> None:
        objective = arcflow_objective(self.run, step, self.student, self.teacher, self.average)
        self.learner.gradients(objective, self.sample, sample_draws(range(len(self.sample.x))))

    def ours(self, step: int = 1) -> None:
        self.gradients(step)
        self.learner.update(self.progress)


class Bench(Loop):
    """One batch, and the three ways to spend an iteration on it."""

    def __init__(self, batch: int) -> None:
        world = recipes.world()
        run = dataclasses.replace(
            world,
            model=dataclasses.replace(world.model, form="mixture", modes=paper.MODES),
            distill=config.Distill(states=6, spread="systematic", solver="adams", handover="student", decay=0),
            optim=dataclasses.replace(world.optim, batch=batch),
        )
        pipe = load_pipe(world.model)
        self.batch, self.number = batch, 0
        prompts = ["a red ring left of a blue square"] * batch

        def make(number: int) -> Prepared:
            return Prepared(x, network.encode_prompts(pipe, prompts, height=64, width=64), {})

        x = network.noise(pipe, list(range(batch)), 64, 64)
        self.prefetcher = Prefetcher(make, x.device, ahead=True)
        super().__init__(pipe.transformer, run, x, make(0).cond)
        for group in self.learner.optimizer.param_groups:
            group["peak"] = 0.0  # the batch, and what it costs, stays the same

    def gradients_authors(self) -> None:
        def one_by_one(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
            pieces = [slice(i, i + self.batch) for i in range(0, len(x), self.batch)]
            return torch.cat([self.teacher(x[piece], sigma[piece], rows(cond, piece)) for piece in pieces])

        parts = distill(
            self.student,
            one_by_one,
            self.sample.x,
            self.sample.cond,
            config=self.run.distill,
            ratio=0.0,
            generator=[torch.Generator().manual_seed(i) for i in range(self.batch)],
        )
        torch.stack([part.loss for part in parts]).sum().backward()

    def encoded(self) -> None:
        self.sample = self.prefetcher(self.number)
        self.number += 1
        self.ours()

    def authors(self) -> None:
        self.gradients_authors()
        self.learner.update(self.progress)

    def checks(self) -> None:
        """What a training does after each iteration for its own safety (`training.loop`)."""
        self.journal.write(1, loss=0.1, teacher_ratio=0.0, gradient_norm=1.0, lr=1e-3, skipped=0)
        self.journal.speed(1, seconds=1.0, data=0.0, teacher=0.5)
        Ranks().any(False, bool(self.caught), self.checkpoints.due(), bool(self.lost()))

    def safe(self) -> None:
        self.ours()
        self.checks()

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Have a run folder while the block lasts."""
        with TemporaryDirectory() as place, home(place, Ranks()) as self.lost, stop_signals() as self.caught:
            learner = self.learner
            self.checkpoints = Checkpoints(Path(place), learner.parameters, learner.average, learner.optimizer)
            self.journal = Log(Path(place), 0)
            with closing(self.journal), closing(self.checkpoints):
                yield

    def bare(self) -> None:
        half = self.run.distill.states // 2  # in a call, see `rollout.visit`
        cond, x = repeat(self.sample.cond, half), self.sample.x.repeat(half, 1, 1)
        for segment in segments(self.run.distill.steps):
            sigma = float(shift_sigma(segment.tau_src))
            for _ in range(2):
                student_views.teacher_velocity(self.net, x, sigma, cond)
            out = network.call(self.net, self.sample.x, sigma, self.sample.cond)
            out.backward(torch.ones_like(out))
        self.net.zero_grad()


def peak(bench: Bench, call: Callable[[], None]) -> int:
    """Bytes of activations and gradients."""
    with Alive(bench.net) as alive:
        call()
    bench.net.zero_grad()
    return alive.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    bench = Bench(options.batch)
    with bench.at_home():
        time_all(bench, options.repeats)
    bench.prefetcher.close()
    mine, theirs = peak(bench, bench.gradients), peak(bench, bench.gradients_authors)
    print(
        f"activations and gradients: {mine / 1e6:.0f} MB, the authors' way {theirs / 1e6:.0f} MB: {mine / theirs:.2f}"
    )


def time_all(bench: Bench, repeats: int) -> None:
    """Time an iteration in each way, in turn, and print what comes out."""
    timed = []
    for n in range(repeats + 2):  # two to warm up
        row = tuple(map(seconds, (bench.bare, bench.ours, bench.authors, bench.encoded, bench.safe)))
        if n >= 2:
            timed.append(row)
            print(
                "   ".join(
                    f"{name} {1e3 * t:6.0f} ms"
                    for name, t in zip(("bare", "ours", "authors'", "encoded", "safe"), row, strict=True)
                )
            )
    print(f"an iteration over its bare calls: median {statistics.median(b / a for a, b, *_ in timed):.2f}")
    print(f"the authors' way over ours: median {statistics.median(c / b for _, b, c, *_ in timed):.2f}")
    print(f"encoding on the fly: median {statistics.median(d / b for _, b, _, d, _ in timed) - 1:+.1%}")
    alone = seconds(lambda: [bench.checks() for _ in range(1000)]) / 1000
    share = alone / statistics.median(b for _, b, *_ in timed)
    paired = statistics.median(e / b for _, b, *_, e in timed) - 1
    print(f"log and looks: {1e6 * alone:.0f} us, {share:.3%} of an iteration; in turn with ours: median {paired:+.1%}")


if __name__ == "__main__":
    main()
