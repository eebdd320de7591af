"""Videos: as many frames as a model takes, kept as animated images, and how much they move."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from arcflow.families import WAN, family_of, network
from arcflow.families.flux import FLUX
from arcflow.metrics.motion import motion, strip
from arcflow.sampling.folder import Recipe, save_png
from arcflow.sampling.generate import generate
from arcflow.sampling.open import _frames, token_of
from tests.support.families import FRAMES, MORE, sd3, side, wan

RECIPE = dict(prompt="a", seed=0, steps=2, height=4, width=4, guidance=None, model="m", adapter="a", version="1")


def test_a_video_model_draws_videos_and_an_image_model_without_callbacks_images():
    pipe = MORE["wan"]()
    drawn = generate(pipe, ["a red cube"], [0], steps=2, height=32, width=32, frames=FRAMES["wan"])
    assert drawn.images.shape == (1, FRAMES["wan"], 32, 32, 3) and drawn.nfe == 4  # the teacher is guided
    pipe = MORE["longcat_image"]()
    drawn = generate(pipe, ["a red cube"], [0], steps=2, height=side(""), width=side(""))
    assert drawn.images.shape == (1, 16, 16, 3) and "step" not in vars(pipe.scheduler)


def test_a_video_is_kept_as_one_file_that_moves(tmp_path):
    video = np.random.default_rng(0).integers(0, 255, (3, 4, 4, 3), dtype=np.uint8)
    save_png(video, Recipe(**RECIPE, frames=3), tmp_path / "v.png")
    with Image.open(tmp_path / "v.png") as kept:
        assert kept.n_frames == 3 and kept.text["frames"] == "3"
        kept.seek(2)
        assert np.array_equal(np.asarray(kept.convert("RGB")), video[2])


def test_images_have_the_names_that_they_had():
    assert Recipe(**RECIPE).file == Recipe(**RECIPE, frames=1).file != Recipe(**RECIPE, frames=5).file


def test_motion_is_one_for_the_teacher_and_less_for_what_stands_still():
    teacher = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    still = teacher.unflatten(1, (3, 4))[:, :1].expand(-1, 3, -1, -1).flatten(1, 2)
    assert motion(teacher, teacher, 3) == 1.0 and motion(still, teacher, 3) == 0.0
    assert motion(still + (teacher - still) / 2, teacher, 3) == pytest.approx(0.5)


def test_a_strip_goes_from_the_first_frame_to_the_last():
    video = np.arange(9, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2).repeat(3, 3)
    assert strip(video)[0, ::2, 0].tolist() == [0, 3, 5, 8]
    assert strip(video[0]).shape == (2, 2, 3)


def test_frames_that_a_model_cannot_take_are_one_sentence(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text(json.dumps({"scale_factor_temporal": 4, "scale_factor_spatial": 8}))
    assert _frames(None, None, WAN, tmp_path) == 81 and _frames(5, None, WAN, tmp_path) == 5
    assert token_of(tmp_path) == 16
    with pytest.raises(ValueError, match="1 and a multiple of 4 more for this model.*say 5"):
        _frames(6, None, WAN, tmp_path)
    with pytest.raises(ValueError, match="flux draws images"):
        _frames(5, None, FLUX, tmp_path)


def test_frames_of_a_list_that_the_model_cannot_draw_are_one_sentence():
    """Before a training begins."""
    network.check_size(wan(), 32, 32, 5)
    with pytest.raises(ValueError, match="6 frames: expected 1 and a multiple of 4 more for this pipeline, say 5"):
        network.check_size(wan(), 32, 32, 6)
    with pytest.raises(ValueError, match="5 frames: sd3 draws images; expected 1"):
        network.check_size(sd3(), 32, 32, 5)


def test_a_model_that_cannot_be_carried_is_told_why():
    other = type("MochiTransformer3DModel", (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match="not a supported backbone .it runs from the image"):
        family_of(other)
