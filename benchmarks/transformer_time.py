"""What the transformer costs: two student calls against fifty teacher calls, and one call against one.

    python -m benchmarks.transformer_time [--adapter FOLDER] [--images 16] [--repeats 9]

The shipped small teacher through the stock pipeline, as `arcflow evaluate` times it; the student has its LoRA fused.
Runs alternate, so that whatever else the machine does falls on both; medians of the ratios are printed.
"""

import argparse
import copy
import statistics
from typing import Any

import torch

from arcflow.families import network
from arcflow.sampling import attach, generate
from arcflow.sampling.open import SHIPPED, adapter_of, open_pipe

SIZE: dict[str, Any] = {"height": 64, "width": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapter", default=SHIPPED)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    teacher = open_pipe(SHIPPED, "cpu", "float32")
    ours = attach.attach(copy.deepcopy(teacher), adapter_of(SHIPPED, options.adapter), fuse=True)
    prompts, seeds = ["a red ring left of a blue square"] * options.images, list(range(options.images))
    pairs = []
    for repeat in range(options.repeats + 1):  # one to warm up
        with generate.euler(teacher):
            fifty = generate.generate(teacher, prompts, seeds, steps=50, **SIZE).seconds["transformer"]
        two = generate.generate(ours, prompts, seeds, steps=2, **SIZE).seconds["transformer"]
        if repeat:
            pairs.append((fifty, two))
            print(f"50 steps {1e3 * fifty:8.1f} ms   2 steps {1e3 * two:7.1f} ms   {fifty / two:5.1f}x")
    print(f"transformer time: median {statistics.median(a / b for a, b in pairs):.1f} times less")
    one_call(teacher, ours, prompts, seeds, options.repeats)


@torch.no_grad()
def one_call(teacher: Any, ours: Any, prompts: list[str], seeds: list[int], repeats: int) -> None:
    """One student call over one teacher call, many short alternating runs."""
    x = network.noise(teacher, seeds, **SIZE)
    cond = network.encode_prompts(teacher, prompts, **SIZE)
    ratios = []
    for _ in range(10 * repeats):
        ours.scheduler.set_timesteps(2)  # says how far the student's call goes
        with generate.metered(teacher) as base, generate.metered(ours) as fast:
            network.call(teacher.transformer, x, 1.0, cond)
            network.call(ours.transformer, x, 1.0, cond)
        ratios.append(fast.seconds["transformer"] / base.seconds["transformer"])
    print(f"one call: student, LoRA fused, over teacher: median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
