"""The loop: prompts in, an adapter out.

One `for` over iterations: noise and conditioning of iteration n, one backward pass per segment and micro-batch, one
AdamW step, one step of the average. Everything random in iteration n derives from (seed, n), so a run that was killed
goes on from its last checkpoint to the same bits. Whatever ends the loop, the last whole iteration is saved first.
Settings: arXiv 2602.09014.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from arcflow import families
from arcflow.config import Run, check, to_json
from arcflow.data.batches import Prompts, open_prompts
from arcflow.data.embeddings import Encode, encoder
from arcflow.data.pictures import read_pictures
from arcflow.data.prefetch import Feed, Sample
from arcflow.distillation.objective import teacher_ratio
from arcflow.families import network
from arcflow.families.loading import load_pipe, settle
from arcflow.runs.checkpoint import Checkpoints, Mark, Progress
from arcflow.runs.log import Log, Tracker
from arcflow.student import adapter, formats
from arcflow.student.layers import learn
from arcflow.system import processes
from arcflow.system.devices import attention, torch_device
from arcflow.system.errors import first_line, sentence
from arcflow.system.packages import need
from arcflow.system.processes import OnAll, Ranks
from arcflow.system.seeds import seed_of
from arcflow.system.signals import Insisted, Stopped, stop_signals
from arcflow.system.timing import Speed
from arcflow.training.home import claim, contents_of, home, keep_held_out, prompts_of
from arcflow.training.learner import Learner, arcflow_objective, sample_draws, views
from arcflow.training.validation import Gauge


def train(config: Run, pipe: DiffusionPipeline | None = None, log: Callable[[str], None] = tqdm.write) -> Path:
    """Distill, and return the run folder: `adapter/`, `log.jsonl`, `run.json`, `checkpoints/`.

    A run that is already in the folder is taken up where it stopped, by as many processes as `torchrun` starts now.
    `pipe` (by default loaded from `config.model.base`) is changed in place: at the end its transformer is the student
    with averaged weights. Raises `system.signals.Stopped` after a SIGINT, SIGTERM or SIGHUP, once everything is saved;
    whatever else ends the run, it has saved the last whole iteration first, and says where it stands.
    """
    device = torch_device(config.device)
    if config.model.compile and device.type == "cpu":
        compiler = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")))
        check(compiler, "model.compile", True, "a C++ compiler on the path", "install g++ or clang++, or leave it out")
    with processes.start(device, config.shard) as ranks, attention(device):
        say = log if ranks.first else _silent
        with home(config.out, ranks) as lost:
            return _train(config, pipe, device, ranks, say, lost)


def _silent(message: str) -> None:
    pass


def _train(
    config: Run,
    pipe: DiffusionPipeline | None,
    device: torch.device,
    ranks: Ranks,
    log: Callable[[str], None],
    lost: Callable[[], str | None],
) -> Path:
    started = time.monotonic()
    optim, mine, speed = config.optim, ranks.rows(config.optim.batch), Speed(device)
    data = open_prompts(prompts_of(config), seed=config.seed, batch=optim.batch)
    if data.message:
        log(data.message)
    folder = claim(config, ranks, contents_of(data), write=False)
    if config.tracker != "none":
        need(config.tracker, asked=f"tracker = {config.tracker!r}", install=config.tracker)

    pipe = load_pipe(config.model, not config.data.embeddings) if pipe is None else pipe
    encode, negative = encoder(settle(pipe, config.model, device, ranks), config, data, device, ranks)
    contents = contents_of(data, pipe.transformer, config.data.embeddings)
    claim(config, ranks, contents, write=False)
    learner = Learner.on(pipe.transformer, config, ranks)
    student, teacher = views(pipe.transformer, negative, config.distill.teacher_cfg)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        learner.parameters,
        learner.average,
        learner.optimizer,
        keep=config.keep,
        milestones=config.milestones,
        ranks=ranks,
        log=log,
    )
    progress = checkpoints.restore()
    if progress.step > optim.iterations:
        raise ValueError(
            f"{folder} holds a run of {progress.step} iterations, and {optim.iterations} are asked for: expected as "
            f"many or more; raise optim.iterations, or choose another folder with --out"
        )
    if progress.data:
        take_up(data, progress.data, folder)
    before = progress.seconds

    held_out = data.held_out
    gauge = Gauge(
        config,
        teacher,
        network.noise(pipe, held_out.seeds, *held_out.size).to(device),
        encode(held_out.prompts, held_out.size),
        folder / "held_out.safetensors",
        log,
        ranks,
        contents["teacher"],
    )
    feed = feed_of(pipe, data, encode, config, device, ranks)
    fetch, ask = speed.of("data", fetched(feed, ranks)), speed.of("teacher", teacher)

    claim(config, ranks, contents, log)  # from here on the folder holds this run
    if ranks.first:
        keep_held_out(config, held_out.prompts)
    journal = open_log(config, ranks, folder, progress.step, log, checkpoints.mark)
    if progress.step:
        log(f"resuming {folder} at iteration {progress.step} of {optim.iterations}")
    quiet = None if ranks.first else True
    bar = tqdm(total=optim.iterations, initial=progress.step, desc="distill", unit="it", disable=quiet)

    def measure() -> None:
        pipe.transformer.eval()
        with learner.average.applied():
            measured = gauge.distance(student)
        progress.distance = measured["distance"]
        learn(pipe.transformer)
        if journal and config.pictures:
            journal.picture(progress.step, gauge.pictures(pipe, config.pictures, held_out.size))
        if journal:
            journal.write(progress.step, **measured, **(gauge.euler if progress.step == 0 else {}))

    def mark() -> dict[str, Any] | None:
        progress.seconds = before + time.monotonic() - started
        return journal.sync() if journal else None

    def state() -> str:
        newest = checkpoints.newest
        there = f"iteration {newest} of {optim.iterations} is saved in {folder}" if newest else f"{folder} is empty yet"
        return f"{there}: run the same command to go on"

    whole = True  # whether weights, average, moments and progress are those of one iteration
    with (
        stop_signals() as caught,  # until the last checkpoint is on the disk
        closing(journal) if journal else nullcontext(),
        bar,
        closing(checkpoints),
        closing(feed),
    ):
        try:
            learn(pipe.transformer)
            known = ranks.agree(lambda: journal.measured(progress.step) if journal else None)
            if known is not None:
                progress.distance = known
            elif progress.step % config.eval_every == 0 or progress.step == optim.iterations:
                measure()
            for step in range(progress.step, optim.iterations):
                torch.manual_seed(dropout_seed(config.seed, step, ranks.rank))
                sample = fetch(step)
                first = step * optim.batch + mine.start
                draws = sample_draws(seed_of(config.seed, "draws", first + i) for i in range(len(sample.x)))
                losses = learner.gradients(arcflow_objective(config, step, student, ask), sample, draws)
                ratio = teacher_ratio(step, config.distill.decay, config.distill.hold)
                logs = losses.logs() | {"teacher_ratio": ratio}
                whole = False
                norm = learner.update(progress)
                progress.data = sample.position
                whole = True

                logs = ranks.mean(logs)
                if journal and progress.step % config.log_every == 0:
                    lr = learner.optimizer.param_groups[0]["lr"]
                    journal.write(progress.step, **logs, gradient_norm=norm, lr=lr, skipped=progress.skipped)
                    journal.speed(progress.step, **speed.line(config.log_every, config.log_every * optim.batch))

                last = progress.step == optim.iterations
                late = time.monotonic() - started > 60 * (config.stop_after or math.inf)
                # All stop here, or none; and save here, or none.
                late, told, again, taken = ranks.any(late, bool(caught), checkpoints.due(), bool(lost()))
                if taken:
                    raise OnAll(lost() or f"{folder} was taken over by another process")
                # Saved first: a measurement may fail, and is made again when the run is taken up.
                if late or told or last or again or progress.step % config.save_every == 0:
                    checkpoints.save(progress, mark)
                if not told and (last or progress.step % config.eval_every == 0):
                    measure()
                bar.update()
                bar.set_postfix(loss=logs["loss"], distance=progress.distance, refresh=False)
                if late or told:
                    break
            caught.saving = True
            checkpoints.finish(progress, mark)

            if progress.step < optim.iterations:
                stopped = f"stopped at iteration {progress.step} of {optim.iterations}, saved in {folder}"
                log(f"{stopped}: run the same command to go on")
            (told,) = ranks.any(bool(caught))
            if told:
                number = next(iter(caught), signal.SIGTERM)  # another process may have been told
                by = signal.Signals(number).name
                raise Stopped(number, f"{folder}: stopped by {by}, saved; the same call goes on")
            whole = False
            learner.average.swap()
            if ranks.first or ranks.mesh:  # all give their part of a network that is shared out
                save_adapter(pipe.transformer, folder / "adapter", config, progress)
        except Stopped:
            raise
        except BaseException as error:
            caught.saving = True
            if whole and not lost() and (ranks.count == 1 or isinstance(error, OnAll)):
                learner.optimizer.zero_grad()
                _save_what_is(checkpoints, progress, mark, log)
            log(f"{folder} ends before its time ({first_line(error)}); {state()}")
            if isinstance(error, Insisted):
                raise Stopped(error.number, f"{folder}: stopped by {error}; {state()}") from None
            raise
    return folder


def _save_what_is(checkpoints: Checkpoints, progress: Progress, mark: Mark, log: Callable[[str], None]) -> None:
    """Save the last whole iteration of a run that ends with an error, if it can be."""
    try:
        checkpoints.finish(progress, mark)
    except Exception as worse:  # a device that has failed, a disk that is gone: the error that came first is raised
        log(f"the last whole iteration could not be saved as well ({first_line(worse)})")


def open_log(
    config: Run, ranks: Ranks, folder: Path, step: int, log: Callable[[str], None], mark: dict[str, Any] | None
) -> Log | None:
    """The log of a run that stands at iteration `step`, and its tracker, on the first process."""
    opened = list[Log]()

    def make() -> None:
        tracked = config.tracker != "none"
        curves = Tracker(config.tracker, folder, json.loads(to_json(config))) if tracked else None
        opened.append(Log(folder, step, log, curves, mark))

    ranks.agree(make)
    return opened[0] if opened else None


def take_up(data: Prompts, position: dict[str, Any], folder: Path) -> None:
    """Let a data set go on from a position that a checkpoint holds."""
    try:
        data.load(position)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"the checkpoint in {folder} holds no position of this data set ({first_line(error)}): expected one that "
            f"this version of arcflow and of `datasets` has written; start again with another --out"
        ) from error


def fetched(feed: Feed, ranks: Ranks) -> Callable[[int], Sample]:
    """The batches of a feed. One that cannot be made on one process ends the run on all, at the same iteration."""

    def fetch(step: int) -> Sample:
        sample, trouble = None, None
        try:
            sample = feed(step)
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


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the random numbers that layers draw in an iteration, another one on every process.

    The first process leaves its number out, so that its numbers are those of a run on one process alone.
    """
    return seed_of(seed, "dropout", step, rank) if rank else seed_of(seed, "dropout", step)


def feed_of(
    pipe: DiffusionPipeline, data: Prompts, encode: Encode, config: Run, device: torch.device, ranks: Ranks
) -> Feed:
    """This process's part of every batch. One process reads the prompts, so that a streamed data set is read once."""
    mine = ranks.rows(config.optim.batch)

    def make(number: int) -> Sample:
        batch, position = ranks.agree(lambda: (data.batch(number), data.state()), ranks.side)
        x = network.noise(pipe, batch.seeds[mine], *batch.size).to(device)
        clean = None
        if config.data.images:
            clean = network.encode_pictures(pipe, read_pictures(batch.images[mine], batch.size)).to(device)
        return Sample(x, encode(batch.prompts[mine], batch.size), position, clean)

    in_memory = config.data.cache and not config.data.embeddings
    return Feed(make, device, ahead=not in_memory)


def save_adapter(net: torch.nn.Module, folder: Path, config: Run, progress: Progress) -> None:
    """Write the adapter with everything needed to sample rightly, and the record of its training."""
    settings = json.loads(to_json(config))
    settings.pop("out")  # a folder of this machine
    record = {name: value for name, value in dataclasses.asdict(progress).items() if name != "data"}
    info = formats.AdapterInfo(
        base=config.model.base,
        shift=config.distill.shift,
        steps=config.distill.steps,
        also_steps=config.distill.also_steps,
        final_step_scale=config.distill.final_step_scale,
        guidance=config.distill.guidance if families.family_of(net).guidance else None,
        teacher_lora=config.model.teacher_lora,
        training={"settings": settings, "progress": record},
    )
    adapter.save_adapter(net, folder, info=info)
