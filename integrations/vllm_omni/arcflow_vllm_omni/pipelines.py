"""vLLM-Omni's pipelines, which draw as ever but for one kind of folder: a mixture of `arcflow export --layout merged`.

Its scheduler configuration says `ArcFlowScheduler`. Then that scheduler takes the steps, as many as the student was
distilled for unless a request says how many, and a second call for guidance is refused: paths cannot be mixed.
"""

import os
from typing import Any

from vllm_omni.diffusion.models.flux import FluxPipeline, get_flux_post_process_func
from vllm_omni.diffusion.models.qwen_image import QwenImagePipeline, get_qwen_image_post_process_func

from .scheduling_arcflow import ArcFlowScheduler

__all__ = [
    "ArcFlowFluxPipeline",
    "ArcFlowQwenImagePipeline",
    "get_flux_post_process_func",
    "get_qwen_image_post_process_func",
]


class Steps:
    """What both pipelines do besides; stands before vLLM-Omni's class."""

    scheduler: Any

    def __init__(self, *, od_config: Any, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)
        local = os.path.isdir(od_config.model)
        config = ArcFlowScheduler.load_config(od_config.model, subfolder="scheduler", local_files_only=local)
        if config["_class_name"] == ArcFlowScheduler.__name__:
            self.scheduler = ArcFlowScheduler.from_config(config)

    @property
    def packed(self) -> bool:
        """Whether the transformer gives whole paths."""
        return isinstance(self.scheduler, ArcFlowScheduler)

    def forward(self, req: Any, *args: Any, **more: Any) -> Any:
        """Images; at the student's own number of steps where a request gives none."""
        if self.packed:
            for settings in req.sampling_params_list:
                settings.num_inference_steps = settings.num_inference_steps or self.scheduler.steps
        return super().forward(req, *args, **more)

    def predict_noise_maybe_with_cfg(self, do_true_cfg: bool, *args: Any, **more: Any) -> Any:
        """The transformer's answer, of one call."""
        if self.packed and do_true_cfg:
            raise ValueError(
                "this folder is an ArcFlow student, whose answers are whole paths and cannot be mixed: expected a "
                "request without a negative prompt. Its teacher was guided already."
            )
        return super().predict_noise_maybe_with_cfg(do_true_cfg, *args, **more)


class ArcFlowFluxPipeline(Steps, FluxPipeline):
    """FLUX.1."""


class ArcFlowQwenImagePipeline(Steps, QwenImagePipeline):
    """Qwen-Image."""
