"""Putting an adapter on a stock pipeline, and taking it off again.

`attach` adds what `student.adapter.load_adapter` cannot, because it sees the transformer alone: the scheduler, which
tells the student how far each step goes, and what this pipeline has to be told so that it does not guide twice. With it
the transformer gives mean velocities, as wide as the base's own output, and all that a pipeline does with these (true
guidance, slices, a change of layout) is right as it stands.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from arcflow.families import family_of
from arcflow.sampling.scheduler import ArcFlowScheduler
from arcflow.student.adapter import draft_adapter, found_at, networks_at
from arcflow.student.build import exchange, remove
from arcflow.student.formats import PARTS, AdapterInfo
from arcflow.student.span import Meant
from arcflow.student.state import State, is_student, other_adapters, refuse_to_save, state_of, uncompiled


def attach(
    pipe: Any, path: str | Path, *, fuse: bool = False, guidance: bool = False, component: str = "transformer"
) -> Any:
    """The same pipeline, sampling in a few steps: adapter on its transformer, `ArcFlowScheduler` in its place.

    `path` is a folder, or "owner/name" or "owner/name:subfolder" on the Hugging Face Hub. With `fuse` the LoRA is added
    into copies of the weights: faster, for their memory. True classifier-free guidance works, at two calls a step; as
    most students have learned a guided teacher already, it brings a warning unless `guidance` says that it is meant.
    Where a LoRA was part of the teacher, it has to be on the pipeline before; without one there is a warning.
    `component` is the network that it goes on, where a pipeline has two: each takes an adapter of its own, and both
    walk one grid. A file that holds adapters for both (`student.adapter.join_adapters`) puts each on its network.

    Raises:
        ValueError: the adapter does not fit, or cannot be put on this pipeline as it is now. Nothing is changed then.
    """
    held = networks_at(path)
    names = held if held and component == PARTS[0] else (component,)
    lacking = [name for name in names if len(names) > 1 and getattr(pipe, name, None) is None]
    if lacking:
        raise ValueError(
            f"{path} holds adapters for {' and '.join(held)}, and this {type(pipe).__name__} has no {lacking[0]}: "
            f"expected a pipeline of both networks"
        )
    drafts = list[_Draft]()
    for name in names:
        drafts.append(_draft(pipe, path, name, name if held else "", guidance, alone=len(names) == 1))
    undo = list[Callable[[], object]]()
    try:
        for draft in drafts:
            undo.append(_way_back(pipe, draft.transformer))
            _put_on(pipe, draft, fuse)
    except BaseException:
        for back in reversed(undo[:-1]):  # the last one has put itself back
            back()
        raise
    return pipe


def _way_back(pipe: Any, transformer: ModelMixin) -> Callable[[], object]:
    """What puts a network and its pipeline back to what they are now."""
    state = state_of(transformer) if is_student(transformer) else None
    fused = state is not None and state.fused
    stock, saving = transformer.__dict__.get("_arcflow_stock"), pipe.__dict__.get("save_pretrained")
    scheduler = pipe.scheduler

    def back() -> None:
        if state:
            exchange(transformer, state, fused=fused)
        else:
            remove(transformer)
        pipe.scheduler = scheduler
        for thing, name, value in ((transformer, "_arcflow_stock", stock), (pipe, "save_pretrained", saving)):
            thing.__dict__.pop(name, None)
            if value is not None:
                thing.__dict__[name] = value

    return back


@dataclass(frozen=True)
class _Draft:
    """A student that is ready to be put on its network."""

    transformer: ModelMixin
    state: State
    info: AdapterInfo


def _draft(pipe: object, path: str | Path, component: str, network: str, guidance: bool, alone: bool) -> _Draft:
    """The student of an adapter, which fits the pipeline's network `component` as both are now. `network` is whose it
    is in a file of several."""
    transformer = _transformer(pipe, component)
    info = found_at(path, network).info
    _check_first_step(pipe)
    if alone:
        _check_grid(pipe, transformer, info)
    if info.teacher_lora and not other_adapters(transformer):
        warnings.warn(
            f"{path} was distilled from its base with a LoRA on it, which this pipeline does not have (unless fused): "
            f"pipe.load_lora_weights({info.teacher_lora!r}) before attach, to draw what its teacher draws",
            stacklevel=3,
        )
    try:
        state = draft_adapter(transformer, path, network=network)
    except ValueError as error:
        raise (None if network else _for_the_other(pipe, path, component)) or error from None
    state.head.integrates = True
    state.meant = _meant(pipe, transformer, info, guidance)
    return _Draft(transformer, state, info)


def _put_on(pipe: Any, draft: _Draft, fuse: bool) -> None:
    """Let a network be the student that was drafted for it, and the scheduler walk its grid."""
    transformer, info = draft.transformer, draft.info
    scheduler = ArcFlowScheduler(
        info.modes,
        info.shift,
        info.final_step_scale,
        info.pixels,
        trained_steps=info.fewest,
        wide=family_of(transformer).wide,
    )
    scheduler.stock = _stock(pipe.scheduler, transformer)
    exchange(transformer, draft.state, fused=fuse)
    transformer.eval()
    transformer.__dict__["_arcflow_stock"] = scheduler.stock
    pipe.scheduler = scheduler
    pipe.save_pretrained = refuse_to_save  # before it writes the other parts


def detach(pipe: Any) -> Any:
    """The pipeline as it was before `attach`, bit for bit; LoRAs that were loaded meanwhile stay."""
    transformers = [_transformer(pipe, name) for name in PARTS if getattr(pipe, name, None) is not None]
    transformer = next((one for one in transformers if hasattr(one, "_arcflow_stock")), transformers[0])
    if not isinstance(pipe.scheduler, ArcFlowScheduler) and not hasattr(transformer, "_arcflow_stock"):
        raise ValueError("no adapter is attached to this pipeline; arcflow.attach(pipe, path) puts one on.")
    stock = _stock(pipe.scheduler, transformer)
    for one in transformers:
        if is_student(one):  # else a pipeline that shares the transformer was detached before
            remove(one)
            one.__dict__.pop("_arcflow_stock", None)
    pipe.scheduler = stock
    pipe.__dict__.pop("save_pretrained", None)
    return pipe


def _check_grid(pipe: Any, transformer: ModelMixin, info: AdapterInfo) -> None:
    """Refuse an adapter for one of two networks that walks another grid than that of the other one."""
    others = [uncompiled(one) for name in PARTS if (one := getattr(pipe, name, None)) is not None]
    now = pipe.scheduler
    if not isinstance(now, ArcFlowScheduler) or not any(is_student(one) for one in others if one is not transformer):
        return
    if (now.shift, now.final_step_scale) != (info.shift, info.final_step_scale):
        raise ValueError(
            f"the adapter was trained at shift {info.shift:g}, that of the pipeline's other network at {now.shift:g}: "
            f"both walk one grid; expected the same shift"
        )


def _check_first_step(pipe: Any) -> None:
    """Refuse a pipeline whose second network stands alone and is not called at noise level 1, where students start."""
    boundary = getattr(pipe, "config", {}).get("boundary_ratio")
    if boundary is not None and boundary <= 1 and pipe.transformer is None:
        raise ValueError(
            f"this {type(pipe).__name__} has no transformer, which its boundary_ratio of {boundary:g} has called at "
            f"noise level 1, where a student starts: expected one above 1, so that transformer_2 takes every step. "
            f"Call pipe.register_to_config(boundary_ratio=1.001)."
        )


def _for_the_other(pipe: object, path: str | Path, component: str) -> ValueError | None:
    """What to say if an adapter does not fit one network of a pipeline, and fits the other one."""
    for name in PARTS:
        other = getattr(pipe, name, None)
        if name == component or other is None:
            continue
        try:
            draft_adapter(uncompiled(other), path)
        except ValueError:
            continue
        return ValueError(
            f"{path} is an adapter for the pipeline's other network: expected one for {component!r}. Give "
            f"component={name!r}."
        )
    return None


def _transformer(pipe: object, component: str = "transformer") -> ModelMixin:
    """A pipeline's transformer, under `torch.compile`."""
    if component not in PARTS:
        raise ValueError(f"component is {component!r}; expected one of {', '.join(map(repr, PARTS))}.")
    transformer = getattr(pipe, component, None)
    if transformer is None or getattr(pipe, "scheduler", None) is None:
        raise ValueError(
            f"{type(pipe).__name__} is no pipeline with a transformer and a scheduler, as a student needs: give the "
            f"whole pipeline (for a transformer alone there is arcflow.load_adapter)."
        )
    return uncompiled(transformer)


def _stock(now: SchedulerMixin, transformer: ModelMixin) -> SchedulerMixin:
    """The pipeline's own scheduler, from before the first `attach`."""
    if not isinstance(now, ArcFlowScheduler):
        return now
    return now.stock or getattr(transformer, "_arcflow_stock", now)


def _meant(pipe: object, transformer: ModelMixin, info: AdapterInfo, guidance: bool) -> Meant:
    """What the adapter expects of this pipeline."""
    embeds = bool(transformer.config.get("guidance_embeds"))
    settings = info.training.get("settings", {}).get("distill", {})
    guided = embeds or settings.get("teacher_cfg") is None or settings["teacher_cfg"] > 1
    return Meant(
        guidance=info.guidances if embeds else None,
        unguided=_unguided(pipe, transformer) if guided and not guidance else "",
        time=family_of(transformer).time,
    )


def _unguided(pipe: object, transformer: ModelMixin) -> str:
    """How this pipeline is told not to guide by a second call."""
    known = inspect.signature(type(pipe).__call__).parameters
    if "true_cfg_scale" in known:
        return "true_cfg_scale=1"
    if "guidance_scale" in known:
        return f"guidance_scale={family_of(transformer).off:g}"
    return "a guider of scale 1 (pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0)))"
