"""The queue and its thread, on a studio of toys."""

import threading
from concurrent.futures import CancelledError

import pytest

from arcflow.serving.engine import Engine, Full, NotReady, OutOfMemory, WaitingImage
from arcflow.serving.order import Piece
from tests.support.served import Toys, ordered


class Gate:
    """Holds the engine's thread before each batch until it is opened."""

    def __init__(self):
        self.reached, self.open = threading.Semaphore(0), threading.Event()

    def __call__(self, pieces):
        self.reached.release()
        assert self.open.wait(10)


def job(seed, **changes):
    return WaitingImage(ordered(**changes), Piece(prompt="a ring", seed=seed))


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def toys(gate):
    return Toys(gate)


@pytest.fixture
def engine(toys, gate):
    engine = Engine(lambda: toys, max_waiting=10)
    engine.start()
    engine.ready(10.0)
    yield engine
    gate.open.set()
    engine.close(10.0)


def held(engine, gate):
    """A job that is being drawn until the gate opens."""
    first = job(0, height=16)
    engine.submit([first])
    assert gate.reached.acquire(timeout=10)
    return first


def test_equal_orders_are_drawn_together_in_the_order_they_came(engine, toys, gate):
    held(engine, gate)
    jobs = [job(1), job(2, steps=4), job(3), job(4, steps=4), job(5)]
    engine.submit(jobs)
    gate.open.set()
    assert [j.future.result(10).batch for j in jobs] == [3, 2, 3, 2, 3]
    assert [seeds for _, seeds in toys.batches[1:]] == [[1, 3, 5], [2, 4]]


def test_a_request_enters_the_queue_whole_or_not_at_all(engine, gate):
    held(engine, gate)
    engine.submit([job(i) for i in range(8)])
    with pytest.raises(Full, match="8 images are waiting") as full:
        engine.submit([job(i) for i in range(3)])
    assert 1 <= full.value.seconds <= 30
    assert len(engine.waiting) == 8


def test_who_leaves_is_not_drawn(engine, toys, gate):
    held(engine, gate)
    stays, leaves = job(1), job(2)
    engine.submit([stays, leaves])
    engine.leave([leaves])
    gate.open.set()
    assert stays.future.result(10).batch == 1
    assert leaves.future.cancelled()
    assert [seeds for _, seeds in toys.batches] == [[0], [1]]


def test_a_batch_that_nobody_waits_for_is_given_up(engine, toys, gate):
    first = held(engine, gate)
    engine.leave([first])
    after = job(1)
    engine.submit([after])
    gate.open.set()
    after.future.result(10)
    assert isinstance(first.future.exception(10), CancelledError)
    assert [seeds for _, seeds in toys.batches] == [[1]]


def test_the_teacher_waits_until_no_student_does(engine, toys, gate):
    held(engine, gate)
    jobs = [job(1, model="teacher"), job(2), job(3, steps=4)]
    engine.submit(jobs)
    gate.open.set()
    for j in jobs:
        j.future.result(10)
    assert [seeds for _, seeds in toys.batches[1:]] == [[2], [3], [1]]


def test_draining_ends_what_is_drawn_and_refuses_what_waits(engine, gate):
    first, waits = held(engine, gate), job(1)
    engine.submit([waits])
    engine.drain()
    gate.open.set()
    assert first.future.result(10).batch == 1
    with pytest.raises(NotReady, match="draining"):
        waits.future.result(10)
    with pytest.raises(NotReady):
        engine.submit([job(2)])
    engine.close(10.0)
    assert engine.state == "closed" and not engine.thread.is_alive()


def test_one_picture_that_fails_fails_alone():
    def before(pieces):
        if any(piece.seed == 2 for piece in pieces):
            raise ValueError("no such image")

    engine = Engine(lambda: Toys(before))
    engine.start()
    engine.ready(10.0)
    jobs = [job(i) for i in range(4)]
    engine.submit(jobs)
    assert [j.future.exception(10) is None for j in jobs] == [True, True, False, True]
    engine.close(10.0)


def test_when_memory_runs_out_batches_become_smaller_and_the_thread_lives():
    def before(pieces):
        if len(pieces) > 2 or any(piece.seed == 9 for piece in pieces):
            raise MemoryError

    toys = Toys(before)
    engine = Engine(lambda: toys)
    engine.start()
    engine.ready(10.0)
    jobs = [job(i) for i in range(8)]
    engine.submit(jobs)
    assert all(j.future.result(10) for j in jobs)
    assert max(len(seeds) for _, seeds in toys.batches) <= 2
    huge, small = job(9), job(1)
    engine.submit([huge])
    assert isinstance(huge.future.exception(10), OutOfMemory)
    engine.submit([small])
    assert small.future.result(10)
    engine.close(10.0)


def test_a_model_that_cannot_be_opened_is_told_to_whoever_waits():
    def opened():
        raise ValueError("no such model")

    engine = Engine(opened)
    engine.start()
    with pytest.raises(ValueError, match="no such model"):
        engine.ready(10.0)
    assert engine.state == "failed"


def test_nobody_waits_for_a_thread_that_has_died():
    class Broken(Toys):
        def room(self, order):
            raise RuntimeError("the device is gone")

    engine = Engine(Broken)
    engine.start()
    engine.ready(10.0)
    waits = job(1)
    engine.submit([waits])
    with pytest.raises(NotReady):
        waits.future.result(10)
    engine.thread.join(10)
    assert engine.state == "failed" and isinstance(engine.error, RuntimeError)
    with pytest.raises(NotReady):
        engine.submit([job(2)])
