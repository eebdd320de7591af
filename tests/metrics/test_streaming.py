"""Parts of an evaluation add up to the whole: batches, processes, and a run before and after it was cut off."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from arcflow.metrics.streaming import Moments, Table, merge


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


def test_processes_fill_one_table_in_any_order() -> None:
    rows = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    parts = [Table.empty(50, 6) for _ in range(3)]
    for process, part in enumerate(parts):
        for some in rows[process::3].split(4):
            part.put(some.tolist(), features()[some])
    assert torch.equal(merge(*parts).complete(), features())


def test_an_evaluation_that_was_cut_off_goes_on_from_its_file(tmp_path) -> None:
    table, moments = Table.empty(50, 6), Moments.of(features()[:30])
    table.put(range(30), features()[:30])
    for name, part in (("table", table), ("moments", moments)):
        save_file(vars(part), tmp_path / name)
    table, moments = Table(**load_file(tmp_path / "table")), Moments(**load_file(tmp_path / "moments"))
    assert table.missing() == list(range(30, 50))
    table.put(table.missing(), features()[table.missing()])
    moments.update(features()[30:])
    assert torch.equal(table.complete(), features())
    same(moments, Moments.of(features()))


def test_filling_a_row_again_in_the_same_process_replaces_it() -> None:
    table = Table.empty(2, 6)
    table.put([0, 1], features(2, seed=1))
    table.put([0, 1], features(2))
    assert torch.equal(table.complete(), features(2))


def test_a_table_with_holes_or_rows_filled_twice_is_refused() -> None:
    table = Table.empty(3, 1)
    table.put([0, 2], torch.ones(2, 1))
    with pytest.raises(ValueError, match="1 of 3 rows are not filled, row 1 first; every image has to be put"):
        table.complete()
    other = Table.empty(3, 1)
    other.put([1, 2], torch.ones(2, 1))
    with pytest.raises(ValueError, match="1 of 3 rows are filled more than once, row 2 first"):
        merge(table, other).complete()


def test_what_does_not_belong_together_is_refused(unchecked) -> None:
    with pytest.raises(ValueError, match="got features of width 4 after features of width 6"):
        Moments.empty(6).update(features(3, 4))
    with pytest.raises(ValueError, match=r"got values \(1, 6\), expected \(2, 6\): one row for each image named"):
        Table.empty(4, 6).put([0, 1], features(1))
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
