"""What the transformer costs: two student calls against fifty teacher calls, and one call against one.

    python -m benchmarks.transformer_time [--adapter FOLDER] [--images 16] [--repeats 9] [--calls 300]

The shipped small teacher through the stock pipeline, as `arcflow evaluate` times it; the student has its LoRA fused.
Runs alternate, so that whatever else the machine does falls on both; medians of the ratios are printed. One call is
timed by the processor's clock, which other programs change less, call by call in turn with the teacher's: for the
fused student, and for the same one exported (`--layout merged`), whose scheduler does the head's work.
"""

import argparse
import copy
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from arcflow.families import network
from arcflow.families.conditioning import Cond
from arcflow.sampling import attach, generate
from arcflow.sampling.open import SHIPPED, adapter_of, folder_of, open_pipe
from arcflow.student import formats, merged
from arcflow.student.adapter import found_at

SIZE: dict[str, Any] = {"height": 64, "width": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapter", default=SHIPPED)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--calls", type=int, default=300)
    options = parser.parse_args()
    teacher = open_pipe(SHIPPED, "cpu", "float32")
    ours = attach.attach(copy.deepcopy(teacher), adapter_of(SHIPPED, options.adapter), fuse=True)
    prompts, seeds = ["a red ring left of a blue square"] * options.images, list(range(options.images))
    pairs = []
    for repeat in range(options.repeats + 1):  # one to warm up
        with generate.stock_euler(teacher):
            fifty = generate.generate(teacher, prompts, seeds, steps=50, **SIZE).seconds["transformer"]
        two = generate.generate(ours, prompts, seeds, steps=2, **SIZE).seconds["transformer"]
        if repeat:
            pairs.append((fifty, two))
            print(f"50 steps {1e3 * fifty:8.1f} ms   2 steps {1e3 * two:7.1f} ms   {fifty / two:5.1f}x")
    print(f"transformer time: median {statistics.median(a / b for a, b in pairs):.1f} times less")
    students = {"LoRA fused": ours, "exported": exported(adapter_of(SHIPPED, options.adapter))}
    one_call(teacher, students, prompts, seeds, options.calls)


def exported(adapter: str) -> Any:
    """The student as a folder of diffusers', loaded again."""
    found = found_at(adapter)
    with tempfile.TemporaryDirectory() as place:
        change = merged.change_of(formats.tensors_of(found), found.info)
        folder = merged.write_merged(folder_of(SHIPPED), Path(place) / "merged", change)
        return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


@torch.no_grad()
def one_call(teacher: Any, students: dict[str, Any], prompts: list[str], seeds: list[int], calls: int) -> None:
    """One student call over one teacher call, and with the scheduler's step."""
    x = network.noise(teacher, seeds, **SIZE)
    cond = network.encode_prompts(teacher, prompts, **SIZE)
    pipes = {"teacher": teacher, **students}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pipes}
    with generate.stock_euler(teacher):
        for repeat in range(calls // 2 + 1):  # one to warm up
            for pipe in pipes.values():
                pipe.scheduler.set_timesteps(2)
            for step in range(2):
                for name in sorted(pipes, reverse=bool((repeat + step) % 2)):
                    seconds = _one(pipes[name], x, step, cond)
                    if repeat:
                        times[name].append(seconds)
    for name in students:
        pairs = list(zip(times[name], times["teacher"], strict=True))
        print(f"one call of the student, {name}, over the teacher's: {_median([s[0] / t[0] for s, t in pairs])}")
        print(f"   with the step: {_median([sum(s) / sum(t) for s, t in pairs])}")


def _one(pipe: Any, x: Tensor, step: int, cond: Cond) -> tuple[float, float]:
    """Seconds of the processor in one call and in its step."""
    t = pipe.scheduler.timesteps[step]
    start = time.process_time()
    velocity = network.call(pipe.transformer, x, float(t) / 1000, cond)
    middle = time.process_time()
    pipe.scheduler.step(velocity, t, x)
    return middle - start, time.process_time() - middle


def _median(ratios: list[float]) -> str:
    """Median, with the interval in which 95 of 100 medians lie (from the order of the numbers alone)."""
    ratios, apart = sorted(ratios), 0.98 * math.sqrt(len(ratios))
    low, high = (ratios[round(len(ratios) / 2 + sign * apart - 0.5)] for sign in (-1, 1))
    return f"median {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
