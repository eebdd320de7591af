"""ArcFlow in vLLM-Omni: the pipelines of FLUX.1 and Qwen-Image, which take a merged mixture's own scheduler."""

PIPELINES = {
    "FluxPipeline": ("ArcFlowFluxPipeline", "get_flux_post_process_func"),
    "QwenImagePipeline": ("ArcFlowQwenImagePipeline", "get_qwen_image_post_process_func"),
}
"""Names in a folder's model_index.json -> our class, and the function behind it, in `pipelines`."""


def register() -> None:
    """Put our pipelines in the place of vLLM-Omni's; called in each of its processes, any number of times."""
    from vllm_omni.diffusion.registry import register_diffusion_model

    for name, (ours, post) in PIPELINES.items():
        register_diffusion_model(name, f"{__name__}.pipelines", ours, post_process_func_name=post)
