"""Few-step sampling of flow-matching text-to-image models by momentum mixtures (ArcFlow, arXiv 2602.09014).

    arcflow.attach(pipe, "path/or/repo")          # head + LoRA + scheduler on a stock diffusers pipeline
    image = pipe("a red cube on a blue sphere", num_inference_steps=2).images[0]

Names load on first use (PEP 562), so that `import arcflow` and `arcflow --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arcflow.momentum import Mixture
    from arcflow.sampling.attach import attach, detach
    from arcflow.sampling.scheduler import ArcFlowScheduler
    from arcflow.student.adapter import load_adapter, save_adapter

__version__ = "0.2.0"
__all__ = ["ArcFlowScheduler", "Mixture", "__version__", "attach", "detach", "load_adapter", "save_adapter"]

_HOME = {
    "ArcFlowScheduler": "sampling.scheduler",
    "Mixture": "momentum",
    "attach": "sampling.attach",
    "detach": "sampling.attach",
    "load_adapter": "student.adapter",
    "save_adapter": "student.adapter",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'arcflow' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"arcflow.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
