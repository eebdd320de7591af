"""Sampling: the stock pipeline is what runs, seeds mean the same noise everywhere, nothing is drawn twice."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arcflow import attach, detach, save_adapter, student
from arcflow.sampling.folder import Recipe, parameters, png, read_manifest, sample_folder
from arcflow.sampling.generate import generate, metered, stock_euler, trajectory
from tests.support.pipelines import SIDE, perturb

SIZE = {"height": SIDE, "width": SIDE}
PROMPTS = ["a red cube", "a blue ball", "two green ball"]


@pytest.fixture
def adapter(pipe, tmp_path) -> Path:
    """An adapter for the pipeline, which is left as it was."""
    student.build(pipe.transformer, modes=4, rank=4, generator=torch.Generator().manual_seed(1))
    perturb(pipe.transformer)
    save_adapter(pipe.transformer, tmp_path / "adapter")
    student.remove(pipe.transformer)
    return tmp_path / "adapter"


def recipe(prompt: str = PROMPTS[0], seed: int = 0) -> Recipe:
    size = {"height": SIDE, "width": SIDE}
    return Recipe(prompt=prompt, seed=seed, steps=2, guidance=None, model="tiny", adapter="none", version="0", **size)


def test_images_are_those_of_the_stock_pipeline(flux) -> None:
    with stock_euler(flux):
        ours = generate(flux, PROMPTS[:1], [7], steps=3, **SIZE)
        generator = torch.Generator("cpu").manual_seed(7)
        stock = flux(PROMPTS[0], num_inference_steps=3, max_sequence_length=8, generator=generator, **SIZE).images[0]
    assert np.array_equal(ours.images[0], np.asarray(stock))


def test_euler_walks_the_fixed_shift_grid_and_gives_the_scheduler_back(flux) -> None:
    kept = flux.scheduler
    with stock_euler(flux):
        generate(flux, PROMPTS[:1], [0], steps=2, **SIZE)
        assert flux.scheduler.sigmas.tolist() == pytest.approx([1.0, 3.2 * 0.5 / 2.1, 0.0])
    assert flux.scheduler is kept


def test_batches_change_nothing_and_calls_are_counted(pipe, adapter) -> None:
    attach(pipe, adapter)
    one = generate(pipe, PROMPTS, [1, 2, 3], steps=2, batch_size=1, **SIZE)
    all_at_once = generate(pipe, PROMPTS, [1, 2, 3], steps=2, batch_size=3, **SIZE)
    assert one.nfe == all_at_once.nfe == 2
    assert torch.allclose(one.latents, all_at_once.latents, atol=1e-4)
    assert one.images.shape == (3, SIDE, SIDE, 3)


def test_every_part_is_timed_and_no_hook_stays(pipe) -> None:
    with stock_euler(pipe):
        samples = generate(pipe, PROMPTS[:2], [0, 1], steps=2, **SIZE)
    assert all(seconds > 0 for seconds in samples.seconds.values())
    assert samples.seconds_per_image == pytest.approx(sum(samples.seconds.values()) / 2)
    with metered(pipe):
        pass
    assert not pipe.transformer._forward_hooks and not pipe.vae.decoder._forward_hooks


def test_a_trajectory_ends_where_the_image_is(flux) -> None:
    with stock_euler(flux):
        path = trajectory(flux, PROMPTS[0], 5, steps=4, **SIZE)
        end = generate(flux, PROMPTS[:1], [5], steps=4, **SIZE).latents
    assert len(path) == 4
    assert torch.equal(path[-1:], end)


def test_fusing_the_adapter_changes_nothing_but_rounding(pipe, adapter) -> None:
    attach(pipe, adapter)
    plain = generate(pipe, PROMPTS, [1, 2, 3], steps=2, **SIZE).latents
    detach(pipe)
    attach(pipe, adapter, fuse=True)
    assert torch.allclose(generate(pipe, PROMPTS, [1, 2, 3], steps=2, **SIZE).latents, plain, atol=1e-4)


def test_the_teacher_of_a_family_without_embedded_guidance_is_guided_the_other_way(pristine) -> None:
    from arcflow.sampling.generate import Guide, _arguments

    assert _arguments(pristine["qwen_image"], 2, Guide()) == {"true_cfg_scale": 4.0, "negative_prompt": ["", ""]}
    assert _arguments(pristine["flux"], 2, Guide()) == {"guidance_scale": 3.5, "max_sequence_length": 8}


def test_prompts_and_seeds_must_pair_up(flux) -> None:
    with pytest.raises(ValueError, match="3 prompts and 1 seeds; give one seed for each prompt"):
        generate(flux, PROMPTS, [0], steps=1, **SIZE)


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_pipeline_without_all_its_parts_is_refused_by_name(flux, part) -> None:
    setattr(flux, part, None)
    with pytest.raises(ValueError, match=f"FluxPipeline has no {part}: expected a whole pipeline"):
        generate(flux, ["a red cube"], [0], steps=2, **SIZE)


def test_a_folder_is_finished_and_not_drawn_again(flux, tmp_path) -> None:
    recipes = [recipe(prompt, seed) for prompt in PROMPTS[:2] for seed in (0, 1)]
    with stock_euler(flux):
        first = sample_folder(flux, recipes[:1], tmp_path)
        rest = sample_folder(flux, [*recipes, recipes[0]], tmp_path, batch_size=2)
        again = sample_folder(flux, recipes, tmp_path)
    assert (len(first), len(rest), len(again)) == (1, 3, 0)
    assert [record["file"] for record in read_manifest(tmp_path)] == [r.file for r in recipes]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(r.file for r in recipes)


def test_an_image_carries_its_recipe(flux, tmp_path) -> None:
    with stock_euler(flux):
        (path,) = sample_folder(flux, [recipe()], tmp_path)
    text = Image.open(path).text  # type: ignore[attr-defined]
    assert text.pop("parameters").splitlines()[0] == recipe().prompt
    assert text == {name: str(value) for name, value in dataclasses.asdict(recipe()).items()}


def test_an_image_has_the_text_that_viewers_read() -> None:
    one = dataclasses.replace(
        recipe("a caf\u00e9, at night"), negative_prompt="rain", true_cfg=4.0, adapter="me/it:two"
    )
    first, second, last = parameters(one).splitlines()
    assert (first, second) == ("a caf\u00e9, at night", "Negative prompt: rain")
    assert last.startswith(f"Steps: {one.steps}, Sampler: ArcFlow, CFG scale: 4.0, Seed: {one.seed}, Size: ")
    assert f"{one.width}x{one.height}" in last and 'Adapter: "me/it:two"' in last
    assert "Sampler: Euler" in parameters(dataclasses.replace(one, adapter="none"))
    kept = Image.open(io.BytesIO(png(np.zeros((8, 8, 3), np.uint8), one))).text  # type: ignore[attr-defined]
    assert kept["parameters"] == parameters(one)


@pytest.mark.parametrize("left", [None, 0, 5, 60, -1])
def test_an_image_that_is_gone_or_cut_and_a_line_cut_short_are_made_again(flux, tmp_path, left) -> None:
    with stock_euler(flux):
        (path,) = sample_folder(flux, [recipe()], tmp_path)
        before = path.read_bytes()
        path.unlink()
        if left is not None:
            path.write_bytes(before[:left])
        manifest = tmp_path / "manifest.jsonl"
        manifest.write_text(manifest.read_text() + '{"file": "half')
        assert sample_folder(flux, [recipe()], tmp_path) == [path]
    assert path.read_bytes() == before
    assert len(read_manifest(tmp_path)) == 1


def test_several_processes_share_a_list_and_none_is_lost_or_drawn_twice(flux, tmp_path, monkeypatch) -> None:
    """One of two dies on the way; three finish the folder."""
    from arcflow.sampling import folder

    recipes = [recipe(prompt, seed) for prompt in PROMPTS for seed in (0, 1, 2)]
    save = folder.save_png

    def die(image, recipe, path) -> None:
        if len(list(tmp_path.glob("*.png"))) == 6:
            raise KeyboardInterrupt
        save(image, recipe, path)

    with stock_euler(flux):
        assert len(sample_folder(flux, recipes, tmp_path, share=(0, 2))) == 5
        monkeypatch.setattr(folder, "save_png", die)
        with pytest.raises(KeyboardInterrupt):
            sample_folder(flux, recipes, tmp_path, share=(1, 2), batch_size=2)
        monkeypatch.undo()
        new = [path for rank in range(3) for path in sample_folder(flux, recipes, tmp_path, share=(rank, 3))]
    assert len(new) == 3
    lines = [line for file in tmp_path.glob("manifest*.jsonl") for line in file.read_text().splitlines()]
    assert len(lines) == len(recipes) == len(read_manifest(tmp_path)) == len(list(tmp_path.glob("*.png")))


def test_file_names_tell_recipes_apart() -> None:
    names = {
        recipe().file,
        recipe(seed=1).file,
        recipe("a red  cube!").file,
        dataclasses.replace(recipe(), steps=4).file,
    }
    assert len(names) == 4
    assert recipe().file.startswith("a-red-cube-0-")
