"""Adapter files damaged at random: one clear error or the same student; never another one, never half of one."""

import pytest

from benchmarks import damaged_adapters


@pytest.mark.slow
@pytest.mark.parametrize("layout", damaged_adapters.LAYOUTS)
def test_a_damaged_adapter_is_refused_or_gives_the_same_student(layout):
    counts, wrong = damaged_adapters.study(layout, range(16))
    assert not wrong and counts["refused"] > 8


@pytest.mark.slow
@pytest.mark.parametrize("layout", damaged_adapters.LAYOUTS)
def test_many_damaged_adapters(layout):
    assert not damaged_adapters.study(layout, range(1000, 1150))[1]


@pytest.mark.slow
def test_what_no_checksum_holds_is_seen_as_another_student():
    """So that the two above can fail."""
    counts, _ = damaged_adapters.study("published", range(40))
    assert counts["other numbers"]
