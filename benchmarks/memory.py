"""Memory to sample at 1024 x 1024 in bfloat16, computed without weights: parts, and what a call needs beside them.

    python -m benchmarks.memory              # all models; minutes on a core
    python -m benchmarks.memory sd3 wan

Videos are of `VIDEO` pixels, and of several numbers of frames.

Parts are built on the meta device and called there, while a dispatch mode counts the bytes of every tensor alive.
Attention is counted as its inputs and its output, as fused kernels have it. `arcflow doctor --model` plans with these
numbers.
"""

import math
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
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
    CLIPTextModelWithProjection,
    Gemma2Config,
    Mistral3Config,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from arcflow import student
from arcflow.families.memory import Parts
from arcflow.student.state import lora_layers, state_of
from benchmarks.full_size import MODELS

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
        if func is torch.ops.aten.where.self and any(choice.is_meta for choice in args):
            args = [choice.to("meta") for choice in args]  # Qwen-Image 2.1 chooses by a mask that has its numbers
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
    kept = F.scaled_dot_product_attention, torch.autocast
    F.scaled_dot_product_attention = attention
    torch.autocast = lambda *_, **__: nullcontext()  # type: ignore[assignment]  # the meta device has none
    try:
        with Alive(module) as alive, torch.device("meta"):
            call()
    finally:
        F.scaled_dot_product_attention, torch.autocast = kept
    return alive.peak


def gigabytes(*modules: nn.Module) -> float:
    """Of weights in bfloat16."""
    return sum(2 * p.numel() for module in modules for p in module.parameters()) / 1e9


def tensor(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def measure(
    transformer: Any,
    text: list[nn.Module],
    vae: Any,
    inputs: dict[str, Any],
    latents: Tensor,
    clock: str = "timestep",
    dtype: torch.dtype = torch.bfloat16,
) -> Parts:
    """Of one model; its transformer is a student when the step is measured. `clock` names the argument of its time."""
    transformer, vae = transformer.to(torch.bfloat16), vae.to(torch.bfloat16)
    bare = gigabytes(transformer)
    with torch.device("cpu"):  # where a new head's first numbers are made
        student.build(transformer.eval(), modes=16, rank=256)
    for low in lora_layers(transformer).values():  # as `load_adapter` leaves them
        low.bfloat16()
    head, folds = state_of(transformer).head, state_of(transformer).family.folds

    def step() -> None:
        # what a network folds back is as wide as the base's
        with head.keeping() if folds else nullcontext():
            transformer(**inputs, **time)

    trained = sum(p.numel() for p in student.trainable(transformer).values())
    time = {clock: torch.ones(1, device="meta", dtype=dtype)}
    return Parts(
        transformer=bare,
        adapter=2 * trained / 1e9,
        text=gigabytes(*text),
        vae=gigabytes(vae),
        step=activations(transformer, step) / 1e9,
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


def qwen25() -> nn.Module:
    """Qwen2.5-VL of seven billion parameters."""
    config = Qwen2_5_VLConfig(
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
    return AutoModel.from_config(config)


def qwen_image() -> Parts:
    """Qwen-Image."""
    side = SIDE // 16
    with torch.device("meta"):
        inputs = {
            "hidden_states": tensor(1, side**2, 64),
            "encoder_hidden_states": tensor(1, TEXT, 3584),
            "img_shapes": [[(1, side, side)]],
        }
        latents = tensor(1, 16, 1, SIDE // 8, SIDE // 8)
        return measure(QwenImageTransformer2DModel(), [qwen25()], AutoencoderKLQwenImage(), inputs, latents)


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


def t5(multilingual: bool = False) -> nn.Module:
    """T5 of eleven billion parameters, its encoder; of many languages too."""
    sizes: dict[str, Any] = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
    if multilingual:
        return UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu", vocab_size=256384))
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def shifted_autoencoder() -> Any:
    """FLUX.1's, which others have too; that of Stable Diffusion 3 has the same sizes."""
    return flux_modules()[2]


def sd3() -> Parts:
    """Stable Diffusion 3.5 large."""
    with torch.device("meta"):
        small = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        large = CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
        )
        text = [t5(), CLIPTextModelWithProjection(small), CLIPTextModelWithProjection(large)]
        inputs = {
            "hidden_states": tensor(1, 16, SIDE // 8, SIDE // 8),
            "encoder_hidden_states": tensor(1, 333, 4096),
            "pooled_projections": tensor(1, 2048),
        }
        latents = tensor(1, 16, SIDE // 8, SIDE // 8)
        return measure(MODELS["SD3.5 large"](), text, shifted_autoencoder(), inputs, latents)


def chroma() -> Parts:
    """Chroma."""
    tokens = (SIDE // 16) ** 2
    with torch.device("meta"):
        inputs = {
            "hidden_states": tensor(1, tokens, 64),
            "encoder_hidden_states": tensor(1, TEXT, 4096),
            "attention_mask": tensor(1, TEXT + tokens),
            "img_ids": tensor(tokens, 3),
            "txt_ids": tensor(TEXT, 3),
        }
        latents = tensor(1, 16, SIDE // 8, SIDE // 8)
        return measure(MODELS["Chroma"](), [t5()], shifted_autoencoder(), inputs, latents)


def qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    """Sizes of a Qwen3, as its config names them."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}


QWEN3_4B = qwen3(2560, 9728, 36, 32)


def qwen3_vl_4b() -> Qwen3VLConfig:
    """Qwen3-VL of four billion parameters, whose output is its input's table."""
    sight = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560}
    deep = {"deepstack_visual_indexes": [5, 11, 17]}
    return Qwen3VLConfig(text_config=QWEN3_4B, vision_config={**sight, **deep}, tie_word_embeddings=True)


def qwen3_vl_8b() -> Qwen3VLConfig:
    """Qwen3-VL of eight billion parameters."""
    sight = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096}
    return Qwen3VLConfig(text_config=qwen3(4096, 12288, 36, 32), vision_config=sight)


def z_image() -> Parts:
    """Z-Image."""
    side = SIDE // 8
    with torch.device("meta"):
        text = [AutoModel.from_config(Qwen3Config(**QWEN3_4B))]
        inputs = {"x": [tensor(16, 1, side, side)], "cap_feats": [tensor(TEXT, 2560)]}
        latents = tensor(1, 16, side, side)
        return measure(MODELS["Z-Image"](), text, shifted_autoencoder(), inputs, latents, clock="t")


def krea2() -> Parts:
    """Krea 2."""
    tokens = (SIDE // 16) ** 2
    with torch.device("meta"):
        inputs = {
            "hidden_states": tensor(1, tokens, 64),
            "encoder_hidden_states": tensor(1, TEXT, 12, 2560),
            "encoder_attention_mask": tensor(1, TEXT).bool(),
            "position_ids": tensor(TEXT + tokens, 3),
        }
        latents = tensor(1, 16, 1, SIDE // 8, SIDE // 8)
        text = [AutoModel.from_config(qwen3_vl_4b())]
        return measure(MODELS["Krea 2"](), text, AutoencoderKLQwenImage(), inputs, latents)


def longcat_image() -> Parts:
    """LongCat-Image."""
    tokens = (SIDE // 16) ** 2
    with torch.device("meta"):
        inputs = {
            "hidden_states": tensor(1, tokens, 64),
            "encoder_hidden_states": tensor(1, TEXT, 3584),
            "img_ids": tensor(tokens, 3),
            "txt_ids": tensor(TEXT, 3),
        }
        latents = tensor(1, 16, SIDE // 8, SIDE // 8)
        return measure(MODELS["LongCat-Image"](), [qwen25()], shifted_autoencoder(), inputs, latents)


def lumina2() -> Parts:
    """Lumina Image 2."""
    side = SIDE // 8
    mask = torch.ones(1, 256, dtype=torch.long)  # with its numbers: the network counts words
    with torch.device("meta"):
        inputs = {
            "hidden_states": tensor(1, 16, side, side),
            "encoder_hidden_states": tensor(1, 256, 2304),
            "encoder_attention_mask": mask,
        }
        text = [AutoModel.from_config(Gemma2Config())]
        return measure(MODELS["Lumina 2"](), text, shifted_autoencoder(), inputs, tensor(1, 16, side, side))


def qwen_image_21() -> Parts:
    """Qwen-Image 2.1."""
    side = SIDE // 16
    slots = side**2 // 4  # one place in the text for four tokens of the image
    mask = torch.arange(TEXT + slots)[None] >= TEXT  # with its values: the network looks where the image stands
    with torch.device("meta"):
        inputs = {
            "hidden_states": tensor(1, side**2, 64),
            "encoder_hidden_states": tensor(1, TEXT, 4096),
            "img_shapes": [[(1, side, side)]],
            "img_mask": mask,
        }
        text: list[nn.Module] = [Qwen3VLForConditionalGeneration(qwen3_vl_8b())]
        latents = tensor(1, 64, 1, side, side)
        return measure(MODELS["Qwen-Image 2.1"](), text, AutoencoderKLQwenImage21(), inputs, latents)


def ovis_image() -> Parts:
    """Ovis-Image."""
    tokens = (SIDE // 16) ** 2
    with torch.device("meta"):
        inputs = {
            "hidden_states": tensor(1, tokens, 64),
            "encoder_hidden_states": tensor(1, 256, 2048),
            "img_ids": tensor(tokens, 3),
            "txt_ids": tensor(256, 3),
        }
        text = [AutoModel.from_config(Qwen3Config(**qwen3(2048, 6144, 28, 16)))]
        latents = tensor(1, 16, SIDE // 8, SIDE // 8)
        return measure(MODELS["Ovis-Image"](), text, shifted_autoencoder(), inputs, latents)


def ernie_image() -> Parts:
    """ERNIE-Image, without its prompt enhancer."""
    side = SIDE // 16
    with torch.device("meta"):
        sizes: dict[str, Any] = {"hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072}
        language = {"model_type": "mistral", **sizes, **heads}
        text = [AutoModel.from_config(Mistral3Config(text_config=language))]
        inputs = {
            "hidden_states": tensor(1, 128, side, side),
            "text_bth": tensor(1, TEXT, 3072),
            "text_lens": torch.full((1,), TEXT),
        }
        latents = tensor(1, 32, SIDE // 8, SIDE // 8)
        return measure(MODELS["ERNIE-Image"](), text, AutoencoderKLFlux2(), inputs, latents)


def flux3() -> Parts:
    """FLUX.3."""
    tokens = (SIDE // 16) ** 2
    with torch.device("meta"):
        inputs = {
            "hidden_states": tensor(1, tokens, 128),
            "encoder_hidden_states": tensor(1, TEXT, 8 * 2560),
            "img_ids": tensor(tokens, 4),
            "txt_ids": tensor(TEXT, 4),
        }
        text: list[nn.Module] = [Qwen3VLForConditionalGeneration(qwen3_vl_4b())]
        latents = tensor(1, 32, SIDE // 8, SIDE // 8)
        return measure(MODELS["FLUX.3"](), text, AutoencoderKLFlux2(), inputs, latents)


def wan(frames: int = 81) -> Parts:
    """Wan 2.1 14B."""
    rows, columns = VIDEO
    size = ((frames - 1) // 4 + 1, rows // 8, columns // 8)
    with torch.device("meta"):
        inputs = {"hidden_states": tensor(1, 16, *size), "encoder_hidden_states": tensor(1, TEXT, 4096)}
        return measure(
            MODELS["Wan 2.1 14B"](),
            [t5(multilingual=True)],
            AutoencoderKLWan(),
            inputs,
            tensor(1, 16, *size),
            dtype=torch.float32,
        )


def ltx(frames: int = 81) -> Parts:
    """LTX-Video."""
    rows, columns = VIDEO
    size = ((frames - 1) // 8 + 1, rows // 32, columns // 32)
    with torch.device("meta"):
        inputs = {
            "hidden_states": tensor(1, math.prod(size), 128),
            "encoder_hidden_states": tensor(1, 128, 4096),
            "encoder_attention_mask": tensor(1, 128),
            **dict(zip(("num_frames", "height", "width"), size, strict=True)),
        }
        return measure(MODELS["LTX-Video"](), [t5()], AutoencoderKLLTXVideo(), inputs, tensor(1, 128, *size))


VIDEO = (480, 832)
"""Rows and columns of pixels of a video."""

IMAGES: dict[str, Callable[[], Parts]] = {
    "flux": flux,
    "qwen_image": qwen_image,
    "flux2": flux2,
    "flux3": flux3,
    "sd3": sd3,
    "z_image": z_image,
    "krea2": krea2,
    "chroma": chroma,
    "longcat_image": longcat_image,
    "lumina2": lumina2,
    "qwen_image_21": qwen_image_21,
    "ovis_image": ovis_image,
    "ernie_image": ernie_image,
}

VIDEOS: dict[str, Callable[[int], Parts]] = {"wan": wan, "ltx": ltx}

COUNTS = (17, 49, 81, 121)
"""Frames that are computed."""


def parts_of_all(*names: str) -> dict[str, Parts | dict[int, Parts]]:
    """By the names of `arcflow.families.memory.MODELS`, and of videos by frames of `arcflow.families.memory.VIDEOS`."""
    images = {name: make() for name, make in IMAGES.items() if not names or name in names}
    videos = {name: {n: make(n) for n in COUNTS} for name, make in VIDEOS.items() if not names or name in names}
    return {**images, **videos}


def main(names: list[str]) -> None:
    fields = list(Parts.__dataclass_fields__)
    print(f"{'GB':<16}" + "".join(f"{name:>13}" for name in fields))
    for name in names or [*IMAGES, *VIDEOS]:
        (found,) = parts_of_all(name).values()
        rows = {name: found} if isinstance(found, Parts) else {f"{name}, {n} frames": one for n, one in found.items()}
        for title, parts in rows.items():
            print(f"{title:<16}" + "".join(f"{getattr(parts, field):>13.2f}" for field in fields), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
