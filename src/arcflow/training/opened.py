"""A run that is open: all that its iterations use, and where it stands.

Opening it goes from the settings to the first iteration: prompts, base, student, the newest checkpoint, validation,
the next batch. Nothing is written into the folder before all of that has gone well.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from arcflow.config import Run, check, to_json
from arcflow.data.batches import Batch, Prompts, Size, open_prompts
from arcflow.data.embeddings import Encode, encoder
from arcflow.data.images import read_images
from arcflow.data.prefetch import Prefetcher, Prepared
from arcflow.distillation.kept import Walks
from arcflow.distillation.policy import Student, Teacher
from arcflow.families import family_of, network
from arcflow.families.conditioning import Cond
from arcflow.families.family import Family
from arcflow.families.guidance import check_embeds, with_drawn_guidance
from arcflow.families.loading import load_pipe, put_on_device
from arcflow.runs.checkpoint import Checkpoints, Progress
from arcflow.runs.log import Log, Tracker
from arcflow.student.state import learn
from arcflow.system.devices import memory
from arcflow.system.errors import first_line, sentence
from arcflow.system.packages import need
from arcflow.system.processes import OnAll, Ranks
from arcflow.system.seeds import seed_of
from arcflow.system.text import Json
from arcflow.system.timing import Speed
from arcflow.training.home import claim_run, contents_of, keep_held_out, prompts_of
from arcflow.training.learner import Learner, views
from arcflow.training.sources import with_sources
from arcflow.training.validation import DistanceToTeacher


@dataclass
class OpenTraining:
    """A run that is open."""

    config: Run
    folder: Path
    ranks: Ranks
    log: Callable[[str], None]
    lost: Callable[[], str | None]
    """Why the folder is no longer this run's, on the first process."""
    pipe: DiffusionPipeline
    family: Family
    student: Student
    teacher: Teacher
    learner: Learner
    progress: Progress
    checkpoints: Checkpoints
    validation: DistanceToTeacher
    size: Size
    """Height, width and frames of the held-out images."""
    walks: Walks
    """The teacher's walks that are kept."""
    prefetcher: Prefetcher
    batch: Callable[[int], Prepared]
    """The prefetched one, on all processes or on none."""
    journal: Log | None
    """The log; None on all processes but the first."""
    speed: Speed
    started: float
    """When this start began, on the monotonic clock."""
    before: float
    """Seconds that the run had taken before it was taken up."""
    whole: bool = True
    """Whether weights, average, moments and progress are those of one iteration."""

    def measure(self) -> None:
        """Measure the averaged student's distance to the teacher, for the log, and draw its images."""
        config, step = self.config, self.progress.step
        self.pipe.transformer.eval()
        with self.learner.average.applied():
            measured = self.validation.distance(self.student)
        self.progress.distance = measured["distance"]
        if step == 0:  # a run that is taken up has them in its log
            measured |= self.validation.known()
        learn(self.pipe.transformer)

        if self.journal and config.pictures:
            self.journal.image(step, self.validation.images(self.pipe, config.pictures, self.size))
        if self.journal:
            self.journal.write(step, **measured)

    def mark(self) -> Json | None:
        """How far the log has come, for a checkpoint; the time spent is brought up to date."""
        self.progress.seconds = self.before + time.monotonic() - self.started
        return self.journal.sync() if self.journal else None

    def stands(self) -> str:
        """What of the run is saved, and how to go on."""
        newest = self.checkpoints.newest
        saved = f"iteration {newest} of {self.config.optim.iterations} is saved in {self.folder}"
        there = saved if newest else f"{self.folder} is empty yet"
        return f"{there}: run the same command to go on"


def open_run(
    config: Run,
    pipe: DiffusionPipeline | None,
    device: torch.device,
    ranks: Ranks,
    log: Callable[[str], None],
    lost: Callable[[], str | None],
) -> OpenTraining:
    """The run of these settings, opened where its newest checkpoint stands.

    Raises:
        ValueError: the folder holds another run, or one that is longer already; or something named is not there.
    """
    started, speed = time.monotonic(), Speed(device)
    data = open_prompts(prompts_of(config), seed=config.seed, batch=config.optim.batch)
    if data.message:
        log(data.message)
    folder = claim_run(config, ranks, contents_of(data), write=False)
    if config.tracker != "none":
        need(config.tracker, asked=f"tracker = {config.tracker!r}", install=config.tracker)

    pipe = put_on_device(_opened_pipe(config, pipe, data), config.model, device, ranks)
    family = family_of(pipe.transformer)
    encode, negative = encoder(pipe, config, data, device, ranks)
    contents = contents_of(data, pipe.transformer, config.data.embeddings)
    claim_run(config, ranks, contents, write=False)

    learner = Learner.on(pipe.transformer, config, ranks)
    student, teacher = views(pipe.transformer, negative, config.distill.teacher_cfg)
    encode = with_sources(pipe, teacher, encode, config, data, ranks, log)
    walks = Walks(config.distill, f"{ranks.rank}-{ranks.count}")
    checkpoints, progress = _taken_up(config, learner, walks, data, folder, log)
    held_out = data.held_out
    validation = DistanceToTeacher(
        config,
        teacher,
        network.noise(pipe, held_out.seeds, *held_out.size, family=family).to(device),
        held_out_cond(encode, held_out, config),
        folder / "held_out.safetensors",
        log,
        ranks,
        contents["teacher"],
    )
    if config.distill.reuse > 1:
        _check_room(walks, validation, config, ranks, log)
    prefetcher = prefetcher_of(pipe, family, data, encode, config, device, ranks)
    batch = speed.of("data", fetched(prefetcher, ranks))
    asked = speed.of("teacher", teacher)
    run = OpenTraining(
        config=config,
        folder=folder,
        ranks=ranks,
        log=log,
        lost=lost,
        pipe=pipe,
        family=family,
        student=student,
        teacher=asked,
        learner=learner,
        progress=progress,
        checkpoints=checkpoints,
        validation=validation,
        size=held_out.size,
        walks=walks,
        prefetcher=prefetcher,
        batch=batch,
        journal=None,
        speed=speed,
        started=started,
        before=progress.seconds,
    )
    _begin(run, contents, held_out.prompts)
    return run


def _opened_pipe(config: Run, pipe: DiffusionPipeline | None, data: Prompts) -> DiffusionPipeline:
    """The pipeline of a run, loaded if it is not there yet, and known to draw what the run asks for."""
    pipe = load_pipe(config.model, not config.data.embeddings) if pipe is None else pipe
    check_embeds(pipe.transformer, config.distill.guidance_range, config.model.base)
    network.check_size(pipe, *data.held_out.size)
    for size in data.sizes:
        try:
            network.check_size(pipe, *size)
        except ValueError as error:
            told = size[2:] != data.held_out.size[2:]  # the list's frames; height and width are the settings' in shape
            raise ValueError(f"{config.data.prompts} asks for {error}" if told else str(error)) from error
    return pipe


def _begin(run: OpenTraining, contents: Mapping[str, str], held_out: list[str]) -> None:
    """Claim the folder, which holds this run from here on, keep its held-out prompts, and open its log."""
    config, step = run.config, run.progress.step
    claim_run(config, run.ranks, contents, run.log)
    if run.ranks.first:
        keep_held_out(config, held_out)
    run.journal = open_log(config, run.ranks, run.folder, step, run.log, run.checkpoints.mark)
    if step:
        run.log(f"resuming {run.folder} at iteration {step} of {config.optim.iterations}")


def _taken_up(
    config: Run, learner: Learner, walks: Walks, data: Prompts, folder: Path, log: Callable[[str], None]
) -> tuple[Checkpoints, Progress]:
    """The checkpoints of a run, and where the newest one stands: learner and data set go on from there."""
    checkpoints = Checkpoints(
        folder / "checkpoints",
        learner.parameters,
        learner.average,
        learner.optimizer,
        keep=config.keep,
        milestones=config.milestones,
        ranks=learner.ranks,
        log=log,
        more=walks,
    )
    progress = checkpoints.restore()
    if progress.step > config.optim.iterations:
        raise ValueError(
            f"{folder} holds a run of {progress.step} iterations, and {config.optim.iterations} are asked for: "
            f"expected as many or more; raise optim.iterations, or choose another folder with --out"
        )
    if progress.data:
        take_up(data, progress.data, folder)
    if config.distill.reuse > 1 and progress.step and not walks.batches:
        log("the checkpoint holds no walks of as many processes: the teacher is asked until there are new ones")
    return checkpoints, progress


def _check_room(
    walks: Walks, validation: DistanceToTeacher, config: Run, ranks: Ranks, log: Callable[[str], None]
) -> None:
    """Say how much memory the kept walks will take, and refuse what the machine does not have."""
    size = walks.size(validation.x, validation.cond, -(-config.optim.batch // ranks.count))
    there = memory()
    check(
        there is None or size < there,
        "distill.kept",
        config.distill.kept,
        f"fewer: walks of {config.distill.kept} batches take {size / 1e9:.1f} GB here, and there are {there or 0:.0f}",
        "lower distill.kept",
    )
    log(f"kept walks: up to {config.distill.kept} batches, {size / 1e9:.2g} GB, in checkpoints too")


def take_up(data: Prompts, position: Json, folder: Path) -> None:
    """Let a data set go on from a position that a checkpoint holds."""
    try:
        data.load(position)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"the checkpoint in {folder} holds no position of this data set ({first_line(error)}): expected one that "
            f"this version of arcflow and of `datasets` has written; start again with another --out"
        ) from error


def fetched(prefetcher: Prefetcher, ranks: Ranks) -> Callable[[int], Prepared]:
    """The prefetched batches. One that cannot be made on one process ends the run on all, at the same iteration."""

    def fetch(step: int) -> Prepared:
        sample, trouble = None, None
        try:
            sample = prefetcher(step)
        except Exception as error:
            trouble = error
        (failed,) = ranks.any(trouble is not None)
        if trouble and ranks.count == 1:
            raise trouble
        if failed:
            raise OnAll(sentence(trouble) or first_line(trouble) if trouble else "another process lacks its batch")
        assert sample is not None
        return sample

    return fetch


def prefetcher_of(
    pipe: DiffusionPipeline,
    family: Family,
    data: Prompts,
    encode: Encode,
    config: Run,
    device: torch.device,
    ranks: Ranks,
) -> Prefetcher:
    """This process's part of every batch. One process reads the prompts, so that a streamed data set is read once."""
    mine = ranks.rows(config.optim.batch)

    def make(number: int) -> Prepared:
        batch, position = ranks.agree(lambda: (data.batch(number), data.state()), ranks.side)
        x = network.noise(pipe, batch.seeds[mine], *batch.size, family=family).to(device)
        clean = None
        if config.data.images:
            drawn = read_images(batch.images[mine], batch.size[:2])
            clean = network.encode_images(pipe, drawn, family=family).to(device)
        cond = encode(batch.prompts[mine], batch.size, batch.sources[mine])
        first = number * config.optim.batch + mine.start
        seeds = (seed_of(config.seed, "guidance", first + i) for i in range(len(x)))
        return Prepared(x, with_drawn_guidance(cond, config.distill.guidance_range, seeds), position, clean)

    in_memory = config.data.cache and not config.data.embeddings
    return Prefetcher(make, device, ahead=not in_memory)


def held_out_cond(encode: Encode, held_out: Batch, config: Run) -> Cond:
    """Conditioning of the held-out prompts; out of a range of guidance each has a number of its own, as samples do, so
    that a distance to the teacher is one over all of the range."""
    cond = encode(held_out.prompts, held_out.size, held_out.sources)
    seeds = (seed_of(config.seed, "held-out guidance", i) for i in range(len(held_out.prompts)))
    return with_drawn_guidance(cond, config.distill.guidance_range, seeds)


def open_log(
    config: Run, ranks: Ranks, folder: Path, step: int, log: Callable[[str], None], mark: Json | None
) -> Log | None:
    """The log of a run that stands at iteration `step`, and its tracker, on the first process."""
    opened = list[Log]()

    def make() -> None:
        tracked = config.tracker != "none"
        curves = Tracker(config.tracker, folder, json.loads(to_json(config))) if tracked else None
        opened.append(Log(folder, step, log, curves, mark))

    ranks.agree(make)
    return opened[0] if opened else None
