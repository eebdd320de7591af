"""However a stock pipeline is called, a student on it draws what that call means."""

import copy
import gc
import warnings
import weakref

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxControlNetPipeline, FluxImg2ImgPipeline, FluxMultiControlNetModel
from PIL import Image

import arcflow
from arcflow import ArcFlowScheduler, student
from arcflow.families import network
from arcflow.student import adapter
from tests.support.pipelines import (
    SHAPE,
    SIDE,
    flux2_transformer,
    klein_pipeline,
    perturb,
    sample,
)
from tests.support.students import without_gain

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
LOST = 0.2
"""What half precision may lose of latents around 1: the tiny base itself loses 0.03 in bfloat16."""


def made(pipe, folder):
    """An adapter for this pipeline."""
    draw = torch.Generator().manual_seed(0)
    net = student.build(copy.deepcopy(pipe.transformer), modes=4, rank=2, targets="all", generator=draw)
    perturb(net)
    return adapter.save_adapter(net, folder)


@pytest.fixture
def two_steps(pipe, tmp_path):
    return made(pipe, tmp_path / "two_steps")


def square(side=64):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


def is_euler(pipe, **how):
    """Whether a student without gain draws what the base does under its own scheduler, to the bit."""
    pipe.scheduler.register_to_config(use_dynamic_shifting=False, shift=3.2)
    euler = sample(pipe, **how)
    without_gain(pipe.transformer, integrates=True)
    pipe.scheduler = ArcFlowScheduler(num_modes=4)
    return torch.equal(sample(pipe, **how), euler) and bool(euler.isfinite().all())


# What is asked for


@pytest.mark.parametrize(
    "how",
    [
        {"prompt": ["a red cube", "two blue ball"], "num_images_per_prompt": 2, "height": 21, "width": 35},
        {"num_images_per_prompt": 3, "height": 32, "width": 48},
    ],
)
def test_several_images_and_odd_sizes_are_plain_euler_bit_for_bit(pipe, how):
    assert is_euler(pipe, **how)


def test_noise_levels_of_ones_own_as_a_list_or_an_array(pipe, two_steps):
    arcflow.attach(pipe, two_steps)
    assert torch.equal(sample(pipe, sigmas=[1.0, 0.5]), sample(pipe))
    own = [0.9, 0.4]
    drawn = sample(pipe, sigmas=own)
    assert pipe.scheduler.sigmas[0] < 1 and drawn.isfinite().all() and not torch.equal(drawn, sample(pipe))
    assert torch.equal(sample(pipe, sigmas=np.array(own)), drawn)


def test_every_type_of_output(pipe, two_steps):
    arcflow.attach(pipe, two_steps)
    for name, kind in (("pil", list), ("np", np.ndarray), ("pt", torch.Tensor)):
        images = sample(pipe, output_type=name)
        assert isinstance(images, kind) and len(images) == 1


def test_a_callback_may_change_the_latents_or_stop_and_leaves_nothing(pipe, two_steps):
    arcflow.attach(pipe, two_steps)
    drawn = sample(pipe)

    def nudge(pipe, step, time, given):
        return {"latents": given["latents"] + 0.5}

    def stop(pipe, step, time, given):
        pipe._interrupt = True
        return {}

    for change in (nudge, stop):
        assert not torch.allclose(sample(pipe, callback_on_step_end=change), drawn, atol=0.1)
        assert torch.equal(sample(pipe), drawn)


@pytest.mark.parametrize("steps", [2, 4])
def test_above_one_less_a_step_strength_starts_from_noise_alone(flux, tmp_path, steps):
    """As in the stock pipeline: docs/sampling.md says it."""
    arcflow.attach(flux, made(flux, tmp_path))
    pipe = FluxImg2ImgPipeline(**flux.components)
    pipe.set_progress_bar_config(disable=True)

    def drawn(color, strength):
        image = Image.new("RGB", (SIDE, SIDE), color)
        return sample(pipe, image=image, strength=strength, num_inference_steps=steps, guidance_scale=3.5)

    for strength, alike in ((1 - 1 / steps, False), (1 - 1 / steps + 0.01, True)):
        assert torch.equal(drawn("black", strength), drawn("white", strength)) == alike


# What it is asked of


def test_embeddings_are_enough_for_a_pipeline_without_text_encoders(pipe, two_steps):
    cond = network.encode_prompts(pipe, ["a red cube"], height=SIDE, width=SIDE, max_sequence_length=8)
    names = {
        "encoder_hidden_states": "prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
        "encoder_hidden_states_mask": "prompt_embeds_mask",
    }
    embeds = {"prompt": None, **{names[name]: value for name, value in cond.items() if name in names}}
    before, drawn = sample(pipe), sample(arcflow.attach(pipe, two_steps))
    arcflow.detach(pipe)
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        if hasattr(pipe, part):
            setattr(pipe, part, None)
    arcflow.attach(pipe, two_steps)
    assert torch.equal(sample(pipe, **embeds), drawn)
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe, **embeds), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_before_or_after(pipe, two_steps, dtype):
    exact = sample(arcflow.attach(copy.deepcopy(pipe), two_steps))
    first, after = copy.deepcopy(pipe).to(dtype), copy.deepcopy(pipe)
    before = sample(first)
    arcflow.attach(first, two_steps)
    arcflow.attach(after, two_steps).to(dtype)
    for half in (first, after):
        drawn = sample(half)
        assert drawn.dtype == dtype and float((drawn - exact).square().mean().sqrt()) < LOST
        arcflow.detach(half)
        assert torch.equal(sample(half), before)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of the base's own norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_it_draws_as_closely_as_in_that_dtype(pipe, two_steps, dtype):
    drawn = sample(arcflow.attach(pipe, two_steps))
    with torch.autocast("cpu", dtype):
        again = sample(pipe)
    assert again.dtype == torch.float32 and float((again - drawn).square().mean().sqrt()) < LOST


@pytest.mark.parametrize("pipe", ["flux", "qwen_image"], indirect=True)
def test_guidance_is_noticed_on_every_copy(pipe, two_steps):
    """Parts shared and a scheduler each, as diffusers advises for threads; and a deep copy."""
    arcflow.attach(pipe, two_steps)
    second = copy.copy(pipe)
    second.scheduler = copy.deepcopy(pipe.scheduler)
    images = []
    for one in (copy.deepcopy(pipe), second, pipe):
        with pytest.warns(UserWarning, match="called twice for one step"):
            images.append(sample(one, negative_prompt="green ball", true_cfg_scale=4.0))
    assert all(torch.equal(image, images[0]) for image in images)


@pytest.mark.parametrize("pipe", ["flux", "qwen_image"], indirect=True)
def test_first_block_cache(pipe, two_steps):
    """At a threshold of nothing every block is asked."""
    before, drawn = sample(pipe), sample(arcflow.attach(pipe, two_steps))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(sample(pipe), drawn) and torch.equal(sample(pipe), drawn)
    pipe.transformer.disable_cache()
    assert torch.equal(sample(arcflow.detach(pipe)), before)


def test_attached_again_and_again_nothing_is_kept_alive(pipe, two_steps):
    before, alive = sample(pipe), []

    def counted():
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules())
        return hooks, len(list(pipe.transformer.modules()))

    plain, attached = counted(), set()
    for detach in (True, True, False, False, True):
        arcflow.attach(pipe, two_steps)
        attached.add(counted())
        parts = [pipe.scheduler, *student.trainable(pipe.transformer).values()]
        alive += [weakref.ref(part) for part in parts]
        del parts
        if detach:
            arcflow.detach(pipe)
    gc.collect()
    assert not any(part() is not None for part in alive) and len(attached) == 1
    assert counted() == plain and torch.equal(sample(pipe), before)


# What else it draws from


def test_two_controlnets(flux):
    torch.manual_seed(1)
    nets = [
        diffusers.FluxControlNetModel(
            in_channels=16, num_layers=1, num_single_layers=1, pooled_projection_dim=32, guidance_embeds=True, **SHAPE
        )
        for _ in range(2)
    ]
    for block in (block for net in nets for block in (*net.controlnet_blocks, *net.controlnet_single_blocks)):
        torch.nn.init.normal_(block.weight, std=0.1)
    parts = {name: part for name, part in flux.components.items() if part is not None}
    pipe = FluxControlNetPipeline(**parts, controlnet=FluxMultiControlNetModel(nets))
    pipe.set_progress_bar_config(disable=True)
    assert is_euler(pipe, control_image=[square(SIDE)] * 2, controlnet_conditioning_scale=[0.5, 0.5])


@pytest.mark.parametrize("pipe", ["flux2"], indirect=True)
def test_flux2_draws_from_two_reference_images(pipe, two_steps):
    how = {"image": [square(), square()]}
    before = sample(pipe, **how)
    assert not torch.equal(sample(arcflow.attach(pipe, two_steps), **how), before)
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe, **how), before)
    assert is_euler(pipe, **how)


@pytest.mark.parametrize(("name", "images"), [("Flux2KleinPipeline", []), ("Flux2KleinKVPipeline", [square()])])
def test_distilled_klein_and_one_that_keeps_keys_and_values_of_its_reference(pristine, tmp_path, name, images):
    base = klein_pipeline(pristine["flux2"], flux2_transformer(guidance_embeds=False))
    parts = {name: part for name, part in base.components.items() if part is not None}
    pipe = getattr(diffusers, name)(**parts, is_distilled=True)
    pipe.set_progress_bar_config(disable=True)
    how = {"image": images} if images else {}
    before, folder = sample(pipe, **how), made(pipe, tmp_path)
    arcflow.attach(pipe, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not torch.equal(sample(pipe, **how), before)
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe, **how), before)
    assert is_euler(pipe, **how)
