"""What diffusers offers to save time and memory, under a student: each draws what the plain pipeline draws."""

import copy

import pytest
import torch

import arcflow
from arcflow import student
from arcflow.student import adapter
from tests.support.pipelines import perturb, sample, save_style

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@pytest.fixture
def attached(pipe, tmp_path):
    """A pipeline with a student on it."""
    net = student.build(copy.deepcopy(pipe.transformer), modes=4, rank=2, targets="all")
    perturb(net)
    arcflow.attach(pipe, adapter.save_adapter(net, tmp_path))
    return pipe


def test_group_offload_streams_the_student_in(attached):
    plain = sample(attached)
    attached.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert torch.equal(sample(attached), plain)


def test_attention_backends_are_passed_through(attached):
    plain = sample(attached)
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
