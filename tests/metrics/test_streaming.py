"""Parts of an evaluation add up to the whole: batches, processes, and a run before and after it was cut off."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from arcflow.metrics.streaming import Moments, merge


def features(count: int = 50, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def same(a, b) -> None:
    for name, tensor in vars(a).items():
        torch.testing.assert_close(vars(b)[name], tensor, rtol=1e-12, atol=1e-12)


def test_mean_and_covariance_are_those_of_the_features() -> None:
    x = features().double()
    moments = Moments.of(x)
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.covariance, x.T.cov())


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_batches_are_the_whole(batch) -> None:
    moments = Moments.empty(6)
    for part in features().split(batch):
        moments.update(part)
    same(moments, Moments.of(features()))


def test_merged_parts_are_the_whole_and_stay_as_they_were() -> None:
    parts = [Moments.of(part) for part in features().split(20)]
    same(merge(*parts), Moments.of(features()))
    same(parts[0], Moments.of(features()[:20]))


def test_an_evaluation_that_was_cut_off_goes_on_from_its_file(tmp_path) -> None:
    save_file(vars(Moments.of(features()[:30])), tmp_path / "moments")
    moments = Moments(**load_file(tmp_path / "moments"))
    moments.update(features()[30:])
    same(moments, Moments.of(features()))


def test_what_does_not_belong_together_is_refused(unchecked) -> None:
    with pytest.raises(ValueError, match="got features of width 4 after features of width 6"):
        Moments.empty(6).update(features(3, 4))
    with pytest.raises(ValueError, match="merge parts of the same evaluation"):
        merge(Moments.empty(6), Moments.empty(4))
    broken = features()
    broken[3] = torch.nan
    with pytest.raises(ValueError, match="1 of 50 images have values that are not finite, 3 first"):
        Moments.of(broken)


@pytest.mark.parametrize("count", [0, 1])
def test_a_covariance_takes_two_images(count) -> None:
    with pytest.raises(ValueError, match=f"a covariance takes two images or more, got {count}"):
        _ = Moments.of(features(count)).covariance
