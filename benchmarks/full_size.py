"""The large models at their true shapes, without their weights: parameters, trainable share, size of an adapter.

    python -m benchmarks.full_size

Everything is built on the meta device, which holds shapes and no numbers, so it runs anywhere in seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    ErnieImageTransformer2DModel,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    LongCatImageTransformer2DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    OvisImageTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import nn

from arcflow import student

MODES, RANK = 16, 256
"""Of the published adapters."""


@dataclass(frozen=True)
class Size:
    """Counts of parameters."""

    base: int
    trainable: int
    tensors: int

    @property
    def share(self) -> float:
        return self.trainable / self.base


def sd35(layers: int, **more: Any) -> SD3Transformer2DModel:
    """Stable Diffusion 3.5: as many heads as layers, of 64 features."""
    sizes: dict[str, Any] = {"num_layers": layers, "num_attention_heads": layers, "caption_projection_dim": 64 * layers}
    return SD3Transformer2DModel(**sizes, qk_norm="rms_norm", **more)


def klein(layers: int, single: int, heads: int, text: int) -> Flux2Transformer2DModel:
    """FLUX.2 klein, whose text is three layers of its encoder."""
    sizes: dict[str, Any] = {"num_layers": layers, "num_single_layers": single, "num_attention_heads": heads}
    return Flux2Transformer2DModel(**sizes, joint_attention_dim=text, guidance_embeds=False)


def ernie() -> ErnieImageTransformer2DModel:
    """ERNIE-Image, as its config says."""
    sizes: dict[str, Any] = {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 36, "text_in_dim": 3072}
    return ErnieImageTransformer2DModel(**sizes, ffn_hidden_size=12288)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "FLUX.1-dev": partial(FluxTransformer2DModel, guidance_embeds=True),
    "Qwen-Image": QwenImageTransformer2DModel,
    "FLUX.2-dev": Flux2Transformer2DModel,
    "FLUX.2 klein 4B": partial(klein, 5, 20, 24, 7680),
    "FLUX.2 klein 9B": partial(klein, 8, 24, 32, 12288),
    "FLUX.3": Flux3Transformer2DModel,
    "SD3.5 medium": partial(sd35, 24, pos_embed_max_size=384, dual_attention_layers=tuple(range(13))),
    "SD3.5 large": partial(sd35, 38, pos_embed_max_size=192),
    "Z-Image": ZImageTransformer2DModel,
    "Krea 2": Krea2Transformer2DModel,
    "Chroma": ChromaTransformer2DModel,
    "LongCat-Image": partial(LongCatImageTransformer2DModel, num_layers=10, num_single_layers=20),
    "Lumina 2": partial(Lumina2Transformer2DModel, cap_feat_dim=2304),
    "Qwen-Image 2.1": QwenImage21Transformer2DModel,
    "Ovis-Image": OvisImageTransformer2DModel,
    "ERNIE-Image": ernie,
    "Wan 2.1 14B": WanTransformer3DModel,
    "LTX-Video": LTXVideoTransformer3DModel,
}
"""The transformer of each large model, at the sizes that diffusers gives it or converts it to."""


def transformers(*names: str) -> dict[str, nn.Module]:
    """The transformers of these models, or of all, on the meta device."""
    with torch.device("meta"):
        return {name: make() for name, make in MODELS.items() if not names or name in names}


def count(transformer: nn.Module) -> Size:
    """Sizes of a base, and of the student made of it."""
    base = sum(p.numel() for p in transformer.parameters())
    trained = student.trainable(student.build(transformer, modes=MODES, rank=RANK))
    return Size(base, sum(p.numel() for p in trained.values()), len(trained))


def main() -> None:
    print(f"{'':<16}{'base':>16}{'trainable':>15}{'share':>8}{'tensors':>9}{'adapter, float16':>18}")
    for name, transformer in transformers().items():
        size = count(transformer)
        print(
            f"{name:<16}{size.base:>16,}{size.trainable:>15,}{size.share:>8.2%}{size.tensors:>9}"
            f"{2 * size.trainable / 1e9:>15.2f} GB"
        )


if __name__ == "__main__":
    main()
