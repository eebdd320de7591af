"""A user's own LoRA beside the student's, through the stock pipeline's own methods."""

import copy

import pytest
import torch

import arcflow
from arcflow import student
from arcflow.families import network
from arcflow.student import adapter, views
from tests.support.pipelines import perturb, sample, save_style

STYLE = {
    "FluxPipeline": ["to_q", "to_v", "proj_mlp", "ff.net.2"],
    "QwenImagePipeline": ["to_q", "to_v", "img_mlp.net.2"],
    "Flux2Pipeline": ["to_q", "to_v", "to_qkv_mlp_proj", "ff.linear_out"],
}
"""Attention, which the student leaves alone, and layers that the student tunes too."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:Already unmerged"),
    pytest.mark.parametrize("targets", ["feed_forward", pytest.param("all", marks=pytest.mark.slow)]),
]


@pytest.fixture
def style(pipe, tmp_path):
    return save_style(pipe, tmp_path / "style", STYLE[type(pipe).__name__])


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
        pipe.set_adapters(["arcflow", "style"], [1.0, strength])
        moved.append(float((sample(pipe) - plain).square().mean().sqrt()))
    assert moved[0] == 0 < moved[1] < moved[2]
    pipe.delete_adapters("style")
    assert torch.equal(sample(pipe), plain)


def test_either_may_come_first_and_either_may_go_first(pipe, two_steps, style):
    before = weights(pipe.transformer)
    pipe.load_lora_weights(style, adapter_name="style")
    styled = sample(pipe)
    arcflow.attach(pipe, two_steps)
    both = sample(pipe)
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe), styled)  # the style is still there
    arcflow.attach(pipe, two_steps)
    assert torch.equal(sample(pipe), both)
    pipe.delete_adapters("style")
    arcflow.detach(pipe)
    after = weights(pipe.transformer)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_it_moves_student_and_teacher_alike(pipe, inputs, two_steps, style):
    """The second LoRA's effect on the velocity, by root mean square: of the same order for both."""

    def velocities():
        student_velocity = student.predict(pipe.transformer, inputs.x, inputs.sigma, inputs.cond).velocity(0.0)
        return student_velocity, views.teacher_velocity(pipe.transformer, inputs.x, inputs.sigma, inputs.cond)

    with torch.no_grad():
        arcflow.attach(pipe, two_steps)
        before = velocities()
        pipe.load_lora_weights(style, adapter_name="style")
        pipe.set_adapters(["arcflow", "style"])
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


def test_fused_into_the_base_and_taken_out_again(pipe, two_steps, style):
    arcflow.attach(pipe, two_steps)
    plain = sample(pipe)
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters(["arcflow", "style"])
    both = sample(pipe)
    pipe.fuse_lora(adapter_names=["style"])
    with pytest.raises(ValueError, match="or fuse both"):
        sample(pipe)
    pipe.unfuse_lora()
    pipe.fuse_lora(adapter_names=["arcflow", "style"])
    for impossible in (lambda: student.teacher(pipe.transformer).__enter__(), lambda: arcflow.detach(pipe)):
        with pytest.raises(ValueError, match=r"merged into the base. Call pipe.unfuse_lora\(\)"):
            impossible()
    torch.testing.assert_close(sample(pipe), both, rtol=1e-4, atol=1e-4)
    pipe.unfuse_lora()
    pipe.delete_adapters("style")
    torch.testing.assert_close(sample(pipe), plain, rtol=1e-4, atol=1e-4)


def test_a_student_that_lost_its_own_lora_says_so(pipe, two_steps, style):
    arcflow.attach(pipe, two_steps)
    pipe.load_lora_weights(style, adapter_name="style")  # makes itself the only active one
    with pytest.raises(ValueError, match=r"'arcflow' is switched off.*set_adapters\(\['arcflow', ...\]\)"):
        sample(pipe)
    with pytest.raises(ValueError, match=r"cannot fuse: the PEFT adapters \['style'\]"):
        student.fuse(pipe.transformer)
