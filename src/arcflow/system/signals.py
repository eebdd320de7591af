"""SIGINT, SIGTERM and SIGHUP as a wish to stop, not as an end; and the end of whoever has started this process."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 5.0
"""Seconds."""

LAUNCHED = "ARCFLOW_LAUNCHED"
"""Environment variable of a process that ends with the one that started it, whose pipe is its standard input. It holds
a folder that is then removed."""

LAST_WORDS = 600.0
"""Seconds in which a process whose parent has died may save."""

WISHES = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Ctrl-C, the end of a job, and the end of the terminal that it was started from."""


class Stopped(Exception):
    """A run was told to stop by a signal, and has saved: the same call goes on from there."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + number
        """Exit code that a shell expects of a process that this signal has ended."""


class Insisted(KeyboardInterrupt):
    """A signal came again, `PATIENCE` after the first: whatever goes on is to be left at once."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.code = 128 + number


class Wishes(list[int]):
    """The signals that came, in their order."""

    saving = False
    """While this is set, nothing is left for a second signal: it takes a third one, `PATIENCE` after that."""


@contextmanager
def stop_signals() -> Iterator[Wishes]:
    """Collect the signals that ask a process to stop, instead of dying of them.

    One that comes within `PATIENCE` of the first is the same one again: from the terminal or Slurm, and then from
    torchrun. A later one raises `Insisted` in the main thread, and the next has its usual effect. One that was ignored
    before, as `nohup` does it with SIGHUP, stays ignored.
    """
    caught = Wishes()
    moments = list[float]()
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread can receive signals
        return

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        now = time.monotonic()
        if moments and now - moments[-1] <= PATIENCE:
            return
        moments.append(now)
        if caught.saving and len(moments) == 2:
            _say("saving what was done; once more to leave without it")
        elif len(moments) > 1:
            for one, handler in usual.items():
                signal.signal(one, handler)
            raise Insisted(number)

    usual = {
        number: signal.signal(number, note)
        for number in WISHES
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _say(message: str) -> None:
    """Say it from a handler, in the middle of whatever is being printed."""
    os.write(2, f"arcflow: {message}\n".encode())


def end_with_parent() -> None:
    """Let a process that was started with `LAUNCHED` be told to stop when its parent has ended, however it did."""
    folder = os.environ.pop(LAUNCHED, None)
    if folder is None:
        return

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):  # nobody writes: this waits until the other end is closed
            pass
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # there is nothing to save yet
            shutil.rmtree(folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGTERM)
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(LAST_WORDS)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
