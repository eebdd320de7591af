"""SIGINT and SIGTERM as a wish to stop, not as an end."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 5.0
"""Seconds."""


class Stopped(Exception):
    """A run was told to stop by a signal, and has saved: the same call goes on from there."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + number
        """Exit code that a shell expects of a process that this signal has ended."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them. One that comes `PATIENCE` after the first has its usual
    effect; before that it is the same one again: from the terminal or Slurm, and then from torchrun."""
    caught, moments = list[int](), list[float]()
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread can receive signals
        return

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        moments.append(time.monotonic())
        if moments[-1] - moments[0] > PATIENCE:
            signal.signal(number, usual[signal.Signals(number)])
            signal.raise_signal(number)

    usual = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
