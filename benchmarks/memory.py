"""Memory to sample at 1024 x 1024 in bfloat16, computed without weights: parts, and what a call needs beside them.

    python -m benchmarks.memory

Parts are built on the meta device and called there, while a dispatch mode counts the bytes of every tensor alive.
Attention is counted as its inputs and its output, as fused kernels have it. `arcflow doctor --model` plans with these
numbers.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    CLIPTextConfig,
    CLIPTextModel,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    T5Config,
    T5EncoderModel,
)

from arcflow import student
from arcflow.families.memory import Parts
from arcflow.student import layers

SIDE = 1024
TEXT = 512


class Alive(TorchDispatchMode):
    """Bytes of the tensors made inside that are still alive, and the most there ever were."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        weights = [*module.parameters(), *module.buffers()]  # views of them cost nothing
        self.seen: weakref.WeakSet = weakref.WeakSet(tensor.untyped_storage() for tensor in weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def attention(query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
    """Shape and memory of a fused kernel."""
    return torch.empty_like(query)


@torch.no_grad()
def activations(module: nn.Module, call: Callable[[], Any]) -> int:
    """Peak bytes that a call makes beside the weights."""
    kept, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention
    try:
        with Alive(module) as alive, torch.device("meta"):
            call()
    finally:
        F.scaled_dot_product_attention = kept
    return alive.peak


def gigabytes(*modules: nn.Module) -> float:
    """Of weights in bfloat16."""
    return sum(2 * p.numel() for module in modules for p in module.parameters()) / 1e9


def tensor(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def measure(transformer: Any, text: list[nn.Module], vae: Any, inputs: dict[str, Any], latents: Tensor) -> Parts:
    """Of one model; its transformer is a student when the step is measured."""
    transformer, vae = transformer.to(torch.bfloat16), vae.to(torch.bfloat16)
    bare = gigabytes(transformer)
    with torch.device("cpu"):  # where a new head's first numbers are made
        student.build(transformer.eval(), modes=16, rank=256)
    for low in layers.lora_layers(transformer).values():  # as `load_adapter` leaves them
        low.bfloat16()
    trained = sum(p.numel() for p in student.trainable(transformer).values())
    time = {"timestep": torch.ones(1, device="meta", dtype=torch.bfloat16)}
    return Parts(
        transformer=bare,
        adapter=2 * trained / 1e9,
        text=gigabytes(*text),
        vae=gigabytes(vae),
        step=activations(transformer, lambda: transformer(**inputs, **time)) / 1e9,
        decode=activations(vae, lambda: vae.eval().decode(latents)) / 1e9,
    )


def flux_modules() -> tuple[Any, list[nn.Module], Any]:
    """Transformer, text encoders and autoencoder of FLUX.1-dev, on the device that is set."""
    t5 = T5Config(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
    }
    vae = AutoencoderKL(
        **blocks,
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return FluxTransformer2DModel(guidance_embeds=True), [T5EncoderModel(t5), CLIPTextModel(clip)], vae


def flux() -> Parts:
    """FLUX.1-dev."""
    tokens = (SIDE // 16) ** 2
    with torch.device("meta"):
        inputs = {
            "hidden_states": tensor(1, tokens, 64),
            "encoder_hidden_states": tensor(1, TEXT, 4096),
            "pooled_projections": tensor(1, 768),
            "guidance": tensor(1).float(),
            "img_ids": tensor(tokens, 3),
            "txt_ids": tensor(TEXT, 3),
        }
        return measure(*flux_modules(), inputs, tensor(1, 16, SIDE // 8, SIDE // 8))


def qwen_image() -> Parts:
    """Qwen-Image."""
    side = SIDE // 16
    with torch.device("meta"):
        text = Qwen2_5_VLConfig(
            text_config={
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "vocab_size": 152064,
            },
            vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        )
        inputs = {
            "hidden_states": tensor(1, side**2, 64),
            "encoder_hidden_states": tensor(1, TEXT, 3584),
            "img_shapes": [[(1, side, side)]],
        }
        latents = tensor(1, 16, 1, SIDE // 8, SIDE // 8)
        return measure(
            QwenImageTransformer2DModel(), [AutoModel.from_config(text)], AutoencoderKLQwenImage(), inputs, latents
        )


def flux2() -> Parts:
    """FLUX.2-dev."""
    tokens = (SIDE // 16) ** 2
    with torch.device("meta"):
        language = MistralConfig(
            hidden_size=5120,
            intermediate_size=32768,
            num_hidden_layers=40,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=131072,
        )
        text = [AutoModel.from_config(language), AutoModel.from_config(PixtralVisionConfig())]
        inputs = {
            "hidden_states": tensor(1, tokens, 128),
            "encoder_hidden_states": tensor(1, TEXT, 15360),
            "guidance": tensor(1).float(),
            "img_ids": tensor(1, tokens, 4),
            "txt_ids": tensor(1, TEXT, 4),
        }
        latents = tensor(1, 32, SIDE // 8, SIDE // 8)
        return measure(Flux2Transformer2DModel(), text, AutoencoderKLFlux2(), inputs, latents)


def parts_of_all() -> dict[str, Parts]:
    """By the names of `arcflow.memory.MODELS`."""
    return {"flux": flux(), "qwen_image": qwen_image(), "flux2": flux2()}


def main() -> None:
    names = list(Parts.__dataclass_fields__)
    print(f"{'GB':<12}" + "".join(f"{name:>13}" for name in names))
    for name, parts in parts_of_all().items():
        print(f"{name:<12}" + "".join(f"{getattr(parts, field):>13.2f}" for field in names))


if __name__ == "__main__":
    main()
