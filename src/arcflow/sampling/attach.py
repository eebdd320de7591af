"""Putting an adapter on a stock pipeline, and taking it off again.

`attach` adds what `student.adapter.load_adapter` cannot, because it sees the transformer alone: the scheduler, and a
watch over what a pipeline does with a student. Each call of the student is counted, since true classifier-free guidance
makes two for a step, and both its LoRA and its scheduler must be in place: a packed output read otherwise is noise.
"""

import warnings
import weakref
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from arcflow import student
from arcflow.sampling.scheduler import ArcFlowScheduler
from arcflow.student import layers, views
from arcflow.student.adapter import load_adapter, read_info


class _Attached(NamedTuple):
    """What `detach` needs; hangs on the transformer as `_arcflow_attached`."""

    scheduler: Any
    hook: Any


def attach(pipe: Any, path: str | Path, *, fuse: bool = False) -> Any:
    """The same pipeline, sampling in a few steps: adapter on its transformer, `ArcFlowScheduler` in its place.

    `path` is a folder, or "owner/name" or "owner/name:subfolder" on the Hugging Face Hub. With `fuse` the LoRA is added
    into copies of the weights: faster, for their memory. True classifier-free guidance (negative_prompt with
    true_cfg_scale > 1) is refused while attached: it would mix gating logits. Where a LoRA was part of the teacher, it
    has to be on the pipeline before; without one there is a warning.
    """
    transformer, info = pipe.transformer, read_info(path)
    if info.teacher_lora and not layers.other_adapters(transformer):
        warnings.warn(
            f"{path} was distilled from its base with a LoRA on it, which this pipeline does not have (unless fused): "
            f"pipe.load_lora_weights({info.teacher_lora!r}) before attach, to draw what its teacher draws",
            stacklevel=2,
        )
    fewest = min((info.steps, *info.also_steps))
    scheduler = ArcFlowScheduler(info.modes, info.shift, info.final_step_scale, info.pixels, trained_steps=fewest)
    # a student keeps its stock scheduler through a second attach
    attached: _Attached | None = getattr(transformer, "_arcflow_attached", None)
    load_adapter(transformer, path)
    if fuse:
        student.fuse(transformer)

    owner = weakref.ref(pipe)

    def count(module: nn.Module, *_: Any) -> None:
        if views.in_teacher_view(module):
            return
        scheduler.calls += 1
        if not views.is_whole(module):
            raise ValueError(
                f"the student's LoRA {layers.ADAPTER!r} is switched off, its output head is not; loading or fusing "
                f"another LoRA does that. Name both: pipe.set_adapters([{layers.ADAPTER!r}, ...]), or fuse both."
            )
        now = getattr(owner(), "scheduler", scheduler)
        if now is not scheduler:
            raise ValueError(
                f"the pipeline's scheduler is now {type(now).__name__}, its transformer still a student whose packed "
                f"output only ArcFlowScheduler reads. Keep attach's scheduler, or arcflow.detach(pipe) first."
            )

    if attached:
        attached.hook.remove()
    stock = attached.scheduler if attached else pipe.scheduler
    transformer._arcflow_attached = _Attached(stock, transformer.register_forward_hook(count))
    pipe.scheduler = scheduler
    return pipe


def detach(pipe: Any) -> Any:
    """The pipeline as it was before `attach`, bit for bit."""
    transformer = pipe.transformer
    if not hasattr(transformer, "_arcflow_attached"):
        raise ValueError("no adapter is attached to this pipeline; arcflow.attach(pipe, path) puts one on.")
    student.remove(transformer)
    attached = transformer._arcflow_attached
    attached.hook.remove()
    pipe.scheduler = attached.scheduler
    del transformer._arcflow_attached
    return pipe
