"""The large models at their true shapes: on the meta device, and what is measured on a GPU."""

import dataclasses
from pathlib import Path

import pytest
import torch

from arcflow import attach, detach, recipes, student
from arcflow.families import memory, network
from arcflow.sampling.generate import stock_euler
from arcflow.student import adapter
from tests.support import pipelines as tiny


@pytest.mark.slow
def test_the_share_that_is_trained_is_that_of_the_published_adapters() -> None:
    from benchmarks.full_size import count, transformers

    published = ("FLUX.1-dev", "Qwen-Image")
    sizes = {name: count(net) for name, net in transformers(*published).items()}
    assert {name: (sizes[name].base, sizes[name].trainable) for name in published} == {
        "FLUX.1-dev": (11_901_408_320, 652_405_884),
        "Qwen-Image": (20_430_401_088, 960_687_228),
    }


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own Chroma uses it
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # norms kept in float32
def test_the_memory_that_is_planned_with_is_what_the_benchmark_computes() -> None:
    from arcflow.families.memory import MODELS, VIDEOS
    from benchmarks.memory import IMAGES, parts_of_all

    known = {name: MODELS[name] for name in IMAGES} | VIDEOS
    for name, found in parts_of_all().items():
        one, other = (value if isinstance(value, dict) else {1: value} for value in (known[name], found))
        for frames, parts in other.items():
            assert dataclasses.asdict(one[frames]) == pytest.approx(dataclasses.asdict(parts), abs=0.006)


def test_a_larger_card_takes_a_faster_way_and_every_way_has_a_guide() -> None:
    guide = (Path(__file__).parents[2] / "docs/memory.md").read_text("utf-8")
    for parts in memory.MODELS.values():
        names = [way.name for way in memory.ways(parts)]
        assert all(f"## {name[0].upper()}{name[1:]}" in guide for name in names)
        chosen = [memory.best(parts, card) for card in memory.CARDS]
        assert all(way and way.gigabytes <= card for way, card in zip(chosen, memory.CARDS, strict=True))
        assert [names.index(way.name) for way in chosen if way] == sorted(
            (names.index(way.name) for way in chosen if way), reverse=True
        )


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "card"), [("flux-24gb", 24), ("flux-48gb", 48)])
def test_a_recipe_for_a_card_fits_it(recipe, card) -> None:
    """Computed at the true shapes; what `docs/training.md` says in its table."""
    from benchmarks.training_memory import RECIPES, use

    mine, _ = use(RECIPES[recipe]())
    guide = (Path(__file__).parents[2] / "docs/training.md").read_text("utf-8")
    (row,) = [line for line in guide.splitlines() if line.startswith(f"| {recipe} |")]
    assert float(row.split("|")[-3]) == pytest.approx(mine.total, abs=0.06) and mine.total < card


@pytest.mark.slow
def test_what_is_measured_on_a_gpu_draws_with_and_without_a_student_and_trains_it(flux, tmp_path) -> None:
    """The pieces of `benchmarks.on_gpu`, on a tiny model."""
    from benchmarks.on_gpu import Loop, Sampling, build

    pipe = build(lambda: (flux.transformer, [flux.text_encoder_2, flux.text_encoder], flux.vae), "cpu")
    here = Sampling(pipe, repeats=1, side=tiny.SIDE)
    text = here.encode()
    with stock_euler(pipe):
        assert here.draw(text, 3).calls["transformer"] == 3
    adapter.save_adapter(student.build(pipe.transformer, modes=4, rank=2), tmp_path)
    student.remove(pipe.transformer)
    attach(pipe, tmp_path, fuse=True)
    assert here.draw(text, 2).calls["transformer"] == 2 and here.medians(text, 2)["transformer"] > 0
    detach(pipe)

    cond = network.encode_prompts(flux, ["a red cube"], height=tiny.SIDE, width=tiny.SIDE, max_sequence_length=8)
    training = Loop(pipe.transformer, recipes.flux_48gb(), network.noise(flux, [0], tiny.SIDE, tiny.SIDE), cond)
    before = [p.detach().clone() for p in training.learner.parameters.values()]
    for step in (0, training.run.distill.decay):  # the teacher's share is 1, then 0
        training.ours(step)
    assert not all(torch.equal(p, kept) for p, kept in zip(training.learner.parameters.values(), before, strict=True))
