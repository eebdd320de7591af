"""What every family promises, held against its own stock pipeline: the same for all of them.

A new family adds a tiny pipeline to `tests/support/families.py` and nothing here."""

import copy
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig

import arcflow
from arcflow import ArcFlowScheduler, families, student
from arcflow.distillation import warm_start
from arcflow.distillation.policy import level
from arcflow.families import network, weights
from arcflow.sampling import generate
from arcflow.student import adapter, views
from arcflow.student.layers import swapped
from arcflow.student.places import base_linear, norm_linears
from arcflow.student.state import state_of
from arcflow.training import learner
from tests.support.families import ALL, EXACT, FRAMES, SHIFT, OnOurGrid, side
from tests.support.pipelines import fresh, perturb

PROMPT = "a red cube"
pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of a grid given as a tensor
]

FORMS = ["mixture", pytest.param("coefficients", marks=pytest.mark.slow)]
"""What a student may say of its path; the second is no other for one family than for another."""

WORDS = 16
"""Text tokens that are read, where a pipeline takes a number."""


@pytest.fixture(scope="module")
def made():
    """One pipeline for each family that was asked for."""
    return {}


FAST = ("flux", "wan")
"""A family of pictures and one of videos; the slow part has all of them."""


@pytest.fixture(params=[name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ALL])
def pipe(request, made):
    """A stock pipeline of each family, whose transformer and scheduler may change."""
    if request.param not in made:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made[request.param] = ALL[request.param]()
    return fresh(made[request.param])


@pytest.fixture
def family(pipe):
    return families.family_of(pipe.transformer)


class Noting(FlowMatchEulerDiscreteScheduler):
    """Keeps the velocities and states that it was given."""

    def step(self, model_output, timestep, sample, **how):
        self.taken.append((model_output, sample))
        return super().step(model_output, timestep, sample, **how)


def size(pipe):
    """Of a tiny image or video."""
    name = families.family_of(pipe.transformer).name
    count = {"frames": FRAMES[name]} if name in FRAMES else {}
    return {"height": side(name), "width": side(name), **count}


def draw(pipe, steps=2, guidance=None, seeds=(0,), prompts=(PROMPT,), **more):
    """Latents from the stock pipeline, at one call a step unless `guidance` says another."""
    family, own = families.family_of(pipe.transformer), size(pipe)
    told = generate._arguments(
        pipe, len(prompts), generate.Guide(true_cfg=family.off if guidance is None else guidance)
    )
    if not family.negative and pipe.transformer.config.get("guidance_embeds"):
        told["guidance_scale"] = family.guidance
    if family.reads in told:
        told[family.reads] = WORDS
    if "frames" in own:
        own["num_frames"] = own.pop("frames")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    path = []
    with generate._kept(pipe, path):
        output = pipe(
            prompt=list(prompts),
            num_inference_steps=steps,
            generator=generators,
            **{"output_type": "latent", **EXACT.get(family.name, {}), **own, **told, **more},
        )
    return path[-1] if "output_type" not in more else output.frames if family.video else output.images


def conditioned(pipe, prompts=(PROMPT,)):
    family = families.family_of(pipe.transformer)
    length = WORDS if family.reads and family.second == "guidance_scale" or family.name == "flux" else None
    return network.encode_prompts(pipe, list(prompts), max_sequence_length=length, **size(pipe))


def starting(pipe, seeds=(0,)):
    return network.noise(pipe, list(seeds), **size(pipe))


def tokens_of(pipe, latents):
    """Latents of the stock pipeline, as tokens."""
    if latents.ndim == 3:
        return latents
    return network.unfolded(latents, families.family_of(pipe.transformer).patch_of(pipe.transformer))


def one_pixel(pipe):
    """Where a token is one latent pixel the student's product has other sizes, and sums in another order."""
    return math.prod(families.family_of(pipe.transformer).patch_of(pipe.transformer)) == 1


def same(pipe, one, other):
    if one_pixel(pipe):
        return torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    return torch.equal(one, other)


def without_gain(pipe, modes=4, **build):
    """A student that is its teacher, on the pipeline."""
    net = student.build(pipe.transformer, modes=modes, rank=2, **build).eval()
    state, head = state_of(net), student.trainable(net)
    name = families.family_of(net).head
    if state.form == "mixture":
        base = base_linear(net, name)
        bias = torch.zeros(base.out_features) if base.bias is None else base.bias
        with torch.no_grad():
            head[f"{name}_loggamma.bias"].zero_()
            if state.head.patch_first:
                bias = swapped(bias, base.out_features // state.head.patch_first)
            head[f"{name}_means.bias"].copy_(bias.repeat(modes))
    state.head.integrates = True
    pipe.scheduler = ArcFlowScheduler(num_modes=modes, pixels=state.pixels, shift=SHIFT)
    return net


# The network, called by itself


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # weights that are kept in float32 when they are loaded
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_noise_and_velocity_are_those_of_the_stock_pipeline(pipe, dtype):
    """Bit for bit, the rounding of time included."""
    pipe = copy.deepcopy(pipe).to(dtype)
    taken, pipe.scheduler = [], Noting.from_config(pipe.scheduler.config)
    pipe.scheduler.taken = taken
    draw(pipe, steps=3)
    cond = conditioned(pipe)
    for (v, x), sigma in zip(taken, pipe.scheduler.sigmas.tolist(), strict=False):
        velocity = network.call(pipe.transformer, tokens_of(pipe, x).float(), sigma, cond)
        assert torch.equal(velocity.float(), tokens_of(pipe, v).float()), sigma
    assert len(taken) == 3
    if dtype == torch.float32:
        assert torch.equal(starting(pipe), tokens_of(pipe, taken[0][1]))


def test_images_are_those_of_the_stock_pipeline(pipe, family):
    image = torch.as_tensor(draw(pipe, steps=1, output_type="np"))[..., :3]  # some have transparency too
    tokens = tokens_of(pipe, draw(pipe, steps=1))
    ours = network.decode(pipe, tokens, **size(pipe))
    assert torch.equal(torch.from_numpy(ours), (image * 255).round().byte())


def test_a_sample_does_not_depend_on_its_batch(pipe, family):
    if family.name == "qwen_image_21":
        pytest.skip("padding of the text moves the image behind it, in the stock pipeline too")
    prompts, seeds = ["a red cube", "two blue ball on left of a green cube"], [3, 4]
    together = network.call(pipe.transformer, starting(pipe, seeds), 0.5, conditioned(pipe, prompts))
    for i in range(2):
        alone = network.call(
            pipe.transformer, starting(pipe, seeds[i : i + 1]), 0.5, conditioned(pipe, prompts[i : i + 1])
        )
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-5)


def test_the_names_that_take_a_lora_are_linears_and_not_the_head(pipe, family):
    names, every = weights.lora_names(pipe.transformer), weights.lora_names(pipe.transformer, "all")
    assert len(names) > 4 and set(names) <= set(every)
    assert all(isinstance(pipe.transformer.get_submodule(name), torch.nn.Linear) for name in every)
    assert not {family.head, *norm_linears(pipe.transformer)} & set(every)


def test_what_is_trained_has_a_gradient(pipe):
    """No name in the row is of a Linear whose output nobody reads."""
    net = student.build(pipe.transformer, modes=3, rank=2, targets="all")
    perturb(net)
    path = student.predict(net, starting(pipe), 0.7, conditioned(pipe))
    (path.velocity(0.2).square().mean() + path.logits.square().mean()).backward()
    parts = student.trainable(net)
    silent = [name for name, p in parts.items() if p.grad is None or not p.grad.any()]
    assert not silent


# A student in the stock pipeline


@pytest.mark.parametrize("form", FORMS)
def test_without_gain_it_is_euler_in_two_and_four_steps(pipe, form):
    pipe.scheduler = OnOurGrid()
    euler = [draw(pipe, steps) for steps in (2, 4)]
    without_gain(pipe, form=form)
    for steps, wanted in zip((2, 4), euler, strict=True):
        drawn = draw(pipe, steps)
        assert same(pipe, drawn, wanted) and drawn.isfinite().all()


def test_guided_it_is_the_guided_base(pipe, family):
    if not family.negative and pipe.transformer.config.get("guidance_embeds"):
        pytest.skip("guides by its embedding alone")
    pipe.scheduler = OnOurGrid()
    plain, euler = draw(pipe), draw(pipe, guidance=3.0)
    assert not torch.equal(plain, euler)
    without_gain(pipe)
    assert same(pipe, draw(pipe, guidance=3.0), euler)


def test_the_teachers_view_and_a_base_without_its_student_are_the_untouched_base(pipe):
    before, x, cond = draw(pipe), starting(pipe), conditioned(pipe)
    velocity = network.call(pipe.transformer, x, 0.6, cond)
    stock = pipe.scheduler
    net = student.build(pipe.transformer, modes=3, rank=2)
    perturb(net)
    assert torch.equal(views.teacher_velocity(net, x, 0.6, cond), velocity.float())
    with student.teacher(net):
        assert torch.equal(draw(pipe), before)
    student.remove(net)
    assert pipe.scheduler is stock and torch.equal(draw(pipe), before)


HEARS_ELSEWHERE = ("chroma", "qwen_image_21")
"""Their time embeddings have no Linear with a LoRA in them, or are one with the text's."""


@torch.no_grad()
def test_a_student_that_starts_warm_is_the_base_told_another_level(pipe, family):
    net, x, cond = pipe.transformer, starting(pipe), conditioned(pipe)
    student.build(net, modes=2, rank=4, dropout=0.0, form="coefficients")
    walker = learner.views(net)[0]
    if family.name in HEARS_ELSEWHERE:
        with pytest.raises(ValueError, match="so the student cannot start warm"):
            warm_start.tell(net, walker, x, cond, [(1.0, 0.9)])
        return
    warm_start.tell(net, walker, x, cond, [(1.0, 0.9), (0.7, 0.6)])
    for start, heard in [(1.0, 0.9), (0.7, 0.6)]:
        said = walker(x, level(start, x), cond).velocity(0.0)
        torch.testing.assert_close(said, views.teacher_velocity(net, x, heard, cond), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_goes_to_disk_and_draws_as_by_hand(pipe, tmp_path, form):
    """What the stock pipeline draws is the walk along the paths that `predict` gives; fused to rounding."""
    net = student.build(copy.deepcopy(pipe.transformer), modes=3, rank=2, form=form)
    perturb(net)
    folder = adapter.save_adapter(net, tmp_path / "adapter")
    before = draw(pipe)
    arcflow.attach(pipe, folder)
    drawn = draw(pipe)
    assert not torch.allclose(drawn, before, atol=1e-3)

    x, cond = starting(pipe), conditioned(pipe)
    grid = pipe.scheduler.sigmas.tolist()
    with torch.no_grad():
        for start, end in zip(grid, grid[1:], strict=False):
            x = x - student.predict(net, x, start, cond).displacement(0.0, start - end)
    torch.testing.assert_close(x, tokens_of(pipe, drawn), rtol=1e-4, atol=1e-4)

    arcflow.attach(pipe, folder, fuse=True)
    torch.testing.assert_close(draw(pipe), drawn, rtol=1e-3, atol=1e-4)
    arcflow.detach(pipe)
    assert torch.equal(draw(pipe), before)


def test_a_users_lora_lies_beside_it(pipe, tmp_path):
    """It acts with a student on, and comes off without a trace of either."""
    folder = adapter.save_adapter(student.build(copy.deepcopy(pipe.transformer), modes=3, rank=2), tmp_path)
    arcflow.attach(pipe, folder)
    drawn = draw(pipe)
    names = [*weights.lora_names(pipe.transformer)[:2], families.family_of(pipe.transformer).head]
    torch.manual_seed(3)
    pipe.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=names), "style")
    styled = draw(pipe)
    assert not torch.allclose(styled, drawn, atol=1e-4)
    pipe.transformer.disable_adapters()
    assert torch.equal(draw(pipe), drawn)
    pipe.transformer.delete_adapters("style")
    assert torch.equal(draw(pipe), drawn)


def test_guidance_on_a_guided_student_names_this_pipelines_own_way_out(pipe, family, tmp_path):
    if not family.negative and pipe.transformer.config.get("guidance_embeds"):
        pytest.skip("guides by its embedding alone")
    folder = adapter.save_adapter(student.build(copy.deepcopy(pipe.transformer), modes=3, rank=2), tmp_path)
    arcflow.attach(pipe, folder)
    draw(pipe)
    with pytest.warns(UserWarning, match=f"{family.second}={family.off:g}"):
        draw(pipe, guidance=family.off + 2)
