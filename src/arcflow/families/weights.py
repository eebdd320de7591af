"""A network's weights as they are stored: which Linears take a LoRA, what a quantized one computes."""

import copy
import re
from typing import overload

import torch
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from arcflow.config import Targets
from arcflow.families import family_of
from arcflow.families.family import Family
from arcflow.system.processes import whole

JOINED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""What diffusers' `fuse_qkv_projections` makes of an attention's Linears, which stay beside it."""


def lora_names(transformer: nn.Module, targets: Targets = "feed_forward") -> list[str]:
    """Full names of the Linears that take a LoRA; of a student, that have one."""
    if targets == "full":
        return []
    family = family_of(transformer)
    wanted = family.lora_targets if targets == "feed_forward" else family.every
    blocks = list(transformer.get_submodule(family.blocks).children())
    skip = family.lora_skip.replace("{last}", str(len(blocks) - 1))
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    names = [name.removesuffix(".base_layer") for name in linears if ".lora_" not in name]
    own = [name for name in names if name.rpartition(".")[2] not in JOINED]
    return [name for name in own if re.fullmatch(wanted, name) and not re.fullmatch(skip, name)]


def compute_dtype(transformer: nn.Module, family: Family | None = None) -> torch.dtype:
    """The dtype the network computes in, whatever its weights are stored as (8 or 4 bits, layerwise casting)."""
    family = family or family_of(transformer)
    embedder = transformer.get_submodule(family.embedder)
    base = getattr(embedder, "frozen", None)  # a student may have tuned it too; in quanto it is a flag
    return _dtype_of(base if isinstance(base, nn.Module) else embedder)


def _dtype_of(linear: nn.Module) -> torch.dtype:
    declared = getattr(linear, "compute_dtype", None)  # GGUF, and bitsandbytes in 4 bits
    dtype = declared or get_parameter_dtype(linear)
    return dtype if dtype.is_floating_point else torch.bfloat16  # bitsandbytes in 8 bits, without a bias


def quantized(module: nn.Module) -> bool:
    """Whether a module holds weights that are not plain numbers."""
    return any(type(parameter) not in (nn.Parameter, DTensor) for parameter in module.parameters())


@overload
def dense(module: nn.Linear) -> nn.Linear: ...


@overload
def dense(module: nn.Module) -> nn.Module: ...


def dense(module: nn.Module) -> nn.Module:
    """A copy in float32, quantized Linears as plain ones."""
    if isinstance(module, nn.Linear):
        linear = nn.utils.skip_init(
            nn.Linear, module.in_features, module.out_features, module.bias is not None, device=module.weight.device
        )
        assert isinstance(linear, nn.Linear)  # skip_init says a module
        with torch.no_grad():
            linear.weight.copy_(whole(_weight(module)))
            if module.bias is not None:
                linear.bias.copy_(whole(module.bias))
        return linear
    children = {id(child): dense(child) for child in module.children()}
    return copy.deepcopy(module, children).float()  # a memo: the children are not copied again


@torch.no_grad()
def _weight(linear: nn.Linear) -> Tensor:
    """Weight of a Linear; of a quantized one, whoever made it, what it makes of the identity."""
    if not quantized(linear):
        return linear.weight
    unbiased = copy.copy(linear)
    unbiased._parameters = {**linear._parameters, "bias": None}
    dtype = _dtype_of(linear)
    return unbiased(torch.eye(linear.in_features, device=linear.weight.device, dtype=dtype)).T
