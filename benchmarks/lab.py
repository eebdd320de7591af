"""Few calls in the plane: plain Euler, the straight line and mixtures, at the same network, objective and budget.

    python -m benchmarks.lab [--iterations 1500] [--batch 512] [--seeds 3] [--modes 1 4 16] [--calls 1 2]

The teacher is exact (`arcflow.lab`): eight Gaussians on a circle of radius 3. Printed as Markdown: the mean distance of
the ends to those of the exact path from the same 4000 noises, which no student was trained on; least to most of the
seeds.
"""

import argparse
import time

import torch

from arcflow.distillation.walk import euler
from arcflow.laboratory import plane
from arcflow.path import step_grid
from arcflow.system import seeds

COUNT = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--modes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    teacher, x = plane.circle(), plane.starting_points(COUNT, torch.Generator().manual_seed(seeds.seed_of("held out")))
    ends = plane.exact(teacher, x)
    for calls in (1, 2, 4, 8):
        print(f"plain Euler, {calls}: {plane.mean_distance(euler(teacher, x, {}, step_grid(calls)), ends):.3f}")
    print(f"\n| modes | {' | '.join(f'calls: {n}' for n in options.calls)} | seconds each |")
    print("|---|" + "---|" * (len(options.calls) + 1), flush=True)
    for modes in options.modes:
        started, cells = time.monotonic(), []
        for steps in options.calls:
            found = []
            for seed in range(options.seeds):
                student = plane.train_student(
                    teacher, modes=modes, steps=steps, iterations=options.iterations, batch=options.batch, seed=seed
                )
                found.append(plane.mean_distance(plane.arrivals(student, x, steps), ends))
            cells.append(f"{min(found):.3f}-{max(found):.3f}")
        each = (time.monotonic() - started) / len(options.calls) / options.seeds
        print(f"| {modes} | {' | '.join(cells)} | {each:.0f} |", flush=True)


if __name__ == "__main__":
    main()
