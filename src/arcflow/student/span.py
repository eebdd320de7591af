"""Which span a call of a student has to cover: schedulers say where they are, calls ask.

A student that integrates needs to know how far the coming step goes. The scheduler that drives a loop knows it, and
announces itself in its own thread (`announce`) until its last step is taken (`withdraw`). A call of the student then
asks (`ask_for_step`), with the time that the network was given: the last announced scheduler whose coming step starts
there answers. Nothing ties a transformer to a pipeline or to a scheduler, so that copies, pipelines that share parts,
and threads with a scheduler each are all served; a call that no scheduler expects is refused.
"""

import sys
import threading
import warnings
import weakref
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from arcflow.families.guidance import clamp_guidance


@dataclass
class Call:
    """The last call of a step, as its scheduler needs to know it: whether it guides is seen when the step is taken."""

    samples: int = 0
    warning: str = ""
    """What to say if these are more than the step's, as where guidance makes one call of a doubled batch."""


class Step(NamedTuple):
    """What a scheduler says to a call."""

    span: float
    """Noise level that the step leaves behind."""
    calls: int
    """Calls made for this step, this one included."""
    first: bool
    """Whether it is the first step of a run."""
    start: float
    """Noise level at which the step starts, as it stands on the grid: a network's dtype rounds what it is given."""
    told: set[str]
    """Warnings that were given on behalf of this scheduler: each once."""
    call: Call

    def numbers(self, like: Tensor | None) -> Tensor:
        """Span and start, where a network can read them."""
        return torch.tensor([self.span, self.start], dtype=torch.float32, device=None if like is None else like.device)


@runtime_checkable
class Steps(Protocol):
    """A scheduler, as seen from a call."""

    def coming(self, sigma: float | None) -> Step | None:
        """The coming step. None if it does not start at noise level `sigma`; without one it is not asked."""
        ...


class _Thread(threading.local):
    """What one thread knows."""

    def __init__(self) -> None:
        self.announced: list[weakref.ref[Steps]] = []
        self.step: Tensor | None = None


THREAD = _Thread()


@dataclass(frozen=True)
class Meant:
    """What an adapter expects of the pipeline that it is attached to."""

    guidance: tuple[float, float] | None = None
    """The lowest and the highest guidance embedding it was distilled with; None where the network takes none."""
    unguided: str = ""
    """How the pipeline is told to make one call a step; empty if guidance by two calls is as it should be."""
    time: tuple[float, float] = (0.0, 1.0)
    """a and b where the network is told the time a + b sigma."""

    def level(self, timestep: Tensor) -> float:
        """Noise level of a call. Of a time for each token it is the greatest: parts of a video may be clean already."""
        start, rate = self.time
        return (float(timestep.max() if rate > 0 else timestep.min()) - start) / rate


def announce(steps: Steps) -> None:
    """This thread's loop is driven by this scheduler."""
    withdraw(steps)
    THREAD.announced.append(weakref.ref(steps))


def withdraw(steps: Steps) -> None:
    """This scheduler has taken its last step."""
    THREAD.announced = [known for known in THREAD.announced if known() not in (None, steps)]


def ask_for_step(sigma: float | None) -> Step:
    """The step that a call at noise level `sigma` has to cover.

    Raises:
        ValueError: no `ArcFlowScheduler` of this thread has a step that starts there.
    """
    for known in reversed(THREAD.announced):
        steps = known()
        answer = steps.coming(sigma) if steps else None
        if answer:
            return answer
    raise _nobody(sigma)


def _driver() -> object:
    """The scheduler of the pipeline from whose call this thread comes, if its transformer is a student: a run that was
    aborted leaves a scheduler at a step, and what starts there next may be driven by another."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_code.co_varnames[:1] == ("self",):
            pipe = frame.f_locals.get("self")
            networks = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
            if any(hasattr(getattr(one, "_orig_mod", one), "_arcflow") for one in networks):
                return getattr(pipe, "scheduler", None)
        frame = frame.f_back
    return None


def _nobody(sigma: float | None) -> ValueError:
    return ValueError(
        f"a student was called{'' if sigma is None else f' at noise level {sigma:.4g}'}, but no ArcFlowScheduler is at "
        f"a step that starts there: a student needs one to say how far the step goes. Is another scheduler driving "
        f"the pipeline? Give it the one that arcflow.attach made, or a copy (pipe.scheduler = "
        f"copy.deepcopy(other.scheduler)); or arcflow.detach(pipe). For the whole path of one call there is "
        f"arcflow.student.predict."
    )


def answered(timestep: Tensor | None, guidance: Tensor | None, meant: Meant) -> Step:
    """The step, once what the pipeline does has been held against what the adapter expects."""
    sigma = None if timestep is None else meant.level(timestep)
    step = ask_for_step(sigma)
    driver = _driver()
    if driver is not None and not isinstance(driver, Steps):
        raise _nobody(sigma)
    if step.first and guidance is not None and meant.guidance is not None:
        given, (low, high) = float(guidance.flatten()[0]), meant.guidance
        near = clamp_guidance(given, meant.guidance)
        if abs(given - near) > 0.01 * abs(near):
            known = f"{low:g}" if low == high else f"guidances of {low:g} to {high:g}"
            warn_once(
                step.told,
                f"the pipeline embeds guidance {given:g}, the adapter was distilled at {known}: pass "
                f"guidance_scale={near:g}",
            )
    if meant.unguided:
        twice = (
            f"the student was called twice for one step, as guidance does, and its teacher was guided already: pass "
            f"{meant.unguided} for half the time, or attach with guidance=True if it is meant"
        )
        step.call.samples = 0 if timestep is None or not timestep.ndim else len(timestep)
        step.call.warning = twice
        if step.calls == 2:
            warn_once(step.told, twice)
    return step


def warn_once(told: set[str], text: str) -> None:
    """Warn, unless it is among what was told."""
    if text not in told:
        told.add(text)
        warnings.warn(text, stacklevel=3)


@torch.library.custom_op("arcflow::hear", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _hear(
    timestep: Tensor, guidance: Tensor | None, expected: list[float], unguided: str, start: float, rate: float
) -> Tensor:
    """The time again, once the step is known to this thread: an operation that a compiled graph runs at every call, and
    first, since all that follows depends on the time."""
    known = (expected[0], expected[1]) if expected else None
    THREAD.step = answered(timestep, guidance, Meant(known, unguided, (start, rate))).numbers(timestep)
    return timestep.clone()


@_hear.register_fake
def _(
    timestep: Tensor, guidance: Tensor | None, expected: list[float], unguided: str, start: float, rate: float
) -> Tensor:
    return torch.empty_like(timestep)


@torch.library.custom_op("arcflow::heard", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _heard(features: Tensor) -> Tensor:
    """What this thread has heard; it is asked with the features, so that a graph asks last."""
    assert THREAD.step is not None, "the head of a student was called without its network"
    return THREAD.step.clone()


@_heard.register_fake
def _(features: Tensor) -> Tensor:
    return features.new_empty(2, dtype=torch.float32)


def hear(timestep: Tensor | None, guidance: Tensor | None, meant: Meant) -> tuple[Tensor | None, bool]:
    """Ask, and keep the step for this thread's head. The time to go on with, and whether it is a run's first call,
    which is not known while compiling."""
    if torch.compiler.is_compiling() and timestep is not None:
        known = list(meant.guidance or ())
        return torch.ops.arcflow.hear(timestep, guidance, known, meant.unguided, *meant.time), False
    step = answered(timestep, guidance, meant)
    THREAD.step = step.numbers(timestep)
    return timestep, step.first and step.calls == 1


def heard(features: Tensor) -> tuple[Tensor, Tensor]:
    """The span of this thread's call, and the noise level at which it starts."""
    if torch.compiler.is_compiling():
        numbers = torch.ops.arcflow.heard(features.detach())
    else:
        numbers = THREAD.step
        assert numbers is not None, "the head of a student was called without its network"
    span, start = numbers.unbind()
    return span, start
