"""What else diffusers has for the newer families takes the student, unchanged: image to image, inpainting, ControlNets,
video to video, image to video."""

import copy
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import arcflow
from arcflow import ArcFlowScheduler, families, student
from arcflow.families import network
from arcflow.student import adapter
from arcflow.student.layers import swapped
from arcflow.student.places import base_linear
from arcflow.student.state import state_of
from tests.support.families import FRAMES, MORE, SHIFT, OnOurGrid, loud, side
from tests.support.pipelines import fresh

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]


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


def controlled(side: int, frames: int) -> dict[str, Any]:
    return {"control_image": image(side), "controlnet_conditioning_scale": 0.7}


def controlled_inside(side: int, frames: int) -> dict[str, Any]:
    return {**controlled(side, frames), "control_mask": mask(side)}


def controlled_inpainted(side: int, frames: int) -> dict[str, Any]:
    return {**controlled(side, frames), "image": image(side), "mask_image": mask(side)}


def sd3_controlnet(parts: dict[str, Any], more: int = 0) -> dict[str, Any]:
    config = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
    net = diffusers.SD3ControlNetModel(**{**config, "num_layers": 1, "extra_conditioning_channels": more})
    return {"controlnet": loud(net), "image_encoder": None, "feature_extractor": None}


def z_image_controlnet(parts: dict[str, Any], channels: int) -> dict[str, Any]:
    size = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    places = {"control_layers_places": [0], "control_refiner_layers_places": [0]}
    net = diffusers.ZImageControlNetModel(
        **places, **size, control_in_dim=channels, add_control_noise_refiner="control_layers"
    )
    return {"controlnet": loud(net)}


def wan_of_images(parts: dict[str, Any]) -> dict[str, Any]:
    """A Wan whose input has the first frame and its mask in more channels: 4 of x, 4 of the frame, 4 of the mask."""
    config = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
    torch.manual_seed(1)
    net = diffusers.WanTransformer3DModel(**{**config, "in_channels": 12})
    return {"transformer": loud(net), "image_encoder": None, "image_processor": None}


def nothing(parts: dict[str, Any]) -> dict[str, Any]:
    return {}


ROWS: dict[str, tuple[str, Any, Any]] = {
    "StableDiffusion3Img2ImgPipeline": ("sd3", to_image, nothing),
    "StableDiffusion3InpaintPipeline": ("sd3", inpainted, nothing),
    "ZImageImg2ImgPipeline": ("z_image", to_image, nothing),
    "ZImageInpaintPipeline": ("z_image", inpainted, nothing),
    "ChromaImg2ImgPipeline": ("chroma", to_image, nothing),
    "Flux2KleinInpaintPipeline": ("flux2_klein", inpainted, nothing),
    "WanVideoToVideoPipeline": ("wan", to_video, nothing),
    "LTXImageToVideoPipeline": ("ltx", first_frame, nothing),
    "StableDiffusion3ControlNetPipeline": ("sd3", controlled, sd3_controlnet),
    "StableDiffusion3ControlNetInpaintingPipeline": ("sd3", controlled_inside, partial(sd3_controlnet, more=1)),
    "ZImageControlNetPipeline": ("z_image", controlled, partial(z_image_controlnet, channels=8)),
    "ZImageControlNetInpaintPipeline": ("z_image", controlled_inpainted, partial(z_image_controlnet, channels=17)),
    "WanImageToVideoPipeline": ("wan", first_frame, wan_of_images),
}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}


@pytest.fixture(params=ROWS)
def stock(request, made):
    """(a stock pipeline with tiny random weights, what draws its latents)"""
    family, more, other = ROWS[request.param]
    if family not in made:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made[family] = MORE[family]()
    source, kind = fresh(made[family]), getattr(diffusers, request.param)
    parts = {name: part for name, part in source.components.items() if part is not None or name.startswith("image_")}
    taken = kind.__init__.__code__.co_varnames
    with torch.random.fork_rng():
        parts |= other(parts)
    pipe = kind(**{name: part for name, part in parts.items() if name in taken})
    pipe.set_progress_bar_config(disable=True)
    row, length = families.family_of(pipe.transformer), side(family)

    def sample(pipe: Any, steps: int) -> torch.Tensor:
        embeds = network.encode_text(source, ["a red cube"], 16)["encoder_hidden_states"]
        said = {"prompt_embeds": embeds} if family == "wan" else {"prompt": "a red cube"}
        with (
            torch.random.fork_rng()
        ):  # ControlNets of Stable Diffusion 3 draw their picture's latents without `generator`
            torch.manual_seed(2)
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
    state, name = state_of(net), families.family_of(net).head
    base, parts = base_linear(net, name), student.trainable(net)
    bias = torch.zeros(base.out_features) if base.bias is None else base.bias
    if state.head.patch_first:
        bias = swapped(bias, base.out_features // state.head.patch_first)
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


def test_a_student_draws_in_half_precision_what_its_pipeline_draws(stock, tmp_path):
    pipe, sample = stock
    pipe.to(torch.bfloat16)
    before = sample(pipe, 2)
    folder = adapter.save_adapter(student.build(copy.deepcopy(pipe.transformer), modes=4, rank=2), tmp_path)
    arcflow.attach(pipe, folder)
    after = sample(pipe, 2)
    assert after.isfinite().all() and after.shape == before.shape
    assert after.dtype == torch.promote_types(after.dtype, before.dtype)  # or wider, as Wan's, which begin so
