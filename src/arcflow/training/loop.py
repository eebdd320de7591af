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
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from arcflow.config import Run, check, to_json
from arcflow.data.prefetch import Prepared
from arcflow.distillation.kept import Kept, asked_before, asks, keeping, led_until
from arcflow.distillation.objective import Part, teacher_ratio
from arcflow.distillation.pairs import averaged
from arcflow.families.guidance import usual
from arcflow.student import adapter, formats
from arcflow.student.state import learn
from arcflow.system import processes
from arcflow.system.devices import attention, torch_device
from arcflow.system.errors import first_line
from arcflow.system.processes import OnAll
from arcflow.system.seeds import Draws, seed_of
from arcflow.system.signals import Insisted, Stopped, Wishes, stop_signals
from arcflow.training.home import home
from arcflow.training.learner import arcflow_objective, sample_draws
from arcflow.training.opened import OpenTraining, open_run
from arcflow.training.pace import Pace


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
            run = open_run(config, pipe, device, ranks, say, lost)
            _to_the_end(run)
            return run.folder


def _silent(message: str) -> None:
    pass


def _to_the_end(run: OpenTraining) -> None:
    """Train until the last iteration, or until something ends the run before: then all that is whole is saved."""
    iterations, done = run.config.optim.iterations, run.progress.step
    quiet = None if run.ranks.first else True
    bar = tqdm(total=iterations, initial=done, desc="distill", unit="it", disable=quiet)
    with (
        stop_signals() as caught,  # until the last checkpoint is on the disk
        closing(run.journal) if run.journal else nullcontext(),
        bar,
        closing(run.checkpoints),
        closing(run.prefetcher),
    ):
        try:
            _iterate(run, caught, bar)
            caught.saving = True
            run.checkpoints.finish(run.progress, run.mark)
            _finish(run, caught)
        except Stopped:
            raise
        except BaseException as error:
            caught.saving = True
            if run.whole and not run.lost() and (run.ranks.count == 1 or isinstance(error, OnAll)):
                run.learner.optimizer.zero_grad()
                _save_what_is(run)
            run.log(f"{run.folder} ends before its time ({first_line(error)}); {run.stands()}")
            if isinstance(error, Insisted):
                raise Stopped(error.number, f"{run.folder}: stopped by {error}; {run.stands()}") from None
            raise


def _iterate(run: OpenTraining, caught: Wishes, bar: tqdm) -> None:
    """Iterations, up to the last one or to a stop, with what is written, saved and measured between them."""
    config, progress = run.config, run.progress
    learn(run.pipe.transformer)
    pace = _pace(run)
    with pace.measurement():
        _measure_first(run)

    for step in range(progress.step, config.optim.iterations):
        began = time.monotonic()
        own, norm = _update(run, step)
        losses = run.ranks.mean(own)
        if run.journal and progress.step % config.log_every == 0:
            rate = run.learner.optimizer.param_groups[0]["lr"]
            run.journal.write(progress.step, **losses, gradient_norm=norm, lr=rate, skipped=progress.skipped)
            line = run.speed.line(config.log_every, config.log_every * config.optim.batch)
            run.journal.speed(progress.step, **line)
        elif run.journal and _is_first_use(step, config):
            run.journal.write(progress.step, **losses)

        now = {"loss": losses["loss"], "distance": progress.distance}
        pace.iteration(progress.step, time.monotonic() - began, now)
        last = progress.step == config.optim.iterations
        late = time.monotonic() - run.started > 60 * (config.stop_after or math.inf)
        # All stop here, or none; and save here, or none.
        late, told, again, taken = run.ranks.any(late, bool(caught), run.checkpoints.due(), bool(run.lost()))
        if taken:
            raise OnAll(run.lost() or f"{run.folder} was taken over by another process")
        # Saved first: a measurement may fail, and is made again when the run is taken up.
        if late or told or last or again or progress.step % config.save_every == 0:
            run.checkpoints.save(progress, run.mark)
        if not told and (last or progress.step % config.eval_every == 0):
            with pace.measurement():
                run.measure()

        bar.update()
        bar.set_postfix(loss=losses["loss"], distance=progress.distance, refresh=False)
        if late or told:
            break


def _pace(run: OpenTraining) -> Pace:
    """What tells when the run will end; on all processes but the first it is told to nobody."""
    config, cuda = run.config, torch_device(run.config.device).type == "cuda"
    return Pace(
        run.log,
        iterations=config.optim.iterations,
        done=run.progress.step,
        eval_every=config.eval_every,
        gpus=run.ranks.count if cuda else 0,
        stop_after=config.stop_after,
    )


def _is_first_use(step: int, config: Run) -> bool:
    """Whether an iteration is to be logged because it asks the teacher, where few do."""
    distill = config.distill
    asked = distill.reuse > 1 and asks(step, distill)
    return asked and asked_before(step, distill) % config.log_every == 0


def _measure_first(run: OpenTraining) -> None:
    """The distance that the run begins with: read from the log if a run that was stopped has measured it already."""
    step, journal = run.progress.step, run.journal
    known = run.ranks.agree(lambda: journal.measured(step) if journal else None)
    if known is not None:
        run.progress.distance = known
    elif step % run.config.eval_every == 0 or step == run.config.optim.iterations:
        run.measure()


def _update(run: OpenTraining, step: int) -> tuple[dict[str, float], float]:
    """The losses and the gradient norm of iteration `step`, once its batch has moved the weights."""
    config = run.config
    torch.manual_seed(dropout_seed(config.seed, step, run.ranks.rank))
    if asks(step, config.distill) or not run.walks.batches:
        logs, position = _taught(run, step)
    else:
        logs, position = _again(run, step), run.progress.data
    ratio = teacher_ratio(step, config.distill.decay, config.distill.hold)

    run.whole = False
    norm = run.learner.update(run.progress)
    run.progress.data = position
    run.whole = True
    return logs | {"teacher_ratio": ratio}, norm


def _taught(run: OpenTraining, step: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Losses and gradients of the next batch, for which the teacher is asked; and where the data set stands then."""
    config = run.config
    number = asked_before(step, config.distill)
    sample = run.batch(number)
    if step == 0 and config.distill.warm_start:
        _start_warm(run, sample)
    first = number * config.optim.batch + run.ranks.rows(config.optim.batch).start
    draws = sample_draws(seed_of(config.seed, "draws", first + i) for i in range(len(sample.x)))
    average = averaged(run.pipe.transformer, run.learner.average, run.student)
    objective = arcflow_objective(config, step, run.student, run.teacher, average)
    made = list[Kept]()

    def parts(piece: Prepared, own: Draws) -> Iterator[Part]:
        return keeping(objective(piece, own), piece.cond, made)

    losses = run.learner.gradients(parts, sample, draws)
    if config.distill.reuse > 1 and step < led_until(config.distill):
        run.walks.add(made)
    return losses.logs(), sample.position


def _start_warm(run: OpenTraining, sample: Prepared) -> None:
    """Let a new student start warm, fitted on its first batch, and say what it hears."""
    place = run.ranks.rows(run.config.optim.batch).start
    draws = sample_draws(seed_of(run.config.seed, "warm", place + i) for i in range(len(sample.x)))
    levels = run.learner.start_warm(run.pipe.transformer, run.student, run.teacher, sample, draws)
    heard = ", ".join(f"{heard:.3f} at {start:.3f}" for start, heard in levels)
    run.log(f"warm start: the student hears the noise level {heard}")


def _again(run: OpenTraining, step: int) -> dict[str, float]:
    """Losses and gradients of a batch whose walks are kept. The velocity error has a name of its own: held against that
    of walks that are new, it tells what is learned by heart."""
    config = run.config
    batch = run.walks.draw(torch.Generator().manual_seed(seed_of(config.seed, "kept", step)))
    whole = sum(len(piece.walks[0].x) for piece in batch)
    device = torch_device(config.device)
    pieces = [(len(piece.walks[0].x) / whole, piece.to(device).parts(run.student, config.distill)) for piece in batch]
    logs = run.learner.backward(pieces).logs()
    return logs | {"velocity_error_kept": logs.pop("velocity_error")}


def _finish(run: OpenTraining, caught: Wishes) -> None:
    """Put the averaged weights in and write the adapter; a run that was told to stop ends as `Stopped` instead."""
    progress = run.progress
    if progress.step < run.config.optim.iterations:
        stopped = f"stopped at iteration {progress.step} of {run.config.optim.iterations}, saved in {run.folder}"
        run.log(f"{stopped}: run the same command to go on")
    (told,) = run.ranks.any(bool(caught))
    if told:
        number = next(iter(caught), signal.SIGTERM)  # another process may have been told
        by = signal.Signals(number).name
        raise Stopped(number, f"{run.folder}: stopped by {by}, saved; the same call goes on")
    run.whole = False
    run.learner.average.swap()
    if run.ranks.first or run.ranks.mesh:  # all give their part of a network that is shared out
        save_result(run)


def _save_what_is(run: OpenTraining) -> None:
    """Save the last whole iteration of a run that ends with an error, if it can be."""
    try:
        run.checkpoints.finish(run.progress, run.mark)
    except Exception as worse:  # a device that has failed, a disk that is gone: the error that came first is raised
        run.log(f"the last whole iteration could not be saved as well ({first_line(worse)})")


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the random numbers that layers draw in an iteration, another one on every process.

    The first process leaves its number out, so that its numbers are those of a run on one process alone.
    """
    return seed_of(seed, "dropout", step, rank) if rank else seed_of(seed, "dropout", step)


def save_result(run: OpenTraining) -> None:
    """Write the adapter with everything needed to sample rightly, and the record of its training."""
    config = run.config
    settings = json.loads(to_json(config))
    settings.pop("out")  # a folder of this machine
    record = {name: value for name, value in dataclasses.asdict(run.progress).items() if name != "data"}
    span = config.distill.guidance_range
    info = formats.AdapterInfo(
        base=config.model.base,
        shift=config.distill.shift,
        steps=config.distill.steps,
        also_steps=config.distill.also_steps,
        final_step_scale=config.distill.final_step_scale,
        guidance=usual(config.distill.guidance, run.family) if run.family.guidance else None,
        guidance_range=span if span and span[0] < span[1] else None,
        teacher_lora=config.model.teacher_lora,
        training={"settings": settings, "progress": record},
    )
    adapter.save_adapter(run.pipe.transformer, run.folder / "adapter", info=info)
