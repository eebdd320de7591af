"""Wan 2.2: two networks, each for its range of noise levels, and a student on each."""

import copy
from importlib import import_module

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image

import arcflow
from arcflow import student
from arcflow.commands.export import Export
from arcflow.families import network
from arcflow.student import adapter
from arcflow.student.attached import put_on
from arcflow.student.state import is_student
from tests.support.families import FRAMES, euler, loud, wan
from tests.support.pipelines import perturb


@pytest.fixture(scope="module")
def made():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = wan()
        loud(pipe.transformer)
        other = copy.deepcopy(pipe.transformer)
        for parameter in other.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        parts = {**pipe.components, "transformer_2": other}
    pipe = type(pipe)(**parts, boundary_ratio=0.875)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def two(made):
    pipe = copy.copy(made)
    for name in ("transformer", "transformer_2", "scheduler"):
        setattr(pipe, name, copy.deepcopy(getattr(made, name)))
    return pipe


@pytest.fixture
def adapters(made, tmp_path):
    """Of each network."""
    folders = []
    for name in ("transformer", "transformer_2"):
        net = student.build(copy.deepcopy(getattr(made, name)), modes=3, rank=2)
        perturb(net)
        folders.append(adapter.save_adapter(net, tmp_path / name))
    return folders


@pytest.fixture
def both(adapters, tmp_path):
    """One file with the two."""
    each = {"transformer": adapters[0], "transformer_2": adapters[1]}
    return adapter.join_adapters(each, tmp_path / "both.safetensors")


def draw(pipe, **more):
    generator = torch.Generator("cpu").manual_seed(0)
    size = {"height": 32, "width": 32, "num_frames": FRAMES["wan"], "max_sequence_length": 16}
    how = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe(**{"prompt": "a red cube", **more}, generator=generator, **size, **how).frames


def test_each_takes_a_step_of_the_grid_with_its_own_student(two, adapters):
    """As walked by hand: the first step by the one, the second by the other."""
    before = draw(two)
    arcflow.attach(two, adapters[0])
    arcflow.attach(two, adapters[1], component="transformer_2")
    drawn = draw(two)

    size = {"height": 32, "width": 32, "frames": FRAMES["wan"]}
    x = network.noise(two, [0], **size)
    cond = network.encode_prompts(two, ["a red cube"], max_sequence_length=16, **size)
    grid = two.scheduler.sigmas.tolist()
    with torch.no_grad():
        for net, start, end in zip((two.transformer, two.transformer_2), grid, grid[1:], strict=False):
            x = x - student.predict(net, x, start, cond).displacement(0.0, start - end)
    torch.testing.assert_close(network.unfolded(drawn, (1, 2, 2)), x, rtol=1e-4, atol=1e-4)

    arcflow.detach(two)
    assert torch.equal(draw(two), before)


def test_an_adapter_for_the_other_network_is_told(two, adapters):
    before = draw(two)
    with pytest.raises(ValueError, match="for the pipeline's other network.*Give component='transformer_2'"):
        arcflow.attach(two, adapters[1])
    with pytest.raises(ValueError, match="component is 'vae'"):
        arcflow.attach(two, adapters[0], component="vae")
    assert torch.equal(draw(two), before)


def test_the_second_network_alone_takes_every_step(two, adapters):
    """A boundary of 1 leaves it all steps on a stock grid, which starts below 1; a student's starts there."""
    two.transformer = None
    two.register_to_config(boundary_ratio=1.0)
    with pytest.raises(ValueError, match=r"no transformer, which its boundary_ratio of 1 .*boundary_ratio=1.001"):
        arcflow.attach(two, adapters[1], component="transformer_2")
    two.register_to_config(boundary_ratio=1.001)
    before = draw(two)
    arcflow.attach(two, adapters[1], component="transformer_2")
    assert not torch.equal(draw(two), before)
    arcflow.detach(two)
    assert torch.equal(draw(two), before)


def test_one_file_has_both(two, adapters, both):
    """It draws what the two draw, one after the other, and one of them may be taken of it."""
    before = draw(two)
    arcflow.attach(two, adapters[0])
    arcflow.attach(two, adapters[1], component="transformer_2")
    drawn = draw(two)
    arcflow.detach(two)
    arcflow.attach(two, both)
    assert torch.equal(draw(two), drawn)
    arcflow.attach(two, both, fuse=True)
    torch.testing.assert_close(draw(two), drawn, rtol=1e-3, atol=1e-4)
    arcflow.detach(two)
    assert torch.equal(draw(two), before)
    arcflow.attach(two, both, component="transformer_2")
    assert not is_student(two.transformer) and is_student(two.transformer_2)


def test_a_file_of_both_is_refused_where_it_does_not_fit(two, adapters, both, tmp_path):
    with pytest.raises(ValueError, match="holds adapters for 'transformer' and 'transformer_2': expected one of them"):
        adapter.load_adapter(two.transformer, both)
    single = copy.copy(two)
    single.transformer_2 = None
    with pytest.raises(ValueError, match="has no transformer_2: expected a pipeline of both networks"):
        arcflow.attach(single, both)
    with pytest.raises(ValueError, match="both adapters are for the same network"):
        adapter.join_adapters({"transformer": adapters[0], "transformer_2": adapters[0]}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="expected one for each of transformer, transformer_2"):
        adapter.join_adapters({"transformer": adapters[0]}, tmp_path / "b.safetensors")
    crossed = {"transformer": adapters[1], "transformer_2": adapters[0]}
    swapped = adapter.join_adapters(crossed, tmp_path / "s.safetensors")
    before = draw(two)
    with pytest.raises(ValueError, match="made for another base of the same sizes"):
        arcflow.attach(two, swapped)
    assert torch.equal(draw(two), before)


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_at_the_second_network_leaves_the_first_as_it_was(two, both, adapters, monkeypatch, there):
    """A card that has room for one: no student is half on, and one that was there is on again."""
    if there:
        arcflow.attach(two, adapters[0])
    before, scheduler = two.transformer.state_dict(), two.scheduler
    whole = put_on

    def full(transformer, state):
        if transformer is two.transformer_2:
            raise torch.OutOfMemoryError("no room")
        whole(transformer, state)

    monkeypatch.setattr(import_module("arcflow.student.build"), "put_on", full)
    with pytest.raises(torch.OutOfMemoryError):
        arcflow.attach(two, both)
    after = two.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert two.scheduler is scheduler and is_student(two.transformer) == there
    if there:
        arcflow.detach(two)
    assert type(two.scheduler) is type(scheduler.stock if there else scheduler)
    assert "save_pretrained" not in two.__dict__


def test_a_changed_byte_in_a_file_of_both_is_told(two, both):
    content = bytearray(both.read_bytes())
    content[-5] ^= 1
    both.write_bytes(content)
    with pytest.raises(ValueError, match="checksums .SHA-256. differ|not finite"):
        arcflow.attach(two, both)


def test_both_networks_of_image_to_video_take_theirs(two, tmp_path):
    """The first frame and its mask stand in more channels beside x."""
    config = {name: value for name, value in two.transformer.config.items() if not name.startswith("_")}
    networks, folders = {}, {}
    for seed, name in enumerate(("transformer", "transformer_2")):
        torch.manual_seed(seed)
        networks[name] = loud(WanTransformer3DModel(**{**config, "in_channels": 12}))
        net = student.build(copy.deepcopy(networks[name]), modes=3, rank=2)
        perturb(net)
        folders[name] = adapter.save_adapter(net, tmp_path / name)
    parts = {name: getattr(two, name) for name in ("vae", "text_encoder", "tokenizer")}
    unseen = {"scheduler": euler(), "image_encoder": None, "image_processor": None}
    pipe = WanImageToVideoPipeline(**parts, **unseen, **networks, boundary_ratio=0.875)
    pipe.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    embeds = network.encode_text(two, ["a red cube"], 16)["encoder_hidden_states"]
    told = {"image": image, "prompt": None, "prompt_embeds": embeds}
    before = draw(pipe, **told)
    arcflow.attach(pipe, folders["transformer"])
    arcflow.attach(pipe, folders["transformer_2"], component="transformer_2")
    drawn = draw(pipe, **told)
    assert not torch.allclose(drawn, before, atol=1e-3)
    arcflow.detach(pipe)
    arcflow.attach(pipe, adapter.join_adapters(folders, tmp_path / "both.safetensors"))
    assert torch.equal(draw(pipe, **told), drawn)
    arcflow.detach(pipe)
    assert torch.equal(draw(pipe, **told), before)


def test_export_makes_the_file_of_both(two, adapters, tmp_path):
    high, low = map(str, adapters)
    Export(adapter=high, second=low, layout="file", out=tmp_path / "out").run()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["README.md", "adapter.safetensors"]
    arcflow.attach(two, tmp_path / "out/adapter.safetensors")
    assert is_student(two.transformer) and is_student(two.transformer_2)
    with pytest.raises(ValueError, match="--second goes into one file with --adapter: expected --layout file"):
        Export(adapter=high, second=low, out=tmp_path / "other").run()
