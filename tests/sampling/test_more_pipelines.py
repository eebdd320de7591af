"""What else diffusers has for the newer families takes the student, unchanged: image to image, inpainting, video to
video, image to video."""

import copy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import arcflow
from arcflow import ArcFlowScheduler, families, student
from arcflow.families import network
from arcflow.student import adapter, layers
from tests.support.families import FRAMES, MORE, SHIFT, OnOurGrid, side
from tests.support.pipelines import fresh

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")


def image(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


def mask(side: int) -> Image.Image:
    return Image.fromarray(np.repeat([[0, 255]], side // 2, axis=1).repeat(side, axis=0).astype(np.uint8))


def to_image(side: int, frames: int) -> dict[str, Any]:
    return {"image": image(side), "strength": 0.6}


def inpainted(side: int, frames: int) -> dict[str, Any]:
    return {"image": image(side), "mask_image": mask(side), "strength": 0.6}


def to_video(side: int, frames: int) -> dict[str, Any]:
    return {"video": [image(side)] * frames, "strength": 0.6}


def first_frame(side: int, frames: int) -> dict[str, Any]:
    return {"image": image(side), "num_frames": frames}


ROWS: dict[str, tuple[str, Any]] = {
    "StableDiffusion3Img2ImgPipeline": ("sd3", to_image),
    "StableDiffusion3InpaintPipeline": ("sd3", inpainted),
    "ZImageImg2ImgPipeline": ("z_image", to_image),
    "ZImageInpaintPipeline": ("z_image", inpainted),
    "ChromaImg2ImgPipeline": ("chroma", to_image),
    "Flux2KleinInpaintPipeline": ("flux2_klein", inpainted),
    "WanVideoToVideoPipeline": ("wan", to_video),
    "LTXImageToVideoPipeline": ("ltx", first_frame),
}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}


@pytest.fixture(params=ROWS)
def stock(request, made):
    """(a stock pipeline with tiny random weights, what draws its latents)"""
    family, more = ROWS[request.param]
    if family not in made:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made[family] = MORE[family]()
    source, kind = fresh(made[family]), getattr(diffusers, request.param)
    parts = {name: part for name, part in source.components.items() if part is not None or name.startswith("image_")}
    taken = kind.__init__.__code__.co_varnames
    pipe = kind(**{name: part for name, part in parts.items() if name in taken})
    pipe.set_progress_bar_config(disable=True)
    row, length = families.family_of(pipe.transformer), side(family)

    def sample(pipe: Any, steps: int) -> torch.Tensor:
        embeds = network.encode_text(source, ["a red cube"], 16)["encoder_hidden_states"]
        said = {"prompt_embeds": embeds} if family == "wan" else {"prompt": "a red cube"}
        output = pipe(
            **said,
            height=length,
            width=length,
            num_inference_steps=steps,
            guidance_scale=row.off,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
            **more(length, FRAMES.get(family, 1)),
        )
        return output.frames if row.video else output.images

    return pipe, sample


def test_without_gain_it_is_euler(stock):
    pipe, sample = stock
    pipe.scheduler = OnOurGrid()
    euler = sample(pipe, 4)
    net = student.build(pipe.transformer, modes=4, rank=2).eval()
    state, name = layers.state_of(net), families.family_of(net).head
    base, parts = layers.base_linear(net, name), student.trainable(net)
    bias = torch.zeros(base.out_features) if base.bias is None else base.bias
    if state.head.patch_first:
        bias = layers.swapped(bias, base.out_features // state.head.patch_first)
    with torch.no_grad():
        parts[f"{name}_loggamma.bias"].zero_()
        parts[f"{name}_means.bias"].copy_(bias.repeat(4))
    state.head.integrates = True
    pipe.scheduler = ArcFlowScheduler(num_modes=4, pixels=state.pixels, shift=SHIFT)
    torch.testing.assert_close(sample(pipe, 4), euler, rtol=1e-5, atol=1e-5)
    assert euler.isfinite().all()


def test_attach_and_detach(stock, tmp_path):
    pipe, sample = stock
    before = sample(pipe, 2)
    folder = adapter.save_adapter(student.build(copy.deepcopy(pipe.transformer), modes=4, rank=2), tmp_path)
    arcflow.attach(pipe, folder)
    assert not torch.equal(sample(pipe, 2), before)
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe, 2), before)
