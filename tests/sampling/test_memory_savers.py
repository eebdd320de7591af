"""What diffusers offers to save time and memory, under a student: each draws what the plain pipeline draws."""

import copy

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend

import arcflow
from arcflow import student
from arcflow.student import adapter
from tests.support.pipelines import fresh, perturb, sample, save_style

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@pytest.fixture
def two_steps(pipe, tmp_path):
    """An adapter."""
    net = student.build(copy.deepcopy(pipe.transformer), modes=4, rank=2, targets="all")
    perturb(net)
    return adapter.save_adapter(net, tmp_path / "adapter")


@pytest.fixture
def attached(pipe, two_steps):
    """A pipeline with a student on it."""
    arcflow.attach(pipe, two_steps)
    return pipe


def test_group_offload_streams_the_student_in(attached):
    plain = sample(attached)
    attached.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert torch.equal(sample(attached), plain)


def hooked(transformer):
    """Names of the modules whose weights are brought to their call."""
    hooks = {name: getattr(module, "_diffusers_hook", None) for name, module in transformer.named_modules()}
    return {name for name, hook in hooks.items() if hook and hook.get_hook("group_offloading")}


@pytest.mark.slow
def test_group_offload_brings_what_came_later_and_what_is_left(pipe, two_steps):
    cpu = torch.device("cpu")
    where = {"onload_device": cpu, "offload_device": cpu, "offload_type": "leaf_level"}
    arcflow.attach(pipe, two_steps)
    pipe.transformer.enable_group_offload(**where)
    wanted, drawn = hooked(pipe.transformer), sample(pipe)
    arcflow.detach(pipe)
    base, plain = sample(pipe), hooked(pipe.transformer)
    assert "proj_out" in plain and "proj_out" in wanted  # one head is another module than the other
    arcflow.attach(pipe, two_steps)
    assert hooked(pipe.transformer) == wanted and torch.equal(sample(pipe), drawn)
    student.fuse(pipe.transformer)
    torch.testing.assert_close(sample(pipe), drawn, rtol=1e-3, atol=1e-4)
    arcflow.detach(pipe)
    assert hooked(pipe.transformer) == plain and torch.equal(sample(pipe), base)


def test_weights_on_a_disk_are_refused_and_drawn_with(pipe, two_steps, tmp_path):
    cpu = torch.device("cpu")
    other = fresh(pipe)
    arcflow.attach(pipe, two_steps)
    drawn = sample(pipe)
    for one in (pipe, other):
        place = str(tmp_path / str(id(one)))
        one.transformer.enable_group_offload(cpu, cpu, "leaf_level", offload_to_disk_path=place)
    for refused in (lambda: arcflow.attach(other, two_steps), lambda: arcflow.detach(pipe)):
        with pytest.raises(ValueError, match="on a disk"):
            refused()
    assert not hasattr(other.transformer, "_arcflow")
    torch.testing.assert_close(sample(pipe), drawn)


def test_attention_backends_are_passed_through(attached):
    plain = sample(attached)
    with attention_backend():  # diffusers sets it for all models, and for whatever is tested after this
        attached.transformer.set_attention_backend("_native_math")
        torch.testing.assert_close(sample(attached), plain, rtol=1e-4, atol=1e-4)


def test_tiles_of_the_autoencoder(attached):
    plain = sample(attached, output_type="pt")
    attached.vae = copy.deepcopy(attached.vae)
    attached.vae.enable_tiling()
    torch.testing.assert_close(sample(attached, output_type="pt"), plain)  # one tile holds this image


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("pipe", ["flux"], indirect=True)
def test_compiled_blocks_draw_the_same_and_take_a_second_lora(attached, tmp_path):
    plain = sample(attached)
    style = save_style(attached, tmp_path / "style", ["to_q", "to_v", "proj_mlp", "ff.net.2"])
    attached.load_lora_weights(style, adapter_name="style")
    styled = sample(attached)
    attached.delete_adapters("style")

    attached.transformer.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(sample(attached), plain, rtol=1e-4, atol=1e-4)
    attached.load_lora_weights(style, adapter_name="style")
    torch.testing.assert_close(sample(attached), styled, rtol=1e-4, atol=1e-4)
    assert float((styled - plain).square().mean()) > 1e-4
