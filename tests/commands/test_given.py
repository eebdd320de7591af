"""A file of settings, `--quick`, and a shorter run: what is explicit wins, and a run goes back in."""

import json

import pytest

from arcflow import cli, config, paper, recipes
from arcflow.commands.given import completed
from arcflow.commands.recipes import CARDS, costs


def taken(line: str):
    """The command that a line comes to."""
    return cli.parsed(completed(line.split())[0])


FEW = ("world", "flux", "qwen-image-48gb")
NAMED = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in recipes.RECIPES]
"""Recipes; those that differ from the few in numbers alone are for the slow part."""


@pytest.mark.parametrize("name", NAMED)
def test_the_record_of_a_run_goes_back_in(name, tmp_path) -> None:
    run, file = recipes.RECIPES[name](), tmp_path / "run.json"
    file.write_text(json.dumps(json.loads(config.to_json(run)) | {config.CONTENTS: {"prompts": "0"}}))
    assert taken(f"train --config {file}").recipe == run
    assert taken(f"train --config {file} --seed 7 --out elsewhere").recipe.seed == 7


def test_yaml_names_a_recipe_and_what_is_explicit_wins(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("recipe: flux-published\nprocesses: 2\noptim:\n  lr: 1e-3\nmodel: {rank: 8, lora: false}\n")
    train = taken(f"train --config {file} --model.rank 4")
    assert train.processes == 2 and train.recipe.optim.lr == 1e-3
    assert train.recipe.model.rank == 4 and not train.recipe.model.lora
    file.write_text("prompt: [a, b]\nsteps: 2\nheight: null\nfuse: false\n")
    sample = taken(f"sample --config {file} --steps 4")
    assert sample.prompt == ("a", "b") and sample.drawing.steps == 4 and sample.drawing.height is None


@pytest.mark.parametrize("text", ["- 1", "a: [", "5"])
def test_a_file_that_holds_no_settings_is_named(text, tmp_path, capsys) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "--config", str(file)])
    assert stop.value.code == 2 and str(file) in capsys.readouterr().err


@pytest.mark.slow
def test_a_shorter_run_has_a_shorter_schedule(tmp_path) -> None:
    whole = recipes.world()
    run = taken(f"train world --optim.iterations 440 --out {tmp_path}").recipe
    assert run.optim.cooldown_iterations * 10 == whole.optim.cooldown_iterations
    assert run.distill == whole.distill  # the teacher leads to the end, however far that is
    assert taken("train flux-published --optim.iterations 1000").recipe.distill.decay == paper.FLUX_DECAY / 10
    longer = taken("train world --optim.iterations 9000").recipe
    assert longer.optim.cooldown_iterations == whole.optim.cooldown_iterations
    assert taken("train flux-published --optim.iterations 420 --distill.decay 7").recipe.distill.decay == 7


def test_a_short_run_that_is_there_keeps_its_lengths_when_it_is_given_more(tmp_path) -> None:
    short = taken(f"train world --optim.iterations 100 --out {tmp_path}").recipe
    (tmp_path / "run.json").write_text(config.to_json(short))
    more = taken(f"train world --optim.iterations 200 --out {tmp_path}").recipe
    assert more.distill == short.distill and more.optim.cooldown_iterations == short.optim.cooldown_iterations


def test_processes_are_told_the_whole_schedule() -> None:
    """A value that the user gave, and that the recipe has too, is not shortened on the way to another process."""
    run = taken("train flux-published --optim.iterations 420 --distill.decay 2000").recipe
    settings = json.loads(config.to_json(run))
    again = cli.parsed(completed(recipes.run_command(settings).split()[1:])[0]).recipe
    assert again == run


def test_quick_sets_defaults_and_what_is_explicit_wins() -> None:
    plan = taken("compare --quick --count 384 --out out/mine").plan
    assert (plan.count, plan.out, plan.budget, plan.calls) == (384, "out/mine", 12_000, (2,))
    assert taken("compare --quick").plan.out == "out/compare_quick"


def test_a_wrong_value_is_told_as_it_is_typed(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "world", "--model.rank", "0"])
    said = capsys.readouterr().err
    assert said.startswith("arcflow train: --model.rank = 0: expected 1 or more; say --model.no-lora")
    assert "tyro" not in said and "recipe." not in said


def test_every_recipe_has_a_cost_or_says_that_it_was_not_timed() -> None:
    assert [one.recipe for one in costs()] == [*recipes.RECIPES] and CARDS.keys() <= recipes.RECIPES.keys()
    assert all((one.hours is None) == (one.measured == "not timed") for one in costs())


def test_a_missing_list_is_told_before_anything_is_imported(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["train", "flux"])
    assert "arcflow prompts --out prompts.txt" in capsys.readouterr().err
    cli.main(["prompts", "--count", "50"])
    assert len(set((tmp_path / "prompts.txt").read_text().splitlines())) == 50
