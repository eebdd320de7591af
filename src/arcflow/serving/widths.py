"""Batch sizes at which an image has the same bits.

A matrix product sums in an order that depends on how many rows it has: alone, in a batch of three and in one of eight
the same row may come out different in its last bits, and some pixels by one. A server must not let an image depend on
what others ask for at the same moment. So batches are drawn only at sizes that agree to the last bit, found by trying:
one image is repeated to fill each size, and every row of every size is compared. Smaller batches are padded up to
the next of these sizes. Where none agree, the one that pays is taken, a single row if none does.

The shipped small model on a CPU agrees from four rows on, so an image alone is drawn as four (docs/serving.md says
what that costs).
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

WORTH = 0.8
"""A set of larger sizes has to need less than this of the time per image to be taken."""

PAYS = 0.95
"""Sizes are tried as long as each needs less than this of the time per image of the one before."""


def sizes(most: int) -> list[int]:
    """Powers of two up to `most`, and `most` itself."""
    powers = [2**n for n in range(most.bit_length()) if 2**n < most]
    return [*powers, most]


def agreeing(
    draw: Callable[[int], Tensor], most: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[int, ...]:
    """Batch sizes whose rows are the same to the last bit, in rising order.

    Args:
        draw: gives n rows of one image.
        clock: gives seconds.
    """
    rows, seconds = dict[int, Tensor](), dict[int, float]()
    pace = float("inf")
    for n in sizes(most):
        draw(n)  # the first call of a shape is slow
        start = clock()
        rows[n] = draw(n)
        seconds[n] = clock() - start
        if seconds[n] / n > PAYS * pace:
            break  # the device is full: no larger size will pay
        pace = seconds[n] / n

    def equals(n: int, row: Tensor) -> bool:
        return all(torch.equal(other, row) for other in rows[n])

    best: tuple[int, ...] = (1,)
    for first in rows:
        found = tuple(n for n in rows if n >= first and equals(n, rows[first][0]))
        if found and seconds[found[-1]] / found[-1] < WORTH * seconds[best[-1]] / best[-1]:
            best = found
    return best


def next_width(count: int, widths: tuple[int, ...]) -> int:
    """The size at which `count` images are drawn: the next one that agrees."""
    return next((n for n in widths if n >= count), widths[-1])
