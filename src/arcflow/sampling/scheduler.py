"""A diffusers scheduler that walks the student's path, so that stock pipelines sample it unchanged.

`step` unpacks what the head packed on the last axis and takes the exact step x - d(0, sigma_src - sigma_dst), in
float32 (eqs. 2 and 3). The grid is our own (eq. 5, `path.step_grid`): stock pipelines hand over a uniform grid and a
shift `mu` made from the resolution, and of both only the number of steps is used.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from arcflow.momentum import unpack
from arcflow.path import SHIFT, shift_sigma, step_grid

LOGGER = logging.getLogger(__name__)


@dataclass
class ArcFlowSchedulerOutput(BaseOutput):
    """Latents after a step."""

    prev_sample: Tensor


class ArcFlowScheduler(SchedulerMixin, ConfigMixin):
    """Exact steps along a packed momentum mixture."""

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_modes: int = 16,
        shift: float = SHIFT,
        final_step_scale: float = 1.0,
        pixels: int = 4,
        num_train_timesteps: int = 1000,
        trained_steps: int | None = None,
    ) -> None:
        self.num_modes, self.pixels, self.num_train_timesteps = num_modes, pixels, num_train_timesteps
        self.shift, self.final_step_scale, self.trained_steps = shift, final_step_scale, trained_steps
        self.calls = 0
        """Student calls since the last step, counted by whoever can see them (`sampling.attach`)."""
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
        self._grid(grid, device)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> ArcFlowSchedulerOutput | tuple[Tensor]:
        """Latents at the end of the step that starts at `timestep`, in the dtype of `sample`."""
        calls, self.calls = self.calls, 0
        if calls > 1:
            raise ValueError(
                f"the student was called {calls} times for one step, as true classifier-free guidance does; mixing its "
                f"packed outputs would mix gating logits. It has guidance built in: drop negative_prompt, or set "
                f"true_cfg_scale=1."
            )
        mixture = unpack(model_output, self.num_modes, self.pixels)
        if mixture.v.shape[-1] != sample.shape[-1]:
            raise ValueError(
                f"the model output is {model_output.shape[-1]} wide, which is {self.num_modes} modes of width "
                f"{mixture.v.shape[-1]}; the latents have width {sample.shape[-1]}. Attach an adapter to the "
                f"transformer (arcflow.attach), or make the scheduler with the adapter's num_modes."
            )
        if self._step_index is None:
            self._step_index = self._index_of(timestep) if self._begin_index is None else self._begin_index
        here, there = self.sigmas[self._step_index : self._step_index + 2]
        self._step_index += 1
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        x = (x - mixture.displacement(0.0, float(here - there))).to(sample.dtype)
        return ArcFlowSchedulerOutput(prev_sample=x) if return_dict else (x,)

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
        self.calls = 0

    def _closed(self, values: np.ndarray, name: str) -> Tensor:
        """Custom levels with the end at 0."""
        if not (0 < values[-1] and values[0] <= 1 and (np.diff(values) < 0).all()):
            raise ValueError(
                f"{name} give the noise levels {values.tolist()}; expected them falling, from at most 1, above 0. "
                f"Pass num_inference_steps alone for the adapter's own grid."
            )
        return torch.from_numpy(np.append(values, np.float32(0)))

    def _index_of(self, timestep: float | Tensor) -> int:
        at = torch.as_tensor(timestep).flatten()[:1].cpu()
        hits = (self.timesteps.cpu() == at).nonzero().flatten().tolist()
        if not hits:
            raise ValueError(
                f"timestep {float(at)} is not on the grid {self.timesteps.tolist()}; pass one of scheduler.timesteps."
            )
        return hits[0]


def _float32(values: Any) -> np.ndarray:
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=np.float32)
