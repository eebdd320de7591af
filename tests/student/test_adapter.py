"""Adapters on disk, and on a pipeline."""

import copy
import json

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

import arcflow
from arcflow import ArcFlowScheduler, families, student
from arcflow.families import network
from arcflow.student import adapter, formats
from arcflow.student.places import trainable_shapes
from arcflow.student.state import is_student
from arcflow.system import files
from tests.support.pipelines import flux_transformer, fresh, perturb, qwen_transformer, sample

LAYOUTS = ["arcflow", "published"]
PUBLISHED = pytest.mark.parametrize(
    "pipe",
    [
        pytest.param(family.name, marks=[pytest.mark.slow] if family.name != "flux" else [])
        for family in families.FAMILIES
        if family.published
    ],
    indirect=True,
)
"""Families whose adapters the authors' layout has a name for."""


def distilled(base, modes=4, rank=2, seed=0, **build):
    """A student of a copy of this base that has moved; its weights are numbers that float16 can hold."""
    net = copy.deepcopy(base)
    student.build(net, modes=modes, rank=rank, generator=torch.Generator().manual_seed(seed), **build).eval()
    perturb(net, seed=seed)
    with torch.no_grad():
        for parameter in student.trainable(net).values():
            parameter.copy_(parameter.half())
    return net


def out(net, inputs):
    return network.call(net, inputs.x, inputs.sigma, inputs.cond).detach()


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@PUBLISHED
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_and_loaded_is_the_same_student(net, inputs, tmp_path, layout):
    made = distilled(net)
    adapter.save_adapter(made, tmp_path, layout=layout)
    loaded = arcflow.load_adapter(net, tmp_path)
    assert loaded is net and torch.equal(out(net, inputs), out(made, inputs))
    again = adapter.save_adapter(net, tmp_path / "again", layout=layout)
    file, _ = formats.FILES[layout]
    assert same(load_file(tmp_path / file), load_file(again / file))


@PUBLISHED
def test_the_published_layout_has_the_published_names_and_types(net, tmp_path):
    adapter.save_adapter(distilled(net), tmp_path, layout="published")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == trainable_shapes(net, 4, 2)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == families.family_of(net).published
    assert (config["num_gaussians"], config["logweights_channels"]) == (4, 4)
    assert config["num_layers"] == net.config.num_layers


@PUBLISHED
def test_published_tensors_may_carry_a_prefix(net, inputs, tmp_path):
    made = distilled(net)
    adapter.save_adapter(made, tmp_path, layout="published")
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({f"transformer.{name}": tensor for name, tensor in load_file(file).items()}, file)
    assert torch.equal(out(arcflow.load_adapter(net, tmp_path), inputs), out(made, inputs))


@PUBLISHED
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_scale_of_the_lora_is_kept(net, inputs, tmp_path, layout):
    made = distilled(net, alpha=4.0)
    adapter.save_adapter(made, tmp_path, layout=layout)
    torch.testing.assert_close(out(arcflow.load_adapter(net, tmp_path), inputs), out(made, inputs))


def test_our_layout_says_all_that_sampling_needs(flux, tmp_path):
    told = formats.AdapterInfo(base="owner/base", shift=2.5, steps=4, final_step_scale=0.5, training={"iterations": 7})
    adapter.save_adapter(distilled(flux.transformer), tmp_path, info=told)
    info = adapter.read_info(tmp_path)
    assert (info.family, info.modes, info.pixels, info.rank, info.alpha) == ("flux", 4, 4, 2, 2.0)
    assert (info.shift, info.steps, info.final_step_scale, info.guidance) == (2.5, 4, 0.5, 3.5)
    assert info.base == "owner/base" and info.training == {"iterations": 7}
    assert set(info.versions) == {"arcflow", "torch", "diffusers", "peft"}
    arcflow.attach(flux, tmp_path)
    config = flux.scheduler.config
    assert (config.num_modes, config.shift, config.final_step_scale) == (4, 2.5, 0.5)


@PUBLISHED
@pytest.mark.parametrize("build", [{"lora": False}, {"targets": "full"}], ids=["head and norm", "every weight"])
def test_a_student_without_lora_survives_too(net, inputs, tmp_path, build):
    made = distilled(net, **build)
    adapter.save_adapter(made, tmp_path)
    assert torch.equal(out(arcflow.load_adapter(net, tmp_path), inputs), out(made, inputs))
    with pytest.raises(ValueError, match="save with layout='arcflow'"):
        adapter.save_adapter(made, tmp_path / "published", layout="published")


@PUBLISHED
def test_a_lora_on_all_linears_survives_too(unchecked, net, inputs, tmp_path):
    made = distilled(net, targets="all")
    adapter.save_adapter(made, tmp_path)
    assert adapter.read_info(tmp_path).targets == "all"
    assert torch.equal(out(arcflow.load_adapter(net, tmp_path), inputs), out(made, inputs))
    with pytest.raises(ValueError, match="on 'all'; save with layout='arcflow'"):
        adapter.save_adapter(made, tmp_path / "published", layout="published")
    edit_record(tmp_path, "arcflow", targets="norms")
    with pytest.raises(ValueError, match="targets = 'norms'; expected one of 'feed_forward', 'all'"):
        arcflow.load_adapter(net, tmp_path)


def test_saving_a_fused_student_saves_the_student(net, tmp_path):
    made = distilled(net)
    adapter.save_adapter(made, tmp_path / "apart")
    adapter.save_adapter(student.fuse(made), tmp_path / "fused")
    files = [tmp_path / name / "adapter.safetensors" for name in ("apart", "fused")]
    assert files[0].read_bytes() == files[1].read_bytes()


@PUBLISHED
def test_a_folder_holds_one_adapter(net, tmp_path):
    for layout in ("published", "arcflow", "published"):
        adapter.save_adapter(distilled(net), tmp_path, layout=layout)
        assert {path.name for path in tmp_path.iterdir()} == set(formats.FILES[layout])


def test_attach_samples_in_the_stock_pipeline_and_detach_gives_it_back(pipe, tmp_path):
    adapter.save_adapter(distilled(pipe.transformer), tmp_path)
    before, stock, scheduler = state(pipe.transformer), sample(pipe), pipe.scheduler
    assert arcflow.attach(pipe, tmp_path) is pipe and isinstance(pipe.scheduler, ArcFlowScheduler)
    first = sample(pipe)
    assert not torch.equal(first, stock)
    arcflow.attach(pipe, tmp_path)  # twice is once
    assert torch.equal(sample(pipe), first)
    arcflow.detach(pipe)
    assert same(state(pipe.transformer), before) and pipe.scheduler is scheduler
    assert torch.equal(sample(pipe), stock)
    arcflow.attach(pipe, tmp_path)
    assert torch.equal(sample(pipe), first)


def test_another_adapter_replaces_the_first(pipe, tmp_path):
    for seed in (1, 2):
        adapter.save_adapter(distilled(pipe.transformer, modes=seed + 1, seed=seed), tmp_path / str(seed))
    wanted = sample(arcflow.attach(fresh(pipe), tmp_path / "2"))
    stock = sample(pipe)
    arcflow.attach(pipe, tmp_path / "1")
    assert torch.equal(sample(arcflow.attach(pipe, tmp_path / "2")), wanted)
    assert torch.equal(sample(arcflow.detach(pipe)), stock)


def test_fused_samples_alike(pipe, tmp_path):
    adapter.save_adapter(distilled(pipe.transformer), tmp_path)
    stock = sample(pipe)
    apart = sample(arcflow.attach(pipe, tmp_path))
    torch.testing.assert_close(sample(arcflow.attach(pipe, tmp_path, fuse=True)), apart, rtol=1e-3, atol=1e-4)
    assert torch.equal(sample(arcflow.detach(pipe)), stock)


def test_a_bfloat16_pipeline_takes_an_adapter(pipe, tmp_path):
    pipe = copy.deepcopy(pipe).to(torch.bfloat16)
    adapter.save_adapter(distilled(pipe.transformer), tmp_path)
    for fuse in (False, True):
        arcflow.attach(pipe, tmp_path, fuse=fuse)
        assert sample(pipe).dtype == torch.bfloat16 and sample(pipe).isfinite().all()
    arcflow.load_adapter(pipe.transformer, tmp_path, dtype=torch.float32)
    assert {p.dtype for p in student.trainable(pipe.transformer).values()} == {torch.float32}


def test_fewer_steps_than_trained_for_bring_a_warning(pipe, tmp_path, caplog):
    adapter.save_adapter(distilled(pipe.transformer), tmp_path, info=formats.AdapterInfo(steps=2))
    arcflow.attach(pipe, tmp_path)
    sample(pipe, num_inference_steps=2)
    assert not [record for record in caplog.records if record.name == "arcflow.sampling.scheduler"]
    sample(pipe, num_inference_steps=1)
    assert "in 1 step(s) with an adapter trained for 2" in caplog.text


def test_the_stock_pipeline_comes_from_disk_as_it_went(flux, tmp_path):
    """What a user does: load the stock pipeline, attach, sample."""
    flux.save_pretrained(tmp_path / "base")
    adapter.save_adapter(distilled(flux.transformer), tmp_path / "adapter")
    wanted = sample(arcflow.attach(flux, tmp_path / "adapter"))
    loaded = FluxPipeline.from_pretrained(tmp_path / "base")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(arcflow.attach(loaded, tmp_path / "adapter")), wanted)


def edit_tensors(folder, layout, change):
    file = folder / formats.FILES[layout][0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    if layout == "arcflow":  # as files without a checksum are
        edit_record(folder, layout, sha256={})


def edit_record(folder, layout, **changes):
    file = folder / formats.FILES[layout][1]
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def drop(name):
    return lambda folder, layout: edit_tensors(folder, layout, lambda tensors: tensors.pop(name))


def put(name, value):
    return lambda folder, layout: edit_tensors(folder, layout, lambda tensors: tensors.update({name: value}))


def drop_lora(folder, layout):
    edit_tensors(folder, layout, lambda tensors: [tensors.pop(name) for name in list(tensors) if "lora" in name])


def cut(folder, layout):
    file = folder / formats.FILES[layout][0]
    file.write_bytes(file.read_bytes()[:-100])


def point(folder, layout):
    """What a clone without Git LFS leaves."""
    (folder / formats.FILES[layout][0]).write_text("version https://git-lfs.github.com/spec/v1\nsize 1304811768\n")


def garble(folder, layout):
    (folder / formats.FILES[layout][1]).write_text('{"modes": 4')


def lose(index):
    return lambda folder, layout: (folder / formats.FILES[layout][index]).unlink()


TIME = "time_text_embed.timestep_embedder.linear_1.lora_A.weight"
DAMAGE = {
    "missing": (drop("proj_out_loggamma.bias"), "1 missing: proj_out_loggamma.bias.*Nothing was loaded.*again"),
    "half a lora": (drop(TIME), f"1 missing: {TIME}"),
    "no lora": (drop_lora, "missing: .*lora_A.*and .* more"),
    "unknown": (put("extra.weight", torch.ones(2)), "1 unknown: extra.weight"),
    "misshapen": (
        put("norm_out.linear.bias", torch.ones(3)),
        r"1 misshapen: norm_out.linear.bias \(3,\) \(expected \(64",
    ),
    "not finite": (put("norm_out.linear.bias", torch.full((64,), torch.inf)), "not finite in norm_out.linear.bias"),
    "truncated": (cut, "truncated or damaged: copy, fetch or save it again"),
    "text": (point, "cannot be read.*truncated or damaged: copy, fetch or save it again"),
    "no weights": (lose(0), "no adapter in .*expected adapter.safetensors .* arcflow.json"),
    "no record": (lose(1), "no adapter in .*expected adapter.safetensors .* arcflow.json"),
    "bad record": (garble, "is not JSON.*fetch or save it again"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_adapter_is_one_error_and_nothing_is_loaded(flux, tmp_path, layout, damage):
    break_it, remedy = DAMAGE[damage]
    adapter.save_adapter(distilled(flux.transformer), tmp_path, layout=layout)
    break_it(tmp_path, layout)
    before, scheduler = state(flux.transformer), flux.scheduler
    with pytest.raises(ValueError, match=remedy):
        arcflow.attach(flux, tmp_path)
    assert same(state(flux.transformer), before) and flux.scheduler is scheduler
    assert not is_student(flux.transformer)


def test_a_damaged_adapter_leaves_the_one_before_in_place(pipe, tmp_path):
    adapter.save_adapter(distilled(pipe.transformer), tmp_path / "good")
    adapter.save_adapter(distilled(pipe.transformer, seed=1), tmp_path / "bad")
    cut(tmp_path / "bad", "arcflow")
    wanted = sample(arcflow.attach(pipe, tmp_path / "good"))
    with pytest.raises(ValueError, match="truncated"):
        arcflow.attach(pipe, tmp_path / "bad")
    assert torch.equal(sample(pipe), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_base_is_named(flux, tmp_path, layout, unchecked):
    adapter.save_adapter(distilled(flux.transformer), tmp_path, layout=layout)
    with pytest.raises(ValueError, match="family 'flux'.* base is a QwenImageTransformer2DModel.*Load the base"):
        arcflow.load_adapter(qwen_transformer(), tmp_path)
    with pytest.raises(ValueError, match=r"num_layers is 3 \(the adapter's base has 2\).*Load the base"):
        arcflow.load_adapter(flux_transformer(num_layers=3), tmp_path)
    with pytest.raises(ValueError, match="Linear is not a supported backbone"):
        arcflow.load_adapter(torch.nn.Linear(2, 2), tmp_path)


def test_a_base_of_the_same_sizes_but_other_weights_is_named(flux, tmp_path):
    made = distilled(flux.transformer)
    adapter.save_adapter(made, tmp_path, info=formats.AdapterInfo(base="owner/the-right-one"))
    with pytest.raises(ValueError, match="same sizes.*Load the base it was made for: owner/the-right-one"):
        arcflow.load_adapter(flux_transformer(), tmp_path)
    arcflow.load_adapter(flux.transformer.to(torch.bfloat16), tmp_path)  # another precision is the same base


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"modes": "many"}, "modes = 'many'; expected a whole number"),
        ({"modes": True}, "modes = True; expected a whole number"),
        ({"modes": 10**9}, "modes = 1000000000; expected a whole number from 1 to 256"),
        ({"rank": -1}, "rank = -1; expected a whole number"),
        ({"flavor": 1}, r"unknown \['flavor'\].*Upgrade"),
        ({"shift": 0.0}, "shift = 0.0; expected a finite number above 0"),
        ({"shift": float("nan")}, "shift = nan; expected a finite number"),
        ({"guidance": "strong"}, "guidance = 'strong'; expected null or a finite number"),
        ({"guidance_range": [5.0, 1.5]}, r"guidance_range = .*; expected null or two .* the lower one first"),
        ({"also_steps": [0]}, r"also_steps = \[0\]; expected a list"),
        ({"sizes": {"num_layers": 2.5}}, "sizes = .*; expected an object"),
        ({"base": "a\x1b[2Jb"}, r"base = 'a\\x1b\[2Jb'; expected a text .* without control characters"),
        ({"training": {"settings": [1]}}, "training = .*; expected an object whose settings"),
        ({"sha256": {"adapter.safetensors": "0" * 64}}, r"checksums \(SHA-256\) differ"),
        ({"sha256": {"other.safetensors": "0" * 64}}, r"checksums \(SHA-256\) differ"),
        ({"shift": 3.0}, "shift = 3.0, but adapter.safetensors was saved with 3.2.*take the entry `sha256` out"),
        ({"rank": 3, "sha256": {}}, "K = 4 and rank 3.*misshapen: .*lora_A"),
        (
            {"modes": 8, "sha256": {}},
            r"K = 8 and rank 2.*misshapen: proj_out_.* \(expected \(.*fetch or save the adapter again",
        ),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(unchecked, flux, tmp_path, changes, remedy):
    adapter.save_adapter(distilled(flux.transformer), tmp_path)
    edit_record(tmp_path, "arcflow", **changes)
    with pytest.raises(ValueError, match=remedy):
        arcflow.attach(flux, tmp_path)
    assert not is_student(flux.transformer)


def test_another_model_in_a_published_folder_is_refused(flux, tmp_path):
    adapter.save_adapter(distilled(flux.transformer), tmp_path, layout="published")
    edit_record(tmp_path, "published", _class_name="UNet2DModel")
    with pytest.raises(
        ValueError, match="'UNet2DModel'.*expected one of ArcFluxTransformer2DModel.*Is this an ArcFlow"
    ):
        arcflow.attach(flux, tmp_path)


def test_missing_folders_and_subfolders_are_named_with_what_is_there(flux, tmp_path):
    adapter.save_adapter(distilled(flux.transformer), tmp_path / "two-steps")
    with pytest.raises(ValueError, match="no adapter folder .*nowhere.*owner/name:subfolder"):
        arcflow.attach(flux, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"Did you mean its subfolder 'two-steps'"):
        arcflow.attach(flux, tmp_path)
    with pytest.raises(ValueError, match=r"no subfolder 'one-step'.*\['two-steps'\]"):
        arcflow.attach(flux, f"{tmp_path}:one-step")
    with pytest.raises(ValueError, match="arcflow.json' is a file; expected a folder .* Give the folder"):
        arcflow.attach(flux, tmp_path / "two-steps" / "arcflow.json")
    arcflow.attach(flux, f"{tmp_path}:two-steps")


def test_a_write_that_fails_leaves_the_adapter_before_it(net, tmp_path, monkeypatch):
    adapter.save_adapter(distilled(net), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        adapter.save_adapter(distilled(net, seed=1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_loading_draws_nothing_from_the_global_generator(net, tmp_path):
    adapter.save_adapter(distilled(net), tmp_path)
    before = torch.get_rng_state()
    arcflow.load_adapter(net, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_misuse_is_refused_with_a_remedy(unchecked, flux, tmp_path):
    with pytest.raises(ValueError, match=r"arcflow.attach\(pipe, path\) puts one on"):
        arcflow.detach(flux)
    with pytest.raises(ValueError, match="plain base, not a student"):
        adapter.save_adapter(flux.transformer, tmp_path)
    with pytest.raises(ValueError, match="expected one of 'arcflow', 'published'"):
        adapter.save_adapter(distilled(flux.transformer), tmp_path, layout="onnx")
