"""ArcFlow in ComfyUI: an adapter on a stock MODEL, sampled by the stock KSampler (euler, simple) in a few steps."""

import sys

if "comfy" in sys.modules:  # else this folder is looked at outside of ComfyUI
    from .nodes import comfy_entrypoint

    __all__ = ["comfy_entrypoint"]
