"""Students in ComfyUI: KSampler draws what this project draws, and whatever would draw noise is refused."""

import copy
import logging

import comfy.controlnet
import comfy.ops
import comfy.samplers
import comfy.sd
import host
import pytest
import torch
from arcflow_nodes import nodes as ours
from arcflow_nodes.adapter import read
from arcflow_nodes.patch import patched
from cases import Case, apart, grid, made
from comfy.ldm.flux.controlnet import ControlNetFlux
from comfy_api.v0_0_2 import io
from comfy_extras.nodes_custom_sampler import Guider_Basic
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow
from einops import rearrange
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from arcflow.path import step_grid
from arcflow.student.adapter import save_adapter
from arcflow.student.formats import find, tensors_of
from arcflow.student.plain_lora import factors_of, lora_tensors
from arcflow.student.record import AdapterInfo

CLOSE = 1e-5

ALIKE = 2e-6
"""The same arithmetic in another order."""


def student_of(case: Case, strength: float = 1.0):
    return patched(case.model, read(case.adapter), strength)


@pytest.mark.parametrize("steps", [2, 4])
def test_ksampler_draws_what_diffusers_draws(case, steps):
    drawn = case.sample(student_of(case), steps)
    assert apart(drawn, case.ours(case.tokens(case.noise), grid(steps))) < CLOSE


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_a_student_in_coefficients_draws_the_same(coefficients, steps):
    """At its own number of steps, where its bends are not needed, and at others."""
    case = coefficients
    before = case.sample(case.model, 2)
    drawn = case.sample(student_of(case), steps)
    assert apart(drawn, case.ours(case.tokens(case.noise), grid(steps))) < CLOSE
    assert torch.equal(case.sample(case.model, 2), before)


def test_a_style_on_the_last_layer_of_a_student_in_coefficients_counts_once(coefficients):
    """Whatever is in use when the adapter is applied, and afterwards nothing of it is left."""
    case = coefficients
    width, features = read(case.adapter).last()
    draw = torch.Generator().manual_seed(4)
    shapes = {"A": (2, features), "B": (width, 2)}
    lora = {f"transformer.proj_out.lora_{k}.weight": torch.randn(s, generator=draw) for k, s in shapes.items()}
    before = case.sample(case.model, 2)
    plain = case.sample(student_of(case), 2)
    styled, _ = comfy.sd.load_lora_for_models(case.model, None, lora, 0.1, 0.0)
    first = case.sample(patched(styled, read(case.adapter)), 2)
    case.sample(styled, 2)
    again = case.sample(patched(styled, read(case.adapter)), 2)
    assert torch.equal(first, again) and apart(first, plain) > 1e-3
    assert torch.equal(case.sample(student_of(case), 2), plain)
    assert torch.equal(case.sample(case.model, 2), before)


def test_a_plain_lora_draws_the_student_with_stock_nodes_alone(coefficients):
    """`export --layout lora --keys comfyui` in Load LoRA, ModelSamplingAuraFlow at the adapter's shift, KSampler."""
    case = coefficients
    found = find(case.adapter)
    factors = factors_of(tensors_of(found), found.info)
    model, _ = comfy.sd.load_lora_for_models(
        case.model, None, lora_tensors(factors, "comfyui", found.info.family), 1.0, 0.0
    )
    (model,) = ModelSamplingAuraFlow().patch_aura(model, 3.2)
    assert apart(case.sample(model, 2), case.ours(case.tokens(case.noise), grid(2))) < CLOSE


def test_the_base_comes_back_bit_for_bit(case):
    before = case.sample(case.model, 2)
    drawn = case.sample(student_of(case), 2)
    assert not torch.equal(before, drawn)
    assert torch.equal(case.sample(case.model, 2), before)
    assert torch.equal(case.sample(student_of(case), 2), drawn)


def test_a_run_that_fails_leaves_everything_as_it_was(case):
    drawn = case.sample(student_of(case), 2)
    text, more = case.conditioning()[0]
    with pytest.raises(RuntimeError):
        case.sample(student_of(case), 2, positive=[[text[..., :3], more]])
    assert torch.equal(case.sample(student_of(case), 2), drawn)


def test_an_image_is_redrawn_from_the_middle_of_the_grid(case):
    image = torch.randn(case.noise.shape, generator=torch.Generator().manual_seed(5))
    drawn = case.sample(student_of(case), 2, latent=image, denoise=0.5)
    levels = grid(4)[2:]
    start = float(levels[0]) * case.noise + (1 - float(levels[0])) * image
    assert apart(drawn, case.ours(case.tokens(start), levels)) < CLOSE


def test_inpainting_draws_inside_the_mask_and_keeps_the_rest(case):
    image = torch.randn(case.noise.shape, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 1, *case.noise.shape[-2:])
    mask[..., : mask.shape[-1] // 2] = 1.0
    drawn = case.sample(student_of(case), 2, latent=image, noise_mask=mask)
    inside = case.tokens((mask[:, :, None] if case.noise.ndim == 5 else mask).expand_as(case.noise))
    kept = case.tokens(image)
    assert apart(drawn * (1 - inside), kept * (1 - inside)) < CLOSE
    # by hand: what is outside the mask goes back to the image, noised, before each call and after it
    x, levels = case.tokens(case.noise), grid(2).tolist()
    eps = x.clone()
    for here, there in zip(levels[:-1], levels[1:], strict=True):
        x = x * inside + (here * eps + (1 - here) * kept) * (1 - inside)
        moved = case.ours(x, torch.tensor([here, there]))
        u = (x - moved) / (here - there)
        x0 = (x - here * u) * inside + kept * (1 - inside)
        x = x + (x - x0) / here * (there - here)
    assert apart(drawn, x) < CLOSE


def styled(case: Case):
    """A style's LoRA as files have it, and what our own path draws with both."""
    layers = {"flux": ["to_q", "proj_mlp"], "qwen_image": ["to_q", "to_out.0"], "flux2": ["to_q"]}
    net = copy.deepcopy(case.net)
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=layers[case.name])
    net.add_adapter(config, "style")
    if "arcflow" in net.peft_config:
        net.set_adapters(["arcflow", "style"])
    state = get_peft_model_state_dict(net, adapter_name="style")
    both = Case(case.name, case.model, case.adapter, net.eval(), case.cond, case.noise)
    return {f"transformer.{name}": tensor for name, tensor in state.items()}, both


@pytest.mark.parametrize("first", ["style", "student"])
def test_a_style_goes_on_before_or_after(case, first):
    lora, both = styled(case)
    if first == "style":
        model, _ = comfy.sd.load_lora_for_models(case.model, None, lora, 1.0, 0.0)
        model = patched(model, read(case.adapter))
    else:
        model, _ = comfy.sd.load_lora_for_models(student_of(case), None, lora, 1.0, 0.0)
    expected = both.ours(case.tokens(case.noise), grid(2))
    assert apart(expected, case.ours(case.tokens(case.noise), grid(2))) > 1e-3
    assert apart(case.sample(model, 2), expected) < CLOSE


def test_a_style_on_the_last_layer_finds_its_place(case):
    """It is of no effect there: that layer is the student's own."""
    features = read(case.adapter).tensors["proj_out_means.weight"].shape[1]
    width = case.tokens(case.noise).shape[-1]
    shapes = {"A": (2, features), "B": (width, 2)}
    lora = {f"transformer.proj_out.lora_{side}.weight": torch.randn(shape) for side, shape in shapes.items()}
    plain = student_of(case)
    model, _ = comfy.sd.load_lora_for_models(plain, None, lora, 1.0, 0.0)
    assert apart(case.sample(model, 2), case.sample(plain, 2)) < ALIKE


def test_strength_is_that_of_the_lora(case):
    half = case.sample(student_of(case, 0.5), 2)
    whole = case.sample(student_of(case), 2)
    none = case.sample(student_of(case, 0.0), 2)
    assert apart(half, whole) > 1e-3 and apart(half, none) > 1e-3


def test_guidance_mixes_mean_velocities(case):
    model = student_of(case)
    drawn = case.sample(model, 1, cfg=2.0)
    one = case.sample(model, 1)
    other = case.sample(model, 1, positive=case.conditioning(7))
    assert apart(drawn, 2 * one - other) < CLOSE


NAMES = comfy.samplers.KSampler.SAMPLERS


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("sampler", NAMES)
def test_every_sampler_is_right_or_refused_by_name(flux, sampler, steps):
    right = flux.ours(flux.tokens(flux.noise), grid(steps))
    try:
        drawn = flux.sample(student_of(flux), steps, sampler)
    except ValueError as refused:
        assert sampler.split("_")[0] in str(refused) and "'euler'" in str(refused)
    else:
        assert apart(drawn, right) < CLOSE


@pytest.mark.parametrize("scheduler", comfy.samplers.KSampler.SCHEDULERS)
def test_every_scheduler_is_right_or_warned_of(flux, scheduler, caplog):
    """Right: within a thousandth of the adapter's own noise levels."""
    model = student_of(flux)
    levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, 2)
    with caplog.at_level(logging.WARNING):
        flux.sample(model, 2, scheduler=scheduler)
    right = float((levels - grid(2)).abs().max()) < 1e-3
    assert right != ("choose the scheduler 'simple'" in caplog.text)
    assert right or scheduler != "simple"


def test_more_cfg_and_other_guidance_are_warned_of(flux, caplog):
    prompt = [[flux.conditioning()[0][0], flux.conditioning()[0][1] | {"guidance": 7.0}]]
    with caplog.at_level(logging.WARNING):
        flux.sample(student_of(flux), 2)
    assert "ArcFlow" not in caplog.text
    with caplog.at_level(logging.WARNING):
        flux.sample(student_of(flux), 2, cfg=4.0, positive=prompt)
    assert "cfg is 4" in caplog.text and "FluxGuidance node with 3.5" in caplog.text


def guiding(model, case: Case) -> Guider_Basic:
    """What SamplerCustomAdvanced takes."""
    guider = Guider_Basic(model)
    guider.set_conds(case.conditioning())
    return guider


def test_a_model_called_off_the_grid_is_refused(flux):
    def twice(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return model(x, sigmas[:1] * 0.9, **(extra_args or {}))

    twice.__name__ = "sample_euler"
    guider = guiding(student_of(flux), flux)
    with pytest.raises(ValueError, match="no step of its sampler's.*'euler' with 'simple'"):
        guider.sample(
            flux.noise, torch.zeros_like(flux.noise), comfy.samplers.KSAMPLER(twice), grid(2), disable_pbar=True
        )


def test_the_adapters_own_steps(flux, tmp_path):
    info = AdapterInfo(final_step_scale=0.5)
    path = save_adapter(flux.net, tmp_path / "short.safetensors", info=info)
    model = patched(flux.model, read(path))
    sigmas = ours.ArcFlowSigmas.execute(model, 2, 1.0).result[0]
    assert torch.equal(sigmas, step_grid(2, 3.2, 0.5))
    guider = guiding(model, flux)
    drawn = guider.sample(
        flux.noise, torch.zeros_like(flux.noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True
    )
    assert apart(flux.tokens(drawn), flux.ours(flux.tokens(flux.noise), sigmas)) < CLOSE
    assert torch.equal(ours.ArcFlowSigmas.execute(model, 1, 0.5).result[0], step_grid(2, 3.2, 0.5)[1:])
    with pytest.raises(ValueError, match="without an ArcFlow adapter"):
        ours.ArcFlowSigmas.execute(flux.model, 2, 1.0)


@pytest.mark.parametrize("layout", ["arcflow", "published"])
def test_folders_and_the_published_layout_load_too(case, layout, tmp_path):
    if layout == "published" and case.name == "flux2":
        pytest.skip("there is no published layout for FLUX.2")
    folder = save_adapter(case.net, tmp_path / "adapter", layout=layout)
    file = next(folder.glob("*.safetensors"))
    drawn = case.sample(patched(case.model, read(file)), 2)
    close = CLOSE if layout == "arcflow" else 0.02  # float16
    assert apart(drawn, case.sample(student_of(case), 2)) < close


def test_a_published_file_alone_is_enough(flux, tmp_path):
    folder = save_adapter(flux.net, tmp_path / "adapter", layout="published")
    alone = tmp_path / "flux-2steps.safetensors"
    alone.write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    assert torch.equal(
        flux.sample(patched(flux.model, read(alone)), 2),
        flux.sample(patched(flux.model, read(folder / "diffusion_pytorch_model.safetensors")), 2),
    )


def test_a_reference_picture_beside_the_drawn_one(case):
    """FLUX.1 Kontext, FLUX.2 and Qwen-Image-Edit: its tokens go through the last layer too, and are cut off."""
    text, more = case.conditioning()[0]
    reference = torch.randn(case.noise.shape, generator=torch.Generator().manual_seed(9))
    model = student_of(case)
    drawn = case.sample(model, 2, positive=[[text, {**more, "reference_latents": [reference]}]])
    beside = case.tokens(reference)

    def given(x, sigma):
        where = {"img_shapes": [[(1, 4, 4), (1, 4, 4)]]}
        if case.name != "qwen_image":
            here = case.cond["img_ids"]
            away = torch.zeros_like(here)
            away[..., 0] = 10 if case.name == "flux2" else 1
            where = {"img_ids": torch.cat([here, here + away], here.ndim - 2)}
        return {"hidden_states": torch.cat([x, beside], 1), **where}

    assert apart(drawn, case.ours(case.tokens(case.noise), grid(2), given)) < CLOSE
    assert apart(drawn, case.sample(model, 2)) > 1e-3


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_controlnet_of_flux(flux, strength):
    """A real one of ComfyUI's, tiny: what it adds in the blocks goes through the last layer as the rest does."""
    sizes = {name: value for name, value in flux.model.model.model_config.unet_config.items() if name != "dtype"}
    torch.manual_seed(11)
    operations = comfy.ops.disable_weight_init
    net = ControlNetFlux(control_latent_channels=16, operations=operations, dtype=torch.float32, **sizes)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape))
    net.dtype = torch.float32
    cpu = torch.device("cpu")
    control = comfy.controlnet.ControlNet(net, extra_conds=["y", "guidance"], load_device=cpu)
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(12))
    text, more = flux.conditioning()[0]
    told = {"control": control.set_cond_hint(hint, strength), "control_apply_to_uncond": True}
    model = student_of(flux)
    drawn = flux.sample(model, 2, positive=[[text, {**more, **told}]])

    def given(x, sigma):
        latents = rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=4, p=2, q=2)
        guidance = flux.cond["guidance"]
        time = torch.full((1,), sigma)
        added = net(latents, time, text, y=more["pooled_output"], guidance=guidance, hint=hint)
        double, single = (
            [strength * one for one in added[key][:count]]
            for key, count in (("input", sizes["depth"]), ("output", sizes["depth_single_blocks"]))
        )
        return {"controlnet_block_samples": double, "controlnet_single_block_samples": single}

    assert apart(drawn, flux.ours(flux.tokens(flux.noise), grid(2), given)) < CLOSE
    assert apart(drawn, flux.sample(model, 2)) > 1e-3


class Added(comfy.controlnet.ControlBase):
    """Adds the same to the first block whatever it is given."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def get_control(self, *args):
        return {"input": [self.what], "output": []}

    def copy(self):
        return self


def test_a_controlnet_of_qwen_image(case):
    if case.name != "qwen_image":
        pytest.skip("FLUX.1 has a real one; FLUX.2 takes none in diffusers")
    sizes = case.net.config
    width = sizes.num_attention_heads * sizes.attention_head_dim
    what = torch.randn(1, 16, width, generator=torch.Generator().manual_seed(12))
    text, more = case.conditioning()[0]
    told = {"control": Added(what), "control_apply_to_uncond": True}
    drawn = case.sample(student_of(case), 2, positive=[[text, {**more, **told}]])
    samples = [what] + [torch.zeros_like(what)] * (sizes.num_layers - 1)
    expected = case.ours(case.tokens(case.noise), grid(2), lambda x, sigma: {"controlnet_block_samples": samples})
    assert apart(drawn, expected) < CLOSE
    assert apart(drawn, case.ours(case.tokens(case.noise), grid(2))) > 1e-3


@pytest.mark.skipif(
    host.gguf_folder() is None,
    reason=f"no ComfyUI-GGUF: name its folder in {host.GGUF_NODES}, and install the package gguf",
)
@pytest.mark.parametrize("form", ["mixture", "coefficients"])
def test_a_base_of_a_gguf_file(form, tmp_path):
    """The weights that the file gives back are the base; ours draws with the same ones in diffusers."""
    case = made("flux", tmp_path / form, form, quantized="Q8_0")
    drawn = case.sample(student_of(case), 2)
    assert apart(drawn, case.ours(case.tokens(case.noise), grid(2))) < CLOSE
    plain = case.sample(case.model, 2)
    assert not torch.equal(plain, drawn) and torch.equal(case.sample(student_of(case), 2), drawn)
    assert torch.equal(case.sample(case.model, 2), plain)


def test_two_adapters_are_refused(case):
    with pytest.raises(ValueError, match="has the ArcFlow adapter student.safetensors already"):
        patched(student_of(case), read(case.adapter))


def test_a_lora_that_half_loads_is_refused(flux, tmp_path):
    with safe_open(flux.adapter, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    for part in ("lora_A.weight", "lora_B.weight"):
        tensors[f"transformer_blocks.9.ff.net.2.{part}"] = tensors[f"transformer_blocks.1.ff.net.2.{part}"].clone()
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="of the .* layers of odd.safetensors found their place"):
        patched(flux.model, read(path))


def test_files_that_are_no_adapters_say_so(flux, tmp_path):
    plain = tmp_path / "style.safetensors"
    save_file({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, plain)
    with pytest.raises(ValueError, match="holds no ArcFlow adapter.*'Load LoRA'"):
        read(plain)
    with pytest.raises(ValueError, match="no .safetensors file"):
        read(tmp_path / "style.ckpt")
    plain.write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        read(plain)


def test_an_adapter_of_another_model_is_refused(case, flux):
    if case.name == "flux":
        pytest.skip("its own")
    with pytest.raises(ValueError, match="is for .* the model is for 'flux'"):
        patched(flux.model, read(case.adapter))


def test_nodes_have_the_ids_that_workflows_name():
    schemas = [node.define_schema() for node in (ours.ArcFlowApply, ours.ArcFlowSigmas)]
    assert [schema.node_id for schema in schemas] == ["ArcFlowApply", "ArcFlowSigmas"]
    assert [one.id for one in schemas[0].inputs] == ["model", "adapter", "strength"]
    assert [one.id for one in schemas[1].inputs] == ["model", "steps", "denoise"]
    assert all(issubclass(node, io.ComfyNode) for node in (ours.ArcFlowApply, ours.ArcFlowSigmas))
