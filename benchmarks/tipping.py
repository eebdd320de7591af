"""Where a two-call student leaves its teacher's pictures, and what each of its calls has to do with it.

    python -m benchmarks.tipping [--adapter FOLDER] [--count 512] [--raw-times 0.9 0.8 0.7 0.6 0.5]

On held-out captions and the noise of `arcflow evaluate`, against the teacher's final latents in 50 steps; "tipped" are
pictures further than 0.1 from the teacher's. First table: the student's first arc is followed to a raw time, what it
differs there from the teacher's state (mean square), and what the teacher makes of it in its remaining steps. Second
table: both calls, each with the teacher in the other's place, and the first with plain Euler steps after it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from arcflow import adapter, student
from arcflow.backbone import Cond
from arcflow.baselines.method import Cost
from arcflow.contest import FIRST_SEED, TEACHER_STEPS, Bench
from arcflow.metrics import squared_error
from arcflow.path import shift_sigma, step_grid, unshift_sigma
from arcflow.rollout import arcs, euler
from arcflow.rules import Contest
from arcflow.world import check

SHIPPED = Path(adapter.__file__).parent / "assets" / "adapter"
TIPPED = 0.1
BATCH = 64
Walk = Callable[[Tensor, Cond], Tensor]


class Tipping:
    """The student and its teacher, one network, on the held-out captions."""

    def __init__(self, folder: Path, count: int) -> None:
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
        grid = step_grid(TEACHER_STEPS, self.shift).double()
        inside = grid[(grid < start - 1e-6) & (grid > stop + 1e-6)]
        if steps:
            high, low = (unshift_sigma(level, self.shift) for level in (start, stop))
            inside = shift_sigma(torch.linspace(high, low, steps + 1, dtype=torch.float64), self.shift)[1:-1]
        sigmas = torch.cat([torch.tensor([start]).double(), inside, torch.tensor([stop]).double()])
        return lambda x, cond: euler(self.teacher, x, cond, sigmas)

    def own(self, *sigmas: float) -> Walk:
        """The student along these noise levels, one call for each but the last."""
        return lambda x, cond: arcs(lambda *given: student.predict(self.net, *given), x, cond, torch.tensor(sigmas))

    def judge(self, ends: Tensor) -> str:
        apart, prompts = squared_error(ends, self.ends), self.bench.prompts
        right = [check.judge(one, text) for one, text in zip(self.bench._pictures(ends), prompts, strict=True)]
        tipped = (apart > TIPPED).float().mean()
        return f"{apart.mean():.4f} | {tipped:.1%} | {sum(right) / len(right):.1%} |"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapter", type=Path, default=SHIPPED)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--raw-times", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    options = parser.parse_args()
    of = Tipping(options.adapter, options.count)
    print("| first call, to noise level | mean square there | distance at the end | tipped | accuracy |")
    print("|---|---|---|---|---|")
    for level in shift_sigma(torch.tensor(options.raw_times, dtype=torch.float64), of.shift).tolist():
        mine, there = of.each(of.own(1.0, level), of.noise), of.each(of.led(1.0, level), of.noise)
        end = of.judge(of.each(of.led(level, 0.0), mine))
        print(f"| {level:.3f} | {squared_error(mine, there).mean():.1e} | {end}", flush=True)
    middle = of.grid.tolist()[1]
    mine, there = of.each(of.own(1.0, middle), of.noise), of.each(of.led(1.0, middle), of.noise)
    print("\n| two calls | distance | tipped | accuracy |\n|---|---|---|---|")
    print(f"| the teacher's 50 steps | {of.judge(of.ends)}")
    print(f"| both calls | {of.judge(of.each(of.own(middle, 0.0), mine))}")
    print(f"| the teacher, then the second call | {of.judge(of.each(of.own(middle, 0.0), there))}")
    for steps in (1, 2, 3, 4, 8):
        print(
            f"| the first call, then Euler in {steps} | {of.judge(of.each(of.led(middle, 0.0, steps), mine))}",
            flush=True,
        )


if __name__ == "__main__":
    main()
