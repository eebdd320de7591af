"""The time of a step: ArcFlow's closed form against the policies of pi-Flow, at FLUX size.

    python -m benchmarks.policies [--repeats 7] [--out benchmarks/results/policies.json]

One image of 1024 x 1024: 4096 tokens of width 64, the two steps of a 2-call sampler, float32. Each policy with the
number of modes of its paper, read from what the head said, laid down and walked to the step's end; the network's call,
the same for all, is left out. Runs alternate; a ratio is the median of the ratios of neighboring runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from arcflow import Mixture
from arcflow.config import Distill
from arcflow.methods.piflow import DX, GM, denoised_curve, gaussian_mixture
from arcflow.path import step_grid
from arcflow.reports.claim_files import Policies, Timing
from arcflow.system import records
from arcflow.system.packages import About, about

TOKENS, MODES, WIDTH, PIXELS = 4096, 16, 64, 4
TITLES = {"arcflow": "ArcFlow, closed form", "gm": "pi-Flow GM, 128 sub-steps", "dx": "pi-Flow DX, closed form too"}


def head_output(modes: int, generator: torch.Generator) -> Mixture:
    """Something that a head could have said."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, TOKENS, *shape, generator=generator)

    gains = torch.linspace(0.2, 4.0, modes - 1).log()[:, None] + 0.1 * normal(modes - 1, PIXELS)
    return Mixture(normal(modes, WIDTH), normal(modes, PIXELS), gains)


def steps(generator: torch.Generator) -> dict[str, Callable[[], Tensor]]:
    """Both steps of each, from the same noise."""
    config, x = Distill(), torch.randn(1, TOKENS, WIDTH, generator=generator)
    said = {"arcflow": head_output(MODES, generator), "gm": head_output(GM.modes, generator)}
    said["dx"] = head_output(DX.modes, generator)

    def walk(name: str) -> Tensor:
        state = x
        for here, there in pairwise(step_grid(2).tolist()):
            level = torch.tensor([here])
            if name == "arcflow":
                path = said[name]
            else:
                path = {"gm": gaussian_mixture, "dx": denoised_curve}[name](said[name], state, level, config)
            state = state - path.displacement(0.0, here - there)
        return state

    return {name: (lambda name=name: walk(name)) for name in said}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    timed: dict[str, list[float]] = {name: [] for name in TITLES}
    walks = steps(torch.Generator().manual_seed(0))
    for repeat in range(options.repeats + 1):  # one to warm up
        for name, walk in walks.items():
            start = time.perf_counter()
            walk()
            if repeat:
                timed[name].append(time.perf_counter() - start)
    results = {
        name: Timing(
            seconds=statistics.median(values),
            ratio=statistics.median(b / a for a, b in zip(timed["arcflow"], values, strict=True)),
        )
        for name, values in timed.items()
    }
    for name, row in results.items():
        print(f"{TITLES[name]:<30}{1e3 * row.seconds:8.1f} ms   {row.ratio:5.1f}x")
    if options.out:
        command = f"python -m benchmarks.policies --repeats {options.repeats}"
        records.write(options.out, Policies(**results, about=About(**about(command=command))))


if __name__ == "__main__":
    main()
