"""Students of the families beyond FLUX and Qwen-Image, each on a tiny random model of ComfyUI's own class.

The weights are drawn in ComfyUI's model, by its authors' names, and reach diffusers by diffusers' own converter of
single files: neither knows of the other or of these nodes. What a converter has written into it for one size is written
out here.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import diffusers
import torch
from cases import SIZES, TEXT, Case
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.lumina.model import NextDiT
from diffusers.loaders import single_file_utils as converters
from torch import Tensor, nn

from arcflow import student
from arcflow.config import Form
from arcflow.families import FAMILIES
from arcflow.families.conditioning import Cond
from arcflow.portable import comfyui_name
from arcflow.student.adapter import save_adapter
from tests.support import pipelines

Weights = dict[str, Tensor]

EPSILON = 1e-5
"""Of norms for which ComfyUI leaves it out: a large model's features make no difference of it, those here do."""

Text = tuple[Cond, Tensor, dict[str, Any]]
"""A prompt for our network, and as ComfyUI has it."""


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """One family."""

    kind: str
    """ComfyUI's class of its configuration."""
    sizes: Callable[[], dict[str, Any]]
    """ComfyUI's configuration."""
    net: Callable[[], nn.Module]
    """The same in diffusers."""
    converted: Callable[[Weights, nn.Module], Weights]
    """Weights by ComfyUI's names -> by diffusers'."""
    noise: tuple[int, ...]
    width: int = 32
    """Of a prompt's embeddings."""
    words: int = 32
    """Tokens of a prompt: as many as Z-Image pads to."""
    text: Callable[[Tensor], Text] = lambda text: ({"encoder_hidden_states": text}, text, {})


def made(name: str, home: Path, form: Form = "mixture", seed: int = 0) -> Case:
    """A case of this family, its file in a folder."""
    home.mkdir(exist_ok=True)
    tiny = TINY[name]
    family = next(one for one in FAMILIES if one.name == FAMILY.get(name, name))
    draw = torch.Generator().manual_seed(seed)
    model = empty(tiny)
    net = tiny.net()
    with torch.no_grad():
        for key, weight in model.diffusion_model.named_parameters():
            plain = weight.ndim == 1 and ("norm" in key or key.endswith((".scale", "cap_embedder.0.weight")))
            weight.copy_(0.2 * torch.randn(weight.shape, generator=draw) / max(1, weight[0].numel()) ** 0.25 + plain)
        for key, buffer in model.diffusion_model.named_buffers():
            if key == "pos_embed":
                buffer.copy_(torch.randn(buffer.shape, generator=draw))
    for key, norm in model.diffusion_model.named_modules():
        if key.endswith(("q_norm", "k_norm")) and getattr(norm, "eps", 0.0) is None:
            norm.eps = EPSILON
    weights = {key: value.clone() for key, value in model.diffusion_model.state_dict().items()}
    net.load_state_dict(tiny.converted(weights, net))
    student.build(net.eval(), modes=4, rank=4, form=form).eval()
    pipelines.perturb(net, 0.5 / net.get_submodule(family.head).in_features ** 0.5)
    adapter = save_adapter(net, home / "student.safetensors")
    cond, given, more = tiny.text(torch.randn(1, tiny.words, tiny.width, generator=draw))
    patch = family.patch_of(net) if family.packs else (1,) * len(family.patch)
    cells = [side // p for side, p in zip(tiny.noise[2:], patch, strict=True)]
    cond = cond | family.places(cond, *cells)
    if family.folds:
        cond["img_grid"] = torch.tensor([cells])
    noise = torch.randn(tiny.noise, generator=draw)
    return Case(
        name, model_patcher(model), adapter, net, cond, noise, prompt=[[given, {"pooled_output": None, **more}]]
    )


def model_patcher(model: Any) -> Any:
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def empty(tiny: Tiny) -> Any:
    """ComfyUI's model, its weights undrawn."""
    config = getattr(comfy.supported_models, tiny.kind)(_known(tiny))
    config.latent_format = comfy.latent_formats.LatentFormat()
    config.latent_format.latent_channels = tiny.noise[1]
    config.latent_format.latent_dimensions = len(tiny.noise) - 2
    config.set_inference_dtype(torch.float32, None)
    return config.get_model({}, "").eval()


def _known(tiny: Tiny) -> dict[str, Any]:
    """Its configuration, of which older versions know less."""
    sizes = tiny.sizes()
    reader = {"Chroma": ChromaParams, "Lumina2": NextDiT}.get(tiny.kind)
    if reader is None:
        return sizes
    unknown = {"txt_ids_dims", "vec_in_dim", "rope_theta"} - set(inspect.signature(reader).parameters)
    if reader is NextDiT and "rope_theta" in unknown:  # which has four times the width by itself
        unknown.add("ffn_dim_multiplier")
    return {key: value for key, value in sizes.items() if key not in unknown}


def _as_flux(weights: Weights, net: nn.Module) -> Weights:
    """By ComfyUI's map for FLUX: converters of this network have its width written into them."""
    sizes = {"hidden_size": net.inner_dim, "depth": net.config.num_layers}
    places = comfy.utils.flux_to_diffusers({**sizes, "depth_single_blocks": net.config.num_single_layers})
    out = {}
    for key in net.state_dict():
        place = places.get(key) or _own(key)
        name, where, *change = (place, None) if isinstance(place, str) else (*place, None)[: max(2, len(place))]
        value = weights[name if name in weights else name.removesuffix("weight") + "scale"]
        value = value if where is None else value.narrow(*where)
        out[key] = change[0](value) if change and change[0] else value
    return out


def _own(key: str) -> str:
    """Names that the map leaves out: of Chroma's guidance, FLUX.2's modulation and LongCat's time."""
    layer, _, end = key.rpartition(".")
    if layer.startswith("distilled_guidance_layer."):
        return f"{layer.replace('linear_1', 'in_layer').replace('linear_2', 'out_layer')}.{end}"
    name = comfyui_name(comfyui_name(layer, "flux2"), "longcat_image")
    return f"{name}.{end}".replace(".linear.weight", ".lin.weight")


def _split(weights: Weights, part: str, rows: list[int]) -> Weights:
    """Layers of attention that the authors joined, taken out of `weights`, by their parts."""
    joined = [key for key in weights if f".{part}." in key]
    return {
        key.replace(part, f"to_{letter}"): piece
        for key in joined
        for letter, piece in zip("qkv", weights.pop(key).split(rows), strict=True)
    }


def _lumina2(weights: Weights, net: nn.Module) -> Weights:
    parts = _split(weights, "qkv", [24, 12, 12])
    rest = converters.convert_lumina2_to_diffusers(weights)
    return rest | {key.replace("attention", "attn"): value for key, value in parts.items()}


def _masked(text: Tensor) -> Text:
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    return {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask}, text, {"attention_mask": mask}


def _pooled(text: Tensor) -> Text:
    pooled = text[:, 0]
    return {"encoder_hidden_states": text, "pooled_projections": pooled}, text, {"pooled_output": pooled}


def _layers(text: Tensor) -> Text:
    """Krea 2 reads several layers of its text encoder, which ComfyUI has side by side."""
    deep = text.unflatten(-1, (3, -1))
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    return {"encoder_hidden_states": deep, "encoder_hidden_states_mask": mask}, text, {}


def _chroma(text: Tensor) -> Text:
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    return {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask}, text, {"guidance": 0.0}


def _klein() -> nn.Module:
    return pipelines.flux2_transformer(timestep_guidance_channels=256, rope_theta=2000, guidance_embeds=False)


TINY = {
    "sd3": Tiny(
        kind="SD3",
        sizes=lambda: {
            "in_channels": 4,
            "patch_size": 2,
            "depth": 2,
            "input_size": None,
            "adm_in_channels": 32,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 32, "out_features": 128},
            },
            "num_patches": 64,
            "pos_embed_max_size": 8,
            "pos_embed_scaling_factor": None,
            "qk_norm": "rms",
            "x_block_self_attn_layers": [0],
        },
        net=lambda: diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=64,
            num_attention_heads=2,
            caption_projection_dim=128,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        ),
        converted=lambda weights, net: converters.convert_sd3_transformer_checkpoint_to_diffusers(weights),
        noise=(1, 4, 8, 8),
        text=_pooled,
    ),
    "z_image": Tiny(
        kind="ZImage",
        sizes=lambda: {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 4,
            "dim": 1024,  # below, the time's embedding has other widths in one than in the other
            "cap_feat_dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "qk_norm": True,
            "n_heads": 32,
            "n_kv_heads": 32,
            "axes_dims": [16, 8, 8],
            "axes_lens": [256, 32, 32],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "multiple_of": 1,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        net=lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=1024,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=32,
            n_kv_heads=32,
            cap_feat_dim=32,
            axes_dims=[16, 8, 8],
            axes_lens=[256, 32, 32],
        ),
        converted=lambda weights, net: converters.convert_z_image_transformer_checkpoint_to_diffusers(weights),
        noise=(1, 4, 8, 16),
        text=_masked,
    ),
    "lumina2": Tiny(
        kind="Lumina2",
        sizes=lambda: {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 4,
            "dim": 24,
            "cap_feat_dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "qk_norm": True,
            "n_heads": 2,
            "n_kv_heads": 1,
            "axes_dims": [4, 4, 4],
            "axes_lens": [300, 512, 512],
            "rope_theta": 10000.0,
            "ffn_dim_multiplier": 4.0,
            "multiple_of": 16,
        },
        net=lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 4, 4),
            cap_feat_dim=32,
        ),
        converted=_lumina2,
        noise=(1, 4, 8, 8),
        text=_masked,
    ),
    "wan": Tiny(
        kind="WAN21_T2V",
        sizes=lambda: {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "patch_size": (1, 2, 2),
            "dim": 24,
            "in_dim": 4,
            "out_dim": 4,
            "num_heads": 2,
            "ffn_dim": 32,
            "freq_dim": 16,
            "text_dim": 32,
            "num_layers": 2,
        },
        net=lambda: diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        converted=lambda weights, net: converters.convert_wan_transformer_to_diffusers(weights),
        noise=(1, 4, 2, 8, 8),
    ),
    "ltx": Tiny(
        kind="LTXV",
        sizes=lambda: {
            "image_model": "ltxv",
            "in_channels": 8,
            "cross_attention_dim": 32,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": 32,
            "num_layers": 2,
        },
        net=lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
        converted=lambda weights, net: converters.convert_ltx_transformer_checkpoint_to_diffusers(weights),
        noise=(1, 8, 2, 4, 4),
        text=_masked,
    ),
    "chroma": Tiny(
        kind="Chroma",
        sizes=lambda: {
            **{"image_model": "chroma", "in_channels": 16, "out_channels": 16, "context_in_dim": 32, "hidden_size": 32},
            **{"mlp_ratio": 4.0, "num_heads": 2, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2},
            **{"qkv_bias": True, "in_dim": 64, "out_dim": 32, "hidden_dim": 32, "n_layers": 1, "txt_ids_dims": []},
            **{"vec_in_dim": None, "depth": 19, "depth_single_blocks": 38},  # ComfyUI counts on as many
        },
        net=lambda: diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=19,
            num_single_layers=38,
            **pipelines.SHAPE,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        converted=_as_flux,
        noise=(1, 4, 8, 8),
        text=_chroma,
    ),
    "longcat_image": Tiny(
        kind="LongCatImage",
        sizes=lambda: {
            **{"image_model": "flux", "in_channels": 16, "out_channels": 16, "context_in_dim": 32, "hidden_size": 32},
            **{"mlp_ratio": 4.0, "num_heads": 2, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2},
            **{"qkv_bias": True, "vec_in_dim": None, "guidance_embed": False, "txt_ids_dims": [1, 2]},
            **{"depth": 2, "depth_single_blocks": 1},
        },
        net=lambda: diffusers.LongCatImageTransformer2DModel(
            in_channels=64, num_layers=2, num_single_layers=1, **pipelines.SHAPE
        ),
        converted=_as_flux,
        noise=(1, 16, 8, 8),
    ),
    "flux2_klein": Tiny(
        kind="Flux2",
        sizes=lambda: SIZES["flux2"](_klein().config)[1] | {"guidance_embed": False},
        net=_klein,
        converted=_as_flux,
        noise=(1, 16, 4, 4),
        width=48,
        words=TEXT,
    ),
    "krea2": Tiny(
        kind="Krea2",
        sizes=lambda: {
            "image_model": "krea2",
            "features": 32,
            "tdim": 8,
            "txtdim": 16,
            "heads": 2,
            "kvheads": 1,
            "multiplier": 1,
            "layers": 2,
            "patch": 2,
            "channels": 4,
            "txtlayers": 3,
            "txtheads": 2,
            "txtkvheads": 1,
        },
        net=lambda: diffusers.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=128,
            timestep_embed_dim=8,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=128,
            num_layerwise_text_blocks=2,
            num_refiner_text_blocks=2,
            axes_dims_rope=(4, 6, 6),
        ),
        converted=lambda weights, net: converters.convert_krea2_transformer_checkpoint_to_diffusers(weights),
        noise=(1, 4, 8, 8),
        width=48,
        text=_layers,
    ),
}

FAMILY = {"flux2_klein": "flux2"}
"""Family of a case that goes by another name."""

CASES = [name for name, tiny in TINY.items() if hasattr(comfy.supported_models, tiny.kind)]
"""Those that this version of ComfyUI has a model of."""
