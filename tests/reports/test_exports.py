"""A student that leaves as an ordinary LoRA, or as an ordinary folder, and is drawn by diffusers alone."""

import json
import os
import runpy
import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from PIL import Image
from safetensors.torch import load_file

import arcflow
from arcflow import student
from arcflow.path import step_grid
from arcflow.reports import model_card
from arcflow.sampling.plain import latent_difference
from arcflow.student import adapter, formats
from arcflow.student.plain_lora import LORA, Factors, Keys, factors_of, lora_tensors, raw_times, stock_scheduler
from tests.support.pipelines import SIDE, draws, fresh, perturb, sample

NO_ARCFLOW = """
import sys
sys.modules["arcflow"] = None  # importing it is an error
import numpy, torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from PIL import Image
from safetensors.torch import save_file

folder = sys.argv[1]
image = Image.fromarray(numpy.load(folder + "/image.npy"))
size = dict(prompt="a red cube", num_inference_steps=2, height=16, width=16, max_sequence_length=8)
size |= dict(output_type="latent", guidance_scale=3.5)
drawn = {}


def draw(name, pipe):
    pipe.set_progress_bar_config(disable=True)
    drawn[name] = pipe(generator=torch.Generator("cpu").manual_seed(0), **size).images
    for strength in (0.5, 1.0):
        other = FluxImg2ImgPipeline.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(0)
        drawn[f"{name} {strength}"] = other(image=image, strength=strength, generator=generator, **size).images


draw("merged", DiffusionPipeline.from_pretrained(folder + "/merged"))
try:
    DiffusionPipeline.from_pretrained(folder + "/mixture")
except ValueError as refused:
    assert "trust_remote_code=True" in str(refused)
draw("mixture", DiffusionPipeline.from_pretrained(folder + "/mixture", trust_remote_code=True))
pipe = DiffusionPipeline.from_pretrained(folder + "/base")
pipe.load_lora_weights(folder + "/lora")
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder + "/lora", subfolder="scheduler")
draw("lora", pipe)
save_file({name: value.contiguous() for name, value in drawn.items()}, folder + "/drawn.safetensors")
"""


def in_coefficients(pipe, folder, rank=2, **info):
    """An adapter in coefficients of this pipeline's transformer, which is left alone."""
    net = fresh(pipe).transformer
    student.build(net, form="coefficients", modes=4, rank=rank, alpha=2.0 * rank, generator=draws())
    perturb(net)
    return adapter.save_adapter(net, folder, info=formats.AdapterInfo(**info))


def as_mixture(pipe, folder, **info):
    """An adapter that is a mixture."""
    net = fresh(pipe).transformer
    student.build(net, modes=4, rank=2, generator=draws())
    perturb(net)
    return adapter.save_adapter(net, folder, info=formats.AdapterInfo(**info))


def apart(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.slow
def test_diffusers_alone_draws_the_same_images(flux, tmp_path):
    """Two steps, from text and from an image: a plain LoRA, and a merged folder."""
    made = in_coefficients(flux, tmp_path / "adapter")
    flux.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    model_card.export(str(made), tmp_path / "lora", layout="lora")
    model_card.export(str(made), tmp_path / "merged", layout="merged", base=tmp_path / "base")
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    np.save(tmp_path / "image.npy", pixels)

    mixture = as_mixture(flux, tmp_path / "mixture-adapter")
    model_card.export(str(mixture), tmp_path / "mixture", layout="merged", base=tmp_path / "base")

    plain, wanted = sample(flux), {}
    image = Image.fromarray(pixels)
    for kind, path in (("coefficients", made), ("mixture", mixture)):
        arcflow.attach(flux, path, guidance=True)
        wanted[kind] = sample(flux)
        for strength in (0.5, 1.0):
            other = FluxImg2ImgPipeline.from_pipe(flux)
            wanted[f"{kind} {strength}"] = sample(other, image=image, strength=strength, guidance_scale=3.5)
        arcflow.detach(flux)
        assert apart(plain, wanted[kind]) > 0.01

    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = [sys.executable, "-c", NO_ARCFLOW, str(tmp_path)]
    told = subprocess.run(run, capture_output=True, text=True, timeout=300, env=env)
    assert told.returncode == 0, told.stderr
    drawn = load_file(tmp_path / "drawn.safetensors")
    assert len(drawn) == 9
    for name, latents in drawn.items():
        way, *strength = name.split(" ")
        same = " ".join(["mixture" if way == "mixture" else "coefficients", *strength])
        assert apart(latents, wanted[same]) < 1e-5, name
    shards = sorted((tmp_path / "base" / "transformer").glob("*.safetensors"))
    assert len(shards) > 1 and {p.name for p in shards} == {
        p.name for p in (tmp_path / "merged" / "transformer").glob("*.safetensors")
    }


def test_every_family_takes_the_plain_lora(pipe, tmp_path):
    made = in_coefficients(pipe, tmp_path / "adapter")
    lora = model_card.export(str(made), tmp_path / "lora", layout="lora") / LORA["diffusers"]
    before, stock = sample(pipe), pipe.scheduler
    settings: dict[str, Any] = {"height": SIDE, "width": SIDE}
    if adapter.read_info(made).guidance:
        settings["guidance_scale"] = adapter.read_info(made).guidance
    assert latent_difference(pipe, made, lora, prompts=["a red cube"], **settings) < 1e-5
    assert pipe.scheduler is stock and torch.equal(sample(pipe), before)


def test_the_file_is_no_larger_than_the_adapter(flux, tmp_path):
    made = in_coefficients(flux, tmp_path / "adapter")
    for keys in get_args(Keys):
        out = model_card.export(str(made), tmp_path / keys, layout="lora", keys=keys)
        assert (out / LORA[keys]).stat().st_size <= (made / "adapter.safetensors").stat().st_size
        assert sorted(path.name for path in out.iterdir()) == sorted(["README.md", "scheduler", LORA[keys]])
        text = (out / "README.md").read_text()
        assert "arcflow.attach" not in text and "load_lora_weights" in text and "1, 0.7619, 0" in text


def test_comfyui_has_its_own_names_for_layers_of_flux2():
    factors = Factors(torch.zeros(1, 2), torch.zeros(2, 1))
    names = ["time_guidance_embed.timestep_embedder.linear_1", "single_transformer_blocks.3.attn.to_out", "proj_out"]
    others = ["diffusion_model.time_in.in_layer", "diffusion_model.single_blocks.3.linear2", "transformer.proj_out"]
    named_ones = lora_tensors(dict.fromkeys(names, factors), "comfyui", "flux2")
    assert set(named_ones) == {f"{name}.lora_{side}.weight" for name in others for side in "AB"}


def test_the_other_names_hold_the_same_factors(flux, tmp_path):
    made = in_coefficients(flux, tmp_path / "adapter")
    one, same, other = (
        load_file(model_card.export(str(made), tmp_path / keys, layout="lora", keys=keys) / LORA[keys])
        for keys in get_args(Keys)
    )
    up, swapped = one["transformer.norm_out.linear.lora_B.weight"], "diffusion_model.final_layer.adaLN_modulation.1"
    assert torch.equal(same.pop(f"{swapped}.lora_B.weight"), torch.cat(up.chunk(2)[::-1]))
    assert set(one) - set(same) == {f"transformer.norm_out.linear.lora_{side}.weight" for side in "AB"}
    names = {name.removesuffix(".lora_A.weight") for name in one if name.endswith("lora_A.weight")}
    assert {"transformer.norm_out.linear", "transformer.proj_out"} <= names
    for name in names:
        flat = "lora_" + name.replace(".", "_")
        down, up = other.pop(f"{flat}.lora_down.weight"), other.pop(f"{flat}.lora_up.weight")
        assert torch.equal(down, one[f"{name}.lora_A.weight"]) and torch.equal(up, one[f"{name}.lora_B.weight"])
        assert float(other.pop(f"{flat}.alpha")) == len(down)
    assert not other


def test_factors_of_unequal_ranks_and_scales_become_plain_ones():
    generator = draws()
    tensors = {
        "a.lora_A.weight": torch.randn(4, 8, generator=generator),
        "a.lora_B.weight": torch.randn(6, 4, generator=generator),
        "b.lora_A.weight": torch.randn(2, 8, generator=generator),
        "b.lora_B.weight": torch.randn(2, 2, generator=generator),
        "proj_out_bends.weight": torch.randn(6, 8, generator=generator),
    }
    found = factors_of(tensors, formats.AdapterInfo(rank=4, alpha=2.0))
    assert set(found) == {"a", "b"} and all(len(one.down) == one.up.shape[1] == 4 for one in found.values())
    for name, (down, up) in found.items():
        product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        torch.testing.assert_close(up @ down, 0.5 * product)
    assert float(lora_tensors(found, "kohya", "flux")["lora_transformer_b.alpha"]) == 4  # scale alpha / rank = 1


@pytest.mark.parametrize(("steps", "shift", "scale"), [(1, 3.2, 1.0), (2, 3.2, 1.0), (4, 2.0, 1.0), (2, 3.2, 0.5)])
def test_the_stock_scheduler_walks_the_grid_of_the_student(steps, shift, scale):
    info = formats.AdapterInfo(steps=steps, shift=shift, final_step_scale=scale)
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(stock_scheduler(info))
    uniform = np.linspace(1, 1 / steps, steps).tolist()  # what stock pipelines pass
    scheduler.set_timesteps(sigmas=raw_times(info) or uniform, mu=1.15)
    torch.testing.assert_close(scheduler.sigmas, step_grid(steps, shift, scale), rtol=0, atol=1e-6)


def mixture(pipe, folder, moved=0.05, modes=4):
    net = fresh(pipe).transformer
    student.build(net, modes=modes, rank=4, generator=draws())
    perturb(net, moved)
    return adapter.save_adapter(net, folder)


@pytest.mark.slow
def test_a_mixture_says_what_is_lost_and_is_refused_beyond_a_bound(flux, tmp_path):
    made = mixture(flux, tmp_path / "adapter")
    size = dict(height=SIDE, width=SIDE, max_sequence_length=8)

    def measure(file):
        return latent_difference(flux, made, file, prompts=["a red cube"], **size)

    with pytest.raises(ValueError, match="give --model"):
        model_card.export(str(made), tmp_path / "lora", layout="lora")
    with pytest.raises(ValueError, match=r"differ by .*% from the student's; expected at most 0\.1%.*model.form"):
        model_card.export(
            str(made), tmp_path / "lora", layout="lora", transformer=flux.transformer, bound=1e-3, measure=measure
        )
    assert not (tmp_path / "lora").exists()
    out = model_card.export(
        str(made), tmp_path / "lora", layout="lora", transformer=flux.transformer, bound=1.0, measure=measure
    )
    assert "differ by" in (out / "README.md").read_text()
    lost = measure(out / LORA["diffusers"])
    assert 1e-3 < lost < apart(sample(flux), sample(arcflow.attach(flux, made)))


def test_a_mixture_that_is_straight_loses_next_to_nothing(flux, tmp_path):
    """A single mode of full rank whose biases stay where they are is a LoRA."""
    net = fresh(flux).transformer
    student.build(net, modes=1, rank=32, generator=draws())
    with torch.no_grad():
        base = net.proj_out.frozen
        net.proj_out.tuned.means.bias.copy_(base.bias)
        for name, weight in student.trainable(net).items():
            if weight.ndim == 2:
                weight.add_(0.02 * torch.randn(weight.shape, generator=draws(len(name))))
    made = adapter.save_adapter(net, tmp_path / "adapter")
    size = dict(height=SIDE, width=SIDE, max_sequence_length=8)
    out = model_card.export(
        str(made),
        tmp_path / "lora",
        layout="lora",
        transformer=flux.transformer,
        measure=lambda file: latent_difference(flux, made, file, prompts=["a red cube"], **size),
    )
    assert latent_difference(flux, made, out / LORA["diffusers"], prompts=["a red cube"], **size) < 1e-3


@pytest.mark.slow
def test_a_mixture_is_merged_where_a_stock_class_can_hold_it(pipe, tmp_path):
    """The whole path comes out of the transformer, and the scheduler in the folder takes its exact steps."""
    made = as_mixture(pipe, tmp_path / "adapter", final_step_scale=0.5)
    pipe.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    if pipe.transformer.proj_out.bias is None:
        with pytest.raises(ValueError, match="the base has no proj_out.bias.*Nothing was written"):
            model_card.export(str(made), tmp_path / "out", layout="merged", base=tmp_path / "base")
        assert not (tmp_path / "out").exists()
        return
    out = model_card.export(str(made), tmp_path / "out", layout="merged", base=tmp_path / "base")
    text = (out / "README.md").read_text()
    assert "trust_remote_code=True" in text and "scheduling_arcflow.py" in text and "arcflow.attach" not in text
    index = json.loads((out / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    tensors = {}
    for shard in set(index["weight_map"].values()):
        tensors |= load_file(out / "transformer" / shard)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    arcflow.attach(pipe, made, guidance=True)
    wanted = sample(pipe)
    arcflow.detach(pipe)
    pipe.transformer = type(pipe.transformer).from_pretrained(out / "transformer").eval()
    config = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    module = runpy.run_path(str(out / "scheduler" / "scheduling_arcflow.py"))
    pipe.scheduler = module["ArcFlowScheduler"].from_config(config)
    assert apart(sample(pipe), wanted) < 1e-5


def test_a_merged_folder_is_whole_or_not_there(flux, tmp_path):
    made = in_coefficients(flux, tmp_path / "adapter")
    with pytest.raises(ValueError, match="give --model"):
        model_card.export(str(made), tmp_path / "out", layout="merged")
    with pytest.raises(ValueError, match="no pipeline that can be merged into"):
        model_card.export(str(made), tmp_path / "out", layout="merged", base=tmp_path)
    flux.save_pretrained(tmp_path / "base")
    for part in ("transformer/config.json", "vae/config.json", "model_index.json"):
        config = tmp_path / "base" / part
        config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": f"{tmp_path}/{part}"}))
    with pytest.raises(ValueError, match="the base itself"):
        model_card.export(str(made), tmp_path / "base", layout="merged", base=tmp_path / "base")
    other = fresh(flux)
    other.transformer = type(flux.transformer).from_config({**flux.transformer.config, "num_layers": 1})
    other.save_pretrained(tmp_path / "smaller")
    with pytest.raises(ValueError, match="lacks .* weights of the adapter's"):
        model_card.export(str(made), tmp_path / "out", layout="merged", base=tmp_path / "smaller")
    assert not (tmp_path / "out" / "model_index.json").exists()
    (tmp_path / "base" / "everything.safetensors").write_bytes(b"the base once more")
    (tmp_path / "base" / "LICENSE.md").write_text("as it was")
    out = model_card.export(str(made), tmp_path / "out", layout="merged", base=tmp_path / "base")
    assert (out / "LICENSE.md").is_file() and not (out / "everything.safetensors").exists()
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["shift"] == pytest.approx(3.2)
    assert not [path for path in out.rglob("*.json") if str(tmp_path) in path.read_text()]
