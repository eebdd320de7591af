"""Features are functions of images: one vector each, the same in any batch, and missing weights are named."""

import random
import sys

import numpy as np
import pytest
import torch
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from arcflow.metrics import features
from arcflow.metrics.features import (
    INCEPTION_SIZE,
    clip,
    dino_features,
    inception_features,
    lpips_distance,
    patches,
    world_features,
)
from arcflow.metrics.images import clip_score
from arcflow.metrics.sets import frechet_distance, precision_recall
from arcflow.metrics.streaming import Moments
from arcflow.system import files
from arcflow.world.render import render_all
from arcflow.world.scene import COLORS, SIZE, Object, Scene, sample_prompts, sample_scene
from tests.support.pipelines import WORDS, tokenizer

PROMPTS = ["a red cube", "a blue ball", "two cube left of a red ball on a green cube on a blue ball"]
SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


def drawn(count: int = 3, side: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side + 4, 3), np.uint8)


def scenes(count: int, seed: int, captions: int = 48) -> np.ndarray:
    """Rendered scenes of the same captions, laid out by the seed."""
    rng, said = random.Random(seed), sample_prompts(captions, 0)
    return render_all([sample_scene(said[i % len(said)], rng) for i in range(count)])


@pytest.fixture
def small_clip(tmp_path):
    """A folder as on the Hub."""
    torch.manual_seed(0)
    both = dict(SMALL, intermediate_size=16)
    text = dict(both, vocab_size=len(WORDS), max_position_embeddings=10, bos_token_id=1, eos_token_id=1)
    vision = dict(both, image_size=16, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    tokenizer(10).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def small_dino(tmp_path):
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    BitImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    return tmp_path


class Inception(torch.nn.Module):
    """What the real file is asked: uint8 images of its own size, and the numbers before its last layer."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features and x.dtype == torch.uint8 and x.shape[2:] == (299, 299)
        return x.double().mean([2, 3])


@pytest.fixture
def small_inception(tmp_path, monkeypatch):
    torch.jit.script(Inception()).save(tmp_path / "inception.pt")
    monkeypatch.setattr(features, "INCEPTION_SHA256", files.digest(tmp_path / "inception.pt"))
    return tmp_path / "inception.pt"


def test_inception_sees_every_image_at_its_own_size(small_inception) -> None:
    features = inception_features(small_inception, batch_size=2)
    images = drawn()
    assert torch.equal(features(images), torch.cat([features(image[None]) for image in images]))
    means = torch.from_numpy(images.mean((1, 2))).float()
    torch.testing.assert_close(features(images), means, rtol=0.02, atol=0)


def test_another_program_than_inception_is_told(tmp_path) -> None:
    torch.jit.script(Inception()).save(tmp_path / "mine.pt")
    with pytest.warns(UserWarning, match="mine.pt is not the file of https.*It is a program that runs here"):
        inception_features(tmp_path / "mine.pt")


def test_inception_does_not_resize_patches(small_inception) -> None:
    images = drawn(2, INCEPTION_SIZE + 10)
    crops = patches(images)
    wanted = torch.from_numpy(crops.astype(np.float64).mean((1, 2))).float()
    assert torch.equal(inception_features(small_inception)(crops), wanted)


def test_clip_gives_one_vector_for_each_image_and_text(small_clip) -> None:
    """Whatever the batch, and for texts longer than it reads."""
    halves, one = clip(small_clip, batch_size=2), clip(small_clip, batch_size=1)
    images, texts = halves.images(drawn()), halves.texts(PROMPTS)
    assert images.shape == texts.shape == (3, 8)
    torch.testing.assert_close(images, one.images(drawn()))
    torch.testing.assert_close(texts, one.texts(PROMPTS))
    assert clip_score(images, texts).abs().max() <= 100


def test_dino_gives_its_class_token(small_dino) -> None:
    features = dino_features(small_dino, batch_size=2)(drawn())
    net = Dinov2Model.from_pretrained(small_dino)
    pixels = BitImageProcessorPil.from_pretrained(small_dino)(list(drawn()), return_tensors="pt")
    with torch.no_grad():
        token = net(**pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(features, token)


def test_one_patch_is_the_center_and_several_reach_from_edge_to_edge() -> None:
    images = drawn(2, 20)
    assert np.array_equal(patches(images, 10), images[:, 5:15, 7:17])
    grid = patches(images, 10, per_side=2)
    assert np.array_equal(grid[:4], [images[0, y:, x:][:10, :10] for y in (0, 10) for x in (0, 14)])
    assert np.array_equal(grid[7], images[1, -10:, -10:])


@pytest.mark.slow
def test_the_worlds_features_tell_its_own_images_from_damaged_ones() -> None:
    features = world_features()
    real, other, few = (features(x) for x in (scenes(48, 0), scenes(48, 1), scenes(48, 2, captions=4)))
    blue = scenes(48, 1)
    blue[(blue == COLORS["red"]).all(-1)] = COLORS["blue"]
    floor, recolored, collapsed = (
        frechet_distance(Moments.of(real), Moments.of(x)) for x in (other, features(blue), few)
    )
    assert 1.2 * floor < recolored < collapsed / 1.2
    assert precision_recall(real, few).recall < precision_recall(real, other).recall


def test_the_worlds_features_say_what_is_there_and_hardly_where() -> None:
    def image(shape: str, color: str, x: float, y: float) -> Scene:
        return Scene("white", (Object(shape, color, x, y, 9.0),))

    ring, moved = image("ring", "red", 20.0, 20.0), image("ring", "red", 44.0, 36.0)
    blue, disc = image("ring", "blue", 20.0, 20.0), image("circle", "red", 20.0, 20.0)
    features = world_features(batch_size=3)(render_all([ring, moved, blue, disc]))
    assert features.shape == (4, 44)
    away = torch.linalg.vector_norm(features[1:] - features[0], dim=1)
    assert 5 * away[0] < away[1:].min()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: clip(folder / "absent"), "cannot load .*absent.*`hf download"),
        (lambda folder: dino_features(folder / "absent"), "cannot load .*absent.*`hf download"),
        (lambda folder: inception_features(folder / "absent.pt"), "absent.pt is no TorchScript file; download https"),
        (lambda folder: lpips_distance(), r'LPIPS takes lpips.*pip install "arcflow\[eval\]"'),
        (lambda folder: patches(drawn(), 50), "a patch of 50 pixels does not fit images of 20"),
        (lambda folder: world_features()(drawn()), f"the world's images are {SIZE} x {SIZE}, got 20 x 24"),
        (lambda folder: world_features()(drawn(0)), "got 0 images or texts; expected one at least"),
        (lambda folder: world_features()(drawn() / 255), r"expected uint8 images .* got float64 \(3, 20, 24, 3\)"),
    ],
)
def test_what_is_missing_or_wrong_is_said_with_a_remedy(unchecked, tmp_path, monkeypatch, call, message) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)  # as if not installed
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
