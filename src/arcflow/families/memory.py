"""What fits a card: the ways to sample a large model in two steps at 1024 x 1024, by the memory they take.

The parts are computed, not measured: weights counted at their true shapes, what a call needs beside them by following
every tensor of it without numbers (`python -m benchmarks.memory`). How each way is written: docs/memory.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from arcflow.config import Fit


@dataclass(frozen=True)
class Parts:
    """GB of the weights in bfloat16, and of what a call needs beside them."""

    transformer: float
    adapter: float
    text: float
    vae: float
    step: float
    decode: float


@dataclass(frozen=True)
class FittingWay:
    """A way to sample, and the GB of GPU memory it takes at its peak."""

    name: str
    gigabytes: float
    fit: Fit
    """Value of the option `--fit` that asks for this way."""


VIDEOS = {
    "wan": {
        17: Parts(transformer=28.58, adapter=0.80, text=11.36, vae=0.25, step=0.98, decode=4.08),
        49: Parts(transformer=28.58, adapter=0.80, text=11.36, vae=0.25, step=2.53, decode=4.16),
        81: Parts(transformer=28.58, adapter=0.80, text=11.36, vae=0.25, step=4.09, decode=4.24),
        121: Parts(transformer=28.58, adapter=0.80, text=11.36, vae=0.25, step=6.03, decode=4.34),
    },
    "ltx": {
        17: Parts(transformer=3.85, adapter=0.31, text=9.52, vae=0.84, step=0.10, decode=0.69),
        49: Parts(transformer=3.85, adapter=0.31, text=9.52, vae=0.84, step=0.23, decode=1.97),
        81: Parts(transformer=3.85, adapter=0.31, text=9.52, vae=0.84, step=0.35, decode=3.24),
        121: Parts(transformer=3.85, adapter=0.31, text=9.52, vae=0.84, step=0.51, decode=4.84),
    },
}
"""What video models take, by frames of 480 x 832 pixels."""

MODELS = {
    "flux": Parts(transformer=23.80, adapter=1.30, text=9.77, vae=0.17, step=0.49, decode=1.61),
    "qwen_image": Parts(transformer=40.86, adapter=1.92, text=15.49, vae=0.25, step=0.50, decode=3.63),
    "flux2": Parts(transformer=64.45, adapter=3.01, text=46.61, vae=0.17, step=1.67, decode=1.61),
    "flux3": Parts(transformer=11.08, adapter=0.71, text=8.88, vae=0.17, step=0.87, decode=1.61),
    "sd3": Parts(transformer=16.11, adapter=0.97, text=11.16, vae=0.17, step=0.35, decode=1.61),
    "z_image": Parts(transformer=12.31, adapter=0.75, text=8.04, vae=0.17, step=0.56, decode=1.61),
    "krea2": Parts(transformer=25.64, adapter=0.99, text=8.88, vae=0.25, step=0.87, decode=3.63),
    "chroma": Parts(transformer=17.80, adapter=1.26, text=9.52, vae=0.17, step=0.51, decode=1.61),
    "longcat_image": Parts(transformer=12.54, adapter=0.71, text=15.49, vae=0.17, step=0.49, decode=1.61),
    "lumina2": Parts(transformer=5.22, adapter=0.54, text=5.23, vae=0.17, step=0.53, decode=1.61),
    "qwen_image_21": Parts(transformer=14.23, adapter=0.85, text=17.53, vae=0.68, step=0.80, decode=6.74),
    "ovis_image": Parts(transformer=14.74, adapter=0.95, text=3.44, vae=0.17, step=0.74, decode=1.61),
    "ernie_image": Parts(transformer=16.07, adapter=1.00, text=7.70, vae=0.17, step=0.99, decode=1.61),
    "wan": VIDEOS["wan"][81],
    "ltx": VIDEOS["ltx"][121],
}
"""What models take, as `python -m benchmarks.memory` prints it."""


def parts_of(family: str) -> Parts:
    """What a family's large model takes. Where none is computed it is FLUX.1's, which has as many tokens at 1024 x
    1024: what a model's own files weigh is counted before anything is decided (`fit.weighed`)."""
    return MODELS.get(family, MODELS["flux"])


CARDS = (12, 16, 24, 48, 80)
"""GB of the cards that are planned for."""

CONTEXT = 1.0
"""GB that the CUDA context takes, and what is lost between allocations."""

INT8, NF4 = 0.51, 0.28
"""Size of a weight with its scales, over bfloat16: one for a row, or for a block of 64 weights."""

STREAMED = 2.0
"""GB of layers that are on the card at a time when the rest streams in from the CPU."""


def ways(parts: Parts) -> Iterator[FittingWay]:
    """Ways to hold a model in memory, from the fastest to the smallest."""

    def in_turn(transformer: float, text: float) -> float:
        """One part on the card at a time."""
        network = transformer * parts.transformer + parts.adapter + parts.step
        return max(network, text * parts.text, parts.vae + parts.decode) + CONTEXT

    whole = parts.transformer + parts.adapter + parts.text + parts.vae + max(parts.step, parts.decode)
    yield FittingWay("everything on the card", whole + CONTEXT, "card")
    yield FittingWay("model offload", in_turn(1.0, 1.0), "offload")
    yield FittingWay("transformer and text encoder in int8, model offload", in_turn(INT8, INT8), "int8")
    yield FittingWay("transformer and text encoder in nf4, model offload", in_turn(NF4, NF4), "nf4")
    yield FittingWay("group offload", STREAMED + max(parts.step, parts.vae + parts.decode) + CONTEXT, "group")


def best(parts: Parts, card: int | float) -> FittingWay | None:
    """The fastest way that fits a card with this memory in GB; None if none does."""
    return next((way for way in ways(parts) if way.gigabytes <= card), None)
