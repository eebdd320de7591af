"""Batch sizes are drawn only where rows agree to the last bit, and only where they pay."""

import pytest
import torch

from arcflow.serving.widths import agreeing, next_width, sizes


class Clock:
    """Stands still but for what is spent."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def machine(bits, seconds, clock):
    """A machine whose rows depend on the size as `bits` says, and which takes `seconds` for a batch."""

    def draw(n):
        clock.now += seconds(n)
        return torch.full((n, 3), float(bits(n)))

    return draw


def overhead(n):
    return 0.01


@pytest.mark.parametrize(
    ("bits", "seconds", "expected"),
    [
        (lambda n: 0, overhead, (1, 2, 4, 8)),  # all agree
        (lambda n: n >= 4, overhead, (4, 8)),  # one alone is drawn as four
        (lambda n: n, overhead, (8,)),  # none agree: the one size that pays
        (lambda n: n, lambda n: 0.01 * n, (1,)),  # nor does it pay
    ],
)
def test_the_sizes_that_agree_are_taken(bits, seconds, expected, clock):
    assert agreeing(machine(bits, seconds, clock), 8, clock) == expected


def test_a_row_that_depends_on_its_place_excludes_the_size(clock):
    def draw(n):
        clock.now += 0.01
        return torch.zeros(n, 3) if n < 8 else torch.arange(8.0)[:, None].expand(8, 3)

    assert agreeing(draw, 8, clock) == (1, 2, 4)


def test_a_full_device_is_not_tried_further(clock):
    tried = []

    def draw(n):
        tried.append(n)
        clock.now += 0.01 * n
        return torch.zeros(n, 1)

    assert agreeing(draw, 64, clock) == (1,) and max(tried) <= 4


def test_batches_are_padded_to_the_next_size():
    assert sizes(6) == [1, 2, 4, 6]
    assert [next_width(n, (4, 8)) for n in (1, 4, 5, 8)] == [4, 4, 8, 8]
