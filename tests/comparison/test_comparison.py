"""A comparison: equal budgets, runs that are done once, numbers that can be taken up again."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from arcflow import recipes
from arcflow.comparison import runs as comparison
from arcflow.comparison.bench import Bench
from arcflow.comparison.config import Plan
from arcflow.comparison.entrants import STUDIES, entrants, settings
from arcflow.comparison.jobs import Job, jobs
from arcflow.comparison.results import Comparison, Measured, TrialResult, summary
from arcflow.comparison.runs import bench_reference, claim_comparison, compare, run_job
from arcflow.comparison.trial import train_entrant
from arcflow.config import flat, to_json
from arcflow.system import records

TINY = Plan(calls=(2,), seeds=1, budget=400, batch=4, prompts=16, count=6, alike=2, pictures=2, rank=2, workers=1)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return dataclasses.replace(TINY, out=str(tmp_path_factory.mktemp("compare")))


@pytest.fixture(scope="module")
def bench(plan):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arcflow.comparison.bench.TEACHER_STEPS", 4)  # the small teacher's 50 steps are seconds
        bench = Bench(plan)
        claim_comparison(plan)
        bench_reference(plan, bench)
    return bench


def test_a_training_for_any_number_of_calls_is_measured_at_all_of_them(plan):
    todo = jobs(dataclasses.replace(plan, calls=(1, 4), seeds=2))
    assert {job.calls for job in todo if job.entrant == "reflow"} == {(1, 4)}
    assert {job.calls for job in todo if job.entrant == "arcflow"} == {(1,), (4,)}
    assert len({job.name for job in todo}) == len(todo)


@pytest.mark.parametrize("study", STUDIES)
def test_the_settings_of_every_entrant_are_valid_and_their_own(plan, study):
    field = entrants(study)
    assert len({entrant.name for entrant in field}) == len(field)
    for entrant in field:
        assert settings(plan, entrant, 2, 0).run.distill.steps == 2


def by_name(run):
    return flat(json.loads(to_json(run)))


def test_every_method_trains_by_the_recipe(plan):
    usual = dataclasses.replace(Plan(), budget=plan.budget)
    for entrant in entrants("methods"):
        budget, recipe = settings(usual, entrant, 2, 0), recipes.comparison()
        assert dataclasses.replace(budget, run=recipe.run, forwards=recipe.forwards) == recipe
        differ = {name for name, value in by_name(budget.run).items() if by_name(recipe.run)[name] != value}
        own = set() if entrant.name != "coefficients" else {"model.form", "distill.handover", "distill.end"}
        assert differ <= {"model.modes"} | own, entrant.name


def test_the_guide_names_every_setting_in_which_the_recipe_is_not_the_demos():
    guide = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text("utf-8")
    ours, demo = by_name(recipes.comparison().run), by_name(recipes.world_quick())
    training = ("model.", "distill.", "optim.")
    differ = {name for name, value in demo.items() if name.startswith(training) and ours[name] != value}
    table = guide[guide.index("## What is the recipe's") : guide.index("## What the numbers say")]
    named = set(re.findall(r"`((?:model|distill|optim)\.[a-z_]+)`", table))
    assert named == differ


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arcflow", "reflow", "dmd2"])
def test_a_training_ends_with_its_budget(plan, bench, name):
    entrant = next(e for e in entrants("methods") if e.name == name)
    made = train_entrant(bench, entrant, 2, 1, bench_reference(plan))
    last, _ = made.curve[-1]
    assert plan.budget <= last < 3 * plan.budget and made.skipped == 0
    assert len(made.curve) == 5 and made.iterations >= 1


@pytest.mark.slow
def test_the_same_training_twice_gives_the_same_numbers(plan, bench):
    job, reference = Job("methods", "linear", (2,), 0), bench_reference(plan)
    assert run_job(bench, reference, job).results == run_job(bench, reference, job).results


@pytest.mark.slow
def test_solvers_are_the_teachers_own(plan, bench):
    record = run_job(bench, bench_reference(plan), Job("methods", "euler", (4,), 0))
    assert max(record.results[4].distance) < 1e-9  # here the teacher takes 4 steps itself


@pytest.mark.slow
def test_runs_that_are_there_are_not_done_again(plan, bench, monkeypatch):
    asked = dataclasses.replace(plan, only=("arcflow", "linear"))
    did = []

    def shared(plan, missing, subject):
        for job in missing:
            did.append(job.name)
            run_job(bench, bench_reference(plan), job)
            yield job

    monkeypatch.setattr(comparison, "_shared", shared)
    first = compare(asked, log=did.append)
    done = list(did)
    assert compare(asked, log=did.append) == first and did == done
    stored = records.read(Comparison, Path(plan.out) / "methods.json")
    assert stored == first
    teacher = (Path(plan.out) / "teacher.png").read_bytes()
    (Path(plan.out) / "teacher.png").unlink()  # as in a folder of before
    assert bench_reference(plan, bench).latents.shape[0] == plan.count
    assert (Path(plan.out) / "teacher.png").read_bytes() == teacher
    assert stored.rows.keys() == {"euler", "arcflow", "linear"} and stored.first == "arcflow"
    assert stored.rows["arcflow"].calls[2].less_first.distance.mean == 0


def test_a_folder_with_another_budget_is_refused(plan):
    claim_comparison(plan)
    with pytest.raises(ValueError, match=r"budget: 400 there, 500 now.*choose another folder"):
        claim_comparison(dataclasses.replace(plan, budget=500))
    claim_comparison(dataclasses.replace(plan, seeds=9, calls=(8,)))  # more of the same


def test_an_unknown_entrant_is_told_the_known_ones(plan):
    with pytest.raises(ValueError, match="no arcflwo in the study 'methods': expected some of arcflow, coefficients"):
        jobs(dataclasses.replace(plan, only=("arcflwo",)))


@pytest.mark.slow
def test_latents_that_are_not_finite_are_counted(plan, bench):
    def nothing(x, cond, generator):
        return torch.full_like(x, torch.nan)

    assert bench.measure(nothing, bench_reference(plan))[0].broken == 6


def test_means_over_trainings_have_an_interval(plan):
    def record(seed, distance):
        measured = Measured(distance=[distance] * 6, right=[True, False] * 3, diversity=1.0, broken=0)
        curve = [(1, distance)]
        return TrialResult(entrant="x", seed=seed, results={2: measured}, title="x", spent=1, curve=curve, trained=1)

    asked = dataclasses.replace(plan, only=("arcflow",), seeds=2)
    runs = {Job("methods", "arcflow", (2,), s): record(s, d) for s, d in enumerate((0.1, 0.3))}
    means = summary(asked, runs).rows["arcflow"].calls[2]
    assert means.distance.mean == pytest.approx(0.2) and means.distance.seeds == pytest.approx([0.1, 0.3])
    assert means.distance.low < 0 < means.distance.high and means.curve == [(1, pytest.approx(0.2))]


@pytest.mark.slow
def test_a_comparison_as_a_user_runs_it(tmp_path, monkeypatch, capsys):
    from arcflow.cli import main

    monkeypatch.chdir(tmp_path)
    small = "--calls 2 --seeds 1 --budget 800 --prompts 64 --count 8 --alike 2 --pictures 2 --workers 2 --out out"
    main(["compare", "--only", "arcflow", "linear", *small.split()])
    printed = capsys.readouterr().out
    assert "ArcFlow" in printed and (tmp_path / "out" / "methods.html").stat().st_size > 100_000
    main(["claims", "out", "--out", "claims.md"])
    assert "Momentum beats straight lines" in (tmp_path / "claims.md").read_text()
