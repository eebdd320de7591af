"""Where the time goes: seconds per iteration, split into teacher, student and the wait for data, and the memory.

On a GPU parts are timed by events, without making it wait. Clock times differ from run to run, so they have a file of
their own, `speed.jsonl`, beside the log that does not.
"""

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from arcflow.system.devices import peak_memory

P = ParamSpec("P")

T = TypeVar("T")

Moment = float | torch.cuda.Event
"""On the clock of the CPU, or in the work of a GPU."""


class Speed:
    """Times calls of the parts it is given, and sums them up by line."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans = dict[str, list[tuple[Moment, Moment]]]()
        self.since = time.perf_counter()

    def of(self, part: str, call: Callable[P, T]) -> Callable[P, T]:
        """A call that does what the given one does and is timed as `part`."""
        spans = self.spans.setdefault(part, [])

        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            start = self._now()
            result = call(*args, **kwargs)
            spans.append((start, self._now()))
            return result

        return timed

    def line(self, iterations: int, samples: int) -> dict[str, float]:
        """Since the last line: seconds per iteration, samples per second, the share of each part and of the rest,
        which is the student's, and the peak of the memory in GiB."""
        seconds = time.perf_counter() - self.since
        self.since = time.perf_counter()
        shares = {part: sum(_between(*span) for span in spans) / seconds for part, spans in self.spans.items()}
        for spans in self.spans.values():
            spans.clear()
        return {
            "seconds_per_iteration": seconds / max(iterations, 1),
            "samples_per_second": samples / seconds,
            **{f"{part}_share": share for part, share in shares.items()},
            "student_share": 1 - sum(shares.values()),
            "memory_gib": peak_memory(self.device) / 2**30,
        }

    def _now(self) -> Moment:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(start: Moment, end: Moment) -> float:
    """Seconds from one moment to another of the same kind."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1000
    assert isinstance(start, float) and isinstance(end, float)
    return end - start


def now() -> float:
    """Seconds on a clock, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
