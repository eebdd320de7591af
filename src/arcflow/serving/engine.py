"""One thread that owns the pipeline, a bounded queue in front of it, and batches of what may be drawn together.

    open -> ready -> draining -> closed        (or failed, when the model cannot be opened)

A request for n images is n jobs, taken into the queue together or not at all. The thread takes the job that waits
longest, adds all others of an equal order, and draws them as one batch; jobs of the teacher, at fifty calls each, wait
until no student's job is there, or for `PATIENCE` seconds. Who leaves is dropped from the queue; a batch that nobody
waits for any more ends after its step. When memory runs out batches become smaller; one image that does not fit is an
error of its own, and the thread goes on.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8

from arcflow.serving.metrics import Metrics
from arcflow.serving.offer import TEACHER, Gone, Offer, Watch
from arcflow.serving.order import Drawn, Order, Piece
from arcflow.serving.texts import Texts

LOGGER = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "closed", "failed"]

Partial = Callable[[int, UInt8[np.ndarray, "height width 3"]], None]

PATIENCE = 10.0
"""Seconds after which a job of the teacher goes first."""


class Full(Exception):
    """The queue has no room for a request."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} images are waiting already; try again in {seconds} s")
        self.seconds = seconds


class NotReady(Exception):
    """The engine loads, drains or has stopped."""

    def __init__(self, state: State) -> None:
        super().__init__(f"the server is {state}; try again in a moment")
        self.state = state


class OutOfMemory(Exception):
    """One image alone was too much for the device."""


@runtime_checkable
class Draws(Protocol):
    """What an engine needs of a studio."""

    texts: Texts

    def offer(self) -> Offer: ...

    def draw(self, order: Order, pieces: Sequence[Piece], watch: Watch | None = None) -> list[Drawn]: ...

    def room(self, order: Order) -> int: ...

    def shrink(self, order: Order) -> bool: ...


class WaitingImage:
    """One image that is waited for. Its future ends with the image, or with what went wrong."""

    def __init__(self, order: Order, piece: Piece, partial: Partial | None = None) -> None:
        self.order = order
        self.piece = piece
        self.partial = partial
        self.future = Future[Drawn]()
        self.since = time.monotonic()
        self.left = threading.Event()

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self.left.set()
        self.future.cancel()


class Engine:
    """A queue and the thread that empties it."""

    def __init__(self, opened: Callable[[], Draws], *, max_waiting: int = 64) -> None:
        """`opened` makes the studio; it is called in the engine's thread, which alone uses what it returns."""
        self.opened = opened
        self.max_waiting = max_waiting
        self.metrics = Metrics()
        self.state: State = "loading"
        self.offer: Offer | None = None
        self.error: BaseException | None = None
        self.waiting = list[WaitingImage]()
        self.changed = threading.Condition()
        self.pace = 0.5
        """Seconds per image, lately."""
        self.thread = threading.Thread(target=self._live, name="arcflow-engine", daemon=True)

    def start(self) -> None:
        """Begin to load; `ready` waits for the end of it. May be called again."""
        with self.changed:
            if self.thread.ident is None:
                self.thread.start()

    def ready(self, timeout: float | None = None) -> Offer:
        """What can be drawn, once the model is loaded.

        Raises:
            NotReady: it still is not after `timeout` seconds, or the engine has been closed.
            Exception: whatever stood in the way of loading.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.state != "loading", timeout)
            if self.error is not None:
                raise self.error
            if self.offer is None or self.state != "ready":
                raise NotReady(self.state)
            return self.offer

    def submit(self, jobs: Sequence[WaitingImage]) -> None:
        """Take all of these jobs into the queue, or none.

        Raises:
            Full: there is no room for them.
            NotReady: the engine is not taking any.
        """
        with self.changed:
            if self.state != "ready":
                raise NotReady(self.state)
            if len(self.waiting) + len(jobs) > self.max_waiting:
                seconds = min(max(math.ceil(self.pace * (len(self.waiting) + len(jobs) - self.max_waiting)), 1), 30)
                raise Full(len(self.waiting), seconds)
            self.waiting += jobs
            self.metrics.waiting.set(len(self.waiting))
            self.changed.notify_all()

    def leave(self, jobs: Sequence[WaitingImage]) -> None:
        """These are not waited for any more: out of the queue, and out of the batch where all others left too."""
        with self.changed:
            for job in jobs:
                if not job.future.done():
                    self.metrics.left.inc()
                job.leave()
            self._sweep()

    def close(self, timeout: float | None = None) -> None:
        """Finish the batch that is being drawn, refuse what waits, end the thread."""
        self.drain()
        if self.thread.ident is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout)

    def drain(self) -> None:
        """Take no more jobs, refuse those that wait, and let the thread end after its batch."""
        with self.changed:
            if self.state in ("loading", "ready"):
                self.state = "draining"
            refused = self.waiting
            self.waiting = []
            self.metrics.waiting.set(0)
            self.changed.notify_all()
        for job in refused:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(NotReady("draining"))

    # --- the thread

    def _live(self) -> None:
        try:
            studio = self.opened()
            offer = studio.offer()
        except BaseException as error:  # whoever waits for `ready` is told, whatever it was
            with self.changed:
                self.state = "failed"
                self.error = error
                self.changed.notify_all()
            return
        with self.changed:
            self.offer = offer
            self.state = "ready" if self.state == "loading" else self.state
            self.changed.notify_all()
        batch = list[WaitingImage]()
        try:
            while batch := self._next(studio):
                start = time.perf_counter()
                self._draw(studio, batch)
                spent = time.perf_counter() - start
                self.metrics.busy.inc(spent)
                self.pace += 0.2 * (spent / len(batch) - self.pace)
        except BaseException as error:  # not of an image, which `_draw` answers: nobody may wait for a dead thread
            LOGGER.critical("the engine has failed", exc_info=error)
            self.error = error
            for job in batch:
                if not job.future.done():
                    job.future.set_exception(error)
        self.drain()
        with self.changed:
            self.state = "closed" if self.error is None else "failed"
            self.changed.notify_all()

    def _next(self, studio: Draws) -> list[WaitingImage]:
        """The next batch, its futures running; empty when the engine is to end."""
        with self.changed:
            while True:
                self.changed.wait_for(lambda: self.waiting or self.state != "ready")
                if self.state != "ready":
                    return []
                self._sweep()
                first = min(self.waiting, key=_rank, default=None)
                if first is None:
                    continue
                together = [job for job in self.waiting if job.order == first.order][: studio.room(first.order)]
                batch = [job for job in together if job.future.set_running_or_notify_cancel()]
                taken = set(map(id, together))
                self.waiting = [job for job in self.waiting if id(job) not in taken]
                self.metrics.waiting.set(len(self.waiting))
                if batch:
                    return batch

    def _sweep(self) -> None:
        self.waiting = [job for job in self.waiting if not job.left.is_set()]
        self.metrics.waiting.set(len(self.waiting))

    def _draw(self, studio: Draws, batch: list[WaitingImage]) -> None:
        """Draw a batch; every future gets its image or its error."""
        begun = time.monotonic()
        hits, misses = studio.texts.hits, studio.texts.misses
        watch = Watch(
            wanted=lambda: not all(job.left.is_set() for job in batch),
            partial={place: job.partial for place, job in enumerate(batch) if job.partial is not None},
        )
        try:
            try:
                drawn = studio.draw(batch[0].order, [job.piece for job in batch], watch)
            finally:  # before anybody has an answer, and before what failed is drawn again
                self.metrics.texts.labels("yes").inc(studio.texts.hits - hits)
                self.metrics.texts.labels("no").inc(studio.texts.misses - misses)
        except Gone:
            for job in batch:
                job.future.set_exception(CancelledError())
        except Exception as error:
            self._failed(studio, batch, error)
        else:
            self.metrics.drawn.labels(batch[0].order.model).inc(len(batch))
            for together in {id(one.seconds): one for one in drawn}.values():
                self.metrics.batch.observe(together.batch)
                for part, seconds in together.seconds.items():
                    self.metrics.seconds.labels(part).observe(seconds)
            for job, one in zip(batch, drawn, strict=True):
                self.metrics.waited.observe(begun - job.since)
                job.future.set_result(replace(one, waited=begun - job.since))

    def _failed(self, studio: Draws, batch: list[WaitingImage], error: Exception) -> None:
        """Draw a failed batch again in smaller ones, so that one image's failure is no other's."""
        short = _out_of_memory(error)
        self.metrics.errors.labels("memory" if short else type(error).__name__).inc()
        LOGGER.warning("a batch of %d failed: %s", len(batch), error, exc_info=None if short else error)
        error.__traceback__ = None  # it holds the tensors of the batch
        smaller = studio.shrink(batch[0].order) if short else False
        if len(batch) == 1:
            job = batch[0]
            if short and smaller and job.order.task != "edit":  # padding may have been what was too much
                self._draw(studio, batch)
            else:
                job.future.set_exception(OutOfMemory("the image does not fit the memory") if short else error)
            return
        size = max(len(batch) // 2, 1) if short else 1
        for start in range(0, len(batch), size):
            self._draw(studio, batch[start : start + size])


def _rank(job: WaitingImage) -> tuple[bool, float]:
    late = time.monotonic() - job.since > PATIENCE
    return job.order.model == TEACHER and not late, job.since


def _out_of_memory(error: Exception) -> bool:
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in words
