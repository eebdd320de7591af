"""A student as a plain LoRA: its factors under the names that other programs read, and the grid to draw it on.

A student in coefficients *is* its base with a LoRA at its own number of steps, the least that it was trained for
(docs/math.md, eq. 12): the file has its factors as they are, without the bends. Of a mixture, whose gates and momentum
factors look at the features, `linearized` gives what comes nearest: the gates' biases alone, averaged over its own
steps. What that loses has to be measured (`sampling.plain`).
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from arcflow.families import family_named as named_family
from arcflow.momentum import Mixture
from arcflow.path import step_grid, tau_grid
from arcflow.portable import comfyui_name
from arcflow.student.record import AdapterInfo

Keys = Literal["diffusers", "comfyui", "kohya"]

LORA = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "comfyui": "lora_comfyui.safetensors",
    "kohya": "lora_kohya.safetensors",
}
"""Name of the file: the one that diffusers looks for, and two that say what they hold."""


FLUX = ("flux", "flux2", "longcat_image")
"""Families of FLUX's network: the halves of their last norm are in one order in diffusers, in the other elsewhere."""

UNMAPPED = ("z_image", "lumina2", "wan", "ltx")
"""Families of which some version of ComfyUI knows no layer by diffusers' name."""


class Factors(NamedTuple):
    """A change of a Linear's weight, up @ down."""

    down: Float[Tensor, "rank features"]
    up: Float[Tensor, "width rank"]

    def merged(self, weight: Float[Tensor, "width features"]) -> Float[Tensor, "width features"]:
        """The weight with the change in it, in its own dtype."""
        return (weight.float() + self.up.float() @ self.down.float()).to(weight.dtype)


def factors_of(tensors: Mapping[str, Tensor], info: AdapterInfo) -> dict[str, Factors]:
    """An adapter's LoRA by the names of the Linears, its scale in the upper factors, all of one rank: programs that
    know neither scales nor several ranks read it rightly."""
    scale = info.alpha / info.rank if info.rank else 1.0
    names = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
    found = {name: Factors(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in names}
    rank = max((len(one.down) for one in found.values()), default=0)
    return {name: _widened(down, up * scale if scale != 1 else up, rank) for name, (down, up) in found.items()}


def _widened(down: Tensor, up: Tensor, rank: int) -> Factors:
    """The same change by factors of a higher rank."""
    more = rank - len(down)
    return Factors(F.pad(down, (0, 0, 0, more)), F.pad(up, (0, more))) if more else Factors(down, up)


@torch.no_grad()
def linearized(tensors: Mapping[str, Tensor], info: AdapterInfo, base: Mapping[str, nn.Linear]) -> dict[str, Factors]:
    """The LoRA that comes nearest to a student that is a mixture: a measured loss goes with it.

    Args:
        base: the base's norm's Linears and its last one, by name.
    """
    head = named_family(info.family).head
    rank = info.rank or 64
    changes = {name: tensors[f"{name}.weight"].float() for name in base if name != head}
    changes[head] = _nearest_head(tensors, info, head)
    found = factors_of(tensors, info)
    for name, weight in changes.items():
        found[name] = _low_rank(weight - base[name].weight.float().cpu(), rank)
    return found


def _nearest_head(tensors: Mapping[str, Tensor], info: AdapterInfo, head: str) -> Float[Tensor, "width features"]:
    """The weight whose product with the features is the mean velocity, gates taken at their biases, averaged
    over the student's own steps."""
    grid = step_grid(info.fewest, info.shift, info.final_step_scale)
    weight = tensors[f"{head}_means.weight"].float()
    v = weight.unflatten(0, (info.modes, -1)).permute(2, 0, 1)
    logits = tensors[f"{head}_logweights.bias"].float().view(info.modes, info.pixels).expand(len(v), -1, -1)
    log_gamma = tensors[f"{head}_loggamma.bias"].float().view(info.modes - 1, info.pixels).expand(len(v), -1, -1)
    path = Mixture(v, logits, log_gamma)
    spans = (grid[:-1] - grid[1:]).tolist()
    nearest = torch.stack([path.mean_velocity(0.0, span) for span in spans]).mean(0).T
    if named_family(info.family).patch_first:  # the base says the place in the patch first, a path the channel
        nearest = nearest.unflatten(0, (-1, info.pixels)).transpose(0, 1).flatten(0, 1)
    return nearest


def _low_rank(change: Float[Tensor, "width features"], rank: int) -> Factors:
    """The nearest product of two factors."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    root = s[:rank].sqrt()
    return _widened((root[:, None] * v[:rank]).contiguous(), (u[:, :rank] * root).contiguous(), rank)


def lora_tensors(factors: Mapping[str, Factors], keys: Keys, family: str) -> dict[str, Tensor]:
    """The tensors of a LoRA file: `transformer.<name>.lora_A.weight` as diffusers writes it; the same for ComfyUI and
    kin, with the authors' names for what they do not know by diffusers' (`portable.COMFYUI`, and the last norm of
    FLUX, whose halves they have in the other order); or `lora_transformer_<name>.lora_down.weight` with an alpha,
    kohya's way with diffusers' names (FLUX.1)."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        if keys != "kohya":
            other = comfyui_name(name, family) if keys == "comfyui" else name
            if keys == "comfyui" and family in FLUX and name == "norm_out.linear":
                other = "final_layer.adaLN_modulation.1"
                up = torch.cat(up.chunk(2)[::-1])
            known = keys == "diffusers" or (other == name and family not in UNMAPPED)
            place = f"transformer.{name}" if known else f"diffusion_model.{other}"
            tensors[f"{place}.lora_A.weight"] = down.contiguous()
            tensors[f"{place}.lora_B.weight"] = up.contiguous()
        else:
            flat = f"lora_transformer_{name.replace('.', '_')}"
            tensors[f"{flat}.lora_down.weight"] = down.contiguous()
            tensors[f"{flat}.lora_up.weight"] = up.contiguous()
            tensors[f"{flat}.alpha"] = torch.tensor(float(len(down)))
    return tensors


def stock_scheduler(info: AdapterInfo) -> dict[str, object]:
    """Configuration of diffusers' own Euler scheduler that walks the student's grid, whatever the resolution."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": info.shift,
        "use_dynamic_shifting": False,
    }


def raw_times(info: AdapterInfo) -> list[float] | None:
    """What a stock pipeline has to be given as `sigmas`; None if those that it takes by itself are right."""
    return None if info.final_step_scale == 1 else tau_grid(info.fewest, info.final_step_scale)[:-1].tolist()
