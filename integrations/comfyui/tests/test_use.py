"""The nodes as people use them: cut grids, batches, nodes before and after, models that come and go."""

import logging

import cases
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import nodes
import pytest
import torch
import torch._dynamo.testing
from arcflow_nodes import nodes as ours
from arcflow_nodes.adapter import read
from arcflow_nodes.patch import patched
from cases import Case, apart, grid
from comfy_extras.nodes_custom_sampler import Guider_Basic
from comfy_extras.nodes_model_advanced import ModelSamplingFlux
from more_cases import made
from safetensors import safe_open
from safetensors.torch import save_file

from arcflow.student.adapter import join_adapters

CLOSE = 1e-5


def student_of(case: Case, strength: float = 1.0):
    return patched(case.model, read(case.adapter), strength)


def part(case: Case, model, latent, start: int, end: int, steps: int = 4, noise: bool = False):
    """KSamplerAdvanced from a step to another, its noise left in."""
    words = case.conditioning()
    (out,) = nodes.KSamplerAdvanced().sample(
        *(model, "enable" if noise else "disable", 0, steps, 1.0, "euler", "simple", words, words),
        *({"samples": latent}, start, end, "enable"),
    )
    return out["samples"]


def inside(case: Case, latent, steps: int, place: int) -> torch.Tensor:
    """Tokens at a point of the grid, of latents that left a sampler there: ComfyUI has divided them by 1 - sigma."""
    return case.tokens(latent) * (1 - grid(steps)[place])


def drawn(case: Case, model, steps: int) -> torch.Tensor:
    """What KSamplerAdvanced draws of its own noise in one go."""
    return part(case, model, torch.zeros_like(case.noise), 0, steps, steps, noise=True)


def test_steps_in_two_samplers_are_the_steps_of_one(flux):
    model = student_of(flux)
    whole = drawn(flux, model, 4)
    half = part(flux, model, torch.zeros_like(flux.noise), 0, 2, noise=True)
    assert apart(part(flux, model, half, 2, 4), whole) < CLOSE


def test_the_base_may_draw_the_end(flux):
    """A student's first steps, the base's last ones, and the other way round: each its own."""
    model = student_of(flux)
    half = part(flux, model, torch.zeros_like(flux.noise), 0, 2, noise=True)
    base, own = (flux.tokens(part(flux, one, half, 2, 4)) for one in (flux.model, model))
    assert not torch.equal(base, own)
    assert torch.equal(flux.tokens(part(flux, flux.model, half, 2, 4)), base)
    assert apart(own, flux.ours(inside(flux, half, 4, 2), grid(4)[2:])) < CLOSE


def test_split_noise_levels_in_custom_samplers(flux):
    guider = Guider_Basic(student_of(flux))
    guider.set_conds(flux.conditioning())
    euler, x = comfy.samplers.sampler_object("euler"), torch.zeros_like(flux.noise)
    sigmas = ours.ArcFlowSigmas.execute(guider.model_patcher, 3, 1.0).result[0]
    x = guider.sample(flux.noise, x, euler, sigmas[:2], disable_pbar=True)
    x = guider.sample(torch.zeros_like(flux.noise), x, euler, sigmas[1:], disable_pbar=True)
    assert apart(flux.tokens(x), flux.ours(flux.tokens(flux.noise), grid(3))) < CLOSE


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_other_numbers_of_steps(flux, steps, caplog):
    with caplog.at_level(logging.WARNING):
        model = student_of(flux)
        one = flux.sample(model, steps)
    # ComfyUI's 'simple' takes its levels out of a table of a thousand: three steps are not quite even
    levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    assert float((levels - grid(steps)).abs().max()) < 1e-3
    assert apart(one, flux.ours(flux.tokens(flux.noise), levels)) < CLOSE
    assert ("take 2 or more" in caplog.text) == (steps == 1)


def test_two_images_at_once_are_each_its_own(flux):
    model = student_of(flux)
    torch.manual_seed(0)
    noise = torch.cat([flux.noise, torch.randn_like(flux.noise)])
    both = Case(flux.name, flux.model, flux.adapter, flux.net, flux.cond, noise).sample(model, 2)
    assert apart(both[:1], flux.sample(model, 2)) < CLOSE
    other = Case(flux.name, flux.model, flux.adapter, flux.net, flux.cond, noise[1:]).sample(model, 2)
    assert apart(both[1:], other) < CLOSE


def test_two_nodes_with_two_files_do_not_meet(flux, tmp_path):
    """Nor in either order, nor when one is drawn between two of the other."""
    with safe_open(flux.adapter, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    other = tmp_path / "other.safetensors"
    save_file({name: 0.5 * tensor for name, tensor in tensors.items()}, other, metadata)
    a, b = student_of(flux), patched(flux.model, read(other))
    first, second = flux.sample(a, 2), flux.sample(b, 2)
    assert not torch.equal(first, second)
    assert torch.equal(flux.sample(a, 2), first) and torch.equal(flux.sample(b, 2), second)
    with pytest.raises(ValueError, match="has the ArcFlow adapter student.safetensors already; apply one alone"):
        patched(a, read(other))


def test_a_model_that_was_unloaded_draws_the_same(flux):
    model = student_of(flux)
    first, base = flux.sample(model, 2), flux.sample(flux.model, 2)
    comfy.model_management.unload_all_models()
    assert torch.equal(flux.sample(model, 2), first)
    comfy.model_management.unload_all_models()
    assert torch.equal(flux.sample(flux.model, 2), base)


@pytest.mark.parametrize("form", ["mixture", "coefficients"])
def test_where_memory_is_short(form, tmp_path, monkeypatch):
    """Most layers are left on the side, patched and cast as they are called."""
    case = cases.made("flux", tmp_path, form)
    model = student_of(case)
    first, base = case.sample(model, 2), case.sample(case.model, 2)
    comfy.model_management.unload_all_models()
    load, asked = comfy.model_patcher.ModelPatcher.load, []

    def little(self, device_to=None, lowvram_model_memory=0, **more):
        asked.append(lowvram_model_memory)
        more["full_load"] = False
        return load(self, device_to, lowvram_model_memory=4096, **more)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", little)
    assert apart(case.sample(model, 2), first) < CLOSE and asked
    comfy.model_management.unload_all_models()
    assert apart(case.sample(case.model, 2), base) < CLOSE
    monkeypatch.undo()
    comfy.model_management.unload_all_models()
    assert torch.equal(case.sample(case.model, 2), base)


def test_another_shift_behind_the_node_is_warned_of(flux, caplog):
    (model,) = ModelSamplingFlux().patch(student_of(flux), 6.0, 6.0, 1024, 1024)
    with caplog.at_level(logging.WARNING):
        one = flux.sample(model, 2)
    assert "choose the scheduler 'simple'" in caplog.text
    levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
    assert apart(one, flux.ours(flux.tokens(flux.noise), levels)) < CLOSE


@pytest.mark.parametrize("form", ["mixture", "coefficients"])
def test_a_compiled_last_layer_is_compiled_once(form, tmp_path):
    """For steps of all lengths."""
    case = cases.made("flux", tmp_path, form)
    head = student_of(case).object_patches["diffusion_model.final_layer.linear"]
    features = torch.randn(1, 4, head.weight.shape[1], generator=torch.Generator().manual_seed(2))
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounter()
    fast = torch.compile(head, backend=counted)
    for start, end in ((1.0, 0.7619), (0.7619, 0.0), (0.5, 0.25)):
        head.tell(torch.tensor(start), torch.tensor(start - end))
        assert apart(fast(features), head(features)) < CLOSE
    assert counted.frame_count == 1


def test_a_wrapper_that_reuses_calls_is_of_no_harm(flux):
    """EasyCache at its defaults, where it exists."""
    caching = pytest.importorskip("comfy_extras.nodes_easycache")
    model = caching.EasyCacheNode.execute(student_of(flux), 0.2, 0.15, 0.95, False).result[0]
    assert flux.sample(model, 2).isfinite().all()


def test_a_file_that_was_replaced_is_read_again(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    monkeypatch.setattr(ours.folder_paths, "get_full_path", lambda kind, name: str(tmp_path / name))
    file.write_bytes(b"one")
    first = ours.ArcFlowApply.fingerprint_inputs(None, "a.safetensors", 1.0)
    assert ours.ArcFlowApply.fingerprint_inputs(None, "a.safetensors", 1.0) == first
    file.write_bytes(b"another")
    assert ours.ArcFlowApply.fingerprint_inputs(None, "a.safetensors", 1.0) != first


def test_the_two_networks_of_wan(tmp_path):
    """Each with an adapter of its own, one behind the other on one grid; the wrong one's is refused."""
    high, low = made("wan", tmp_path / "high"), made("wan", tmp_path / "low", seed=9)
    words = high.conditioning()
    model, other = student_of(high), student_of(low)
    kept = part(high, model, torch.zeros_like(high.noise), 0, 1, 2, noise=True)
    (out,) = nodes.KSamplerAdvanced().sample(
        other, "disable", 0, 2, 1.0, "euler", "simple", words, words, {"samples": kept}, 1, 2, "disable"
    )
    low.cond = high.cond
    assert apart(low.tokens(out["samples"]), low.ours(inside(low, kept, 2, 1), grid(2)[1:])) < CLOSE
    with pytest.raises(ValueError, match="was made for another base of the same sizes"):
        patched(high.model, read(low.adapter))
    both = join_adapters({"transformer": high.adapter, "transformer_2": low.adapter}, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match="holds adapters for 'transformer' and 'transformer_2'"):
        read(both)
