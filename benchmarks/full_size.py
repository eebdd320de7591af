"""The large models at their true shapes, without their weights: parameters, trainable share, size of an adapter.

    python -m benchmarks.full_size

Everything is built on the meta device, which holds shapes and no numbers, so it runs anywhere in seconds.
"""

from dataclasses import dataclass

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel
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


def transformers() -> dict[str, nn.Module]:
    """The transformer of each family's large model, on the meta device."""
    with torch.device("meta"):
        return {
            "FLUX.1-dev": FluxTransformer2DModel(guidance_embeds=True),
            "Qwen-Image": QwenImageTransformer2DModel(),
            "FLUX.2-dev": Flux2Transformer2DModel(),
        }


def count(transformer: nn.Module) -> Size:
    """Sizes of a base, and of the student made of it."""
    base = sum(p.numel() for p in transformer.parameters())
    trained = student.trainable(student.build(transformer, modes=MODES, rank=RANK))
    return Size(base, sum(p.numel() for p in trained.values()), len(trained))


def main() -> None:
    print(f"{'':<12}{'base':>16}{'trainable':>15}{'share':>8}{'tensors':>9}{'adapter, float16':>18}")
    for name, transformer in transformers().items():
        size = count(transformer)
        print(
            f"{name:<12}{size.base:>16,}{size.trainable:>15,}{size.share:>8.2%}{size.tensors:>9}"
            f"{2 * size.trainable / 1e9:>15.2f} GB"
        )


if __name__ == "__main__":
    main()
