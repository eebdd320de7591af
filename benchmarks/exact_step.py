"""The exact step at FLUX size against the same formula in image layout.

    python -m benchmarks.exact_step [--repeats 9] [--device cuda]

One image of 1024 x 1024: 4096 tokens, K = 16 modes, D = 64, P = 4, float32, from noise to sigma 0.762. Ours stays in
token space and takes exponentials once per latent pixel. The other way is the formula as it is usually written for
images: gates and gammas expanded to every channel, the straight mode concatenated, expm1 over every channel. Both start
from tensors in their own layout, so the formula alone is compared. They take turns; a turn is the median of half a
second of calls (`torch.utils.benchmark`), and the ratio of each pair of turns is shown.

On a CPU the other way pays for fresh memory in every call, buffers of 67 MB. Hence both are timed twice: with the
memory of the process managed as it is by default, and kept when freed (glibc only), where both are pure arithmetic.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.benchmark import Timer

from arcflow import Mixture
from arcflow.path import step_grid
from arcflow.system.devices import keep_buffers
from arcflow.system.timing import now

Call = Callable[[], object]
TOKENS, MODES, WIDTH, PIXELS = 4096, 16, 64, 4
SIDE = 64
"""Tokens a side."""


def to_image(tokens: Tensor) -> Tensor:
    """(1, tokens, K, channels * 4) to (1, K, channels, 128, 128)."""
    return rearrange(tokens, "b (h w) k (c p q) -> b k c (h p) (w q)", h=SIDE, p=2, q=2).contiguous()


def ours(x: Tensor, mixture: Mixture, length: float) -> Tensor:
    return x - mixture.displacement(0.0, length)


def image_layout(x: Tensor, v: Tensor, logits: Tensor, log_gamma: Tensor, length: float) -> Tensor:
    """The step with one value per channel of gates and gammas."""
    gamma = torch.cat([torch.zeros_like(v[:, :1]), log_gamma.expand_as(v[:, 1:])], 1)
    gates = logits.softmax(1).expand_as(v)
    near = gamma.abs() * length < 1e-4
    factor = torch.where(near, length, torch.expm1(gamma * length) / torch.where(near, 1.0, gamma))
    return x - (gates * v * factor).sum(1)


def seconds(call: Call) -> float:
    start = now()
    call()
    return now() - start


def turn(call: Call) -> float:
    """Seconds of one call, median of half a second of them."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    device = options.device
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, v, logits = normal(1, TOKENS, WIDTH), normal(1, TOKENS, MODES, WIDTH), normal(1, TOKENS, MODES, PIXELS)
    gains = torch.linspace(0.2, 4.0, MODES - 1, device=device)
    log_gamma = gains.log()[:, None] + 0.1 * normal(1, TOKENS, MODES - 1, PIXELS)
    mixture = Mixture(v, logits, log_gamma)
    image = to_image(x[:, :, None])[:, 0], to_image(v), to_image(logits), to_image(log_gamma)
    sigmas = step_grid(2)
    length = float(sigmas[0] - sigmas[1])

    difference = to_image(ours(x, mixture, length)[:, :, None])[:, 0] - image_layout(*image, length)
    print(f"{TOKENS} tokens, K = {MODES}, D = {WIDTH}, P = {PIXELS}, {device}, {torch.get_num_threads()} threads")
    print(f"largest difference of the results: {difference.abs().max():.1e}")
    calls = (lambda: ours(x, mixture, length)), (lambda: image_layout(*image, length))
    compare(*calls, options.repeats)
    if device.type == "cpu":
        keep_buffers()
        compare(*calls, options.repeats, ", freed memory kept")


def compare(token_space: Call, other: Call, repeats: int, setting: str = "") -> None:
    pairs = [(turn(token_space), turn(other)) for _ in range(repeats)]
    for fast, slow in pairs:
        print(f"token space {1e3 * fast:7.2f} ms   image layout {1e3 * slow:7.2f} ms   {slow / fast:5.1f}x")
    print(f"exact step{setting}: median {statistics.median(b / a for a, b in pairs):.1f} times faster")


if __name__ == "__main__":
    main()
