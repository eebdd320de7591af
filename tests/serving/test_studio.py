"""What a studio is made of, and what decides an image in it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import arcflow
from arcflow import student
from arcflow.families import WAN
from arcflow.sampling import open as opening
from arcflow.sampling.generate import generate
from arcflow.serving import offer
from arcflow.serving import studio as studios
from arcflow.serving.images import within
from arcflow.serving.offer import StudioSetup, Watch
from arcflow.serving.order import Order, Piece
from arcflow.serving.studio import Studio
from arcflow.serving.texts import Texts
from arcflow.student.adapter import save_adapter
from tests.support.families import MORE, side
from tests.support.pipelines import SIDE, draws, fresh, perturb


@pytest.fixture
def setup(pristine, tmp_path, monkeypatch) -> StudioSetup:
    """A tiny Qwen-Image, whose prompts are as long as their words."""
    pipe = fresh(pristine["qwen_image"])
    pipe.save_pretrained(tmp_path / "base")
    model = fresh(pristine["qwen_image"]).transformer
    student.build(model, modes=4, rank=2, generator=draws())
    perturb(model)
    save_adapter(model, tmp_path / "adapter")
    monkeypatch.setattr(opening.Setup, "base", lambda self: pipe)
    monkeypatch.setattr(studios, "size_of", lambda *asked: (SIDE, SIDE))
    adapters = {"two": str(tmp_path / "adapter")}
    return StudioSetup(model=str(tmp_path / "base"), adapters=adapters, device="cpu", max_batch=4)


@pytest.fixture
def qwen(setup) -> Studio:
    return Studio(setup)


def test_a_picture_does_not_depend_on_how_long_others_prompts_are(qwen):
    order = Order(height=SIDE, width=SIDE, steps=2, model="two")
    words = ["a red cube", "a " * 70, "two blue ball on left of red cube", "a red cube"]
    shown = []
    pieces = [Piece(prompt=prompt, seed=seed) for seed, prompt in enumerate(words)]
    watch = Watch(partial={place: lambda step, image, place=place: shown.append((place, step)) for place in (1, 3)})
    together = qwen.draw(order, pieces, watch)
    assert [picture.batch for picture in together] == [3, 1, 3, 3]
    assert sorted(shown) == [(1, 1), (3, 1)]
    for piece, picture in zip(pieces, together, strict=True):
        alone = qwen.draw(order, [piece])[0].image
        assert np.abs(alone.astype(int) - picture.image).max() <= 1  # batches of another size are rounded otherwise


def test_memory_that_ran_out_for_one_size_makes_no_other_size_smaller(qwen):
    small, large = (Order(height=side, width=side, steps=2, model="two") for side in (SIDE, 2 * SIDE))
    before = qwen.room(small)
    assert [qwen.shrink(large) for _ in range(3)] == [True, True, False]
    assert (qwen.room(large), qwen.room(small)) == (1, before)


def test_a_prompt_is_encoded_again_under_another_style():
    texts, asked = Texts(1), list[str]()

    def encode(prompt):
        asked.append(prompt)
        return {"encoder_hidden_states": torch.zeros(1, 2, 3)}

    for styles in ((), (("ink", 0.5),), (), (("ink", 0.5),)):
        texts.of("a ring", encode, styles)
    assert (len(asked), texts.hits, texts.misses) == (2, 2, 2)


def test_what_is_read_beside_the_text_is_no_larger_than_what_is_drawn():
    picture = Image.new("LA", (400, 100))
    assert within(picture, 64 * 64).size == (128, 32)
    assert within(picture, 10**6).size == (400, 100) and within(picture, 10**6).mode == "RGB"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [name for name in offer.SERVED if name in MORE])
def test_the_newer_families_are_served_as_they_are_sampled(name, tmp_path, monkeypatch):
    """The server's image is that of the stock pipeline; guided, too, and an image on the way is one."""
    long = side(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = MORE[name]()
    pipe.transformer.save_pretrained(tmp_path / "base/transformer")
    told = {"_class_name": type(pipe).__name__, "transformer": ["diffusers", type(pipe.transformer).__name__]}
    (tmp_path / "base/model_index.json").write_text(json.dumps(told))
    net = student.build(fresh(pipe).transformer, modes=4, rank=2)
    perturb(net)
    adapter = save_adapter(net, tmp_path / "adapter")
    served = fresh(pipe)
    monkeypatch.setattr(opening.Setup, "base", lambda self: served)
    monkeypatch.setattr(studios, "size_of", lambda *asked: (long, long))
    studio = Studio(
        StudioSetup(model=str(tmp_path / "base"), adapters={"two": str(adapter)}, device="cpu", max_batch=2)
    )
    arcflow.attach(pipe, adapter, guidance=True, fuse=True)
    prompts = ["a red cube", "two blue ball"]
    for scale in (None, 3.0):
        order = Order(height=long, width=long, steps=2, model="two", negative=scale)
        shown = []
        pieces = [Piece(prompt=prompt, seed=seed, negative="a ball") for seed, prompt in enumerate(prompts)]
        together = studio.draw(
            order, pieces, Watch(partial={1: lambda step, image, shown=shown: shown.append(image.shape)})
        )
        assert shown == ([] if name == "z_image" else [(long, long, 3)])
        how = {} if scale is None else {"negative": "a ball", "true_cfg": scale}
        for piece, drawn in zip(pieces, together, strict=True):
            alone = generate(pipe, [piece.prompt], [piece.seed], steps=2, height=long, width=long, **how)
            assert np.abs(alone.images[0].astype(int) - drawn.image).max() <= 1


@pytest.mark.parametrize(
    ("pipeline", "tasks"),
    [
        ("FluxPipeline", ("generate", "vary", "inpaint")),
        ("ZImagePipeline", ("generate", "vary", "inpaint")),
        ("Flux2KleinPipeline", ("generate", "edit")),
        ("QwenImageEditPlusPipeline", ("generate", "edit")),
        ("ChromaPipeline", ("generate",)),
        ("ErnieImagePipeline", ("generate",)),
    ],
)
def test_what_is_offered_has_a_stock_pipeline(pipeline, tasks):
    assert offer.tasks_of(pipeline) == tasks


def test_a_video_is_not_served(setup, monkeypatch):
    monkeypatch.setattr(studios, "settle", lambda *asked: replace(opening.settle(*asked), family=WAN))
    with pytest.raises(ValueError, match="draws videos, and the server draws images: .*arcflow sample --frames"):
        Studio(setup)


def test_a_family_that_is_not_served_is_refused_before_it_is_loaded(setup, monkeypatch):
    monkeypatch.setattr(studios, "SERVED", ("flux",))
    monkeypatch.setattr(opening.Setup, "base", None)
    with pytest.raises(ValueError, match="'qwen_image', which the server does not draw, .*: expected one of flux"):
        Studio(setup)
