"""The next batch is made while this one is trained on."""

import threading

import pytest
import torch

from arcflow.data.prefetch import Prefetcher, Prepared

CPU = torch.device("cpu")


def sample(number):
    return Prepared(torch.full((2,), float(number)), {}, {"at": number})


@pytest.mark.parametrize("ahead", [False, True])
def test_batches_come_by_number_whatever_is_made_ahead(ahead):
    prefetcher = Prefetcher(sample, CPU, ahead=ahead)
    assert [prefetcher(number).position["at"] for number in (0, 1, 2, 7, 8)] == [0, 1, 2, 7, 8]
    prefetcher.close()


def test_the_next_batch_is_there_before_it_is_asked_for():
    """So that the transformer does not wait for text encoders: on a thread of its own, one batch ahead."""
    made, threads, second = [], set(), threading.Event()

    def make(number):
        threads.add(threading.current_thread())
        made.append(number)
        if number == 1:
            second.set()
        return sample(number)

    prefetcher = Prefetcher(make, CPU, ahead=True)
    prefetcher(0)
    assert second.wait(60) and threading.current_thread() not in threads
    prefetcher.close()
    assert made == [0, 1]


def test_what_goes_wrong_ahead_is_said_when_that_batch_is_asked_for():
    def make(number):
        if number == 1:
            raise ValueError("no such image")
        return sample(number)

    prefetcher = Prefetcher(make, CPU, ahead=True)
    assert prefetcher(0).position["at"] == 0
    with pytest.raises(ValueError, match="no such image"):
        prefetcher(1)
    prefetcher.close()
