"""A run is typed, complete, checked when it is made, and survives its own JSON."""

import dataclasses

import pytest

from arcflow.config import Data, Distill, Model, Optim, Run, from_json, to_json
from arcflow.recipes import flux, flux_published, qwen_image_published, world, world_quick

RECIPES = (world, world_quick, flux, flux_published, qwen_image_published)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_survives_its_json(recipe):
    assert from_json(to_json(recipe())) == recipe()


@pytest.mark.parametrize("guidance", [3.5, (1.5, 5.0)])
def test_a_number_and_a_range_of_guidance_survive_their_json(guidance):
    run = Run(distill=Distill(guidance=guidance))
    assert from_json(to_json(run)) == run


@pytest.mark.parametrize("kind", [Model, Distill, Data, Optim, Run])
def test_every_field_says_what_it_is(kind):
    import ast
    import inspect

    (body,) = ast.parse(inspect.getsource(kind)).body
    statements = [*body.body, None]
    fields = {field.name for field in dataclasses.fields(kind)}
    explained = {
        first.target.id
        for first, second in zip(statements, statements[1:], strict=False)
        if isinstance(first, ast.AnnAssign) and isinstance(second, ast.Expr)
    }
    assert fields - explained - {"model", "distill", "data", "optim"} == set()


def test_the_published_values():
    run = flux_published()
    assert (run.model.modes, run.model.rank, run.model.dropout) == (16, 256, 0.05)
    assert (run.distill.steps, run.distill.shift, run.distill.guidance) == (2, 3.2, 3.5)
    assert (run.distill.states, run.distill.window, run.distill.mode_dropout) == (4, 3, 0.1)
    assert (run.optim.lr, run.optim.lr_log_gamma, run.optim.betas) == (1e-4, 1e-5, (0.9, 0.95))
    assert (run.optim.weight_decay, run.optim.clip, run.optim.batch) == (0.0, 50.0, 384)
    both = (run, qwen_image_published())
    assert [(r.optim.iterations, r.distill.decay) for r in both] == [(10_000, 2000), (15_000, 1000)]
    assert [r.distill.teacher_cfg for r in both] == [1.0, 4.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Model(modes=0), r"model.modes = 0: expected 1 or more; the published adapters use 16"),
        (lambda: Model(rank=0), r"model.rank = 0: .*model.lora to False"),
        (lambda: Model(dropout=1.0), r"model.dropout = 1.0: expected 0 <= p < 1"),
        (lambda: Distill(steps=0), r"distill.steps = 0"),
        (lambda: Distill(window=128), r"distill.window = 128: expected 0 to 127"),
        (lambda: Distill(mode_dropout=-0.1), r"distill.mode_dropout = -0.1"),
        (lambda: Distill(led=3), r"distill.led = 3: expected 0 to 2, the fewest segments"),
        (lambda: Distill(teacher_cfg=0.0), r"distill.teacher_cfg = 0.0: expected 1 or more; 1 switches it off"),
        (lambda: Distill(guidance=(5.0, 1.5)), r"distill.guidance = \(5.0, 1.5\): .* the lower one first; say 3.5, or"),
        (lambda: Distill(guidance=-1.0), r"distill.guidance = -1.0: expected a number from 0 on"),
        (lambda: Data(prompts="prompts.doc"), r'data.prompts = .*expected "world", a file \(.txt, .jsonl'),
        (lambda: Data(prompts="owner/name"), r"data.cache = True: expected False for a streamed data set"),
        (lambda: Data(held_out="world"), r"data.held_out = 'world'"),
        (lambda: Data(held_out_count=0), r"data.held_out_count = 0"),
        (lambda: Optim(batch=0), r"optim.batch = 0"),
        (lambda: Optim(micro_batch=0), r"optim.micro_batch = 0"),
        (lambda: Optim(lr=0.0), r"optim.lr = 0.0: expected a positive number"),
        (lambda: Optim(betas=(0.9, 1.0)), r"optim.betas"),
        (lambda: Optim(cooldown="linear"), r"optim.cooldown_iterations = 0: .*set the length of the cooldown"),
        (lambda: Run(stop_after=0.0), r"stop_after = 0.0"),
        (lambda: Run(keep=0), r"keep = 0"),
        (
            lambda: from_json('{"optim": {"learning_rate": 1}}'),
            r"run.optim: unknown keys \['learning_rate'\], missing keys \[\]; expected",
        ),
    ],
)
def test_nonsense_is_refused_with_a_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_configuration_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        world().seed = 1
