"""The next batch, made while this one is trained on.

The text encoders of the large models take a second for a batch that the transformer then works on for many. A thread
of their own (on a GPU: a stream of their own) reads the prompts of the next iteration, draws its noise and encodes its
text, so that the transformer does not wait. What a batch holds is a function of its number, and does not depend on
this.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from arcflow.families.conditioning import Cond
from arcflow.system.text import Json


@dataclass(frozen=True)
class Prepared:
    """What an iteration trains on."""

    x: Tensor
    cond: Cond
    position: Json
    """Where a streamed data set stands after it."""
    clean: Tensor | None = None
    """Latents of images, where training depends on them."""


class Prefetcher:
    """Batches by number, in order; with `ahead` the next one is begun when one is asked for."""

    def __init__(self, make: Callable[[int], Prepared], device: torch.device, *, ahead: bool) -> None:
        self.make, self.ahead = make, ahead
        self.stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        # The same number of cores as here: products of matrices round by how they are divided.
        self.thread = ThreadPoolExecutor(1, "prefetch", torch.set_num_threads, (torch.get_num_threads(),))
        self.pending: tuple[int, Future[Prepared]] | None = None

    def __call__(self, number: int) -> Prepared:
        if not self.ahead:
            return self.make(number)
        begun = self.pending
        self.pending = None
        sample = begun[1].result() if begun and begun[0] == number else self.thread.submit(self._make, number).result()
        self.pending = number + 1, self.thread.submit(self._make, number + 1)
        if self.stream:
            here = torch.cuda.current_stream()
            here.wait_stream(self.stream)
            for value in (sample.x, *sample.cond.values(), *([] if sample.clean is None else [sample.clean])):
                value.record_stream(here)  # its memory is not the other stream's to reuse
        return sample

    def _make(self, number: int) -> Prepared:
        with torch.cuda.stream(self.stream):  # without one this does nothing
            return self.make(number)

    def close(self) -> None:
        """Wait for what was begun."""
        self.thread.shutdown()
