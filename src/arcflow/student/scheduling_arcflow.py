"""A scheduler for folders whose transformer is a whole mixture: it takes the exact step along the path that comes out.

`arcflow export --layout merged` puts this file, with `arcflow.portable` in front, beside the configuration, so that
diffusers loads it by `trust_remote_code=True` where no arcflow is; the plugins for other engines carry the same. The
scheduler of this package's own pipelines is `sampling.scheduler`.
"""

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from arcflow.portable import mean_velocity, shift_sigma, split, step_grid


class ArcFlowScheduler(SchedulerMixin, ConfigMixin):
    """Exact steps: x - (sigma - sigma') ubar, with the mean velocity ubar of a packed path (eq. 4), in float32."""

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_modes: int = 16,
        shift: float = 3.2,
        final_step_scale: float = 1.0,
        pixels: int = 4,
        num_train_timesteps: int = 1000,
        steps: int = 2,
    ) -> None:
        self.num_modes, self.pixels, self.num_train_timesteps = num_modes, pixels, num_train_timesteps
        self.shift, self.final_step_scale, self.steps = shift, final_step_scale, steps
        self.set_timesteps(steps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | np.ndarray | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """The student's grid of a number of steps. `sigmas` are raw times, shifted here; the uniform ones that stock
        pipelines pass mean no more than their count. `mu`, a shift by the size of the image, is not used."""
        given = None if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float32).cpu()
        count = num_inference_steps or (self.steps if given is None else len(given))
        if given is None or np.allclose(given, np.linspace(1, 1 / count, count), atol=1e-5):
            grid = step_grid(count, self.shift, self.final_step_scale)
        else:
            grid = torch.cat([shift_sigma(given, self.shift), torch.zeros(1)])
        if len(grid) != count + 1 or not (grid.diff() < 0).all() or grid[0] > 1:
            raise ValueError(f"sigmas are {sigmas}; expected {count} of them, falling, from at most 1, above 0.")
        self.sigmas = grid  # on the CPU: a step reads two numbers
        self.timesteps = (grid[:-1] * self.num_train_timesteps).to(device)
        self.num_inference_steps = count
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> tuple[Tensor] | dict[str, Tensor]:
        """Latents at the end of the step that starts at `timestep`, in the dtype of `sample`."""
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        here, there = self.sigmas[self._step_index : self._step_index + 2].tolist()
        path = split(model_output.float(), self.num_modes, self.pixels)
        if path[0].shape[-1] != sample.shape[-1]:
            raise ValueError(
                f"the model output is {model_output.shape[-1]} wide, a path of width {path[0].shape[-1]}; the latents "
                f"have width {sample.shape[-1]}. This scheduler is for the transformer that it was exported with."
            )
        x = (sample.float() - (here - there) * mean_velocity(*path, 0.0, here - there)).to(sample.dtype)
        self._step_index += 1
        return {"prev_sample": x} if return_dict else (x,)

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Index of the step that starts at a time."""
        at = float(torch.as_tensor(timestep).flatten()[0])
        return int((self.sigmas[:-1] * self.num_train_timesteps - at).abs().argmin())

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """Clean latents taken to the noise level of `timestep` (image-to-image, inpainting)."""
        if self._begin_index is None:
            index = [self.index_for_timestep(one) for one in torch.as_tensor(timestep).flatten()]
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

    def set_shift(self, shift: float) -> None:
        """The adapter's own shift stays; engines that set one for every model may call this."""

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
