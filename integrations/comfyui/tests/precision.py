"""What a base in fewer bits costs in ComfyUI: latents and pictures against the same student on a float32 base.

    python integrations/comfyui/tests/precision.py

The shipped adapter on the small world's teacher, KSampler (euler, simple, 2 steps). The student's own last layer is
float32 in all of them; its LoRA is merged into the weights by ComfyUI, in their type, but for GGUF files, where
ComfyUI-GGUF (if there, see `host`) adds it at each call.
"""

import json
import sys
from pathlib import Path
from typing import Any

import host

PROMPTS = (
    "a large red cube left of a small blue ball",
    "a green ball",
    "a blue cube above a red ball",
    "two yellow cubes",
)


def main() -> None:
    """Print the table as JSON."""
    sys.path.insert(0, str(host.ROOT))
    import tests.support.pipelines  # noqa: F401  # before ComfyUI's own folder `tests` is in reach

    folder = host.folder()
    if folder is None:
        sys.exit("no ComfyUI: name its folder in COMFYUI_PATH, or make one: python integrations/comfyui/tests/get.py")
    host.start(folder)
    host.nodes()
    print(json.dumps(measured(), indent=2))


def measured() -> dict[str, dict[str, float]]:
    """Relative root mean square of the latents, mean and greatest difference of the pixels in steps of 1/255."""
    import torch
    from arcflow_nodes.adapter import read
    from arcflow_nodes.patch import patched
    from cases import model_of
    from einops import rearrange

    from arcflow.families import network
    from arcflow.sampling.open import adapter_of, open_pipe

    pipe = open_pipe("world", "cpu", "float32")
    adapter = read(Path(adapter_of("world", "world")) / "adapter.safetensors")
    types: dict[str, tuple[Any, Any]] = {
        "float32": (torch.float32, None),
        "bfloat16, computed in float32": (torch.bfloat16, torch.float32),
        "bfloat16": (torch.bfloat16, None),
        "fp8 (e4m3), computed in float32": (torch.float8_e4m3fn, torch.float32),
        "fp8 (e4m3), computed in bfloat16": (torch.float8_e4m3fn, torch.bfloat16),
    }
    drawn = {}
    with torch.inference_mode():
        for name, (stored, computed) in types.items():
            drawn[name] = latents(pipe, patched(model_of("flux", pipe.transformer, stored, computed), adapter))
        for kind in ("Q8_0", "Q5_1", "Q4_0") if host.gguf_folder() else ():
            base = model_of("flux", pipe.transformer, quantized=kind)
            drawn[f"GGUF {kind}, computed in float32"] = latents(pipe, patched(base, adapter))
    tokens = {name: rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2) for name, x in drawn.items()}
    pictures = {name: network.decode(pipe, x, 64, 64).astype(float) for name, x in tokens.items()}
    wanted, right = drawn["float32"], pictures["float32"]
    return {
        name: {
            "latents_rms": float((x - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()),
            "pixels_mean": float(abs(pictures[name] - right).mean()),
            "pixels_most": float(abs(pictures[name] - right).max()),
        }
        for name, x in drawn.items()
    }


def latents(pipe: Any, model: Any) -> Any:
    """What KSampler draws of each prompt."""
    import comfy.sample
    import torch

    from arcflow.families import network

    drawn = []
    for seed, prompt in enumerate(PROMPTS):
        cond = network.encode_prompts(pipe, [prompt], height=64, width=64)
        more = {"pooled_output": cond["pooled_projections"], "guidance": 3.5}
        text = [[cond["encoder_hidden_states"], more]]
        noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
        settings = (2, 1.0, "euler", "simple", text, text, torch.zeros_like(noise))
        drawn.append(comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=seed))
    return torch.cat(drawn)


if __name__ == "__main__":
    main()
