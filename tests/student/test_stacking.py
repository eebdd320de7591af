"""A user's own LoRA beside the student, through the stock pipeline's own methods: it never touches the student."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

import arcflow
from arcflow import student
from arcflow.families import network
from arcflow.student import adapter, views
from tests.support.pipelines import STYLE, perturb, sample, save_style

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:Already unmerged"),
    pytest.mark.parametrize("targets", ["feed_forward", pytest.param("all", marks=pytest.mark.slow)]),
]


@pytest.fixture(params=[pytest.param("blocks", marks=pytest.mark.slow), "everywhere"])
def style(request, pipe, tmp_path):
    """A LoRA on blocks alone, or on the norm and the last layer too, where the student has weights of its own."""
    layers = STYLE[type(pipe).__name__] + (["norm_out.linear", "proj_out"] if request.param == "everywhere" else [])
    return save_style(pipe, tmp_path / "style", layers)


@pytest.fixture
def two_steps(pipe, tmp_path, targets):
    """A student's adapter."""
    net = student.build(copy.deepcopy(pipe.transformer), modes=4, rank=2, targets=targets)
    perturb(net)
    return adapter.save_adapter(net, tmp_path / "two_steps")


def weights(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_a_second_lora_at_any_strength_and_gone_without_a_trace(pipe, two_steps, style):
    arcflow.attach(pipe, two_steps)
    plain = sample(pipe)
    pipe.load_lora_weights(style, adapter_name="style")
    moved = []
    for strength in (0.0, 0.5, 1.0):
        pipe.set_adapters("style", strength)
        moved.append(float((sample(pipe) - plain).square().mean().sqrt()))
    assert moved[0] == 0 < moved[1] < moved[2]
    pipe.delete_adapters("style")
    assert torch.equal(sample(pipe), plain)


@pytest.mark.parametrize("gesture", ["unload_lora_weights", "disable_lora"])
def test_what_takes_a_users_lora_off_leaves_the_student_on(pipe, two_steps, style, gesture):
    arcflow.attach(pipe, two_steps)
    plain = sample(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), plain)
    pipe.load_lora_weights(style, adapter_name="style")
    assert not torch.equal(sample(pipe), plain)
    getattr(pipe, gesture)()
    assert torch.equal(sample(pipe), plain)


def test_a_strength_given_at_the_call_is_the_styles_alone(pipe, two_steps, style):
    name = "joint_attention_kwargs" if "Flux" in type(pipe).__name__ and "2" not in type(pipe).__name__ else None
    half = {name or "attention_kwargs": {"scale": 0.5}}
    arcflow.attach(pipe, two_steps)
    plain = sample(pipe)
    assert torch.equal(sample(pipe, **half), plain)
    pipe.load_lora_weights(style, adapter_name="style")
    at_the_call = sample(pipe, **half)
    pipe.set_adapters("style", 0.5)
    assert torch.equal(at_the_call, sample(pipe))


def test_either_may_come_first_and_either_may_go_first(pipe, two_steps, style):
    before = weights(pipe.transformer)
    pipe.load_lora_weights(style, adapter_name="style")
    styled = sample(pipe)
    arcflow.attach(pipe, two_steps)
    both = sample(pipe)
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe), styled)  # the style is still there
    pipe.unload_lora_weights()
    arcflow.attach(pipe, two_steps)
    pipe.load_lora_weights(style, adapter_name="style")
    # The order in which two LoRAs on one Linear are added may round the last bit otherwise.
    torch.testing.assert_close(sample(pipe), both, rtol=1e-5, atol=1e-5)
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe), styled)
    pipe.unload_lora_weights()
    after = weights(pipe.transformer)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_it_moves_student_and_teacher_alike(pipe, inputs, two_steps, targets, tmp_path):
    """The second LoRA's effect on the velocity, by root mean square: of the same order for both."""

    def velocities():
        student_velocity = student.predict(pipe.transformer, inputs.x, inputs.sigma, inputs.cond).velocity(0.0)
        return student_velocity, views.teacher_velocity(pipe.transformer, inputs.x, inputs.sigma, inputs.cond)

    with torch.no_grad():
        arcflow.attach(pipe, two_steps)
        before = velocities()
        pipe.load_lora_weights(save_style(pipe, tmp_path, STYLE[type(pipe).__name__]), adapter_name="style")
        after = velocities()
    on_student, on_teacher = (float((b - a).square().mean().sqrt()) for a, b in zip(before, after, strict=True))
    assert 0.3 < on_student / on_teacher < 3


def test_the_teacher_view_keeps_the_style(pipe, inputs, two_steps, style):
    pipe.load_lora_weights(style, adapter_name="style")
    net = pipe.transformer
    with torch.no_grad():
        styled = network.call(net, inputs.x, inputs.sigma, inputs.cond)
        arcflow.load_adapter(net, two_steps)
        assert torch.equal(views.teacher_velocity(net, inputs.x, inputs.sigma, inputs.cond), styled)


@pytest.mark.slow
def test_merged_into_the_base_and_taken_out_again(pipe, two_steps, targets, tmp_path):
    arcflow.attach(pipe, two_steps)
    plain = sample(pipe)
    pipe.load_lora_weights(save_style(pipe, tmp_path, STYLE[type(pipe).__name__]), adapter_name="style")
    pipe.set_adapters("style", 0.5)
    both = sample(pipe)
    pipe.set_adapters("style", 1.0)
    pipe.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(sample(pipe), both, rtol=1e-4, atol=1e-4)
    pipe.unfuse_lora()
    pipe.delete_adapters("style")
    torch.testing.assert_close(sample(pipe), plain, rtol=1e-4, atol=1e-4)


def test_merged_where_the_student_has_its_own_weights_it_is_refused(pipe, two_steps, targets, tmp_path):
    arcflow.attach(pipe, two_steps)
    pipe.load_lora_weights(save_style(pipe, tmp_path, ["to_q", "norm_out.linear"]), adapter_name="style")
    styled = sample(pipe)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"merged into norm_out.linear.*pipe.unfuse_lora\(\)"):
        sample(pipe)
    pipe.unfuse_lora()
    torch.testing.assert_close(sample(pipe), styled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", ["style", "student"])
def test_a_fused_student_takes_a_style_and_gives_it_back(pipe, two_steps, style, first):
    teacher = sample(pipe)
    pipe.load_lora_weights(style, adapter_name="style")
    styled_teacher = sample(pipe)
    arcflow.attach(pipe, two_steps)
    both = sample(pipe)
    arcflow.detach(pipe)
    if first == "student":
        pipe.unload_lora_weights()
        arcflow.attach(pipe, two_steps, fuse=True)
        pipe.load_lora_weights(style, adapter_name="style")
    else:
        arcflow.attach(pipe, two_steps, fuse=True)
    torch.testing.assert_close(sample(pipe), both, rtol=1e-3, atol=1e-4)
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe), styled_teacher)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), teacher)


def test_what_was_merged_into_a_fused_student_stays_with_the_base(pipe, two_steps, targets, tmp_path):
    folder = save_style(pipe, tmp_path, STYLE[type(pipe).__name__])
    pipe.load_lora_weights(folder, adapter_name="style")
    styled = sample(pipe)
    pipe.unload_lora_weights()
    arcflow.attach(pipe, two_steps, fuse=True)
    pipe.load_lora_weights(folder, adapter_name="style")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    arcflow.detach(pipe)
    torch.testing.assert_close(sample(pipe), styled, rtol=1e-4, atol=1e-4)


def test_whoever_looks_for_linears_by_name_finds_linears_alone(pipe, two_steps, targets):
    arcflow.attach(pipe, two_steps)
    found = [m for name, m in pipe.transformer.named_modules() if any(part in name for part in ("to_q", "to_out.0"))]
    assert found and all(isinstance(module, torch.nn.Linear) for module in found)


def test_a_lora_on_all_linears_has_none_in_the_student(pipe, two_steps, targets):
    arcflow.attach(pipe, two_steps)
    plain, net = sample(pipe), pipe.transformer
    before = [name for name, _ in net.named_parameters()]
    net.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"), "style")
    inside = [name for name, _ in net.named_parameters() if "lora_" in name and ("tuned" in name or "frozen" in name)]
    assert not inside and not torch.equal(sample(pipe), plain)
    assert isinstance(net.proj_out, BaseTunerLayer) and isinstance(net.norm_out.linear, BaseTunerLayer)
    pipe.delete_adapters("style")
    assert torch.equal(sample(pipe), plain) and len(before) == len(list(net.parameters()))


def test_a_style_is_saved_beside_a_student_as_without_one(pipe, two_steps, style, targets, tmp_path):
    """The file has the style's weights, all of them, and nothing of the student's."""
    pipe.load_lora_weights(style, adapter_name="style")
    arcflow.attach(pipe, two_steps)
    told = get_peft_model_state_dict(pipe.transformer, adapter_name="style")
    type(pipe).save_lora_weights(tmp_path / "again", transformer_lora_layers=told)
    before, after = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (style, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_is_trained_on_a_student(pipe, inputs, two_steps, targets, dora):
    arcflow.attach(pipe, two_steps)
    net = pipe.transformer
    config = LoraConfig(r=2, target_modules=[*STYLE[type(pipe).__name__], "norm_out.linear"], use_dora=dora)
    net.add_adapter(config, "style")
    learned = {name: p for name, p in net.named_parameters() if "lora_B" in name}
    student.predict(net, inputs.x, inputs.sigma, inputs.cond).velocity(0.0).square().mean().backward()
    assert learned and all(p.grad is not None for p in learned.values())
