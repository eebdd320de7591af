"""The numbers of a comparison: means with intervals over the trainings, rank, what is more than noise."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from arcflow.comparison.config import MAIN, Contest, command
from arcflow.comparison.jobs import Job, wanted
from arcflow.metrics.intervals import Interval, seed_difference, seed_interval
from arcflow.system.packages import about
from arcflow.world.scene import SKILLS, held_out, parse

MEASURES = ("distance", "accuracy", "diversity")

TITLES = {"euler": "plain Euler", "heun": "Heun", "dpmpp": "DPM-Solver++"}
"""Of the teacher's own solvers."""


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


Rows = dict[str, dict[str, Any]]


def main_calls(rows: Rows) -> str:
    """The number of calls at which entrants are ranked."""
    counts = sorted({calls for row in rows.values() for calls in row["calls"]}, key=int)
    return str(MAIN) if str(MAIN) in counts else counts[0]


def ranked(rows: Rows, calls: str) -> list[str]:
    """Names, nearest to the teacher first; those that were not run at so many calls are left out."""
    there = [name for name, row in rows.items() if calls in row["calls"]]
    return sorted(there, key=lambda name: rows[name]["calls"][calls]["distance"]["mean"])


def spread(value: dict[str, Any], form: str) -> str:
    """A mean, and half the width of its interval where there is one."""
    if value["low"] is None:
        return f"{value['mean']:{form}}"
    return f"{value['mean']:{form}} &plusmn; {(value['high'] - value['low']) / 2:{form}}"


def verdict(means: dict[str, Any], what: str) -> str:
    """How an entrant stands to the first: "lower", "higher", or "same", which is all that noise leaves."""
    apart = means["less_first"].get(what)
    if apart is None or apart["low"] <= 0 <= apart["high"]:
        return "same"
    return "lower" if apart["high"] < 0 else "higher"
