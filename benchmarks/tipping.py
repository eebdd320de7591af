"""Where a two-call student leaves its teacher's pictures, and what each of its calls has to do with it.

    python -m benchmarks.tipping [--adapter FOLDER] [--count 512] [--raw-times 0.9 0.8 0.7 0.6]

On held-out captions and the noise of `arcflow evaluate`, against the teacher's final latents in 50 steps; "tipped" are
pictures further than 0.1 from the teacher's. First table: the student's first arc is followed to a raw time and to
its end, what it differs there from the teacher's state (mean square), and what the teacher makes of it in its remaining
steps. Second table: both calls, the second from the teacher's state, and plain Euler steps in its place.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from arcflow import student
from arcflow.comparison.bench import BATCH, TEACHER_STEPS, Bench
from arcflow.comparison.config import Contest
from arcflow.distillation.method import Cost
from arcflow.distillation.walk import arcs, euler
from arcflow.families.conditioning import Cond
from arcflow.metrics.pictures import squared_error
from arcflow.path import shift_sigma, step_grid, unshift_sigma
from arcflow.sampling.open import SHIPPED, adapter_of
from arcflow.student import adapter
from arcflow.world.check import accuracy
from arcflow.world.scene import FIRST_SEED

TIPPED = 0.1
Walk = Callable[[Tensor, Cond], Tensor]


class Tipping:
    """The student and its teacher, one network, on the held-out captions."""

    def __init__(self, folder: str, count: int) -> None:
        info = adapter.read_info(folder)
        self.bench, self.shift = Bench(Contest(count=count, prompts=1)), info.shift
        self.net = adapter.load_adapter(self.bench.base, folder)
        self.grid = step_grid(2, info.shift, final_step_scale=info.final_step_scale)
        self.teacher = self.bench.teacher(self.net, Cost())
        self.noise = self.bench.noise(range(FIRST_SEED, FIRST_SEED + count))
        self.ends = self.each(self.led(1.0, 0.0), self.noise)

    def each(self, walk: Walk, x: Tensor) -> Tensor:
        """Where a walk leads from every state."""
        texts, done = self.bench.prompts, range(0, len(x), BATCH)
        return torch.cat([walk(x[at : at + BATCH], self.bench.cond(texts[at : at + BATCH])) for at in done])

    def led(self, start: float, stop: float, steps: int | None = None) -> Walk:
        """The teacher between two noise levels: over its own grid, or in so many steps, even in raw time."""
        if steps:
            high, low = (unshift_sigma(level, self.shift) for level in (start, stop))
            sigmas = shift_sigma(torch.linspace(high, low, steps + 1, dtype=torch.float64), self.shift)
        else:
            grid = step_grid(TEACHER_STEPS, self.shift).tolist()
            sigmas = torch.tensor([start, *(x for x in grid if start - 1e-6 > x > stop + 1e-6), stop])
        return lambda x, cond: euler(self.teacher, x, cond, sigmas)

    def own(self, *sigmas: float) -> Walk:
        """The student along these noise levels, one call for each but the last."""
        return lambda x, cond: arcs(lambda *given: student.predict(self.net, *given), x, cond, torch.tensor(sigmas))

    def judge(self, ends: Tensor) -> str:
        """Distance, share of tipped pictures and accuracy, as the last cells of a row."""
        apart = squared_error(ends, self.ends)
        right = accuracy(self.bench.pictures(ends), self.bench.prompts)["overall"]
        return f"{apart.mean():.4f} | {(apart > TIPPED).float().mean():.1%} | {right:.1%} |"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapter", default=SHIPPED)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--raw-times", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    options = parser.parse_args()
    of = Tipping(adapter_of(SHIPPED, options.adapter), options.count)
    _, middle, _ = of.grid.tolist()
    levels = shift_sigma(torch.tensor(options.raw_times, dtype=torch.float64), of.shift).tolist()
    print("| first call, to noise level | mean square there | distance at the end | tipped | accuracy |")
    print("|---|---|---|---|---|")
    mine = there = of.noise
    for level in (*levels, middle):
        mine, there = of.each(of.own(1.0, level), of.noise), of.each(of.led(1.0, level), of.noise)
        end = of.judge(of.each(of.led(level, 0.0), mine))
        print(f"| {level:.3f} | {squared_error(mine, there).mean():.1e} | {end}", flush=True)
    print("\n| two calls | distance | tipped | accuracy |\n|---|---|---|---|")
    print(f"| the teacher's {TEACHER_STEPS} steps | {of.judge(of.ends)}")
    print(f"| both calls | {of.judge(of.each(of.own(middle, 0.0), mine))}")
    print(f"| the teacher, then the second call | {of.judge(of.each(of.own(middle, 0.0), there))}")
    for steps in (1, 2, 3, 4, 8):
        end = of.judge(of.each(of.led(middle, 0.0, steps), mine))
        print(f"| the first call, then Euler in {steps} | {end}", flush=True)


if __name__ == "__main__":
    main()
