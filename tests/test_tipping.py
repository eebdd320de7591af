"""Where a student leaves its teacher: the pieces that `benchmarks.tipping` puts together."""

import pytest
import torch

from arcflow.path import shift_sigma
from arcflow.sampling.open import SHIPPED, adapter_of
from benchmarks.tipping import Tipping

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two():
    return Tipping(adapter_of(SHIPPED, SHIPPED), count=2)


@pytest.mark.parametrize("raw_time", [0.9, 0.5])
def test_a_teacher_led_in_two_pieces_ends_where_it_ends_in_one(two, raw_time):
    level = float(shift_sigma(raw_time, two.shift))
    there = two.each(two.led(1.0, level), two.noise)
    assert not torch.equal(there, two.noise)
    torch.testing.assert_close(two.each(two.led(level, 0.0), there), two.ends, rtol=0, atol=1e-3)


def test_fifty_even_steps_are_its_own_grid(two):
    torch.testing.assert_close(two.each(two.led(1.0, 0.0, steps=50), two.noise), two.ends, rtol=0, atol=1e-3)


def test_a_picture_further_than_a_tenth_is_tipped_and_may_be_right(two):
    assert two.judge(two.ends) == "0.0000 | 0.0% | 100.0% |"
    assert two.judge(two.ends.flip(0)).split(" | ")[1] == "100.0%"
