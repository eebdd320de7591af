"""When a training will end: told after ten iterations, and in lines now and then where there is no terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

TELL = 10
"""Iterations of a start after which its end is told."""

LEAST = 30.0
"""Seconds between two lines off a terminal, at least."""

LINES = 200
"""Lines off a terminal over a whole run, about."""


class Pace:
    """The time of a start's iterations and measurements.

    The first iteration warms up (kernels are chosen, memory is taken), so it is left out where there are others.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        iterations: int,
        done: int,
        eval_every: int,
        gpus: int,
        stop_after: float | None = None,
        lines: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`gpus` take part, 0 where cores do it; `stop_after` are minutes of this start; `lines` are told where there
        is no terminal, or as it is said."""
        self.say, self.clock = say, clock
        self.iterations, self.done, self.eval_every = iterations, done, eval_every
        self.gpus, self.stop_after = gpus, stop_after
        self.lines = not sys.stderr.isatty() if lines is None else lines
        self.spent, self.counted, self.first = 0.0, 0, 0.0
        self.measuring = 0.0
        self.began = self.last_line = clock()

    @contextmanager
    def measurement(self) -> Iterator[None]:
        """Times a measurement; one that was found in the log takes none, so the longest counts."""
        began = self.clock()
        yield
        self.measuring = max(self.measuring, self.clock() - began)

    def iteration(self, step: int, seconds: float, losses: dict[str, float]) -> None:
        """Iteration `step`, counted from 1, took that long; says what there is to say."""
        started = step - self.done
        if started == 1:
            self.first = seconds
        else:
            self.spent, self.counted = self.spent + seconds, self.counted + 1
        if started == TELL and step < self.iterations:
            self.say(self.estimate(step))
        if self.lines and self.clock() - self.last_line >= max(LEAST, self.left(self.done) / LINES):
            self.last_line = self.clock()
            said = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            each = f"{self.each:.2g} s an iteration, ends about {self._when(self.left(step))}"
            self.say(f"iteration {step} of {self.iterations}: {said}; {each}")

    @property
    def each(self) -> float:
        """Seconds of an iteration."""
        return self.spent / self.counted if self.counted else self.first

    def left(self, step: int) -> float:
        """Seconds from iteration `step` to the end, by what was seen."""
        measurements = (self.iterations - 1) // self.eval_every - step // self.eval_every + 1
        return (self.iterations - step) * self.each + measurements * self.measuring

    def estimate(self, step: int) -> str:
        """When it will end, and what that costs."""
        left = self.left(step)
        hours = told_hours(self.left(0) * self.gpus / 3600)
        cost = f", {hours} GPU-hours in all on {self.gpus} GPU{'s' * (self.gpus > 1)}" if self.gpus else ""
        said = (
            f"{self.each:.2g} s an iteration: ends about {self._when(left)}, in {told_time(left)}{cost} "
            f"(by {TELL} iterations and {told_time(self.measuring)} a measurement)"
        )
        if self.stop_after is not None and self.clock() + left - self.began > 60 * self.stop_after:
            said += f"; this start stops after {self.stop_after:g} min, and the same command goes on"
        return said

    @staticmethod
    def _when(seconds: float) -> str:
        return f"{datetime.now() + timedelta(seconds=seconds):%Y-%m-%d %H:%M}"


def told_time(seconds: float) -> str:
    """A time of two units at most, as people say it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // (24 * 60)} d {minutes % (24 * 60) // 60} h"


def told_hours(hours: float) -> str:
    """Hours, in two digits or all before the point."""
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
