"""The steps for mflux against this project's own, with MLX on a CPU.

    python integrations/mflux/tests/check.py PACKAGES...

PACKAGES are folders with `mlx` and `mlx-cpu`, and `mflux` if its own loader of schedulers is to be tried: without it an
empty class stands in for the one that the steps inherit from.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent

ROOT = HERE.parents[2]

CLOSE = 1e-6


def main() -> None:
    """Print the differences as JSON; an error if one is too large."""
    sys.path += [str(ROOT / "src"), *sys.argv[1:], str(HERE.parent)]
    real = importlib.util.find_spec("mflux") is not None
    if not real:
        name = "mflux.models.common.schedulers.base_scheduler"
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules[".".join(parts[:end])] = types.ModuleType(".".join(parts[:end]))
        sys.modules[name].BaseScheduler = object
    import mlx.core as mx
    import numpy as np
    import torch
    from arcflow_mflux import ArcFlowScheduler

    from arcflow.momentum import unpack
    from arcflow.path import step_grid

    if real:
        from mflux.models.common.schedulers import try_import_external_scheduler

        assert try_import_external_scheduler("arcflow_mflux.ArcFlowScheduler") is ArcFlowScheduler

    found: dict[str, float] = {}
    draws = torch.Generator().manual_seed(0)
    for steps in (2, 4):
        ours = ArcFlowScheduler(types.SimpleNamespace(num_inference_steps=steps))
        grid = step_grid(steps)
        found[f"noise levels, {steps} steps"] = float(np.abs(np.array(ours.sigmas) - grid.numpy()).max())
        for modes in (1, 4, 16):
            x, y = (torch.randn(2, 9, 64, generator=draws) for _ in range(2))
            packed = torch.randn(2, 9, 64 * modes + 4 * (2 * modes - 1), generator=draws)
            packed[..., -8:] = 0.0  # a momentum factor of 1
            for i in range(steps):
                span = float(grid[i] - grid[i + 1])
                wanted = x - unpack(packed, modes).displacement(0.0, span)
                drawn = np.array(ours.step(mx.array(packed.numpy()), i, mx.array(x.numpy())))
                apart = float(np.abs(drawn - wanted.numpy()).max() / wanted.abs().max())
                found[f"step {i + 1} of {steps}, {modes} modes"] = apart
                euler = np.array(ours.step(mx.array(y.numpy()), i, mx.array(x.numpy())))
                found[f"Euler step {i + 1} of {steps}"] = float(np.abs(euler - (x - span * y).numpy()).max())
    print(json.dumps({"loaded by mflux itself": real, **found}, indent=2))
    assert all(apart < CLOSE for apart in found.values())


if __name__ == "__main__":
    main()
