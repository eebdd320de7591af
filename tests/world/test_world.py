"""The world: captions mean what they say, images show it, and the checker reads it back."""

import random

import numpy as np
import pytest

from arcflow.world.check import accuracy, is_right, one_word_changes, read_scene
from arcflow.world.render import AREA, coverage, render, render_all
from arcflow.world.scene import (
    BACKGROUNDS,
    COLORS,
    RADII,
    SHAPES,
    SIZE,
    SKILLS,
    Prompt,
    holds,
    parse,
    sample_prompt,
    sample_prompts,
    sample_scene,
)


def examples(count: int, seed: int = 0) -> list[tuple[Prompt, np.ndarray]]:
    rng = random.Random(seed)
    prompts = [sample_prompt(rng) for _ in range(count)]
    return [(prompt, render(sample_scene(prompt, rng))) for prompt in prompts]


@pytest.mark.slow
def test_a_caption_reads_back_as_what_it_was_made_from() -> None:
    for prompt in sample_prompts(600, seed=1):
        assert parse(prompt.text) == prompt


@pytest.mark.slow
def test_captions_are_reproducible_and_skills_have_equal_shares() -> None:
    prompts = sample_prompts(60, seed=3, split="test")
    assert prompts == sample_prompts(60, seed=3, split="test")
    assert [p.skill for p in prompts[:6]] == list(SKILLS)


@pytest.mark.slow
def test_held_out_combinations_never_occur_in_training() -> None:
    def said(prompt: Prompt) -> tuple:
        turn = {"right of": "left of", "below": "above"}.get(prompt.relation or "")
        nouns = [noun.text() for noun in (reversed(prompt.nouns) if turn else prompt.nouns)]
        return (turn or prompt.relation, *(nouns if prompt.relation else sorted(nouns)))

    train = {said(prompt) for prompt in sample_prompts(400, 0, "train")}
    test = {said(prompt) for prompt in sample_prompts(200, 0, "test")}
    assert len(test) > 60
    assert not train & test


def test_a_paraphrase_falls_on_the_same_side_of_the_cut() -> None:
    assert parse("a red ring left of a blue square").split == parse("a blue square right of a red ring on gray").split
    assert parse("a red ring and a blue square").split == parse("a blue square and a red ring on white").split


@pytest.mark.slow
def test_every_word_and_every_skill_is_seen_in_training() -> None:
    words = {word for p in sample_prompts(600, 0, "train") for word in p.text.replace(",", "").split()}
    assert words >= {*COLORS, *SHAPES, *BACKGROUNDS, *RADII, "left", "right", "above", "below", "two", "three"}
    assert all(sample_prompts(3, 0, "test", skill) for skill in SKILLS)


@pytest.mark.slow
def test_the_checker_accepts_rendered_scenes() -> None:
    right = [is_right(image, prompt) for prompt, image in examples(500)]
    assert np.mean(right) >= 0.999


@pytest.mark.slow
def test_the_checker_rejects_captions_changed_in_one_word() -> None:
    rng = random.Random(1)
    wrong = [is_right(image, rng.choice(one_word_changes(prompt))) for prompt, image in examples(500, seed=2)]
    assert np.mean(wrong) <= 0.001


def test_reading_recovers_the_scene_to_half_a_pixel() -> None:
    rng = random.Random(5)
    for _ in range(100):
        scene = sample_scene(sample_prompt(rng), rng)
        seen = read_scene(render(scene))
        assert seen.background == scene.background
        for thing in scene.objects:
            nearest = min(seen.objects, key=lambda o: abs(o.x - thing.x) + abs(o.y - thing.y))
            assert (nearest.shape, nearest.color, nearest.size) == (thing.shape, thing.color, thing.size)
            assert abs(nearest.x - thing.x) + abs(nearest.y - thing.y) < 0.5


def test_a_smudge_or_a_missing_object_fails_the_caption() -> None:
    prompt = parse("a large red square on white")
    image = render(sample_scene(prompt, random.Random(0)))
    assert is_right(image, prompt)
    smudged = image.copy()
    smudged[:6, :6] = COLORS["blue"]
    assert not is_right(smudged, prompt)
    assert not is_right(np.full_like(image, 245), prompt)
    noise = np.random.default_rng(0).integers(0, 256, image.shape, np.uint8)
    assert not is_right(noise, prompt)


def test_edges_are_anti_aliased_and_areas_are_right() -> None:
    for shape, area in AREA.items():
        alpha = coverage(shape, 32.3, 31.6, 12.0, slice(0, SIZE), slice(0, SIZE))
        assert ((alpha > 0) & (alpha < 1)).sum() > 20
        assert alpha.sum() == pytest.approx(area * 144, rel=0.02)


def test_accuracy_is_told_by_skill() -> None:
    prompts = sample_prompts(12, seed=0)
    rng = random.Random(0)
    images = render_all([sample_scene(prompt, rng) for prompt in prompts])
    images[0] = 0
    result = accuracy(images, [prompt.text for prompt in prompts])
    assert set(result) == {"overall", *SKILLS}
    assert result["single_object"] == 0.5
    assert result["overall"] == pytest.approx(11 / 12)


def test_scenes_hold_what_their_captions_say() -> None:
    rng = random.Random(7)
    for prompt in sample_prompts(200, seed=7):
        assert holds(prompt, sample_scene(prompt, rng))


@pytest.mark.parametrize(
    "caption", ["a dog", "a red", "four red circles", "a ring on pink", "", "a ring near a square"]
)
def test_a_text_outside_the_grammar_is_refused_with_an_example(caption: str) -> None:
    with pytest.raises(ValueError, match="expected captions such as"):
        parse(caption)


def test_an_image_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a uint8 image \(64, 64, 3\)"):
        read_scene(np.zeros((32, 32, 3), np.uint8))
