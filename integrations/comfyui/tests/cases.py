"""The same random student twice: in diffusers, driven by this project, and as files that ComfyUI's nodes load."""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.ldm.flux.model
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import comfy.utils
import host
import torch
from torch import Tensor, nn

from arcflow import student
from arcflow.config import Form
from arcflow.families import family_of
from arcflow.families.conditioning import Cond
from arcflow.families.network import unfolded
from arcflow.path import step_grid
from arcflow.portable import comfyui_name
from arcflow.student.adapter import save_adapter
from arcflow.student.views import teacher_velocity
from tests.support import pipelines

TEXT = 512
"""Tokens of a prompt: FLUX.2 in ComfyUI pads shorter ones."""

GUIDANCE = 3.5


@dataclass
class Case:
    """One family."""

    name: str
    model: Any
    """ComfyUI's MODEL of the base."""
    adapter: Path
    net: nn.Module
    """The student in diffusers."""
    cond: Cond
    noise: Tensor
    """As ComfyUI has it."""
    prompt: list | None = None
    """The same, where it is not what FLUX and Qwen-Image have."""

    def tokens(self, latents: Tensor) -> Tensor:
        """Latents as our own path has them."""
        family = family_of(self.net)
        flat = latents if family.video or latents.ndim == 4 else latents.squeeze(2)
        return unfolded(flat, family.patch_of(self.net) if family.packs else (1, 1))

    @torch.no_grad()
    def ours(self, x: Tensor, grid: Tensor, more: Callable[[Tensor, float], dict[str, Any]] | None = None) -> Tensor:
        """Tokens at the end of a grid of noise levels, by our own exact step. `more` is what the network is given
        besides, for latents at a noise level; as many tokens as `x` has come out."""
        x = x.float()
        for here, there in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
            given = {} if more is None else more(x, here)
            hook = self.net.register_forward_pre_hook(partial(_besides, given), with_kwargs=True)
            try:
                path = student.predict(self.net, x, here, self.cond)
            finally:
                hook.remove()
            x = x - path.displacement(0.0, here - there)[:, : x.shape[1]]
        return x

    @torch.no_grad()
    def teacher(self, x: Tensor, sigma: float) -> Tensor:
        """The base's velocity."""
        return teacher_velocity(self.net, x, sigma, self.cond)

    def conditioning(self, seed: int | None = None) -> list:
        """The prompt as ComfyUI has it; another one with a seed."""
        if self.prompt is not None:
            return self.prompt
        text = self.cond["encoder_hidden_states"]
        more: dict[str, Any] = {"pooled_output": self.cond.get("pooled_projections", torch.zeros(1, 1))}
        if self.name != "qwen_image":
            more["guidance"] = GUIDANCE
        if seed is not None:
            text = torch.randn(text.shape, generator=torch.Generator().manual_seed(seed))
        return [[text, more]]

    def sample(
        self,
        model: Any,
        steps: int,
        sampler: str = "euler",
        scheduler: str = "simple",
        *,
        cfg: float = 1.0,
        latent: Tensor | None = None,
        positive: list | None = None,
        **more: Any,
    ) -> Tensor:
        """What KSampler draws, as tokens."""
        start = torch.zeros_like(self.noise) if latent is None else latent
        positive = positive or self.conditioning()
        return self.tokens(
            comfy.sample.sample(
                *(model, self.noise, steps, cfg, sampler, scheduler, positive, self.conditioning(7), start),
                disable_pbar=True,
                seed=0,
                **more,
            )
        )


def _besides(given: dict[str, Any], net: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    return args, kwargs | given


def apart(a: Tensor, b: Tensor) -> float:
    """Greatest difference over the size of the greatest value."""
    return float((a - b).abs().max() / b.abs().max())


def grid(steps: int) -> Tensor:
    """Noise levels of the adapters here."""
    return step_grid(steps)


def made(name: str, home: Path, form: Form = "mixture", quantized: str | None = None) -> Case:
    """A case of this family, its files in a folder; its base as a type of GGUF files has it, if given."""
    torch.manual_seed(0)
    net = TRANSFORMERS[name]()
    if quantized:
        _round(net, quantized)
    model = model_of(name, net, computed=torch.float32 if quantized else None, quantized=quantized)
    student.build(net, modes=4, rank=4, form=form).eval()
    pipelines.perturb(net, 0.2)
    adapter = save_adapter(net, home / "student.safetensors")
    draw = torch.Generator().manual_seed(1)
    dim = net.config.joint_attention_dim
    text: Cond = {"encoder_hidden_states": torch.randn(1, TEXT, dim, generator=draw)}
    if name == "flux":
        text["pooled_projections"] = torch.randn(1, net.config.pooled_projection_dim, generator=draw)
    if name == "qwen_image":
        text["encoder_hidden_states_mask"] = torch.ones(1, TEXT, dtype=torch.bool)
    cond = text | family_of(net).places(text, 4, 4)
    if name != "qwen_image":
        cond["guidance"] = torch.full((1,), GUIDANCE)
    shape = {"flux": (1, 4, 8, 8), "qwen_image": (1, 4, 1, 8, 8), "flux2": (1, 16, 4, 4)}[name]
    return Case(name, model, adapter, net, cond, torch.randn(shape, generator=draw))


@torch.no_grad()
def model_of(
    name: str,
    net: nn.Module,
    stored: torch.dtype = torch.float32,
    computed: torch.dtype | None = None,
    quantized: str | None = None,
) -> Any:
    """ComfyUI's model with the weights of a network of diffusers, in a type, and computing in another one if given;
    or in a quantized type of GGUF files, read by ComfyUI-GGUF."""
    kind, sizes = SIZES[name](net.config)
    cpu = torch.device("cpu")

    def empty(operations: Any = None) -> Any:
        config = kind(sizes)
        config.custom_operations = operations
        config.latent_format = comfy.latent_formats.LatentFormat()
        config.latent_format.latent_channels = sizes["in_channels"]
        if name == "qwen_image":
            config.latent_format.latent_dimensions = 3
        config.set_inference_dtype(stored, computed)
        return config.get_model({}, "").eval()

    model = empty()
    weights = _renamed(model.diffusion_model.state_dict(), net.state_dict(), name, sizes)
    if not quantized:
        model.diffusion_model.load_state_dict(weights)
        return comfy.model_patcher.ModelPatcher(model, cpu, cpu)
    operations = host.gguf_nodes().ops.GGMLOps()
    operations.Linear.dequant_dtype = computed  # float16 in the loader, unless its advanced form is told another one
    model = empty(operations)
    with tempfile.TemporaryDirectory() as home:
        weights = in_gguf(weights, quantized, name, Path(home) / "base.gguf")
        model.diffusion_model.load_state_dict(weights)
    return host.gguf_nodes().nodes.GGUFModelPatcher.clone(comfy.model_patcher.ModelPatcher(model, cpu, cpu))


@torch.no_grad()
def _round(net: nn.Module, kind: str) -> None:
    """Give a network the weights that a GGUF file of it holds."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    quantized = GGMLQuantizationType[kind]
    for weight in net.parameters():
        if _fits(weight, quantized):
            weight.copy_(torch.from_numpy(dequantize(quantize(weight.numpy(), quantized), quantized)))


def _fits(weight: Tensor, kind: Any) -> bool:
    """Whether it is a matrix whose rows are whole blocks."""
    from gguf.constants import GGML_QUANT_SIZES

    return weight.ndim == 2 and weight.shape[1] % GGML_QUANT_SIZES[kind][0] == 0


def in_gguf(weights: dict[str, Tensor], kind: str, name: str, path: Path) -> dict[str, Tensor]:
    """Weights as ComfyUI-GGUF reads them from a file: matrices quantized, if their rows can be, the rest in float32."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    quantized = GGMLQuantizationType[kind]
    writer = GGUFWriter(path, "qwen_image" if name == "qwen_image" else "flux")
    for key, weight in weights.items():
        values = weight.float().numpy()
        if _fits(weight, quantized):
            writer.add_tensor(key, quantize(values, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = host.gguf_nodes().loader.gguf_sd_loader(path)
    return read[0] if isinstance(read, tuple) else read


def _renamed(
    names: dict[str, Tensor], weights: dict[str, Tensor], name: str, sizes: dict[str, Any]
) -> dict[str, Tensor]:
    """The weights by ComfyUI's names, parts of joined layers put together."""
    if name == "qwen_image":
        return dict(weights)
    places = comfy.utils.flux_to_diffusers(sizes)
    out = {key: value.float() for key, value in names.items()}
    left = set(out)
    for key, value in weights.items():
        place = places.get(key) or _plain(key)
        place = (place,) if isinstance(place, str) else place
        target, where = place[0], place[1] if len(place) > 1 else None
        if target not in out:  # norms are `.scale` in some versions
            target = target.removesuffix("weight") + "scale"
        value = place[2](value) if len(place) > 2 else value
        if where is None:
            out[target].copy_(value)
        else:
            axis, start, length = where
            out[target].narrow(axis, start, length).copy_(value)
        left.discard(target)
    assert not left, f"not written: {sorted(left)}"
    return out


def _plain(key: str) -> str:
    """Names that ComfyUI's map leaves out."""
    layer, _, end = key.rpartition(".")
    return f"{comfyui_name(layer, 'flux2')}.{end}".replace(".linear.weight", ".lin.weight")


def _known(sizes: dict[str, Any]) -> dict[str, Any]:
    """Those sizes that this version of ComfyUI has a name for."""
    names = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
    return {name: value for name, value in sizes.items() if name in names or name == "image_model"}


def _flux(config: Any) -> tuple[Any, dict[str, Any]]:
    return comfy.supported_models.Flux, _known(
        _flux_sizes(config)
        | {
            "image_model": "flux",
            "in_channels": config.in_channels // 4,
            "out_channels": config.in_channels // 4,
            "vec_in_dim": config.pooled_projection_dim,
            "mlp_ratio": 4.0,
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
        }
    )


def _flux2(config: Any) -> tuple[Any, dict[str, Any]]:
    return comfy.supported_models.Flux2, _known(
        _flux_sizes(config)
        | {
            "image_model": "flux2",
            "in_channels": config.in_channels,
            "out_channels": config.in_channels,
            "vec_in_dim": None,
            "mlp_ratio": 3.0,
            "theta": 2000,
            "patch_size": 1,
            "qkv_bias": False,
            "global_modulation": True,
            "mlp_silu_act": True,
            "ops_bias": False,
            "default_ref_method": "index",
            "ref_index_scale": 10.0,
            "txt_ids_dims": [3],
        }
    )


def _flux_sizes(config: Any) -> dict[str, Any]:
    return {
        "context_in_dim": config.joint_attention_dim,
        "hidden_size": config.num_attention_heads * config.attention_head_dim,
        "num_heads": config.num_attention_heads,
        "depth": config.num_layers,
        "depth_single_blocks": config.num_single_layers,
        "axes_dim": list(config.axes_dims_rope),
        "guidance_embed": True,
        "txt_ids_dims": [],
    }


def _qwen(config: Any) -> tuple[Any, dict[str, Any]]:
    return comfy.supported_models.QwenImage, {
        "image_model": "qwen_image",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.attention_head_dim,
        "joint_attention_dim": config.joint_attention_dim,
        "axes_dims_rope": tuple(config.axes_dims_rope),
    }


SIZES = {"flux": _flux, "qwen_image": _qwen, "flux2": _flux2}

TRANSFORMERS = {
    "flux": pipelines.flux_transformer,
    "qwen_image": pipelines.qwen_transformer,
    "flux2": lambda: pipelines.flux2_transformer(timestep_guidance_channels=256, rope_theta=2000),
}

CASES = [name for name in SIZES if name != "flux2" or hasattr(comfy.supported_models, "Flux2")]
