"""What it costs one student to take more than one number of calls, or more than one guidance.

    python -m benchmarks.one_student --students one steps guidance --seeds 0 1 2 --out out/one_student
    python -m benchmarks.one_student --adapter world --guidances 1.5 3.5        # what an adapter that is there does

All trainings are the comparison's, with the project's own objective, on the same budget of forward-equivalents: "one"
is for two calls at guidance 3.5, "steps" takes one, two and four calls in turn, "guidance" draws a guidance of 1.5 to 5
for every sample. Each is measured in every number of calls and at every guidance that any of them was trained for:
distance to the teacher's own images at that guidance, and accuracy, on the held-out captions. The table has means over
the seeds and, in brackets, the interval of the difference to the first student (Student's t). A training that was
stopped goes on; one that is done is not repeated.
"""

import argparse
import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import arcflow
from arcflow import paper, recipes
from arcflow.comparison.bench import TEACHER_STEPS, Bench
from arcflow.comparison.config import Plan
from arcflow.config import ALWAYS, Run
from arcflow.distillation.method import Cost
from arcflow.distillation.walk import arcs, euler
from arcflow.families.conditioning import Cond
from arcflow.metrics.images import squared_error
from arcflow.metrics.intervals import seed_difference
from arcflow.path import step_grid
from arcflow.sampling.open import adapter_of
from arcflow.student.adapter import read_info
from arcflow.system import files
from arcflow.training.learner import views
from arcflow.training.loop import train
from arcflow.world.scene import HELD_OUT

RANGE = (1.5, 5.0)

STUDENTS: dict[str, dict[str, object]] = {"one": {}, "steps": {"also_steps": (1, 4)}, "guidance": {"guidance": RANGE}}
"""What each changes in the settings of the first."""

MEASURED = [(1, 3.5), (2, 1.5), (2, 3.5), (2, 5.0), (4, 3.5)]
"""Calls and guidance of the measurements."""


def training(student: str, seed: int, budget: int, out: Path) -> Run:
    """The settings of one training, as many iterations long as the budget lasts."""
    replace, usual = dataclasses.replace, recipes.comparison().run
    run = replace(
        usual,
        out=str(out / f"{student}-{seed}"),
        seed=seed,
        device="cpu",
        pictures=0,
        save_every=25,
        eval_every=10_000,
        model=replace(usual.model, form="coefficients", modes=4),
        distill=replace(usual.distill, handover="average", end=0.2, reuse=recipes.reuse(budget), hold=ALWAYS),
        data=replace(usual.data, held_out_count=8),
    )
    run = replace(run, distill=replace(run.distill, **STUDENTS[student]))
    iterations = round(budget / (run.optim.batch * recipes.forwards(run)))
    cooldown = round(iterations * usual.optim.cooldown_iterations / usual.optim.iterations)
    return replace(run, optim=replace(run.optim, iterations=iterations, cooldown_iterations=cooldown))


def at(cond: Cond, guidance: float) -> Cond:
    """The same conditioning at another guidance."""
    return cond | {"guidance": torch.full_like(cond["guidance"], guidance)}


def references(bench: Bench, guidances: list[float], out: Path) -> dict[float, Tensor]:
    """The teacher's final latents of the held-out captions at each guidance; drawn once for a folder."""
    teacher, grid = bench.teacher(bench.base, Cost()), step_grid(TEACHER_STEPS, paper.SHIFT)
    found = {}
    for guidance in guidances:
        path = out / f"teacher-{guidance:g}.safetensors"
        if not path.exists():
            latents = bench.ends(lambda x, cond, _, told=guidance: euler(teacher, x, at(cond, told), grid))
            files.write_tensors(path, {"latents": latents})
        found[guidance] = load_file(path)["latents"]
    return found


Numbers = dict[str, list[float]]
"""Distance and accuracy of a student, by what it was told."""


def measured(adapter: Path, bench: Bench, teacher: dict[float, Tensor]) -> Numbers:
    """What a student is worth at every guidance of which there are images of the teacher's."""
    net, info = copy.deepcopy(bench.base), read_info(adapter)
    arcflow.load_adapter(net, adapter)
    student, found = views(net.eval())[0], Numbers()
    for calls, guidance in MEASURED:
        if guidance not in teacher:
            continue
        grid = step_grid(calls, info.shift, info.final_step_scale)
        with torch.no_grad():
            ends = bench.ends(lambda x, cond, _, told=guidance, grid=grid: arcs(student, x, at(cond, told), grid))
        distance = float(squared_error(ends, teacher[guidance]).mean())
        found[label(calls, guidance)] = [distance, float(np.mean(bench.right(bench.images(ends))))]
    return found


def kept(run: Run, bench: Bench, teacher: dict[float, Tensor]) -> Numbers:
    """The same of a training, which is done first, if it is not there yet; kept beside its adapter."""
    path = Path(run.out) / "measured.json"
    if not path.exists():
        train(run, log=lambda message: None)
        files.write_json(path, measured(Path(run.out) / "adapter", bench, teacher))
    return json.loads(path.read_text("utf-8"))


def label(calls: int, guidance: float) -> str:
    return f"{calls} calls, guidance {guidance:g}"


def table(numbers: dict[str, list[Numbers]]) -> str:
    """Means over the seeds, and behind every student but the first the interval of what it differs by."""
    lines = ["| measured | " + " | ".join(numbers) + " |", "|---" * (1 + len(numbers)) + "|"]
    first = next(iter(numbers.values()))
    for place, name in enumerate(("distance", "accuracy")):
        for told in first[0]:
            values = [[seed[told][place] for seed in seeds] for seeds in numbers.values()]
            cells = [f"{np.mean(each):.3f}" for each in values]
            for i, each in enumerate(values[1:], 1):
                apart = seed_difference(each, values[0])
                cells[i] += f" ({apart.low:+.3f}, {apart.high:+.3f})" if len(each) > 1 else ""
            lines.append(f"| {name}, {told} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=24_000)
    parser.add_argument("--guidances", nargs="+", type=float, default=[1.5, 3.5, 5.0], help="measured at these")
    parser.add_argument("--captions", type=int, default=HELD_OUT, help="held-out captions, one image of each")
    parser.add_argument("--adapter", help="measure this one alone, and train nothing")
    parser.add_argument("--out", type=Path, default=Path("out/one_student"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(Plan(device="cpu", prompts=1, count=options.captions))
    teacher = references(bench, options.guidances, options.out)
    for guidance, latents in teacher.items():
        print(f"teacher at guidance {guidance:g}: {np.mean(bench.right(bench.images(latents))):.1%}", flush=True)
    if options.adapter:
        adapter = Path(adapter_of("world", options.adapter) or options.adapter)
        print(table({options.adapter: [measured(adapter, bench, teacher)]}))
        return
    numbers: dict[str, list[Numbers]] = {}
    for seed in options.seeds:
        for student in options.students:
            run = training(student, seed, options.budget, options.out)
            numbers.setdefault(student, []).append(kept(run, bench, teacher))
            print(student, seed, run.optim.iterations, numbers[student][-1], flush=True)
    print(table(numbers))


if __name__ == "__main__":
    main()
