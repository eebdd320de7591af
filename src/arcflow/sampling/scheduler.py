"""A diffusers scheduler that walks the student's path, so that stock pipelines sample it unchanged.

It tells the student's calls how far the coming step goes (`student.span`), and takes the step with the mean velocity
that comes back: x - (sigma_src - sigma_dst) ubar, in float32. For loops of one's own `step` takes a packed path as well
(eqs. 2 and 3). Each thread needs a scheduler of its own.

The grid is our own (eq. 5, `path.step_grid`): stock pipelines hand over a uniform grid and a shift `mu` made from the
resolution, and of both only the number of steps is used.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from arcflow.momentum import unpack
from arcflow.path import SHIFT, shift_sigma, step_grid
from arcflow.student.span import Call, Step, announce, warn_once, withdraw

LOGGER = logging.getLogger(__name__)
LOCK = threading.RLock()
"""Held while a scheduler looks at or changes where it is."""
ROUNDING = 2.0**-8
"""What a time may lose on its way through a network's dtype, relative: bfloat16."""


@dataclass
class ArcFlowSchedulerOutput(BaseOutput):
    """Latents after a step."""

    prev_sample: Tensor


class ArcFlowScheduler(SchedulerMixin, ConfigMixin):
    """Exact steps along the path of a student."""

    order = 1
    init_noise_sigma = 1.0
    stock: SchedulerMixin | None = None
    """The scheduler in whose place `attach` put this one."""

    @register_to_config
    def __init__(
        self,
        num_modes: int = 16,
        shift: float = SHIFT,
        final_step_scale: float = 1.0,
        pixels: int = 4,
        num_train_timesteps: int = 1000,
        trained_steps: int | None = None,
        wide: bool = False,
    ) -> None:
        self.num_modes = num_modes
        self.pixels = pixels
        self.num_train_timesteps = num_train_timesteps
        self.shift = shift
        self.final_step_scale = final_step_scale
        self.trained_steps = trained_steps
        self.wide = wide
        self.calls = 0
        """Student calls since the last step, counted by whoever can see them (`sampling.attach`)."""
        self._told: set[str] = set()
        self._call = Call()
        self._grid(step_grid(2, shift, final_step_scale), None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | np.ndarray | Tensor | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | np.ndarray | Tensor | None = None,
    ) -> None:
        """The grid of a number of steps. `sigmas` are raw times, shifted here as the stock scheduler does; the uniform
        ones that stock pipelines pass mean no more than their count. `timesteps` are 1000 sigma, taken as they are.
        `mu` is accepted and unused: the shift is the one the adapter was trained with."""
        given = [len(values) for values in (sigmas, timesteps) if values is not None]
        count = num_inference_steps or (given[0] if given else 0)
        if count < 1 or any(n != count for n in given):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}, with {given or 'no'} custom values; expected at least "
                f"1 step and as many values. Pass num_inference_steps=2, say, alone."
            )
        if self.trained_steps and count < self.trained_steps:
            LOGGER.warning(
                "sampling in %d step(s) with an adapter trained for %d: expect worse images; take at least %d.",
                *(count, self.trained_steps, self.trained_steps),
            )
        if timesteps is not None:
            grid = self._closed(_float32(timesteps) / self.num_train_timesteps, "timesteps")
        elif sigmas is None or np.allclose(_float32(sigmas), np.linspace(1, 1 / count, count), atol=1e-5):
            grid = step_grid(count, self.shift, self.final_step_scale)
        else:
            grid = shift_sigma(self._closed(_float32(sigmas), "sigmas"), self.shift)
        with LOCK:
            self._grid(grid, device)
            self._thread = threading.get_ident()
        announce(self)

    def coming(self, sigma: float | None) -> Step | None:
        """The step that a student's call at noise level `sigma` is made for; None if none is to come from there.

        Raises:
            ValueError: another thread uses this scheduler too.
        """
        with LOCK:
            self._only_here()
            index = self._coming(None if sigma is None else sigma * self.num_train_timesteps)
            if index is None or index >= len(self.timesteps):
                return None
            if sigma is not None and abs(sigma - float(self.sigmas[index])) > ROUNDING * sigma:
                return None
            self._calls = self._calls + 1 if self._called == index else 1
            self._called = index
            start = float(self.sigmas[index])
            return Step(self._span(index), self._calls, self._step_index is None, start, self._told, self._call)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> ArcFlowSchedulerOutput | tuple[Tensor]:
        """Latents at the end of the step that starts at `timestep`, in the dtype of `sample`; of a `wide` scheduler in
        float32 at least, for pipelines that go on in it after a step in half precision."""
        velocity = model_output.shape == sample.shape
        with LOCK:
            self._only_here()
            index = self._coming(timestep)
            index = self._index_of(timestep) if index is None else index
            if index >= len(self.timesteps):
                raise ValueError(f"all {index} steps of the grid are taken; call set_timesteps before another image.")
            if velocity and self._called != index:
                raise ValueError(
                    "the model output is a velocity, but no student was called for this step. Is an adapter attached "
                    "(arcflow.attach)? Without one the pipeline needs its stock scheduler (arcflow.detach)."
                )
            span = self._span(index)
        if velocity and self._call.samples > len(sample):
            warn_once(self._told, self._call.warning)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        x = (x - self._displacement(model_output, sample, span, velocity)).to(x.dtype if self.wide else sample.dtype)
        with LOCK:
            self._only_here()
            self._called = None
            self._step_index = index + 1
            last = self._step_index == len(self.timesteps)
        withdraw(self) if last else announce(self)
        return ArcFlowSchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _displacement(self, output: Tensor, sample: Tensor, span: float, velocity: bool) -> Tensor:
        """What the latents lose in a step: from a mean velocity, or from a packed path."""
        if velocity:
            return output.to(torch.promote_types(output.dtype, torch.float32)) * span
        mixture = unpack(output, self.num_modes, self.pixels)
        if mixture.v.shape[-1] != sample.shape[-1]:
            raise ValueError(
                f"the model output is {output.shape[-1]} wide, which is {self.num_modes} modes of width "
                f"{mixture.v.shape[-1]}; the latents have width {sample.shape[-1]}. Attach an adapter to the "
                f"transformer (arcflow.attach), or make the scheduler with the adapter's num_modes."
            )
        with torch.autocast(output.device.type, enabled=False):  # in float32, whatever the network computes in
            return mixture.displacement(0.0, span)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """Clean latents taken to the noise level of `timestep` (image-to-image, inpainting)."""
        if self._begin_index is None:
            index = [self._index_of(t) for t in torch.as_tensor(timestep).flatten()]
        else:
            index = [self._begin_index if self._step_index is None else self._step_index]
        sigma = self.sigmas[index].to(sample.device, sample.dtype).view(-1, *[1] * (sample.ndim - 1))
        return sigma * noise + (1.0 - sigma) * sample

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The latents: this path needs no scaling."""
        return sample

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this step of the grid (image-to-image)."""
        with LOCK:
            self._only_here()
            self._begin_index = begin_index

    @property
    def step_index(self) -> int | None:
        """Index of the coming step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, if a pipeline set one."""
        return self._begin_index

    def __len__(self) -> int:
        return self.num_train_timesteps

    def _grid(self, sigmas: Tensor, device: str | torch.device | None) -> None:
        self.sigmas = sigmas  # on the CPU: a step reads two numbers
        self.timesteps = (sigmas[:-1] * self.num_train_timesteps).to(device)
        self.num_inference_steps = len(self.timesteps)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._called: int | None = None
        self._calls = 0
        self._thread: int | None = None
        self._shared = False

    def _only_here(self) -> None:
        """Whether this thread alone uses the scheduler since its grid was set."""
        if self._thread not in (None, threading.get_ident()):
            self._shared = True  # the other thread is told as well
        if self._shared:
            raise ValueError(
                "this scheduler is used by several threads at once, so is the pipeline around it: their images would "
                "be mixed. Give each thread a pipeline of its own, which may share all other parts: "
                "type(pipe)(**{**pipe.components, 'scheduler': copy.deepcopy(pipe.scheduler)})."
            )

    def _span(self, index: int) -> float:
        return float(self.sigmas[index] - self.sigmas[index + 1])

    def _coming(self, timestep: float | Tensor | None) -> int | None:
        """Index of the step to be taken next."""
        if self._step_index is not None:
            return self._step_index
        if self._begin_index is not None:
            return self._begin_index
        return 0 if timestep is None else self._found(timestep)

    def _found(self, timestep: float | Tensor) -> int | None:
        at = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
        apart = [abs(t - at) for t in self.timesteps.tolist()]
        index = min(range(len(apart)), key=apart.__getitem__)
        return index if apart[index] <= ROUNDING * at else None

    def _closed(self, values: np.ndarray, name: str) -> Tensor:
        """Custom levels with the end at 0."""
        if not (0 < values[-1] and values[0] <= 1 and (np.diff(values) < 0).all()):
            raise ValueError(
                f"{name} give the noise levels {values.tolist()}; expected them falling, from at most 1, above 0. "
                f"Pass num_inference_steps alone for the adapter's own grid."
            )
        return torch.from_numpy(np.append(values, np.float32(0)))

    def _index_of(self, timestep: float | Tensor) -> int:
        index = self._found(timestep)
        if index is None:
            raise ValueError(
                f"timestep {float(torch.as_tensor(timestep).flatten()[0])} is not on the grid "
                f"{self.timesteps.tolist()}; pass one of scheduler.timesteps."
            )
        return index


def _float32(values: Sequence[float] | np.ndarray | Tensor) -> np.ndarray:
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=np.float32)
