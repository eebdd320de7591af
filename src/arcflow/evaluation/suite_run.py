"""One evaluation: what is asked for, in the order it is done: draw, lay out, measure, ask scorers, write results.

Nothing is loaded before it is known to be needed: a run that only adds a scorer opens no pipeline, and the pipeline is
gone before a scorer wants the memory.
"""

import csv
import gc
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from arcflow.evaluation import images as drawn
from arcflow.evaluation import scorers, summary
from arcflow.evaluation.images import Image
from arcflow.evaluation.measured import (
    MEASURES,
    NETWORKS,
    Call,
    Material,
    Measure,
    check_network,
    folder_images,
    measure,
    named_by,
    network,
    parted,
    table,
)
from arcflow.evaluation.request import Request
from arcflow.evaluation.results import Metric, Settings, SuiteResults
from arcflow.evaluation.scorers import ManifestLine
from arcflow.evaluation.suites import SUITES
from arcflow.evaluation.suites.suite import Item, Suite, numbered_lines, read_items, read_records
from arcflow.families.identity import part_digest
from arcflow.sampling.generate import stock_euler
from arcflow.sampling.open import dtype_of
from arcflow.student.identity import tensors_digest
from arcflow.system import records
from arcflow.system.devices import torch_device
from arcflow.system.packages import About


@dataclass(frozen=True, kw_only=True)
class ReferenceImages:
    """Images to compare with."""

    store: Path
    """Where their features are kept: in their own folder if it is one of ours, so that all who compare share them."""
    files: dict[str, Path]
    paired: bool
    """They are of the same prompts and noises, under the same names."""


@dataclass(frozen=True, kw_only=True)
class SuiteRun:
    """An evaluation that knows all it needs; `plan` makes one from the command's options."""

    asked: Request
    settings: Settings
    suite: Suite
    items: list[Item]
    draws: int
    images: list[Image]
    folder: Path
    adapter: str
    share: tuple[int, int]
    reference: ReferenceImages | None
    scorers: dict[str, str]
    answers: dict[str, dict[str, float]]

    @property
    def files(self) -> dict[str, Path]:
        return {image.file: self.folder / "pictures" / image.file for image in self.images}

    def draw(self, open_pipe: Callable[[], DiffusionPipeline]) -> None:
        """Draw what is missing and show it to the official scorer; `open_pipe` gives the pipeline, student and all."""
        new = 0
        if drawn.missing_images(self.folder, self.images, self.share):
            pipe = open_pipe()
            with nullcontext() if self.adapter else stock_euler(pipe):
                new = drawn.draw_missing(pipe, self.folder, self.images, self.asked.machine.batch, self.share)
            del pipe
            if torch.cuda.is_available():  # a scorer may want the memory
                gc.collect()
                torch.cuda.empty_cache()

        def show() -> int:
            drawn.lay_out(self.folder, self.suite, self.items, self.draws, self.asked.name)
            return new

        self._timed("layout", show)

    def score(self) -> None:
        """Measure what is not measured, and ask the scorers about what they have not answered."""
        own = self.folder / "measured"
        for name, one in self._measures().items():
            load = partial(one.load, self._material)
            self._timed(name, partial(measure, own / name, self.files, load, share=self.share))

        for name, load in self._features().items():
            self._timed(name, partial(measure, own / name, self.files, load, share=self.share))
            if self.reference:
                store = self.reference.store / name
                files = self.reference.files
                self._timed(f"{name} of the reference", partial(measure, store, files, load, share=self.share))

        lines = self._manifest(self.images[self.share[0] :: self.share[1]])
        for name, command in self.scorers.items():
            self._timed(name, partial(scorers.run_scorer, self.folder, name, command, lines, self.share))

    def _timed(self, stage: str, do: Callable[[], int]) -> int:
        return drawn.timed(self.folder, stage, do, self.share)

    def _measures(self) -> dict[str, Measure]:
        """Scores of single images, by the name they are kept under."""
        material = self._material
        return {one.stored(material): one for one in MEASURES if one.wanted(material)}

    @property
    def _material(self) -> Material:
        return Material(
            suite=self.suite.name,
            prompts={image.file: image.prompt for image in self.images},
            twins=self.reference.files if self.reference and self.reference.paired else None,
            device=self._device(),
            clip=self.asked.clip,
            lpips=self.asked.lpips,
        )

    def _features(self) -> dict[str, Callable[[], Call]]:
        names = self.asked.features
        if not names and self.reference and self.suite.name == "world":
            names = ("world",)
        return {named_by(*parted(name)): partial(network, name, self._device()) for name in names}

    def _device(self) -> str:
        return str(torch_device(self.asked.machine.device))

    def _manifest(self, images: Sequence[Image]) -> list[ManifestLine]:
        more = {item.number: item.more for item in self.items}
        return [
            ManifestLine(
                id=image.id,
                prompt=image.prompt,
                image=str((self.folder / "pictures" / image.file).absolute()),
                category=image.category,
                suite=self.suite.name,
                seed=image.seed,
                metadata=more[image.number] or None,
            )
            for image in images
        ]

    def results(self, about: About) -> SuiteResults | None:
        """All numbers, also in results.json; None as long as another process has not done its share."""
        if drawn.missing_images(self.folder, self.images):
            return None
        found: dict[str, Metric] = {}

        def sum_up() -> int:
            if not self._summed_up(found):
                return 0
            drawn.lay_out(self.folder, self.suite, self.items, self.draws, self.asked.name)
            return len(self.images)

        if not self._timed("results", sum_up):
            return None
        whole = not self.suite.counts or Counter(item.category for item in self.items) in self.suite.counts
        result = SuiteResults(
            suite=self.suite.name,
            paper=self.suite.paper,
            complete=whole and self.draws >= self.suite.images,
            settings=self.settings,
            prompts=len(self.items),
            pictures=len(self.images),
            metrics=found,
            seconds=drawn.times(self.folder, list(self.scorers)),
            about=about,
        )
        records.write(self.folder / "results.json", result)
        return result

    def _summed_up(self, found: dict[str, Metric]) -> bool:
        """Put all numbers; False as long as some are missing."""
        for name, one in self._measures().items():
            values = table(self.folder / "measured" / name, list(self.files))
            if values is None:
                return False
            scores = dict(zip((image.id for image in self.images), values[:, 0].tolist(), strict=True))
            found[name] = summary.summed_up(self.items, self.draws, scores, one.better, share=one.share)

        if not all(self._compared(name, found) for name in self._features()):
            return False

        for name in self.scorers:
            scores = scorers.read_scores(self.folder, name)
            if not all(image.id in scores for image in self.images):
                return False
            found[name] = summary.summed_up(self.items, self.draws, scores, "")

        for name, scores in self.answers.items():
            found[name] = summary.summed_up(self.items, self.draws, scores, "higher", share=self.suite.shares)
        return True

    def _compared(self, name: str, found: dict[str, Metric]) -> bool:
        """Put what one kind of features says; False as long as some are missing."""
        y = table(self.folder / "measured" / name, list(self.files))
        x = table(self.reference.store / name, list(self.reference.files)) if self.reference else None
        if y is None or (self.reference and x is None):
            return False
        if x is not None:
            found |= {f"{name} {metric}": value for metric, value in summary.between(x, y).items()}
        if self.draws > 1:
            paired = x if self.reference and self.reference.paired else None
            found[f"{name} diversity"] = summary.relative_diversity(self.items, self.draws, y, paired)
        return True


def plan(
    asked: Request,
    share: tuple[int, int],
    adapter: str,
    *,
    height: int,
    width: int,
    guidance: float | None,
    version: str,
    fused: bool = False,
    told: Mapping[str, object] | None = None,
) -> SuiteRun:
    """An evaluation of a suite from what is asked for; nothing is drawn yet.

    Args:
        share: number of this process and of all of them.
        adapter: the adapter's files; empty for the teacher itself.
        version: of this package, for the images' recipes.
        fused: whether the adapter is added into the weights.
        told: further fields of the settings, and those that are not what is asked for but what came of it.

    Raises:
        ValueError: the options do not go together, or the folder holds something else.
    """
    for named in asked.features:
        check_network(named)
    names = [name for name, _ in map(parted, (*asked.scorer, *asked.answers))]
    taken = {*(one.name for one in MEASURES), *NETWORKS}
    if len(set(names)) < len(names) or taken & set(names):
        raise ValueError(
            f"scorers and answers are named {names}: expected each once, and none of {sorted(taken)}; rename one"
        )
    assert asked.suite
    suite = SUITES[asked.suite]
    items = read_items(suite, asked.prompts, count=asked.count, complete=asked.complete)
    draws = asked.images or suite.images
    wanted = {"model": asked.subject.model, "adapter": asked.subject.adapter, "steps": asked.drawing.steps}
    wanted |= {"dtype": dtype_of(asked.machine.device, asked.machine.dtype)}
    settings = Settings(
        suite=suite.name,
        prompts=drawn.items_digest(read_items(suite, asked.prompts, complete=False)) if asked.prompts else "built in",
        height=height,
        width=width,
        guidance=guidance,
        weights=tensors_digest(adapter),
        base=part_digest(asked.subject.model, "transformer") or "",
        **{**wanted, **(told or {})},
    )
    images = drawn.images_of(suite, items, draws, settings, version, fused)
    drawn.claim_images(asked.folder, settings)
    reference = _reference(asked.reference, asked.folder, settings, images) if asked.reference else None
    if asked.lpips and not (reference and reference.paired):
        raise ValueError(
            f"LPIPS compares images of the same prompts, got --reference {asked.reference}: expected the folder of "
            f"another evaluation of {suite.name}; make one of the teacher with --adapter none --steps 50"
        )
    return SuiteRun(
        asked=asked,
        settings=settings,
        suite=suite,
        items=items,
        draws=draws,
        images=images,
        folder=asked.folder,
        adapter=adapter,
        share=share,
        reference=reference,
        scorers=dict(scorers.parse_scorer(named) for named in asked.scorer),
        answers={name: _official(suite, items, draws, asked.name, path) for name, path in map(parted, asked.answers)},
    )


def _reference(folder: Path, out: Path, settings: Settings, images: Sequence[Image]) -> ReferenceImages:
    about = folder / "suite.json"
    if not about.exists():
        key = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        return ReferenceImages(store=out / "reference" / key, files=folder_images(folder), paired=False)
    theirs = drawn.read_settings(folder)
    if (theirs.suite, theirs.prompts) != (settings.suite, settings.prompts):
        files = {path.name: path for path in sorted((folder / "pictures").glob("*.png"))}
        return ReferenceImages(store=folder / "measured", files=files, paired=False)
    files = {image.file: folder / "pictures" / image.file for image in images}
    missing = [name for name, path in files.items() if not path.exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(files)} images are not in {folder}, {missing[0]} first: expected the same "
            "prompts and as many images of each; finish that evaluation first"
        )
    return ReferenceImages(store=folder / "measured", files=files, paired=True)


def _official(suite: Suite, items: Sequence[Item], draws: int, model: str, named: str) -> dict[str, float]:
    """The answers in a file that an official scorer, or any other program, wrote."""
    path = Path(named)
    try:
        lines = numbered_lines(path) if path.suffix == ".jsonl" else []
        if lines and "score" in json.loads(lines[0][1]):
            found = {record["id"]: float(record["score"]) for record in read_records(path)}
        elif suite.answers:
            found = suite.answers(path, items, model)
        else:
            raise ValueError(f"{suite.name} has no file of its own to read")
        known = {item.id for item in items} | {item.image(draw) for item in items for draw in range(draws)}
        strange = [name for name, score in found.items() if name not in known or not np.isfinite(score)]
        if strange or not found:
            raise ValueError(
                f"the answer about {strange[0]!r} is not of this suite, or no number" if strange else "empty"
            )
    except (ValueError, OSError, KeyError, TypeError, IndexError, RecursionError, OverflowError, csv.Error) as error:
        raise ValueError(
            f"cannot read the answers in {named!r} ({error}): expected NAME=FILE, and in it what the official scorer "
            f'of {suite.name} writes, or lines {{"id", "score"}} (.jsonl); correct --answers'
        ) from error
    return found
