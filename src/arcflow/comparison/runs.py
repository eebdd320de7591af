"""Every method at every number of calls, several trainings of each, and what of it is more than noise.

A run is one training of one entrant; its numbers go into a file of their own when it is done, so that a comparison that
was cut off goes on with the runs that are missing. Runs are shared out to processes. A mean has the interval of
Student's t over the trainings (one noise, one set of prompts for all: what differs is the training's seed), and one
method is called better than another only if the interval of their difference leaves out 0
(`metrics.intervals.seed_difference`).
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from arcflow.comparison.bench import Bench, End, TeacherImages
from arcflow.comparison.config import FREE, SHOWN, Plan
from arcflow.comparison.entrants import entrants
from arcflow.comparison.jobs import Job, jobs
from arcflow.comparison.results import TITLES, Comparison, Measured, TrialResult, summary
from arcflow.comparison.subject import WORLD, Subject
from arcflow.comparison.trial import ender, train_entrant
from arcflow.config import Distill
from arcflow.distillation.method import Cost
from arcflow.distillation.solvers import SOLVERS
from arcflow.system import files, records
from arcflow.system.devices import cores, torch_device


def compare(plan: Plan, log: Callable[[str], None] = print, subject: Subject = WORLD) -> Comparison:
    """Do the runs that are missing, then sum up all that are asked for."""
    out, todo = claim_comparison(plan), jobs(plan)
    missing = [job for job in todo if not _done(out, job)]
    if missing:
        log(f"{len(missing)} of {len(todo)} runs to do, {plan.budget} forward-equivalents each, in {out}")
        for job in _shared(plan, missing, subject):
            tqdm.write(job.name)
    elif not (out / "teacher.png").exists():  # a folder of before
        bench_reference(plan, subject=subject)
    results = summary(plan, {job: records.read(TrialResult, _record(out, job)) for job in todo}, subject)
    records.write(out / f"{plan.study}.json", results)
    return results


def claim_comparison(plan: Plan) -> Path:
    """The folder, refused if its runs had another budget, network or prompts."""
    out = Path(plan.out)
    settings = {name: value for name, value in asdict(plan).items() if name not in FREE}
    files.claim(out / "contest.json", json.dumps(settings, indent=2) + "\n", holds="runs")
    return out


def _record(out: Path, job: Job) -> Path:
    return out / "runs" / f"{job.name}.json"


def _done(out: Path, job: Job) -> bool:
    path = _record(out, job)
    return path.exists() and {*job.calls} <= records.read(TrialResult, path).results.keys()


def _shared(plan: Plan, missing: list[Job], subject: Subject) -> Iterator[Job]:
    """The runs as they are done, by several processes."""
    cuda = torch_device(plan.device).type == "cuda"
    workers = min(plan.workers or (1 if cuda else cores()), len(missing))
    bench_reference(plan, subject=subject)
    threads = max(1, cores() // max(workers, plan.workers or 1))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin, (threads,)) as pool:
        waiting = {pool.submit(_work, plan, subject, job): job for job in missing}
        with tqdm(total=len(missing), desc="compare", unit="run") as bar:
            try:
                for done in as_completed(waiting):
                    done.result()
                    bar.update()
                    yield waiting[done]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@cache
def _settled(plan: Plan, subject: Subject) -> tuple[Bench, TeacherImages]:
    """What the runs of a process share: the bench, and the teacher's images."""
    bench = Bench(plan, subject)
    return bench, bench_reference(plan, bench)


def _begin(threads: int) -> None:
    """A worker: it ends with its parent, and takes its share of the cores."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_the_parent() -> None:
    """A worker whose parent was killed would finish its run, and then wait for ever."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _work(plan: Plan, subject: Subject, job: Job) -> None:
    run_job(*_settled(plan, subject), job)


def bench_reference(plan: Plan, bench: Bench | None = None, subject: Subject = WORLD) -> TeacherImages:
    """The teacher's images, drawn once for a folder; the first of them are a file to look at."""
    path = Path(plan.out) / "teacher.safetensors"
    shown, drawn = path.with_name("teacher.png"), path.exists()
    if drawn and shown.exists():
        return TeacherImages(**load_file(path))
    bench = bench or Bench(plan, subject)
    reference = TeacherImages(**load_file(path)) if drawn else bench.reference()
    save_strip(bench.images(reference.latents[:SHOWN]), shown)
    if not drawn:
        files.write_tensors(path, vars(reference))
    return reference


def save_strip(images: UInt8[np.ndarray, "count rows columns 3"], path: Path) -> None:
    """Write images side by side as one PNG, whole or not at all."""
    files.write_image(path, Image.fromarray(np.concatenate(list(images), 1)))


def run_job(bench: Bench, reference: TeacherImages, job: Job) -> TrialResult:
    """Train, measure, and put it on disk: first the images, then the numbers, which say that it is done."""
    path = _record(Path(bench.plan.out), job)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = _solver(bench, job) if job.entrant in SOLVERS else _student(bench, reference, job)

    results: dict[int, Measured] = {}
    for calls in job.calls:
        with torch.no_grad():
            results[calls], images = bench.measure(made.ends(calls), reference)
        save_strip(images, path.with_name(f"{path.stem}-{calls}.png"))
    record = replace(made.record, results=results)
    files.write_text(path, json.dumps(records.plain(record)) + "\n")
    return record


@dataclass(frozen=True)
class _Made:
    """A record that is not measured yet, and how its student, or solver, is sampled in some number of calls."""

    record: TrialResult
    ends: Callable[[int], End]


def _solver(bench: Bench, job: Job) -> _Made:
    teacher, solve = bench.teacher(bench.base, Cost()), SOLVERS[job.entrant]

    def ends(calls: int) -> End:
        return lambda x, cond, generator: solve(teacher, x, cond, calls, Distill().shift)

    title = TITLES[job.entrant]
    return _Made(
        TrialResult(entrant=job.entrant, seed=job.seed, results={}, title=title, spent=0, curve=[], trained=0), ends
    )


def _student(bench: Bench, reference: TeacherImages, job: Job) -> _Made:
    entrant = next(e for e in entrants(job.study) if e.name == job.entrant)
    made = train_entrant(bench, entrant, job.trained_for, job.seed, reference)

    def ends(calls: int) -> End:
        return ender(entrant.method.sample, made.walker, made.run.distill, calls)

    record = TrialResult(
        entrant=job.entrant,
        seed=job.seed,
        results={},
        title=entrant.title,
        spent=bench.plan.budget,
        curve=made.curve,
        trained=made.trained,
        iterations=made.iterations,
        skipped=made.skipped,
        seconds=made.seconds,
    )
    return _Made(record, ends)
