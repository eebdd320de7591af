"""What torchmetrics and torch-fidelity make of the same features, for the tests to hold ours against.

    python -m benchmarks.metrics_reference        # with torchmetrics and torch-fidelity installed beside arcflow

Writes tests/metrics_reference.json. The tests need neither package: torch-fidelity cannot be imported without
torchvision, which has no build for every torch.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FILE = Path(__file__).parent.parent / "tests" / "metrics_reference.json"
CASES = {"many": (300, 24), "few": (60, 80)}
"""Images and width: the covariances of the second are singular."""
SUBSETS, SUBSET_SIZE, NEIGHBORS = 7, 40, 3


def features(case: str) -> tuple[Tensor, Tensor]:
    """Two sets that overlap, one narrower than the other, skewed as activations are."""
    count, width = CASES[case]
    rng = np.random.RandomState(0)
    mix = rng.randn(width, width) / width**0.5
    real, made = np.abs(rng.randn(count, width) @ mix), np.abs(0.8 * rng.randn(count, width) @ mix + 0.1)
    return torch.from_numpy(real), torch.from_numpy(made)


def images() -> tuple[np.ndarray, np.ndarray]:
    """Images, and the same with noise."""
    rng = np.random.RandomState(1)
    images = rng.randint(0, 256, (4, 16, 24, 3))
    return images.astype(np.uint8), np.clip(images + 9 * rng.randn(*images.shape), 0, 255).astype(np.uint8)


class Given(nn.Module):
    """In place of Inception: the features are given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return x


def by_torchmetrics(real: Tensor, made: Tensor) -> dict[str, Any]:
    from torchmetrics.image.fid import FrechetInceptionDistance  # pyright: ignore[reportMissingImports]
    from torchmetrics.image.kid import KernelInceptionDistance  # pyright: ignore[reportMissingImports]

    network = Given(real.shape[1])
    frechet = FrechetInceptionDistance(network).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(network, subsets=2, subset_size=len(real)).set_dtype(torch.float64)
    for metric in (frechet, kernel):
        metric.update(real, real=True)
        metric.update(made, real=False)
    return {"frechet": frechet.compute().item(), "kernel_all": kernel.compute()[0].item()}


def by_torch_fidelity(real: Tensor, made: Tensor) -> dict[str, Any]:
    from torch_fidelity import metric_fid, metric_kid, metric_prc  # pyright: ignore[reportMissingImports]

    moments = [metric_fid.fid_features_to_statistics(x) for x in (real, made)]
    kernel = metric_kid.kid_features_to_metric(
        real, made, kid_subsets=SUBSETS, kid_subset_size=SUBSET_SIZE, verbose=False
    )
    covered = metric_prc.prc_features_to_metric(made, real, prc_neighborhood=NEIGHBORS, verbose=False)
    return {
        "frechet": metric_fid.fid_statistics_to_metric(*moments, False)[metric_fid.KEY_METRIC_FID],
        "kernel": [kernel[metric_kid.KEY_METRIC_KID_MEAN], kernel[metric_kid.KEY_METRIC_KID_STD]],
        "precision_recall": [covered[metric_prc.KEY_METRIC_PRECISION], covered[metric_prc.KEY_METRIC_RECALL]],
    }


def psnr() -> list[float]:
    from torchmetrics.functional.image import peak_signal_noise_ratio  # pyright: ignore[reportMissingImports]

    a, b = (torch.from_numpy(images).double() for images in images())
    return peak_signal_noise_ratio(a, b, data_range=255.0, reduction="none", dim=(1, 2, 3)).tolist()


def main() -> None:
    numbers: dict[str, Any] = {name: version(name) for name in ("torch", "torchmetrics", "torch-fidelity")}
    numbers["psnr"] = psnr()
    for case in CASES:
        numbers[case] = {"torchmetrics": by_torchmetrics(*features(case))}
        numbers[case]["torch_fidelity"] = by_torch_fidelity(*features(case))
    FILE.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
