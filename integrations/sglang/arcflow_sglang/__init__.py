"""ArcFlow in SGLang-Diffusion: the scheduler that a merged mixture's folder names, where SGLang looks for it.

SGLang imports this package once in each process if `SGLANG_EXTERNAL_MODEL_PACKAGE=arcflow_sglang`.
"""

from sglang.multimodal_gen.runtime.models.registry import ModelRegistry

ModelRegistry.register_model("ArcFlowScheduler", f"{__name__}.scheduling_arcflow:ArcFlowScheduler")
