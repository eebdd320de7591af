"""Prompts, and what a pipeline makes of them: the only data a distillation needs.

Which prompts and which noise iteration n gets is a function of the run's seed and n, nothing else, so an interrupted
run goes on as if nothing had happened; only a streamed data set has a position that is saved. Samples are counted
through the whole run: epoch e walks through all prompts in a random order of its own, and sample i has noise of its
own. With `data.buckets` images have the shapes that the list tells, all of a batch the same. Text encoders are
frozen: a small pipeline's embeddings are computed once, in fixed chunks, and kept in memory (one encoding per prompt,
whatever batch asks for it); a large one encodes every batch.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator

from arcflow.config import Data, Optim, Sources
from arcflow.data.prompts import BLOCK, ListedPrompt, read_prompts
from arcflow.data.stream import Stream
from arcflow.system.seeds import seed_of
from arcflow.system.text import Json

Size = tuple[int, ...]
"""Height and width in pixels, and the frames of a video."""


def buckets(height: int, width: int, step: int) -> list[tuple[int, int]]:
    """Image sizes (height, width) of about the same area, from twice as high to twice as wide, in steps of `step`."""
    area = height * width
    sizes = {(height, width)}
    for short in range(step, min(height, width) + step, step):
        long = round(area / short / step) * step
        if short < long <= 2 * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest_size(size: Size | None, sizes: list[Size], usual: Size, frames: int | None = None) -> Size:
    """The size whose shape is closest, of as many frames; the usual ones where the list tells none."""
    if size is None and frames is None:
        return usual
    rows, columns, *_ = size or usual
    count = frames or _frames(usual)

    def apart(s: Size) -> tuple[int, float, Size]:
        ratio = max(s[0] * columns, s[1] * rows) / min(s[0] * columns, s[1] * rows)
        return abs(_frames(s) - count), ratio, s

    return min(sizes, key=apart)


def _frames(size: Size) -> int:
    """Frames of a size: an image has one."""
    return size[2] if len(size) == 3 else 1


def micro_batches(count: int, optim: Optim) -> Iterator[slice]:
    """A batch in pieces that fit in memory."""
    size = optim.micro_batch or optim.batch
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


class Batch(NamedTuple):
    """Samples of one iteration: images of one size."""

    prompts: list[str]
    seeds: list[int]
    """Seeds of the noise, one for each prompt."""
    size: Size
    images: Sequence[str] = ()
    """Paths of images, where training depends on them."""
    sources: Sequence[str] = ()
    """Paths of images to edit, or words of which they are drawn first."""


def _sizes(config: Data, rows: Sequence[ListedPrompt] = ()) -> list[Size]:
    """All that batches may have: the shapes of about the same area, and the frames that the list tells."""
    if not config.buckets:
        return [config.size]
    step = 64 if min(config.height, config.width) >= 512 else 16
    counts = sorted({config.frames, *(row.frames for row in rows if row.frames)})
    shapes = buckets(config.height, config.width, step)
    return [(*shape, *([count] if count > 1 else [])) for count in counts for shape in shapes]


def _held_out(rows: Sequence[ListedPrompt], config: Data, seed: int) -> Batch:
    seeds = [seed_of(seed, "held-out noise", i) for i in range(len(rows))]
    sources = _sources(rows, config.sources, config.held_out or config.prompts)
    return Batch([row.text for row in rows], seeds, config.size, sources=sources)


def _sources(rows: Sequence[ListedPrompt], sources: Sources, where: str) -> list[str]:
    """The images to edit of these rows, whose list is the file `where`."""
    folder = Path(where).parent
    return [str(folder / row.source) if sources == "files" else row.source for row in rows if row.source]


class PromptData:
    """Prompts in memory: batch n is a function of the seed and n.

    `order` is the seed of the batches where it is another than that of the prompts. `train` are all rows, `held_out` a
    batch for measuring, `sizes` all that batches may have, `message` what was left out of the list.
    """

    def __init__(self, config: Data, *, seed: int, batch: int, order: int | None = None) -> None:
        self.seed = seed if order is None else order
        self.count = batch
        self.train, held_out, self.message = prompt_sets(config, seed)
        self.held_out = _held_out(held_out, config, seed)
        self.sizes = _sizes(config, self.train)
        self._plans: dict[tuple[int, str, tuple[int, ...]], list[int]] = {}
        self._places = {size: [] for size in self.sizes}
        for i, row in enumerate(self.train):
            frames = row.frames if config.buckets else None
            self._places[nearest_size(row.size, self.sizes, self.held_out.size, frames)].append(i)
        self.folder = Path(config.prompts).parent if config.images else None
        self.sources: Sources = config.sources
        self.where = config.prompts
        if self.folder:
            self._look(self.folder, config.prompts)
        if len(self.sizes) > 1:
            self._merge(config.prompts)

    def _look(self, folder: Path, where: str) -> None:
        """Every row must have an image."""
        lacking = [row for row in self.train if not row.image or not (folder / row.image).is_file()]
        if lacking:
            raise ValueError(
                f"{where}: {len(lacking)} of {len(self.train)} rows have no image, the first {lacking[0].image!r} "
                f"of {lacking[0].text[:60]!r}: expected paths relative to {folder} in the column 'image'; correct "
                f"them, or leave data.images off"
            )

    def _merge(self, where: str) -> None:
        """Sizes that do not fill a batch give their prompts to the nearest that does."""
        full = [size for size, places in self._places.items() if len(places) >= self.count]
        if not full:
            raise ValueError(
                f"{where}: no image size has {self.count} prompts, one batch: expected more; "
                f"lower optim.batch or switch data.buckets off"
            )
        for size in [size for size in self._places if size not in full]:
            self._places[nearest_size(size, full, full[0], _frames(size))] += self._places.pop(size)
        self.sizes = full

    def batch(self, step: int) -> Batch:
        """Prompts, noise and size of iteration `step`, counted from 0."""
        samples = range(step * self.count, (step + 1) * self.count)
        seeds = [seed_of(self.seed, "noise", i) for i in samples]
        if len(self.sizes) == 1:
            return self._batch([self._row(i) for i in samples], seeds, self.sizes[0])
        whole = {size: len(places) // self.count for size, places in self._places.items()}
        epoch, place = divmod(step, sum(whole.values()))
        each = [(size, k) for size, count in whole.items() for k in range(count)]
        size, k = each[self._order(len(each), "sizes", epoch)[place]]
        order = self._order(len(self._places[size]), "order", epoch, *size)[k * self.count : (k + 1) * self.count]
        return self._batch([self.train[self._places[size][i]] for i in order], seeds, size)

    def _batch(self, rows: list[ListedPrompt], seeds: list[int], size: Size) -> Batch:
        images = [str(self.folder / row.image) for row in rows] if self.folder else []
        return Batch([row.text for row in rows], seeds, size, images, _sources(rows, self.sources, self.where))

    def _row(self, sample: int) -> ListedPrompt:
        epoch, place = divmod(sample, len(self.train))
        return self.train[self._order(len(self.train), "order", epoch)[place]]

    def _order(self, count: int, purpose: str, epoch: int, *which: int) -> list[int]:
        """A random order, the epoch's own. Those of the last two epochs are kept: a batch may span both."""
        key = (epoch, purpose, which)
        if key not in self._plans:
            shuffle = Generator().manual_seed(seed_of(self.seed, purpose, epoch, *which))
            self._plans = {known: order for known, order in self._plans.items() if known[0] >= epoch - 1}
            self._plans[key] = torch.randperm(count, generator=shuffle).tolist()
        return self._plans[key]

    def state(self) -> dict[str, object]:
        """Nothing: the number of the iteration says all."""
        return {}

    def load(self, state: Json) -> None:
        pass


class PromptStream:
    """Prompts of a data set that is read as it goes: batches come in order, and the position is saved.

    A block of rows is shuffled, then sorted by image size; what does not fill a batch waits for the next block. The
    first block is read at once, so that a run can look at its sizes before it begins.
    """

    def __init__(self, config: Data, *, seed: int, batch: int) -> None:
        self.seed = seed
        self.count = batch
        self.train = list[ListedPrompt]()
        self.stream = Stream(config.prompts, config.split, config.column, block=BLOCK, strict=config.strict)
        self.config = config
        self.sizes = _sizes(config)
        self.step = 0
        self.waiting: dict[Size, list[str]] = {size: [] for size in self.sizes}
        self.ready: list[tuple[Size, list[str]]] = []
        rows = self.stream.next()
        apart = read_prompts(config.held_out, config.column, strict=config.strict)[0] if config.held_out else rows
        self._hold(_held_out(apart[: config.held_out_count], config, seed))
        self._sort(rows)

    @property
    def message(self) -> str | None:
        return self.stream.sieve.message()

    def _hold(self, held_out: Batch) -> None:
        """Keep these prompts out of all batches."""
        self.held_out = held_out
        self._apart = {alike(text) for text in held_out.prompts}

    def _sort(self, rows: list[ListedPrompt]) -> None:
        shuffle = Generator().manual_seed(seed_of(self.seed, "block", self.stream.epoch, self.stream.place))
        for i in torch.randperm(len(rows), generator=shuffle).tolist():
            if alike(rows[i].text) in self._apart:
                continue
            frames = rows[i].frames if self.config.buckets else None
            if frames and frames not in map(_frames, self.sizes):  # what a stream has is found out as it is read
                self._have(_sizes(self.config, [rows[i]]))
            size = nearest_size(rows[i].size, self.sizes, self.held_out.size, frames)
            self.waiting[size].append(rows[i].text)
            if len(self.waiting[size]) == self.count:
                self.ready.append((size, self.waiting[size]))
                self.waiting[size] = []

    def _have(self, sizes: Iterable[Size]) -> None:
        """Batches may have these sizes too."""
        self.sizes = list(dict.fromkeys([*self.sizes, *sizes]))
        self.waiting = {size: self.waiting.get(size, []) for size in self.sizes}

    def batch(self, step: int) -> Batch:
        """Prompts, noise and size of iteration `step`, the one after the last."""
        if step != self.step:
            raise ValueError(f"batch {step} of a stream: expected {self.step}, the next one")
        epoch = self.stream.epoch
        while not self.ready:
            self._sort(self.stream.next())
            if self.stream.epoch > epoch + self.count:
                raise ValueError(
                    f"{self.stream.sieve.where} fills no batch of {self.count} in as many epochs: expected prompts "
                    f"beside the {len(self.held_out.prompts)} held-out ones; lower data.held_out_count"
                )
        size, prompts = self.ready.pop(0)
        self.step += 1
        samples = range(step * self.count, (step + 1) * self.count)
        return Batch(prompts, [seed_of(self.seed, "noise", i) for i in samples], size)

    def state(self) -> dict[str, object]:
        """Where the next batch comes from; goes into JSON."""
        waiting = [[size, list(texts)] for size, texts in self.waiting.items()]
        return {"step": self.step, "stream": self.stream.state(), "waiting": waiting, "ready": list(self.ready)}

    def load(self, state: Json) -> None:
        """Go on from there."""
        self.step = state["step"]
        self.stream.load(state["stream"])
        self.waiting = {tuple(size): texts for size, texts in state["waiting"]}
        self._have(self.waiting)
        self.ready = [(tuple(size), texts) for size, texts in state["ready"]]


Prompts = PromptData | PromptStream


def open_prompts(config: Data, *, seed: int, batch: int) -> Prompts:
    """The prompts of a run."""
    kind = PromptStream if config.streamed else PromptData
    return kind(config, seed=seed, batch=batch)


def prompt_sets(config: Data, seed: int) -> tuple[list[ListedPrompt], list[ListedPrompt], str | None]:
    """Training and held-out prompts, and what was left out; without a file of their own the last ones are held out."""
    held_out: list[ListedPrompt] = []
    if config.held_out:
        held_out = _read(config, config.held_out)[0][: config.held_out_count]
    if config.prompts == "world":
        from arcflow.world.scene import Split, sample_prompts  # the grammar is needed here only

        def drawn(count: int, split: Split) -> list[ListedPrompt]:
            return [ListedPrompt(prompt.text) for prompt in sample_prompts(count, seed, split=split)]

        return drawn(config.count, "train"), held_out or drawn(config.held_out_count, "test"), None
    rows, message = _read(config, config.prompts)
    train = list(dict.fromkeys(rows))
    told = [message] if message else []
    if len(train) < len(rows):
        told.append(f"{config.prompts}: {len(rows) - len(train)} of {len(rows)} rows left out: they are there before")
    if not held_out:
        if len(train) <= config.held_out_count:
            raise ValueError(
                f"{config.prompts} has {len(train)} prompts and {config.held_out_count} are to be held out: "
                f"expected more of them; lower data.held_out_count or give data.held_out a file of its own"
            )
        train, held_out = train[: -config.held_out_count], train[-config.held_out_count :]
    known = set(map(_mark, held_out))
    apart = [row for row in train if _mark(row) not in known]
    if len(apart) < len(train):
        told.append(f"{config.prompts}: {len(train) - len(apart)} rows left out of training: they are held out")
    if not apart:
        raise ValueError(
            f"{config.prompts}: all {len(train)} prompts are held out too: expected others to train on; "
            f"give data.held_out another file or lower data.held_out_count"
        )
    return apart, held_out, "; ".join(told) or None


def _read(config: Data, path: str) -> tuple[list[ListedPrompt], str | None]:
    return read_prompts(path, config.column, strict=config.strict, sources=config.sources)


def _mark(row: ListedPrompt) -> tuple[str, str]:
    """What two rows have in common that are the same for a reader."""
    return alike(row.text), row.source


def alike(text: str) -> str:
    """What prompts have in common that are the same for a reader: spaces and Unicode's spellings do not count."""
    return " ".join(unicodedata.normalize("NFC", text).split())
