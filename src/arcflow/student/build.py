"""One network that is teacher and student.

`build` turns a stock transformer into a student in place: the base is frozen, the last Linear and those of the norm
before it get a tuned twin under the same name, and Linears get a LoRA. Nothing is subclassed, so stock pipelines go on
working, and no second copy of the base is held.

    student  = predict(net, x, sigma, cond)                 # a Mixture, with gradient
    with teacher(net): u = net(...)                         # the untouched base, bit for bit

The teacher view flips flags and leaves `requires_grad` alone. Be back in the student view before `backward()`:
checkpointed blocks are computed again there. Parameters go by the names of the published adapters
(`proj_out_means.weight`, `<module>.lora_A.weight`, ...). Source: arXiv 2602.09014, section 4."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from arcflow import paper
from arcflow.config import Form, Targets
from arcflow.families import family_of
from arcflow.families.weights import dense, lora_names
from arcflow.path import step_grid
from arcflow.student.attached import put_on, take_off
from arcflow.student.checks import check_at_hand
from arcflow.student.coefficients import CoefficientHead, Grids
from arcflow.student.fuse import check_fusible, fuse, unfuse
from arcflow.student.head import Affine, MomentumHead
from arcflow.student.layers import BentHead, Fork, Head, LowRank, Tuned
from arcflow.student.places import base_linear, end_ranks, frozen_module, norm_linears, twin_names
from arcflow.student.span import Meant
from arcflow.student.state import State, is_student, state_of
from arcflow.system.text import few


def build(
    transformer: nn.Module,
    *,
    modes: int = paper.MODES,
    rank: int = paper.RANK,
    alpha: float | None = None,
    dropout: float = paper.DROPOUT,
    lora: bool = True,
    targets: Targets = "feed_forward",
    form: Form = "mixture",
    grids: Grids = (),
    generator: torch.Generator | None = None,
) -> nn.Module:
    """The same transformer, now a student that starts as its teacher. Without `lora` only head and norm are tuned; with
    `targets` "full" there is none, and every weight has a tuned twin in float32. `alpha` is the rank unless given. All
    draws are from `generator`, in float32 on the CPU. In the form "coefficients" norm and last layer learn by LoRA too,
    and `grids` has the noise levels of the student's own steps (two, unless given)."""
    if is_student(transformer):
        raise ValueError("this transformer is a student already; call arcflow.student.remove(transformer) first.")
    design = Design(
        modes=modes,
        rank=rank if lora else 0,
        alpha=alpha,
        dropout=dropout,
        lora=lora,
        targets=targets,
        form=form,
        grids=grids,
    )
    put_on(transformer, draft(transformer, design, generator))
    return transformer


@dataclass(frozen=True, kw_only=True)
class Design:
    """What a student is to be like, whatever its base: the arguments of `build`."""

    modes: int
    rank: int
    """Rank of the LoRA; 0 without one."""
    alpha: float | None
    dropout: float
    lora: bool
    targets: Targets
    form: Form
    grids: Grids


def draft(transformer: nn.Module, design: Design, generator: torch.Generator | None) -> State:
    """The student that `build` would put on this transformer, which is left alone: it may be a student already."""
    family = family_of(transformer)
    if design.lora and design.rank < 1:
        raise ValueError(
            f"rank is {design.rank}; expected at least 1 ({paper.RANK} in the published adapters), or lora=False."
        )
    check_takes_one(transformer)
    if design.form == "coefficients" and not design.lora:
        raise ValueError("a student in coefficients is its base with a LoRA; expected one. Leave lora as it is.")

    lows = _lora(transformer, design, generator)
    whole = twin_names(transformer) if design.targets == "full" else []
    twins = {name: Fork(frozen_module(transformer, name), dense(frozen_module(transformer, name))) for name in whole}
    head = _head(transformer, design, generator)
    norm = norm_linears(transformer) if design.form == "mixture" else []
    tuned: dict[str, Tuned] = {name: _tuned(base_linear(transformer, name)) for name in norm}
    tuned[family.head] = head  # the last one, as it is in the network
    return State(
        family=family,
        modes=design.modes,
        pixels=math.prod(family.patch_of(transformer)),
        targets=design.targets,
        form=design.form,
        rank=design.rank if lows else 0,
        alpha=_alpha(design) if lows else 0.0,
        lows=lows,
        tuned=tuned,
        twins=twins,
        head=head,
        meant=Meant(time=family.time),
    )


def _alpha(design: Design) -> float:
    """The scale of a LoRA times its rank: the rank unless given."""
    return float(design.alpha or design.rank)


def _lora(transformer: nn.Module, design: Design, generator: torch.Generator | None) -> dict[str, LowRank]:
    """The LoRA by the names of the Linears, drawn in their order."""
    names = lora_names(transformer, design.targets) if design.lora else []
    ranks = dict.fromkeys(names, design.rank)
    if design.form == "coefficients":
        ranks |= end_ranks(transformer, design.rank)
    scale = _alpha(design) / design.rank if ranks else 1.0
    return {
        name: _low_rank(base_linear(transformer, name), own, scale, design.dropout, generator)
        for name, own in ranks.items()
    }


def _head(transformer: nn.Module, design: Design, generator: torch.Generator | None) -> Head:
    """The last Linear and its tuned twin, which starts as that."""
    family = family_of(transformer)
    base = base_linear(transformer, family.head)
    pixels = math.prod(family.patch_of(transformer))
    patch_first = pixels if family.patch_first else 0
    if design.form == "coefficients":
        grids = design.grids or (tuple(step_grid(2).tolist()),)
        bends = CoefficientHead(base.in_features, design.modes, base.out_features, grids, base.weight.device)
        return BentHead(base, bends, patch_first)
    start = _channel_first(dense(base), patch_first)
    return Head(base, MomentumHead.from_linear(start, design.modes, pixels, generator), patch_first)


def _tuned(linear: nn.Linear) -> Tuned:
    """A Linear of the norm and its trainable twin, with the same weights."""
    return Tuned(linear, _affine(dense(linear)))


def check_takes_one(transformer: nn.Module) -> None:
    """Whether a student can be put on this transformer as it is now.

    A network that was made without weights, whole on the meta device, takes one: its sizes are counted that way.

    Raises:
        ValueError: its work is split over processes already, or offloading has taken its weights away, or its Linears
            keep none that can be read.
    """
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError(
            "this transformer's work is split over processes already, and the student's head would not gather its "
            "share; attach the adapter first, then call enable_parallelism."
        )
    check_at_hand(transformer)
    away = [name for name, parameter in transformer.named_parameters() if parameter.is_meta]
    # Offloading puts a hook on each module that brings its weights back for the call.
    offloaded = any(hasattr(module, "_hf_hook") for module in transformer.modules())
    whole = len(away) == sum(1 for _ in transformer.parameters())
    if away and (offloaded or not whole):
        raise ValueError(
            f"weights of this transformer are not there ({few(away)} on the meta device), as sequential offload leaves "
            f"them: attach before offloading, or call pipe.remove_all_hooks() first."
        )
    if not isinstance(getattr(base_linear(transformer, family_of(transformer).head), "weight", None), torch.Tensor):
        raise ValueError(
            "the Linears of this transformer keep no weights that can be read, as after "
            "torch.ao.quantization.quantize_dynamic: expected plain ones, or those of a loader of diffusers "
            "(bitsandbytes, torchao, GGUF, quanto)."
        )


def _low_rank(linear: nn.Linear, rank: int, scale: float, dropout: float, generator: torch.Generator | None) -> LowRank:
    """A LoRA that starts at nothing, float32: down is normal with standard deviation 1/rank, up zero."""
    device = linear.weight.device
    down = torch.randn(rank, linear.in_features, generator=generator) / rank
    return LowRank(down.to(device), torch.zeros(linear.out_features, rank, device=device), scale, dropout)


def _channel_first(linear: nn.Linear, patch_first: int) -> nn.Linear:
    """The same Linear, whose rows go by the channel first and the place in the patch then."""
    if patch_first:
        with torch.no_grad():
            for parameter in linear.parameters():
                rows = parameter.unflatten(0, (patch_first, -1)).transpose(0, 1).flatten(0, 1)
                parameter.copy_(rows)
    return linear


def _affine(linear: nn.Linear) -> Affine:
    """The same weights, trainable."""
    affine = Affine(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    affine.weight = nn.Parameter(linear.weight.detach())
    if linear.bias is not None:
        affine.bias = nn.Parameter(linear.bias.detach())
    return affine


def exchange(transformer: nn.Module, state: State, *, fused: bool = False) -> None:
    """Put a student on, in the place of one that may be there; if that fails, all is as it was before."""
    if fused:
        check_fusible(transformer, list(state.lows))
    before, before_fused = None, False
    if is_student(transformer):
        before_fused = state_of(transformer).fused
        unfuse(transformer)
        before = take_off(transformer)
    try:
        put_on(transformer, state)
        if fused:
            fuse(transformer)
    except BaseException:
        if is_student(transformer):
            take_off(transformer)
        if before:
            put_on(transformer, before)
            if before_fused:
                fuse(transformer)
        raise


def remove(transformer: nn.Module) -> nn.Module:
    """The untouched base again, bit for bit."""
    state_of(transformer)
    check_at_hand(transformer)
    unfuse(transformer)
    take_off(transformer)
    return transformer
