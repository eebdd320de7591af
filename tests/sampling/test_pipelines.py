"""Every stock pipeline of a family takes the student, unchanged."""

import copy
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, FluxControlNetModel
from diffusers.models.controlnets.controlnet_qwenimage import QwenImageControlNetModel
from PIL import Image

from arcflow import ArcFlowScheduler, student
from arcflow.families import network
from arcflow.sampling import attach
from arcflow.student import adapter
from tests.support.pipelines import SHAPE, SIDE, flux_transformer, fresh
from tests.support.students import without_gain

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
HALF = Image.fromarray(np.repeat([[0, 255]], SIDE // 2, axis=1).repeat(SIDE, axis=0).astype(np.uint8))
"""A mask: the right half is drawn anew."""

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")


def flux_controlnet() -> dict[str, Any]:
    """One that says something: as built, its outputs are zero."""
    torch.manual_seed(1)
    net = FluxControlNetModel(
        in_channels=16, num_layers=1, num_single_layers=1, pooled_projection_dim=32, guidance_embeds=True, **SHAPE
    )
    return {"controlnet": loud(net)}


def qwen_controlnet(more: int = 0) -> dict[str, Any]:
    """Of a picture, and with one more channel of a mask too."""
    torch.manual_seed(1)
    sizes = {"in_channels": 16, "out_channels": 4, "num_layers": 1, "extra_condition_channels": more}
    return {"controlnet": loud(QwenImageControlNetModel(**sizes, **SHAPE))}


def flux_of(channels: int) -> dict[str, Any]:
    """A FLUX that has pictures in more channels beside x: Fill (picture and mask) and Control."""
    torch.manual_seed(1)
    return {"transformer": flux_transformer(in_channels=channels, out_channels=16)}


def loud(net: Any) -> Any:
    for block in [*net.controlnet_blocks, *(getattr(net, "controlnet_single_blocks", None) or [])]:
        torch.nn.init.normal_(block.weight, std=0.1)
    return net.eval()


IMAGE: dict[str, Any] = {"image": PICTURE, "strength": 0.6}
AS_IT_IS = {"_auto_resize": False, "max_area": SIDE**2}
CONTROL = {"control_image": PICTURE, "controlnet_conditioning_scale": 0.7}
ROWS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Any]] | None]] = {
    "FluxPipeline": ("flux", {}, None),
    "FluxImg2ImgPipeline": ("flux", IMAGE, None),
    "FluxInpaintPipeline": ("flux", {**IMAGE, "mask_image": HALF}, None),
    "FluxKontextPipeline": ("flux", {"image": PICTURE, **AS_IT_IS}, None),
    "FluxKontextInpaintPipeline": ("flux", {**IMAGE, "mask_image": HALF, **AS_IT_IS}, None),
    "FluxControlNetPipeline": ("flux", CONTROL, flux_controlnet),
    "FluxControlNetImg2ImgPipeline": ("flux", {**IMAGE, **CONTROL}, flux_controlnet),
    "FluxControlNetInpaintPipeline": ("flux", {**IMAGE, **CONTROL, "mask_image": HALF}, flux_controlnet),
    "FluxFillPipeline": ("flux", {"image": PICTURE, "mask_image": HALF}, partial(flux_of, 48)),
    "FluxControlPipeline": ("flux", {"control_image": PICTURE}, partial(flux_of, 32)),
    "FluxControlImg2ImgPipeline": ("flux", {**IMAGE, "control_image": PICTURE}, partial(flux_of, 32)),
    "FluxControlInpaintPipeline": (
        "flux",
        {**IMAGE, "control_image": PICTURE, "mask_image": HALF},
        partial(flux_of, 32),
    ),
    "QwenImagePipeline": ("qwen_image", {}, None),
    "QwenImageImg2ImgPipeline": ("qwen_image", IMAGE, None),
    "QwenImageInpaintPipeline": ("qwen_image", {**IMAGE, "mask_image": HALF}, None),
    "QwenImageEditPipeline": ("qwen_image", {"image": PICTURE}, None),
    "QwenImageEditPlusPipeline": ("qwen_image", {"image": [PICTURE, PICTURE]}, None),
    "QwenImageEditInpaintPipeline": ("qwen_image", {**IMAGE, "mask_image": HALF}, None),
    "QwenImageControlNetPipeline": ("qwen_image", CONTROL, qwen_controlnet),
    "QwenImageControlNetInpaintPipeline": (
        "qwen_image",
        {**CONTROL, "control_mask": HALF},
        partial(qwen_controlnet, 4),
    ),
}


FAST = ("FluxPipeline", "FluxInpaintPipeline")
every_row = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
)


@pytest.fixture
def stock(pristine, monkeypatch):
    """(name) -> a stock pipeline with tiny random weights, and how to call it for latents."""

    def make(name: str):
        family, more, other = ROWS[name]
        source = fresh(pristine[family])
        source.scheduler.register_to_config(use_dynamic_shifting=False, shift=3.2)
        kind = getattr(diffusers, name)
        parts = {k: v for k, v in source.components.items() if v is not None}
        extra = other() if other else {}
        module = importlib.import_module(kind.__module__)
        if hasattr(module, "calculate_dimensions"):  # editing pipelines enlarge their image to a million pixels
            extra["processor"] = None
            answer = (SIDE, SIDE) if "Plus" in name else (SIDE, SIDE, None)
            monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: answer)
        pipe = kind(**{**parts, **extra})
        pipe.set_progress_bar_config(disable=True)
        prompts = embedded(source, family)

        def sample(pipe: Any, steps: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(1)
            size = {"height": SIDE, "width": SIDE, "num_inference_steps": steps}
            scale = {"guidance_scale": 3.5} if family == "flux" else {}
            return pipe(**prompts, **size, **scale, **more, generator=generator, output_type="latent").images

        return pipe, sample

    return make


def embedded(pipe: Any, family: str) -> dict[str, torch.Tensor]:
    """A prompt as embeddings: the same for every pipeline of a family."""
    cond = network.encode_prompts(pipe, ["a red cube"], height=SIDE, width=SIDE)
    if family == "flux":
        return {
            "prompt_embeds": cond["encoder_hidden_states"],
            "pooled_prompt_embeds": cond["pooled_projections"],
        }
    return {
        "prompt_embeds": cond["encoder_hidden_states"],
        "prompt_embeds_mask": cond["encoder_hidden_states_mask"],
    }


def with_student(pipe: Any, folder: Any) -> None:
    net = student.build(copy.deepcopy(pipe.transformer), modes=4, rank=2)
    attach.attach(pipe, adapter.save_adapter(net, folder))


@every_row
def test_without_gain_it_samples_plain_euler_bit_for_bit(stock, name):
    pipe, sample = stock(name)
    euler = sample(pipe, 4)
    without_gain(pipe.transformer, integrates=True)
    pipe.scheduler = ArcFlowScheduler(num_modes=4)
    assert torch.equal(sample(pipe, 4), euler)
    assert euler.isfinite().all()


@every_row
def test_attach_and_detach(stock, name, tmp_path):
    pipe, sample = stock(name)
    before = sample(pipe, 2)
    with_student(pipe, tmp_path)
    assert not torch.equal(sample(pipe, 2), before)
    attach.detach(pipe)
    assert torch.equal(sample(pipe, 2), before)


@pytest.mark.parametrize(
    ("name", "auto", "other"),
    [
        ("FluxPipeline", AutoPipelineForImage2Image, "FluxImg2ImgPipeline"),
        ("FluxPipeline", AutoPipelineForInpainting, "FluxInpaintPipeline"),
        ("QwenImagePipeline", AutoPipelineForImage2Image, "QwenImageImg2ImgPipeline"),
        ("QwenImagePipeline", AutoPipelineForInpainting, "QwenImageInpaintPipeline"),
    ],
)
def test_from_pipe_takes_head_and_scheduler_along(stock, name, auto, other, tmp_path):
    pipe, _ = stock(name)
    with_student(pipe, tmp_path)
    wanted, sample = stock(other)
    wanted.transformer, wanted.scheduler = pipe.transformer, pipe.scheduler
    for moved in (type(wanted).from_pipe(pipe), auto.from_pipe(pipe)):
        moved.set_progress_bar_config(disable=True)
        assert type(moved) is type(wanted) and isinstance(moved.scheduler, ArcFlowScheduler)
        assert torch.equal(sample(moved, 2), sample(wanted, 2))
