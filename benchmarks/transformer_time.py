"""What the transformer costs: two student calls against fifty teacher calls, and one call against one.

    python -m benchmarks.transformer_time [--adapter FOLDER] [--images 16] [--repeats 9]

The shipped small teacher through the stock pipeline, as `arcflow evaluate` times it; the student has its LoRA fused.
Runs alternate, so that whatever else the machine does falls on both; medians of the ratios are printed.
"""

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from arcflow.families import network
from arcflow.families.conditioning import Cond
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
    """One student call over one teacher call, and with the scheduler's step; many short runs of two steps in turn, by
    the time of the processor, which other programs change less."""
    x = network.noise(teacher, seeds, **SIZE)
    cond = network.encode_prompts(teacher, prompts, **SIZE)
    calls, with_steps = [], []
    for repeat in range(10 * repeats):
        times = {}
        for pipe in (teacher, ours) if repeat % 2 else (ours, teacher):
            with generate.euler(teacher):
                times[id(pipe)] = _two_steps(pipe, x, cond)
        base, fast = times[id(teacher)], times[id(ours)]
        calls.append(fast[0] / base[0])
        with_steps.append(sum(fast) / sum(base))
    print(f"one call: student, LoRA fused, over teacher: median {statistics.median(calls):.3f}")
    print(f"one call and step: median {statistics.median(with_steps):.3f}")


def _two_steps(pipe: Any, x: Tensor, cond: Cond) -> tuple[float, float]:
    """Seconds of the processor in calls and in steps."""
    called = stepped = 0.0
    pipe.scheduler.set_timesteps(2)
    for t in pipe.scheduler.timesteps:
        start = time.process_time()
        velocity = network.call(pipe.transformer, x, float(t) / 1000, cond)
        middle = time.process_time()
        x = pipe.scheduler.step(velocity, t, x).prev_sample
        called, stepped = called + middle - start, stepped + time.process_time() - middle
    return called, stepped


if __name__ == "__main__":
    main()
