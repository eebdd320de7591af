"""How often a walk of the teacher's is used, by budget: what new walks cost and what is learned by heart.

    python -m benchmarks.reuse --budgets 24000 96000 --reuse 1 2 4 8 --out out/reuse

Every training is `world-quick` with the project's own objective, as long as its budget of forward-equivalents lasts. Of
the last tenth of it the table has the velocity error on new walks and on kept ones: the first says how good the student
is, with far less noise than images do; the second, where it lies below, what is known by heart. In two calls: the
distance on 384 held-out captions, the accuracy on 2048. A training that was stopped goes on; one that is done is not
repeated.
"""

import argparse
import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch

import arcflow
from arcflow import recipes
from arcflow.comparison.bench import Bench, TeacherImages
from arcflow.comparison.config import Plan
from arcflow.comparison.runs import bench_reference
from arcflow.config import Run
from arcflow.distillation.walk import arcs, sampler_grid
from arcflow.metrics.images import squared_error
from arcflow.system import files
from arcflow.training.learner import views
from arcflow.training.loop import train


def training(budget: int, reuse: int, end: float, out: Path) -> Run:
    """The settings of one training, as many iterations long as the budget lasts."""
    replace, quick = dataclasses.replace, recipes.world_quick()
    run = replace(
        quick,
        out=str(out / f"{budget}-{reuse}"),
        stop_after=None,
        pictures=0,
        save_every=10_000,
        eval_every=10_000,
        model=replace(quick.model, form="coefficients", modes=4),
        distill=replace(quick.distill, handover="average", end=end, led=quick.distill.steps, reuse=reuse),
        optim=replace(quick.optim, directions="modes"),
    )
    iterations = max(round(budget / (run.optim.batch * recipes.forwards(run))), 1)
    warmup = min(run.optim.warmup, iterations // 4)
    optim = replace(run.optim, iterations=iterations, warmup=warmup, cooldown_iterations=iterations - warmup)
    return replace(run, optim=optim)


def mean_of(log: list[dict[str, Any]], name: str) -> float | None:
    """Mean over the last tenth of the iterations, of those that say it."""
    last = max(line["step"] for line in log)
    values = [line[name] for line in log if name in line and line["step"] > 0.9 * last]
    return sum(values) / len(values) if values else None


def line(budget: int, reuse: int, run: Run, bench: Bench, reference: TeacherImages) -> str:
    """A row of the table, of a training that is done."""
    log = files.read_lines(Path(run.out) / "log.jsonl")
    new, kept = mean_of(log, "velocity_error"), mean_of(log, "velocity_error_kept")
    net = copy.deepcopy(bench.base)
    arcflow.load_adapter(net, Path(run.out) / "adapter")
    student, grid = views(net.eval())[0], sampler_grid(run.distill.steps, run.distill)
    with torch.no_grad():
        ends = bench.ends(lambda x, cond, generator: arcs(student, x, cond, grid))
    distance = float(squared_error(ends[: len(reference.latents)], reference.latents).mean())
    accuracy = 100 * sum(bench.right(bench.images(ends))) / len(ends)
    errors = " | ".join("-" if value is None else f"{value:.4f}" for value in (new, kept))
    return f"| {budget} | {reuse} | {run.optim.iterations} | {errors} | {distance:.4f} | {accuracy:.1f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", type=int, default=[24_000, 96_000, 180_000])
    parser.add_argument("--reuse", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--end", type=float, default=0.2, help="share of the loss on the end of the step")
    parser.add_argument("--out", type=Path, default=Path("out/reuse"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(out=str(options.out), device="cpu")
    reference = bench_reference(plan)
    bench = Bench(dataclasses.replace(plan, count=2048))
    print("| budget | uses of a walk | iterations | error, new walks | error, kept walks | distance | accuracy |")
    print("|---" * 7 + "|")
    for budget in options.budgets:
        for reuse in options.reuse:
            run = training(budget, reuse, options.end, options.out)
            train(run, log=lambda message: None)
            print(line(budget, reuse, run, bench, reference), flush=True)


if __name__ == "__main__":
    main()
