"""What an ideal student of K modes could reach on the shipped small FLUX: no network, only the class of paths.

    python -m benchmarks.ideal [--count 64] [--points 53] [--refine 30] [--out benchmarks/results/ideal.json]

The teacher walks held-out prompts in `points` - 1 Euler steps, and mixtures are fitted to every token's path by itself
(`arcflow.ideal`). Two tables come out, as Markdown. In the first the fit minimizes the matching objective: what it
leaves of the velocity, in each segment, and how far from the teacher's image its arcs end (mean squares, as
`velocity_error` and `distance` in the log of a training). The second does not start from the loss but from the end,
which is exactly right for every K. Momentum factors are those of a new head; "refined" ones are fitted too.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arcflow import recipes
from arcflow.data.batches import open_prompts
from arcflow.distillation.walk import euler
from arcflow.families import family_of, network
from arcflow.families.conditioning import Cond
from arcflow.families.loading import load_pipe
from arcflow.laboratory.ideal import Errors, Measure, ideal_errors, noise_level, raw_time
from arcflow.path import step_grid
from arcflow.reports.claim_files import Bound, Ideal
from arcflow.system import records
from arcflow.system.packages import About, about

MODES = (1, 2, 4, 8, 16, 32)
REFINED = (2, 4)


def teacher_paths(count: int, steps: int, fewer: list[int]) -> tuple[Tensor, Tensor, int, dict[int, float]]:
    """Every point of the teacher's paths from the noises of held-out prompts, the noise levels, pixels in a token, and
    the end errors of plain Euler in fewer steps."""
    run = recipes.world()
    held_out = open_prompts(replace(run.data, held_out_count=count), seed=run.seed, batch=count).held_out
    pipe = load_pipe(run.model)
    net, (height, width) = pipe.transformer.eval(), held_out.size
    cond = network.encode_prompts(pipe, held_out.prompts, height=height, width=width)
    x = network.noise(pipe, held_out.seeds, height, width)

    def teacher(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return network.call(net, x, sigma, cond).float()

    def walk(steps: int) -> Tensor:
        return euler(teacher, x, cond, step_grid(steps, run.distill.shift), trace=True)

    path = walk(steps)
    plain = {n: float((walk(n)[-1] - path[-1]).square().mean()) for n in fewer}
    return path, step_grid(steps, run.distill.shift), family_of(net).pixels, plain


def line(name: str, errors: Errors) -> str:
    velocity = ", ".join(f"{error:.2g}" for error in errors.velocity)
    directions = ", ".join(map(str, errors.directions))
    return f"| {name} | {velocity} | {errors.walked:.2g} | {directions} |"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--points", type=int, default=53)
    parser.add_argument("--refine", type=int, default=30)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    path, sigmas, pixels, plain = teacher_paths(options.count, options.points - 1, options.steps)
    print(f"{options.count} held-out prompts, teacher in {options.points - 1} steps, {pixels} pixels in a token")
    for title, measure in (("matched, as in training", raw_time), ("matched over noise level", noise_level)):
        for steps in options.steps:
            print(f"\n{title}, calls: {steps} (end error of plain Euler: {plain[steps]:.2g})\n")
            table(measure, path, sigmas, pixels, steps, options.refine)
    if options.out:
        calls = {
            n: Bound(
                euler=plain[n],
                modes={k: ideal_errors(path, sigmas, modes=k, steps=n, pixels=pixels).walked for k in MODES},
            )
            for n in options.steps
        }
        command = f"python -m benchmarks.ideal --count {options.count} --refine {options.refine}"
        records.write(options.out, Ideal(calls=calls, about=About(**about(command=command))))


def table(measure: Measure, path: Tensor, sigmas: Tensor, pixels: int, steps: int, refine: int) -> None:
    print("| modes | velocity error by segment | end error | directions |\n|---|---|---|---|", flush=True)
    for modes in MODES:
        print(line(str(modes), ideal_errors(path, sigmas, modes=modes, steps=steps, pixels=pixels, measure=measure)))
    for modes in REFINED if refine and measure is raw_time else ():
        errors = ideal_errors(path, sigmas, modes=modes, steps=steps, pixels=pixels, measure=measure, refine=refine)
        print(line(f"{modes}, refined", errors), flush=True)


if __name__ == "__main__":
    main()
