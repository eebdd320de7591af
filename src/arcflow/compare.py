"""Every method at every number of calls, several trainings of each, and what of it is more than noise.

A run is one training of one entrant; its numbers go into a file of their own when it is done, so that a comparison that
was cut off goes on with the runs that are missing. Runs are shared out to processes. A mean has the interval of
Student's t over the trainings (one noise, one set of prompts for all: what differs is the training's seed), and one
method is called better than another only if the interval of their difference leaves out 0 (`metrics.seed_difference`).
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from arcflow.baselines.method import Cost
from arcflow.baselines.solvers import SOLVERS
from arcflow.config import Distill
from arcflow.contest import Bench, End, Entrant, Reference, ender, train
from arcflow.evaluate import about, save_results
from arcflow.loading import torch_device
from arcflow.metrics import Interval, seed_difference, seed_interval
from arcflow.rules import Contest, Study
from arcflow.state import write_atomic
from arcflow.studies import entrants
from arcflow.world.commands import held_out
from arcflow.world.scene import SKILLS, parse

MAIN = 2
"""The number of calls at which methods are ranked."""
MEASURES = ("distance", "accuracy", "diversity")
TITLES = {"euler": "plain Euler", "heun": "Heun", "dpmpp": "DPM-Solver++"}
"""Of the teacher's own solvers."""
FREE = ("only", "calls", "seeds", "out", "device", "workers", "study")
"""Settings that may change when a folder is taken up again: which runs there are, not what a run is."""


@dataclass(frozen=True)
class Job:
    """One training, or one solver that needs none."""

    study: Study
    entrant: str
    calls: tuple[int, ...]
    """Numbers of calls that its student is judged at."""
    seed: int
    any_calls: bool = False
    """Whether the training is for any number of calls."""

    @property
    def name(self) -> str:
        calls = "any" if self.any_calls else "".join(map(str, self.calls))
        return f"{self.entrant}/{calls}-{self.seed}"

    @property
    def trained_for(self) -> int:
        """Number of calls that the objective is told."""
        return MAIN if self.any_calls else self.calls[0]


def jobs(contest: Contest) -> list[Job]:
    """All runs of a contest. Those at the main number of calls come first: there is something to see after a while."""
    field, seeds = wanted(contest), range(contest.seeds)
    found = [Job(contest.study, name, (n,), 0) for name in solvers(contest) for n in contest.calls]
    order = sorted(contest.calls, key=lambda n: (n != MAIN, n))
    for n in order:
        named = [entrant.name for entrant in field if entrant.method.per_calls]
        found += [Job(contest.study, name, (n,), seed) for seed in seeds for name in named]
        if n == order[0]:
            named = [entrant.name for entrant in field if not entrant.method.per_calls]
            found += [Job(contest.study, name, tuple(contest.calls), seed, True) for seed in seeds for name in named]
    return found


def solvers(contest: Contest) -> list[str]:
    """The teacher's own solvers, which take part wherever methods are compared."""
    if contest.study != "methods":
        return ["euler"]
    return [name for name in SOLVERS if not contest.only or name in contest.only or name == "euler"]


def wanted(contest: Contest) -> list[Entrant]:
    """The entrants of the study that are asked for."""
    field = {entrant.name: entrant for entrant in entrants(contest.study)}
    unknown = [name for name in contest.only if name not in field and name not in SOLVERS]
    if unknown:
        raise ValueError(
            f"no {', '.join(unknown)} in the study {contest.study!r}: expected some of {', '.join([*field, *SOLVERS])}"
        )
    return [entrant for name, entrant in field.items() if not contest.only or name in contest.only]


def compare(contest: Contest, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Do the runs that are missing, then sum up all that are asked for."""
    out, todo = claim(contest), jobs(contest)
    missing = [job for job in todo if not _done(out, job)]
    if missing:
        log(f"{len(missing)} of {len(todo)} runs to do, {contest.budget} forward-equivalents each, in {out}")
        for job in _shared(contest, missing):
            tqdm.write(job.name)
    results = summary(contest, {job: json.loads(_record(out, job).read_text("utf-8")) for job in todo})
    save_results(results, out / f"{contest.study}.json")
    return results


def claim(contest: Contest) -> Path:
    """The folder, refused if its runs had another budget, network or prompts."""
    out = Path(contest.out)
    stored, mine = out / "contest.json", {k: v for k, v in asdict(contest).items() if k not in FREE}
    if stored.exists():
        theirs = json.loads(stored.read_text("utf-8"))
        changed = [f"{k}: {theirs.get(k)!r} there, {v!r} now" for k, v in mine.items() if theirs.get(k) != v]
        if changed:
            raise ValueError(
                f"{out} holds runs with other settings ({'; '.join(changed)}): expected the same, for they would not "
                f"compare; repeat them, or choose another folder with --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(stored, lambda draft: draft.write_text(json.dumps(mine, indent=2) + "\n", "utf-8"))
    return out


def _record(out: Path, job: Job) -> Path:
    return out / "runs" / f"{job.name}.json"


def _done(out: Path, job: Job) -> bool:
    path = _record(out, job)
    return path.exists() and {*map(str, job.calls)} <= json.loads(path.read_text("utf-8"))["results"].keys()


def _shared(contest: Contest, missing: list[Job]) -> Iterator[Job]:
    """The runs as they are done, by several processes."""
    cuda = torch_device(contest.device).type == "cuda"
    workers = min(contest.workers or (1 if cuda else os.cpu_count() or 1), len(missing))
    bench_reference(contest)
    threads = max(1, (os.cpu_count() or 1) // max(workers, contest.workers or 1))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _settle, (contest, threads)) as pool:
        waiting = {pool.submit(_work, job): job for job in missing}
        with tqdm(total=len(missing), desc="compare", unit="run") as bar:
            try:
                for done in as_completed(waiting):
                    done.result()
                    bar.update()
                    yield waiting[done]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


_bench: Bench
_reference: Reference


def _settle(contest: Contest, threads: int) -> None:
    global _bench, _reference
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _bench = Bench(contest)
    _reference = bench_reference(contest, _bench)


def _end_with_the_parent() -> None:
    """A worker whose parent was killed would finish its run, and then wait for ever."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _work(job: Job) -> None:
    run(_bench, _reference, job)


def bench_reference(contest: Contest, bench: Bench | None = None) -> Reference:
    """The teacher's pictures, drawn once for a folder."""
    path = Path(contest.out) / "teacher.safetensors"
    if not path.exists():
        reference = (bench or Bench(contest)).reference()
        write_atomic(path, lambda draft: save_file(vars(reference), draft))
    return Reference(**load_file(path))


def run(bench: Bench, reference: Reference, job: Job) -> dict[str, Any]:
    """Train, judge, and put it on disk: first the pictures, then the numbers, which say that it is done."""
    path = _record(Path(bench.contest.out), job)
    path.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"entrant": job.entrant, "seed": job.seed, "results": {}}
    if job.entrant in SOLVERS:
        record |= {"title": TITLES[job.entrant], "spent": 0, "curve": [], "trained": 0}
        teacher, solve = bench.teacher(bench.base, Cost()), SOLVERS[job.entrant]

        def ends(calls: int) -> End:
            return lambda x, cond, generator: solve(teacher, x, cond, calls, Distill().shift)
    else:
        entrant = next(e for e in entrants(job.study) if e.name == job.entrant)
        made = train(bench, entrant, job.trained_for, job.seed, reference)
        record |= {"title": entrant.title, "spent": bench.contest.budget, "curve": made.curve, "trained": made.trained}
        record |= {"iterations": made.iterations, "skipped": made.skipped, "seconds": made.seconds}

        def ends(calls: int) -> End:
            return ender(entrant.method.sample, made.walker, made.run.distill, calls)

    for calls in job.calls:
        with torch.no_grad():
            judged = bench.judge(ends(calls), reference)
        strip = np.concatenate(list(judged.pop("pictures")), 1)
        Image.fromarray(strip).save(path.with_name(f"{path.stem}-{calls}.png"))
        record["results"][str(calls)] = judged
    write_atomic(path, lambda draft: draft.write_text(json.dumps(record) + "\n", "utf-8"))
    return record


def summary(contest: Contest, records: dict[Job, dict[str, Any]]) -> dict[str, Any]:
    """For each entrant and number of calls the means over its trainings with their intervals, and how they differ from
    those of the study's first."""
    prompts = [parse(text) for text in held_out(contest.count)]
    skills = {skill: [i for i, prompt in enumerate(prompts) if prompt.skill == skill] for skill in SKILLS}
    rows: dict[str, dict[str, Any]] = {}
    for job, record in records.items():
        row = rows.setdefault(job.entrant, {"title": record["title"], "trained": record["trained"], "calls": {}})
        for calls, judged in ((str(n), record["results"][str(n)]) for n in job.calls):
            row["calls"].setdefault(calls, []).append({**record, **judged, "job": job.name})
    seconds = {e.name: e.method.second_network for e in wanted(contest)}
    for name, row in rows.items():
        row["second_network"] = seconds.get(name, False)
        row["calls"] = {calls: _means(row["calls"][calls], skills) for calls in sorted(row["calls"], key=int)}
    first = rows[wanted(contest)[0].name]["calls"]
    for row in rows.values():
        for calls, means in row["calls"].items():
            means["less_first"] = {
                what: _plain(seed_difference(means[what]["seeds"], first[calls][what]["seeds"]))
                for what in MEASURES
                if calls in first
            }
    return {"rows": rows, "first": wanted(contest)[0].name, "about": about(command=command(contest), **_size(contest))}


def command(contest: Contest) -> str:
    """The command line that does the same again."""
    usual = asdict(Contest())
    changed = {k: v for k, v in asdict(contest).items() if v != usual[k] and k not in ("out", "workers", "device")}
    words = [f"--{k} {' '.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in changed.items()]
    return " ".join(["arcflow compare", *words])


def _size(contest: Contest) -> dict[str, Any]:
    return {name: getattr(contest, name) for name in ("budget", "seeds", "count", "batch", "prompts")}


def _means(runs: list[dict[str, Any]], skills: dict[str, list[int]]) -> dict[str, Any]:
    each = {
        "distance": [float(np.mean(run["distance"])) for run in runs],
        "accuracy": [float(np.mean(run["right"])) for run in runs],
        "diversity": [run["diversity"] for run in runs],
    }
    right = np.mean([run["right"] for run in runs], 0)
    curves = [run["curve"] for run in runs if run["curve"]]
    return {
        **{what: {**_around(values), "seeds": values} for what, values in each.items()},
        "skills": {skill: float(right[rows].mean()) for skill, rows in skills.items() if rows},
        "curve": np.mean(curves, 0).tolist() if curves else [],
        "broken": sum(run["broken"] for run in runs),
        "pictures": [run["job"] for run in runs],
    }


def _around(values: Sequence[float]) -> dict[str, float | None]:
    if len(values) < 2:
        return {"mean": values[0], "low": None, "high": None}
    return _plain(seed_interval(values))


def _plain(interval: Interval) -> dict[str, float | None]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}
