"""Styles as they are found and used: in the formats of other programs, as DoRA, with a part for the text encoder,
swapped in place, merged into the base. With a student on, or put on later, all is as without one."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import FluxControlPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import arcflow
from arcflow import student
from arcflow.student import adapter
from tests.support.pipelines import SIDE, STYLE, fresh, perturb, sample, save_style

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:Already unmerged"),
]


@pytest.fixture
def style(pipe, tmp_path):
    return save_style(pipe, tmp_path / "style", STYLE[type(pipe).__name__])


@pytest.fixture
def two_steps(pipe, tmp_path):
    return made(pipe, tmp_path / "two_steps")


def made(pipe, folder, seed=0):
    """A student's adapter for this pipeline."""
    draw = torch.Generator().manual_seed(seed)
    net = student.build(copy.deepcopy(pipe.transformer), modes=4, rank=2, targets="all", generator=draw)
    perturb(net, seed=seed)
    return adapter.save_adapter(net, folder)


def alike_in_both_orders(pipe, two_steps, put):
    """Puts a style on before the student and after it: one image, and without the student the styled base."""
    first, later, plain = (fresh(pipe) for _ in range(3))
    put(first)
    styled = sample(first)
    both = sample(arcflow.attach(first, two_steps))
    assert torch.equal(sample(arcflow.detach(first)), styled)
    arcflow.attach(later, two_steps)
    put(later)
    torch.testing.assert_close(sample(later), both, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both, sample(arcflow.attach(plain, two_steps)), atol=1e-4)
    assert torch.equal(sample(arcflow.detach(later)), styled)


def low(out: int, features: int, scale: float = 0.3) -> tuple[Tensor, Tensor]:
    return torch.randn(2, features) * scale, torch.randn(out, 2) * scale


def low_ranks(shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """A LoRA's file by the names of its layers and their shapes."""
    file: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        file[f"{name}.lora_down.weight"], file[f"{name}.lora_up.weight"] = low(*shape)
        file[f"{name}.alpha"] = torch.tensor(1.0)
    return file


def kohya(width: int) -> dict[str, Tensor]:
    shapes = {"img_attn_qkv": (3 * width, width), "img_mlp_0": (4 * width, width), "img_mlp_2": (width, 4 * width)}
    return low_ranks({f"lora_unet_double_blocks_0_{name}": shape for name, shape in shapes.items()})


def comfyui(width: int) -> dict[str, Tensor]:
    shapes = {"img_attn.proj": (width, width), "img_mlp.0": (4 * width, width), "img_mlp.2": (width, 4 * width)}
    return low_ranks({f"diffusion_model.double_blocks.0.{name}": shape for name, shape in shapes.items()})


def diffusers_with_alpha(width: int) -> dict[str, Tensor]:
    prefix = "transformer.transformer_blocks.0.attn.to_q"
    down, up = low(width, width, 1.0)
    return {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up, f"{prefix}.alpha": torch.tensor(1.0)}


def written(file: dict[str, Tensor], folder: Path) -> Path:
    folder.mkdir()
    save_file(file, folder / "pytorch_lora_weights.safetensors")
    return folder


@pytest.mark.parametrize("form", [kohya, comfyui, diffusers_with_alpha])
@pytest.mark.parametrize("pipe", ["flux"], indirect=True)
def test_formats_of_other_programs(pipe, two_steps, tmp_path, form):
    torch.manual_seed(4)
    folder = written(form(pipe.transformer.inner_dim), tmp_path / "style")
    alike_in_both_orders(pipe, two_steps, lambda one: one.load_lora_weights(folder, adapter_name="style"))


@pytest.mark.parametrize("pipe", ["flux2"], indirect=True)
def test_a_style_in_comfyuis_names_on_the_norm_and_the_last_layer(pipe, two_steps, tmp_path):
    """`final_layer` is both: layers of which the student has its own."""
    torch.manual_seed(4)
    width, file = pipe.transformer.inner_dim, dict[str, Tensor]()
    for name, out in (("adaLN_modulation.1", 2 * width), ("linear", 16)):
        prefix = f"diffusion_model.final_layer.{name}"
        file[f"{prefix}.lora_A.weight"], file[f"{prefix}.lora_B.weight"] = low(out, width)
    folder = written(file, tmp_path / "style")
    alike_in_both_orders(pipe, two_steps, lambda one: one.load_lora_weights(folder, adapter_name="style"))


def test_dora(pipe, two_steps):
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=STYLE[type(pipe).__name__], use_dora=True)
    net = copy.deepcopy(pipe.transformer)
    net.add_adapter(config, "style")
    weights = get_peft_model_state_dict(net, adapter_name="style")

    def put(one):
        one.transformer.add_adapter(config, "style")
        set_peft_model_state_dict(one.transformer, weights, adapter_name="style")
        one.transformer.eval()

    alike_in_both_orders(pipe, two_steps, put)


@pytest.mark.parametrize("pipe", ["flux"], indirect=True)
def test_a_part_for_the_text_encoder(pipe, two_steps, tmp_path):
    text, net = copy.deepcopy(pipe.text_encoder), copy.deepcopy(pipe.transformer)
    text.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]), "style")
    net.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), "style")
    of_text, of_net = (get_peft_model_state_dict(one, adapter_name="style") for one in (text, net))
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=of_net, text_encoder_lora_layers=of_text)

    def put(one):
        one.text_encoder = copy.deepcopy(one.text_encoder)
        one.load_lora_weights(tmp_path, adapter_name="style")
        assert one.get_list_adapters() == {"transformer": ["style"], "text_encoder": ["style"]}

    alike_in_both_orders(pipe, two_steps, put)


@pytest.mark.parametrize("fuse", [False, True])
def test_swapped_in_place_it_is_the_other_style_and_goes_without_a_trace(pipe, two_steps, style, tmp_path, fuse):
    other, wanted = tmp_path / "other", fresh(pipe)
    net = copy.deepcopy(pipe.transformer)
    torch.manual_seed(9)
    net.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=STYLE[type(pipe).__name__]))
    type(pipe).save_lora_weights(other, transformer_lora_layers=get_peft_model_state_dict(net))
    plain = sample(arcflow.attach(pipe, two_steps, fuse=fuse))
    pipe.load_lora_weights(style, adapter_name="style")
    sample(pipe)
    pipe.load_lora_weights(other, adapter_name="style", hotswap=True)
    arcflow.attach(wanted, two_steps).load_lora_weights(other, adapter_name="style")
    torch.testing.assert_close(sample(pipe), sample(wanted), rtol=1e-3, atol=1e-4)
    pipe.delete_adapters("style")
    assert torch.equal(sample(pipe), plain)


@pytest.mark.parametrize(("unload", "fuse"), [(False, False), (True, True)])
def test_merged_before_it_belongs_to_the_base(pipe, two_steps, style, unload, fuse):
    pipe.load_lora_weights(style, adapter_name="style")
    both = sample(arcflow.attach(pipe, two_steps))
    arcflow.detach(pipe)
    pipe.fuse_lora()
    if unload:
        pipe.unload_lora_weights()
    merged = sample(pipe)
    torch.testing.assert_close(sample(arcflow.attach(pipe, two_steps, fuse=fuse)), both, rtol=1e-3, atol=1e-4)
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe), merged)


def test_a_merge_of_nothing_leaves_the_student_at_its_strength(pipe, two_steps):
    drawn = sample(arcflow.attach(pipe, two_steps))
    pipe.fuse_lora(lora_scale=0.5)
    assert torch.equal(sample(pipe), drawn)


def test_weighed_and_switched_off_while_students_come_and_go(pipe, two_steps, style, tmp_path):
    other = made(pipe, tmp_path / "other", seed=1)
    plain = sample(arcflow.attach(pipe, two_steps))
    arcflow.detach(pipe)
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters("style", 0.5)
    half = sample(pipe)
    pipe.disable_lora()
    arcflow.attach(pipe, two_steps)
    assert torch.equal(sample(pipe), plain)
    pipe.enable_lora()
    both = sample(pipe)
    pipe.set_adapters("style", 1.0)
    arcflow.attach(pipe, other)
    pipe.set_adapters("style", 0.5)
    arcflow.attach(pipe, two_steps)
    assert torch.equal(sample(pipe), both) and not torch.equal(both, plain)
    assert pipe.get_list_adapters() == {"transformer": ["style"]} and pipe.get_active_adapters() == ["style"]
    arcflow.detach(pipe)
    assert torch.equal(sample(pipe), half)


def test_the_students_lora_is_none_of_the_adapters_that_have_names(pipe, two_steps, style):
    """diffusers names those that are there."""
    arcflow.attach(pipe, two_steps)
    pipe.load_lora_weights(style, adapter_name="style")
    styled = sample(pipe)
    with pytest.raises(ValueError, match="'arcflow'.* not in the list of present adapters: {'style'}"):
        pipe.set_adapters(["arcflow", "style"], 0.5)
    assert torch.equal(sample(pipe), styled)


@pytest.mark.parametrize("pipe", ["flux"], indirect=True)
def test_a_control_lora_makes_the_first_layer_wider_in_either_order(pipe, two_steps, tmp_path):
    torch.manual_seed(5)
    width, file = pipe.transformer.inner_dim, dict[str, Tensor]()
    for name, features in (("x_embedder", 32), ("transformer_blocks.0.attn.to_q", width)):
        prefix = f"transformer.{name}"
        file[f"{prefix}.lora_A.weight"], file[f"{prefix}.lora_B.weight"] = low(width, features)
    folder = written(file, tmp_path / "depth")
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    control = FluxControlPipeline(**parts)
    control.set_progress_bar_config(disable=True)
    image = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")

    def put(one):
        one.load_lora_weights(folder, adapter_name="depth")

    def draw(one):
        return sample(one, control_image=image)

    first, later = fresh(control), fresh(control)
    put(first)
    styled = draw(first)
    both = draw(arcflow.attach(first, two_steps))
    assert torch.equal(draw(arcflow.attach(first, two_steps)), both)
    assert torch.equal(draw(arcflow.detach(first)), styled)
    arcflow.attach(later, two_steps)
    put(later)
    torch.testing.assert_close(draw(later), both, rtol=1e-5, atol=1e-5)
    assert torch.equal(draw(arcflow.detach(later)), styled)
