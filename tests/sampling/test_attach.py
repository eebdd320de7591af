"""What people do with a pipeline, done with a student on it: the right image, or one sentence and nothing changed."""

import copy
import functools
import importlib
import io
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline, SD3Transformer2DModel

import arcflow
from arcflow import ArcFlowScheduler, student
from arcflow.families import family_of, network
from arcflow.student import adapter
from arcflow.student.places import base_linear
from arcflow.student.record import AdapterInfo
from arcflow.student.state import lora_layers, state_of
from tests.support.families import ALL
from tests.support.pipelines import SIDE, flux2_transformer, perturb, sample, save_style
from tests.support.students import without_gain

FUSE = importlib.import_module("arcflow.student.fuse")

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


def made(pipe, folder, seed=0, info=None, **build):
    """An adapter for this pipeline."""
    sizes = {"modes": 4, "rank": 2, "targets": "all", "generator": torch.Generator().manual_seed(seed), **build}
    net = student.build(copy.deepcopy(pipe.transformer), **sizes)
    perturb(net, seed=seed)
    return adapter.save_adapter(net, folder, info=info)


@pytest.fixture
def two_steps(pipe, tmp_path):
    return made(pipe, tmp_path / "two_steps")


def as_it_was(pipe):
    """All that a refused call must leave: weights, kinds of modules, hooks, scheduler, what is trainable."""
    net = pipe.transformer
    tensors = {name: value.clone() for name, value in net.state_dict().items()}
    kinds = [(name, type(module)) for name, module in net.named_modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    free = [(name, p.requires_grad, p.dtype) for name, p in net.named_parameters()]
    return tensors, (kinds, hooks, free, net.training, id(pipe.scheduler))


def unchanged(before, after):
    return before[1] == after[1] and all(torch.equal(before[0][name], after[0][name]) for name in before[0])


# Guidance


def test_guidance_of_a_student_without_gain_is_that_of_the_base_bit_for_bit(pipe):
    """Two calls a step, mixed by the pipeline."""
    if pipe.transformer.config.get("timestep_guidance_channels"):
        pytest.skip("FLUX.2 guides by its embedding alone")
    pipe.scheduler.register_to_config(use_dynamic_shifting=False, shift=3.2)
    how = {"negative_prompt": "green ball", "true_cfg_scale": 4.0}
    euler = sample(pipe, **how)
    without_gain(pipe.transformer, integrates=True)
    pipe.scheduler = ArcFlowScheduler(num_modes=4)
    assert torch.equal(sample(pipe, **how), euler)


def test_guidance_on_a_guided_student_brings_one_warning_unless_it_is_meant(pipe, two_steps):
    if pipe.transformer.config.get("timestep_guidance_channels"):
        pytest.skip("FLUX.2 guides by its embedding alone")
    how = {"negative_prompt": "green ball", "true_cfg_scale": 4.0}
    arcflow.attach(pipe, two_steps)
    with pytest.warns(UserWarning, match="called twice for one step.*pass true_cfg_scale=1 .*guidance=True") as told:
        warned = sample(pipe, num_inference_steps=4, **how)
    assert len(told) == 1
    arcflow.attach(pipe, two_steps, guidance=True)
    assert torch.equal(sample(pipe, num_inference_steps=4, **how), warned)


def test_another_guidance_than_the_adapters_brings_a_warning(flux, tmp_path):
    arcflow.attach(flux, made(flux, tmp_path))
    with pytest.warns(UserWarning, match="embeds guidance 7, .* distilled at 3.5: pass guidance_scale=3.5"):
        sample(flux, guidance_scale=7.0)
    sample(flux)


def test_a_guidance_within_an_adapters_range_is_followed_and_one_outside_it_brings_a_warning(flux, tmp_path):
    folder = made(flux, tmp_path, info=AdapterInfo(guidance=3.5, guidance_range=(1.5, 5.0)))
    arcflow.attach(flux, folder)
    low, high = (sample(flux, guidance_scale=scale) for scale in (1.5, 5.0))
    assert not torch.equal(low, high)
    for scale, near in ((7.0, "5"), (1.0, "1.5")):
        arcflow.attach(flux, folder)
        with pytest.warns(UserWarning, match=f"embeds .* distilled at guidances of 1.5 to 5: pass .*={near}"):
            sample(flux, guidance_scale=scale)


# Several pipelines and schedulers


def test_a_copy_goes_its_own_way(pipe, two_steps):
    arcflow.attach(pipe, two_steps)
    drawn = sample(pipe)
    twin = copy.deepcopy(pipe)
    arcflow.detach(pipe)
    assert torch.equal(sample(twin), drawn)
    arcflow.detach(twin)
    assert torch.equal(sample(twin), sample(pipe))


def test_a_fresh_scheduler_is_as_good_and_any_other_is_refused(pipe, two_steps):
    stock, euler = pipe.scheduler, sample(pipe)
    arcflow.attach(pipe, two_steps)
    drawn = sample(pipe)
    for other in (copy.deepcopy(pipe.scheduler), ArcFlowScheduler.from_config(pipe.scheduler.config)):
        pipe.scheduler = other
        assert torch.equal(sample(pipe), drawn)
    pipe.scheduler = stock
    with pytest.raises(ValueError, match=r"another scheduler driving the pipeline.* arcflow.detach\(pipe\)"):
        sample(pipe)
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe), euler)


def test_a_teacher_beside_the_student_is_refused_and_its_sibling_is_not(flux, tmp_path):
    teacher = FluxPipeline(**flux.components)
    arcflow.attach(flux, made(flux, tmp_path))
    drawn = sample(flux)
    with pytest.raises(ValueError, match="another scheduler driving"):
        sample(teacher)
    teacher.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.2)
    with pytest.raises(ValueError, match="another scheduler driving"):
        sample(teacher)
    sibling = FluxImg2ImgPipeline(**flux.components)
    sibling.set_progress_bar_config(disable=True)
    image = torch.zeros(1, 3, SIDE, SIDE)
    sample(sibling, image=image, strength=1.0, guidance_scale=3.5)
    assert torch.equal(sample(flux), drawn)


def test_a_second_attach_through_a_sibling_and_detach_through_either(pipe, two_steps, tmp_path):
    euler = sample(pipe)
    sibling = type(pipe)(**pipe.components)
    sibling.set_progress_bar_config(disable=True)
    sibling.__dict__.update({k: v for k, v in pipe.__dict__.items() if k.startswith(("prompt_template", "system"))})
    arcflow.attach(pipe, two_steps)
    other = made_like(two_steps, pipe, tmp_path)
    arcflow.attach(sibling, other)
    drawn = sample(sibling)
    assert torch.equal(sample(pipe), drawn)
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe), euler)
    with pytest.raises(ValueError, match="no student was called for this step"):
        sample(sibling)
    arcflow.detach(sibling)
    assert torch.equal(sample(sibling), euler)


def made_like(folder, pipe, tmp_path):
    """A second adapter for a pipeline that has one on."""
    plain = student.remove(copy.deepcopy(pipe.transformer))
    holder = copy.copy(pipe)
    holder.transformer = plain
    return made(holder, tmp_path / "other", seed=1)


def test_pipelines_that_draw_inside_one_another(pipe, two_steps):
    arcflow.attach(pipe, two_steps)
    four, two = sample(pipe, num_inference_steps=4), sample(pipe)
    inner = copy.copy(pipe)
    inner.scheduler = copy.deepcopy(pipe.scheduler)
    within = []

    def draw(*_):
        within.append(sample(inner))
        return {}

    assert torch.equal(sample(pipe, num_inference_steps=4, callback_on_step_end=draw), four)
    assert len(within) == 4 and all(torch.equal(one, two) for one in within)


def embedded(pipe):
    """A prompt that is encoded already."""
    cond = network.encode_prompts(pipe, ["a red cube"], height=SIDE, width=SIDE, max_sequence_length=8)
    names = {
        "encoder_hidden_states": "prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
        "encoder_hidden_states_mask": "prompt_embeds_mask",
    }
    return {"prompt": None, **{names[name]: value for name, value in cond.items() if name in names}}


def in_threads(*jobs):
    results: list = [None] * len(jobs)

    def run(i):
        try:
            results[i] = jobs[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.slow
def test_threads_with_a_scheduler_each_share_all_else(pipe, two_steps):
    arcflow.attach(pipe, two_steps)
    embeds = embedded(pipe)  # tokenizers are not for several threads
    wanted = {steps: sample(pipe, num_inference_steps=steps, **embeds) for steps in (2, 3, 4)}
    pipes = {}
    for steps in wanted:
        pipes[steps] = copy.copy(pipe)
        pipes[steps].scheduler = copy.deepcopy(pipe.scheduler)
    drawn = in_threads(
        *(lambda n=n: [sample(pipes[n], num_inference_steps=n, **embeds) for _ in range(3)] for n in wanted)
    )
    for steps, images in zip(wanted, drawn, strict=True):
        assert all(torch.equal(image, wanted[steps]) for image in images)


def test_one_pipeline_in_two_threads_is_refused_in_both(pipe, two_steps):
    arcflow.attach(pipe, two_steps)
    embeds = embedded(pipe)
    wanted = sample(pipe, **embeds)
    started, second = threading.Event(), threading.Event()

    def wait(pipe, step, *_):
        started.set()
        second.wait(20)
        return {}

    def late():
        started.wait(20)
        return sample(pipe, callback_on_step_end=lambda *_: (second.set(), {})[1], **embeds)

    for result in in_threads(lambda: sample(pipe, callback_on_step_end=wait, **embeds), late):
        assert (
            isinstance(result, ValueError)
            and "used by several threads at once" in str(result)
            or torch.equal(result, wanted)
        )
    assert torch.equal(sample(pipe), wanted)


# All or nothing


def test_a_refused_attach_leaves_the_plain_pipeline(pipe, two_steps, monkeypatch):
    before, image = as_it_was(pipe), sample(pipe)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(FUSE, "_merged", fail)
    with pytest.raises(MemoryError):
        arcflow.attach(pipe, two_steps, fuse=True)
    assert unchanged(before, as_it_was(pipe)) and torch.equal(sample(pipe), image)
    pipe.transformer._parallel_config = object()
    with pytest.raises(ValueError, match="split over processes already"):
        arcflow.attach(pipe, two_steps)
    assert unchanged(before, as_it_was(pipe))


def test_linears_without_weights_to_read_are_refused_in_a_sentence(pipe, two_steps):
    """As `torch.ao.quantization.quantize_dynamic` leaves them: packed, behind a method of the name."""
    linear = getattr(pipe.transformer, family_of(pipe.transformer).head)
    weight = linear.weight
    del linear.weight
    linear.weight = lambda: weight
    before = as_it_was(pipe)
    with pytest.raises(ValueError, match="keep no weights that can be read"):
        arcflow.attach(pipe, two_steps)
    assert unchanged(before, as_it_was(pipe))


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_a_refused_attach_leaves_the_adapter_before_it(pipe, two_steps, tmp_path, monkeypatch, fused):
    arcflow.attach(pipe, two_steps, fuse=fused)
    other = made_like(two_steps, pipe, tmp_path)
    before, image = as_it_was(pipe), sample(pipe)
    merge, calls = FUSE._merged, []

    def fail_once(*given):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return merge(*given)

    with monkeypatch.context() as patch:
        patch.setattr(FUSE, "_merged", fail_once)
        with pytest.raises(MemoryError):
            arcflow.attach(pipe, other, fuse=True)
    assert unchanged(before, as_it_was(pipe)) and torch.equal(sample(pipe), image)
    pipe.transformer._parallel_config = object()  # as `enable_parallelism` leaves it
    with pytest.raises(ValueError, match="split over processes already"):
        arcflow.attach(pipe, other)
    pipe.transformer._parallel_config = None
    assert unchanged(before, as_it_was(pipe)) and torch.equal(sample(pipe), image)


def test_detach_gives_back_mode_and_dtype(pipe, two_steps):
    pipe = copy.deepcopy(pipe)
    pipe.transformer.train()
    arcflow.attach(pipe, two_steps, fuse=True)
    pipe.to(torch.bfloat16)
    sample(pipe)
    arcflow.detach(pipe)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16} and pipe.transformer.training


def test_weights_that_are_offloaded_are_refused(pipe, two_steps):
    from accelerate import cpu_offload

    before = sample(pipe)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"), offload_buffers=True)
    with pytest.raises(ValueError, match=r"attach before offloading, or call pipe.remove_all_hooks\(\)"):
        arcflow.attach(pipe, two_steps)
    assert torch.equal(sample(pipe), before)


@pytest.mark.parametrize("hooks", ["gone before", "left on"])
def test_offloaded_after_attach_it_draws_and_comes_off(pipe, two_steps, hooks):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    before = sample(pipe)
    arcflow.attach(pipe, two_steps)
    drawn = sample(pipe)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(sample(pipe), drawn)
    if hooks == "gone before":
        remove_hook_from_module(pipe.transformer, recurse=True)
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe), before)


def test_a_fused_student_draws_offloaded_and_stays_until_its_weights_are_back(pipe, two_steps):
    """To come apart it needs the weights themselves, which lie elsewhere under sequential offload."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    before = sample(pipe)
    arcflow.attach(pipe, two_steps, fuse=True)
    drawn = sample(pipe)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"), offload_buffers=True)
    for take_off in (lambda: arcflow.detach(pipe), lambda: student.unfuse(pipe.transformer)):
        with pytest.raises(ValueError, match=r"weights of the base are offloaded.* pipe.remove_all_hooks\(\) first"):
            take_off()
        assert torch.equal(sample(pipe), drawn)
    remove_hook_from_module(pipe.transformer, recurse=True)
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe), before)


def test_a_thing_that_is_no_pipeline_is_refused(pipe, two_steps):
    with pytest.raises(ValueError, match="no pipeline with a transformer and a scheduler"):
        arcflow.attach(pipe.transformer, two_steps)
    with pytest.raises(ValueError, match="no adapter is attached"):
        arcflow.detach(pipe)


@pytest.mark.parametrize("pipe", ["flux"], indirect=True)
def test_what_names_no_adapter_is_refused(unchecked, pipe, two_steps):
    with pytest.raises(ValueError, match="None names no adapter: expected a folder, a file, or owner/name"):
        arcflow.attach(pipe, None)


@pytest.mark.parametrize("pipe", ["flux"], indirect=True)
def test_a_pipeline_that_was_made_in_inference_mode_is_given_back_outside_of_it(pipe, two_steps):
    with torch.inference_mode():
        pipe.transformer = copy.deepcopy(pipe.transformer)
        before = sample(pipe)
        arcflow.attach(pipe, two_steps)
    sample(pipe)
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe), before)


# Saving and sending


def test_saving_is_refused_with_the_way_out(pipe, two_steps, tmp_path):
    arcflow.attach(pipe, two_steps)
    for save in (pipe.save_pretrained, pipe.transformer.save_pretrained):
        with pytest.raises(ValueError, match=r"arcflow.save_adapter.* arcflow.detach\(pipe\)"):
            save(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    arcflow.detach(pipe).transformer.save_pretrained(tmp_path / "base")


def test_a_student_goes_to_another_process(pipe, two_steps):
    arcflow.attach(pipe, two_steps)
    drawn = sample(pipe)
    pipe.transformer = pickle.loads(pickle.dumps(pipe.transformer))
    assert torch.equal(sample(pipe), drawn)
    file = io.BytesIO()
    torch.save(pipe.transformer, file)
    arcflow.detach(pipe)


# Fused


def test_a_fused_students_linears_are_called_as_plain_ones(pipe, two_steps):
    """No hook is left on them, and all come back."""
    arcflow.attach(pipe, two_steps)
    linears = [base_linear(pipe.transformer, name) for name in lora_layers(pipe.transformer)]
    drawn = sample(pipe)
    student.fuse(pipe.transformer)
    assert not any(linear._forward_hooks for linear in linears)
    torch.testing.assert_close(sample(pipe), drawn, rtol=1e-3, atol=1e-4)
    student.unfuse(pipe.transformer)
    assert all(len(linear._forward_hooks) == 1 for linear in linears) and torch.equal(sample(pipe), drawn)


# Joined projections


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after", "fused"])
def test_joined_projections_draw_the_same_and_come_apart(pipe, two_steps, when):
    if "Qwen" in type(pipe).__name__:
        pytest.skip("Qwen-Image has none")
    teacher = sample(pipe)
    arcflow.attach(pipe, two_steps)
    drawn = sample(pipe)
    arcflow.detach(pipe)
    if when == "before":
        pipe.transformer.fuse_qkv_projections()
    arcflow.attach(pipe, two_steps, fuse=when == "fused")
    if when != "before":
        pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(sample(pipe), drawn, rtol=1e-3, atol=1e-4)
    pipe.transformer.unfuse_qkv_projections()
    torch.testing.assert_close(sample(pipe), drawn, rtol=1e-3, atol=1e-4)
    pipe.transformer.fuse_qkv_projections()  # into Linears that are new
    torch.testing.assert_close(sample(pipe), drawn, rtol=1e-3, atol=1e-4)
    arcflow.detach(pipe)
    torch.testing.assert_close(sample(pipe), teacher, rtol=1e-4, atol=1e-4)
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(sample(pipe), teacher)


@pytest.mark.slow
def test_projections_that_diffusers_cannot_take_apart_come_apart(tmp_path):
    """Stable Diffusion 3's attentions keep what was joined when the network calls their Linears one by one again."""
    pipe = ALL["sd3"]()
    plain = {"qk_norm": None, "dual_attention_layers": ()}  # of neither does a stock network draw the same when joined
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    pipe.transformer = SD3Transformer2DModel(**{**config, **plain}).eval()
    draw = functools.partial(sample, pipe, guidance_scale=1.0)
    teacher, folder = draw(), made(pipe, tmp_path)
    arcflow.attach(pipe, folder)
    drawn = draw()
    arcflow.detach(pipe).transformer.fuse_qkv_projections()
    arcflow.attach(pipe, folder)
    for change in (student.fuse, student.unfuse, lambda net: net.unfuse_qkv_projections()):
        torch.testing.assert_close(draw(), drawn, rtol=1e-3, atol=1e-4)
        change(pipe.transformer)
    assert torch.equal(draw(), drawn)
    arcflow.detach(pipe)
    assert torch.equal(draw(), teacher)


# Compiled


@pytest.mark.long
@pytest.mark.parametrize("story", ["whole", "blocks", "uneven"])
def test_compiled_it_draws_the_same(story):
    """In a process of its own: what checks shapes in tests cannot be compiled."""
    program = Path(__file__).with_name("compiled.py")
    run = subprocess.run([sys.executable, program, story], capture_output=True, text=True, env=with_tests())
    assert run.returncode == 0, run.stderr


def with_tests():
    """The environment of a process that imports what tests share."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}


# Precision


def test_storage_in_eight_bits_leaves_the_students_weights_wide(pipe, two_steps):
    arcflow.attach(pipe, two_steps)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert {p.dtype for p in student.trainable(pipe.transformer).values()} == {torch.float32}
    state_of(pipe.transformer).head.to(torch.float8_e4m3fn)
    assert {p.dtype for p in student.trainable(pipe.transformer).values()} == {torch.float32}


@pytest.mark.parametrize("form", ["mixture", "coefficients"])
def test_under_autocast_the_students_own_weights_stay_float32(flux, tmp_path, form):
    arcflow.attach(flux, made(flux, tmp_path, form=form))
    state = state_of(flux.transformer)
    state.head.integrates = False
    features, straight = torch.randn(2, 5, state.head.in_features), state.head.frozen.weight.new_ones(2, 5, 16)
    head = state.head.tuned
    with torch.no_grad():
        wanted = head(features) if form == "mixture" else head(features, straight)
        state.head.frozen = Says(straight) if form == "coefficients" else state.head.frozen
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(state.head(features), wanted)


class Says(torch.nn.Identity):
    """The same answer to all."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, _):
        return self.answer


def test_under_autocast_a_step_is_taken_in_float32():
    scheduler = ArcFlowScheduler(num_modes=4)
    scheduler.set_timesteps(2)
    packed, x = torch.randn(1, 3, 4 * 16 + 28), torch.randn(1, 3, 16)
    wanted = copy.deepcopy(scheduler).step(packed, scheduler.timesteps[0], x).prev_sample
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scheduler.step(packed, scheduler.timesteps[0], x).prev_sample, wanted)


# Aborted


@pytest.mark.parametrize("when", ["before the first call", "in the first call", "after the first step"])
@pytest.mark.parametrize("pipe", ["flux"], indirect=True)
def test_what_an_aborted_run_leaves_serves_no_other_scheduler(pipe, two_steps, when):
    """A stock scheduler at the very noise level where the other one stopped."""
    arcflow.attach(pipe, two_steps)
    drawn, ours = sample(pipe), pipe.scheduler

    def stop(*_):
        raise KeyboardInterrupt

    if when == "before the first call":
        ours.set_timesteps(4)
    elif when == "in the first call":
        handle = pipe.transformer.proj_out.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            sample(pipe, num_inference_steps=4)
        handle.remove()
    else:
        with pytest.raises(KeyboardInterrupt):
            sample(pipe, num_inference_steps=4, callback_on_step_end=stop)
    pipe.scheduler = OneStep()
    pipe.scheduler.start = float(ours.sigmas[1 if when.startswith("after") else 0])
    with pytest.raises(ValueError, match="another scheduler driving the pipeline"):
        sample(pipe, num_inference_steps=1)
    pipe.scheduler = ours
    assert torch.equal(sample(pipe), drawn)


class OneStep(FlowMatchEulerDiscreteScheduler):
    """One step of the stock scheduler, from a noise level."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        self.sigmas = torch.tensor([self.start, 0.0])
        self.timesteps, self.num_inference_steps = self.sigmas[:-1] * 1000, 1
        self._step_index = self._begin_index = None


def test_a_call_outside_of_any_loop_is_refused_and_predict_serves_it(pipe, inputs, two_steps):
    arcflow.attach(pipe, two_steps)
    with pytest.raises(ValueError, match="no ArcFlowScheduler is at a step.*arcflow.student.predict"):
        network.call(pipe.transformer, inputs.x, inputs.sigma, inputs.cond)
    assert student.predict(pipe.transformer, inputs.x, inputs.sigma, inputs.cond).v.isfinite().all()


# FLUX.2 klein


def test_klein_draws_by_default_and_as_the_command_line_calls_it(pristine, tmp_path):
    from arcflow.sampling.generate import generate
    from tests.support.pipelines import klein_pipeline

    pipe = klein_pipeline(pristine["flux2"], flux2_transformer(guidance_embeds=False))
    arcflow.attach(pipe, made(pipe, tmp_path))
    size = {"height": SIDE, "width": SIDE}
    with pytest.warns(UserWarning, match="pass guidance_scale=1 "):
        assert pipe(prompt="a red cube", num_inference_steps=2, max_sequence_length=8, **size).images
    samples = generate(pipe, ["a red cube"], [0], steps=2, **size)
    assert samples.nfe == 2 and len(samples.images) == 1


def test_a_style_that_is_called_arcflow_is_a_style(flux, tmp_path):
    two_steps = made(flux, tmp_path / "two_steps")
    flux.load_lora_weights(save_style(flux, tmp_path / "style", ["to_q"]), adapter_name="arcflow")
    styled = sample(flux)
    arcflow.attach(flux, two_steps)
    arcflow.detach(flux)
    assert torch.equal(sample(flux), styled)
