"""What differs between backbones, as data: one row of `FAMILIES` per diffusers transformer class.

A row says where the last layers are, which Linears take a LoRA, how many pixels a token packs, and which functions turn
prompts into conditioning and latents into images. Above this file a model is two callables of (x, sigma, cond); `cond`
is a dict of tensors whose first axis is the batch, but for position ids (`*_ids`), which all samples share.
`call` rounds time exactly as the stock pipelines do: they cast 1000 sigma to the dtype of the latents before dividing
it again (in bfloat16 761.9 becomes 760), so that teacher, student and pipeline see the same number.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import get_parameter_dtype
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from arcflow.config import Targets
from arcflow.parallel import whole

Cond = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One backbone: names, places and the functions that know its conditioning."""

    name: str
    transformer: str
    """Class name of the stock diffusers transformer."""
    pipeline: str
    """Class name of its text-to-image pipeline."""
    published: str
    """Class name in the config.json of a published adapter; empty where nobody has published any."""
    embedder: str
    """First Linear on the latents: what it computes in, the network does."""
    lora_targets: str
    """Regular expression for the full names of the Linears that take a LoRA. Never the output head, see `head`."""
    lora_skip: str
    """The same for Linears whose output nobody reads; `{last}` is the index of the last block. Empty: none."""
    guidance: float | None
    """Guidance embedding the adapters are distilled with; None where there is no such input."""
    arguments: Callable[[Cond], dict[str, Any]]
    """Conditioning as keyword arguments of the transformer."""
    encode: Callable[[Any, list[str], int, Any], Cond]
    """(pipe, prompts, text tokens, device of the text encoders) -> what these make of them, a row for each."""
    places: Callable[[Cond, int, int], Cond]
    """(that, rows and columns of tokens) -> where text and picture stand."""
    text_length: Callable[[Any], int]
    """(pipe) -> text tokens its encoder reads at most."""
    to_vae: Callable[[Any, Tensor], Tensor]
    """(pipe, latents (B, C, h, w)) -> images (B, 3, H, W) in [-1, 1]."""
    from_vae: Callable[[Any, Tensor], Tensor]
    """The way back, to the mean of what the encoder gives."""
    head: str = "proj_out"
    norm: str = "norm_out"
    pixels: int = 4
    """Latent pixels per token, P: a patch of 2 x 2."""
    packs: bool = True
    """Whether noise is drawn as pixels and packed into tokens; else its channels are the tokens'."""


def _flux_arguments(cond: Cond) -> dict[str, Any]:
    return dict(cond)


def _flux_encode(pipe: Any, prompts: list[str], length: int, device: Any) -> Cond:
    embeds, pooled, _ = pipe.encode_prompt(prompt=prompts, prompt_2=None, max_sequence_length=length, device=device)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _flux_places(text: Cond, rows: int, columns: int) -> Cond:
    embeds = text["encoder_hidden_states"]
    img_ids = embeds.new_zeros(rows, columns, 3)
    img_ids[..., 1] += torch.arange(rows, device=embeds.device)[:, None]
    img_ids[..., 2] += torch.arange(columns, device=embeds.device)[None, :]
    return {"txt_ids": embeds.new_zeros(embeds.shape[1], 3), "img_ids": img_ids.flatten(0, 1)}


def _flux_text_length(pipe: Any) -> int:
    return min(512, pipe.tokenizer_2.model_max_length)


def _flux_to_vae(pipe: Any, latents: Tensor) -> Tensor:
    config = pipe.vae.config
    latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
    return pipe.vae.decode(latents.to(pipe.vae.device, pipe.vae.dtype), return_dict=False)[0]


def _flux_from_vae(pipe: Any, images: Tensor) -> Tensor:
    config = pipe.vae.config
    return (pipe.vae.encode(images).latent_dist.mode() - (config.shift_factor or 0.0)) * config.scaling_factor


def _qwen_arguments(cond: Cond) -> dict[str, Any]:
    mask = cond["encoder_hidden_states_mask"]
    return {
        "encoder_hidden_states": cond["encoder_hidden_states"],
        # as the stock pipeline: padding is masked, and without any there is no mask
        "encoder_hidden_states_mask": None if bool(mask.all()) else mask,
        "img_shapes": [[tuple(shape)] for shape in cond["img_shapes"].tolist()],
    }


def _qwen_encode(pipe: Any, prompts: list[str], length: int, device: Any) -> Cond:
    embeds, mask = pipe.encode_prompt(prompt=prompts, max_sequence_length=length, device=device)
    mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask.bool()}


def _qwen_places(text: Cond, rows: int, columns: int) -> Cond:
    return {"img_shapes": torch.tensor([[1, rows, columns]] * len(text["encoder_hidden_states"]))}


def _flux2_encode(pipe: Any, prompts: list[str], length: int, device: Any) -> Cond:
    embeds, _ = pipe.encode_prompt(prompt=prompts, max_sequence_length=length, device=device)
    return {"encoder_hidden_states": embeds}


def _flux2_places(text: Cond, rows: int, columns: int) -> Cond:
    embeds = text["encoder_hidden_states"]

    def cells(*sizes: int) -> Tensor:
        return torch.cartesian_prod(*(torch.arange(n, device=embeds.device) for n in sizes))

    return {"txt_ids": cells(1, 1, 1, embeds.shape[1]), "img_ids": cells(1, rows, columns, 1)}


def _flux2_to_vae(pipe: Any, latents: Tensor) -> Tensor:
    vae = pipe.vae
    latents = rearrange(latents, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2).to(vae.device, vae.dtype)
    mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    latents = latents * std[:, None, None] + mean[:, None, None]
    return vae.decode(rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2), return_dict=False)[0]


def _flux2_from_vae(pipe: Any, images: Tensor) -> Tensor:
    vae = pipe.vae
    latents = rearrange(vae.encode(images).latent_dist.mode(), "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
    mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    latents = (latents - mean[:, None, None]) / std[:, None, None]
    return rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)


def _longest(pipe: Any) -> int:
    return 512


def _qwen_to_vae(pipe: Any, latents: Tensor) -> Tensor:
    config = pipe.vae.config
    latents = latents.to(pipe.vae.device, pipe.vae.dtype)
    mean, std = (torch.tensor(v).to(latents)[:, None, None] for v in (config.latents_mean, config.latents_std))
    return pipe.vae.decode((latents / (1.0 / std) + mean).unsqueeze(2), return_dict=False)[0][:, :, 0]


def _qwen_from_vae(pipe: Any, images: Tensor) -> Tensor:
    config = pipe.vae.config
    latents = pipe.vae.encode(images.unsqueeze(2)).latent_dist.mode()[:, :, 0]
    mean, std = (torch.tensor(v).to(latents)[:, None, None] for v in (config.latents_mean, config.latents_std))
    return (latents - mean) / std


_TIME = r"time_(text|guidance)_embed\.timestep_embedder\.linear_[12]"
_EVERY = r"(time_(text|guidance)_embed|(single_)?transformer_blocks)\..*"

FAMILIES = (
    Family(
        name="flux",
        transformer="FluxTransformer2DModel",
        pipeline="FluxPipeline",
        published="ArcFluxTransformer2DModel",
        embedder="x_embedder",
        lora_targets=_TIME
        + r"|transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
        + r"|single_transformer_blocks\.\d+\.proj_(mlp|out)",
        lora_skip="",
        guidance=3.5,
        arguments=_flux_arguments,
        encode=_flux_encode,
        places=_flux_places,
        text_length=_flux_text_length,
        to_vae=_flux_to_vae,
        from_vae=_flux_from_vae,
    ),
    Family(
        name="qwen_image",
        transformer="QwenImageTransformer2DModel",
        pipeline="QwenImagePipeline",
        published="ArcQwenImageTransformer2DModel",
        embedder="img_in",
        lora_targets=_TIME + r"|transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2)",
        # the text stream ends before these
        lora_skip=r"transformer_blocks\.{last}\.(txt_mlp\..*|attn\.(add_q_proj|to_add_out))",
        guidance=None,
        arguments=_qwen_arguments,
        encode=_qwen_encode,
        places=_qwen_places,
        text_length=_longest,
        to_vae=_qwen_to_vae,
        from_vae=_qwen_from_vae,
    ),
    Family(
        name="flux2",
        transformer="Flux2Transformer2DModel",
        pipeline="Flux2Pipeline",
        published="",
        embedder="x_embedder",
        lora_targets=_TIME
        + r"|transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)"
        # attention and feed-forward share their Linears here
        + r"|single_transformer_blocks\.\d+\.attn\.to_(qkv_mlp_proj|out)",
        lora_skip="",
        guidance=4.0,
        arguments=_flux_arguments,
        encode=_flux2_encode,
        places=_flux2_places,
        text_length=_longest,
        to_vae=_flux2_to_vae,
        from_vae=_flux2_from_vae,
        packs=False,
    ),
)


def family_of(transformer: nn.Module) -> Family:
    """The row of `FAMILIES` for this transformer."""
    for family in FAMILIES:
        if any(base.__name__ == family.transformer for base in type(transformer).__mro__):
            return family
    supported = ", ".join(family.transformer for family in FAMILIES)
    raise ValueError(
        f"{type(transformer).__name__} is not a supported backbone; expected one of {supported}. "
        f"Pass the pipeline's `transformer`, or add a row to arcflow.backbone.FAMILIES."
    )


def lora_names(transformer: nn.Module, targets: Targets = "feed_forward") -> list[str]:
    """Full names of the Linears that take a LoRA; of a student, that have one."""
    if targets == "full":
        return []
    family = family_of(transformer)
    wanted = family.lora_targets if targets == "feed_forward" else _EVERY
    blocks: Any = transformer.transformer_blocks
    skip = family.lora_skip.replace("{last}", str(len(blocks) - 1))
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    names = [name.removesuffix(".base_layer") for name in linears if ".lora_" not in name]
    return [name for name in names if re.fullmatch(wanted, name) and not re.fullmatch(skip, name)]


def compute_dtype(transformer: nn.Module) -> torch.dtype:
    """The dtype the network computes in, whatever its weights are stored as (8 or 4 bits, layerwise casting)."""
    embedder = getattr(transformer, family_of(transformer).embedder)
    return _dtype_of(getattr(embedder, "frozen", embedder))  # a student may have tuned it too


def _dtype_of(linear: Any) -> torch.dtype:
    declared = getattr(linear, "compute_dtype", None)  # GGUF, and bitsandbytes in 4 bits
    dtype = declared or get_parameter_dtype(linear)
    return dtype if dtype.is_floating_point else torch.bfloat16  # bitsandbytes in 8 bits, without a bias


def quantized(module: nn.Module) -> bool:
    """Whether a module holds weights that are not plain numbers."""
    return any(type(parameter) not in (nn.Parameter, DTensor) for parameter in module.parameters())


def dense(module: nn.Module) -> Any:
    """A copy in float32, quantized Linears as plain ones."""
    if isinstance(module, nn.Linear):
        linear: Any = nn.utils.skip_init(
            nn.Linear, module.in_features, module.out_features, module.bias is not None, device=module.weight.device
        )
        with torch.no_grad():
            linear.weight.copy_(whole(_weight(module)))
            if module.bias is not None:
                linear.bias.copy_(whole(module.bias))
        return linear
    children = {id(child): dense(child) for child in module.children()}
    return copy.deepcopy(module, children).float()  # a memo: the children are not copied again


@torch.no_grad()
def _weight(linear: nn.Linear) -> Tensor:
    """Of a quantized Linear, whoever made it: what it makes of the identity."""
    if not quantized(linear):
        return linear.weight
    unbiased = copy.copy(linear)
    unbiased._parameters = {**linear._parameters, "bias": None}
    dtype = _dtype_of(linear)
    return unbiased(torch.eye(linear.in_features, device=linear.weight.device, dtype=dtype)).T


def call(
    transformer: nn.Module, x: Float[Tensor, "batch tokens width"], sigma: float | Float[Tensor, " batch"], cond: Cond
) -> Float[Tensor, "batch tokens out"]:
    """Raw output of the network at noise level `sigma`, with the stock pipeline's casts."""
    family, dtype = family_of(transformer), compute_dtype(transformer)
    time = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x)) * 1000
    return transformer(
        hidden_states=x.to(dtype),
        timestep=time.to(dtype) / 1000,
        return_dict=False,
        **family.arguments(cond),
    )[0]


def encode_prompts(
    pipe: Any,
    prompts: list[str],
    *,
    height: int,
    width: int,
    guidance: float | None = None,
    max_sequence_length: int | None = None,
) -> Cond:
    """Conditioning of a batch of prompts for images of this size, by the pipeline's own text encoders. `guidance` and
    the length are the family's unless given."""
    text = encode_text(pipe, prompts, max_sequence_length)
    return place(pipe, text, height=height, width=width, guidance=guidance)


@torch.no_grad()
def encode_text(pipe: Any, prompts: list[str], max_sequence_length: int | None = None, device: Any = None) -> Cond:
    """What the pipeline's text encoders make of prompts, a row for each: conditioning without picture and guidance.
    `device` is theirs, if it is not that of the pipeline."""
    family = family_of(pipe.transformer)
    return family.encode(pipe, prompts, max_sequence_length or family.text_length(pipe), device)


def place(pipe: Any, text: Cond, *, height: int, width: int, guidance: float | None = None) -> Cond:
    """Conditioning made whole: encoded prompts, for images of this size, at this guidance."""
    family = family_of(pipe.transformer)
    cond = text | family.places(text, *_grid(pipe, height, width))
    if pipe.transformer.config.get("guidance_embeds"):
        embeds = text["encoder_hidden_states"]
        scale = guidance if guidance is not None else family.guidance or 1.0
        cond["guidance"] = torch.full((len(embeds),), scale, device=embeds.device, dtype=torch.float32)
    return cond


def noise(pipe: Any, seeds: list[int], height: int, width: int) -> Float[Tensor, "batch tokens width"]:
    """Starting latents, float32 on the CPU: sample i is what the stock pipeline (in float32) draws from
    `torch.Generator("cpu").manual_seed(seeds[i])`, whatever the rest of the batch."""
    rows, columns = _grid(pipe, height, width)
    p = 2 if family_of(pipe.transformer).packs else 1
    shape = (pipe.transformer.config.in_channels // p**2, p * rows, p * columns)
    draws = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    return rearrange(torch.stack(draws), "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)


@torch.no_grad()
def decode(
    pipe: Any, x: Float[Tensor, "batch tokens channels"], height: int, width: int
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Images of packed latents, by the pipeline's own autoencoder."""
    rows, columns = _grid(pipe, height, width)
    if x.shape[1] != rows * columns:
        raise ValueError(
            f"{x.shape[1]} tokens do not make an image of {height} x {width}: expected {rows} x {columns} tokens. "
            f"Give the height and width the latents were made for."
        )
    latents = rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2)
    images = family_of(pipe.transformer).to_vae(pipe, latents)
    return _to_uint8(images)


@torch.no_grad()
def encode_pictures(
    pipe: Any, images: UInt8[np.ndarray, "batch height width 3"]
) -> Float[Tensor, "batch tokens channels"]:
    """Packed latents of pictures, by the pipeline's own autoencoder; float32."""
    unit = torch.from_numpy(images).permute(0, 3, 1, 2).to(pipe.vae.device, pipe.vae.dtype) / 127.5 - 1
    latents = family_of(pipe.transformer).from_vae(pipe, unit).float()
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def _to_uint8(images: Float[Tensor, "batch 3 height width"]) -> UInt8[np.ndarray, "batch height width 3"]:
    unit = (images.float() * 0.5 + 0.5).clamp(0, 1)
    return (rearrange(unit, "b c h w -> b h w c").cpu().numpy() * 255).round().astype(np.uint8)


def _grid(pipe: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens: a token covers 2 x 2 latent pixels."""
    patch = 2 * pipe.vae_scale_factor
    if height % patch or width % patch or min(height, width) < patch:
        raise ValueError(f"image size {height} x {width}: both must be multiples of {patch} for this pipeline.")
    return height // patch, width // patch
