"""The loop: prompts in, an adapter out.

One `for` over iterations: noise and conditioning of iteration n, one backward pass per segment and micro-batch, one
AdamW step, one step of the average. Everything random in iteration n derives from (seed, n), so a run that was killed
goes on from its last checkpoint to the same bits. Settings: arXiv 2602.09014.
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
from tqdm import tqdm

from arcflow import families
from arcflow.config import Run, check, flat, from_json, to_json
from arcflow.data.batches import Prompts, open_prompts
from arcflow.data.embeddings import Encode, encoder
from arcflow.data.pictures import read_pictures
from arcflow.data.prefetch import Feed, Sample
from arcflow.distillation.objective import teacher_ratio
from arcflow.families import network
from arcflow.families.loading import load_pipe, settle
from arcflow.runs.checkpoint import Checkpoints, Progress
from arcflow.runs.log import Log, Tracker
from arcflow.student import adapter, formats
from arcflow.system import files, processes
from arcflow.system.devices import attention, torch_device
from arcflow.system.processes import Ranks
from arcflow.system.seeds import seed_of
from arcflow.system.signals import Stopped, stop_signals
from arcflow.system.timing import Speed
from arcflow.training.learner import Learner, arcflow_objective, sample_draws, views
from arcflow.training.validation import Gauge

FREE = (
    "out",
    "device",
    "pictures",
    "eval_every",
    "save_every",
    "keep",
    "milestones",
    "log_every",
    "stop_after",
    "shard",
    "tracker",
    "model.compile",
    "model.text_device",
)
"""Settings that may change when a run is taken up again."""


def train(config: Run, pipe: Any = None, log: Callable[[str], None] = tqdm.write) -> Path:
    """Distill, and return the run folder: `adapter/`, `log.jsonl`, `run.json`, `checkpoints/`.

    A run that is already in the folder is taken up where it stopped, by as many processes as `torchrun` starts now.
    `pipe` (by default loaded from `config.model.base`) is changed in place: at the end its transformer is the student
    with averaged weights. Raises `system.signals.Stopped` after a SIGINT or SIGTERM, once everything is saved.
    """
    device = torch_device(config.device)
    if config.model.compile and device.type == "cpu":
        compiler = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")))
        check(compiler, "model.compile", True, "a C++ compiler on the path", "install g++ or clang++, or leave it out")
    with processes.start(device, config.shard) as ranks, attention(device):
        return _train(config, pipe, device, ranks, log if ranks.first else _silent)


def _silent(message: str) -> None:
    pass


def _train(config: Run, pipe: Any, device: torch.device, ranks: Ranks, log: Callable[[str], None]) -> Path:
    started = time.monotonic()
    optim, mine, speed = config.optim, ranks.rows(config.optim.batch), Speed(device)
    data = open_prompts(config.data, seed=config.seed, batch=optim.batch)
    if data.message:
        log(data.message)
    folder = claim(config, ranks)
    tracked = ranks.first and config.tracker != "none"
    curves = Tracker(config.tracker, folder, json.loads(to_json(config))) if tracked else None

    pipe = load_pipe(config.model, not config.data.embeddings) if pipe is None else pipe
    encode, negative = encoder(settle(pipe, config.model, device, ranks), config, data, device)
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
    if progress.data:
        data.load(progress.data)
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
    )
    feed = feed_of(pipe, data, encode, config, device, ranks)
    fetch, ask = speed.of("data", feed), speed.of("teacher", teacher)
    journal = Log(folder, progress.step, log, curves) if ranks.first else None
    if progress.step:
        log(f"resuming {folder} at iteration {progress.step} of {optim.iterations}")
    quiet = None if ranks.first else True
    bar = tqdm(total=optim.iterations, initial=progress.step, desc="distill", unit="it", disable=quiet)

    def measure() -> None:
        pipe.transformer.eval()
        with learner.average.applied():
            measured = gauge.distance(student)
        progress.distance = measured["distance"]
        pipe.transformer.train()
        if journal and config.pictures:
            journal.picture(progress.step, gauge.pictures(pipe, config.pictures, held_out.size))
        if journal:
            journal.write(progress.step, **measured, **(gauge.euler if progress.step == 0 else {}))

    told = False
    pipe.transformer.train()
    with journal or nullcontext(), bar, closing(feed), closing(checkpoints), stop_signals() as caught:
        for step in range(progress.step, optim.iterations):
            if step == 0:
                measure()
            torch.manual_seed(dropout_seed(config.seed, step, ranks.rank))
            sample = fetch(step)
            progress.data = sample.position
            first = step * optim.batch + mine.start
            draws = sample_draws(seed_of(config.seed, "draws", first + i) for i in range(len(sample.x)))
            losses = learner.gradients(arcflow_objective(config, step, student, ask), sample, draws)
            ratio = teacher_ratio(step, config.distill.decay, config.distill.hold)
            logs = losses.logs() | {"teacher_ratio": ratio}
            norm = learner.update(progress)

            logs = ranks.mean(logs)
            if journal and progress.step % config.log_every == 0:
                lr = learner.optimizer.param_groups[0]["lr"]
                journal.write(progress.step, **logs, gradient_norm=norm, lr=lr, skipped=progress.skipped)
                journal.speed(progress.step, **speed.line(config.log_every, config.log_every * optim.batch))
            last = progress.step == optim.iterations
            if progress.step % config.eval_every == 0 or last:
                measure()
            bar.update()
            bar.set_postfix(loss=logs["loss"], distance=progress.distance, refresh=False)

            late = time.monotonic() - started > 60 * (config.stop_after or math.inf)
            late, told = ranks.any(late, bool(caught))  # all stop here, or none
            if late or told or last or progress.step % config.save_every == 0:
                progress.seconds = before + time.monotonic() - started
                if journal:
                    journal.sync()
                checkpoints.save(progress)
            if late or told:
                break

    if progress.step < optim.iterations:
        stopped = f"stopped at iteration {progress.step} of {optim.iterations}, saved in {folder}"
        log(f"{stopped}: run the same command to go on")
    if told:
        number = next(iter(caught), signal.SIGTERM)  # another process may have been told
        raise Stopped(number, f"{folder}: stopped by {signal.Signals(number).name}, saved; the same call goes on")
    learner.average.swap()
    if ranks.first or ranks.mesh:  # all give their part of a network that is shared out
        save_adapter(pipe.transformer, folder / "adapter", config, progress)
    return folder


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the random numbers that layers draw in an iteration, another one on every process.

    The first process leaves its number out, so that its numbers are those of a run on one process alone.
    """
    return seed_of(seed, "dropout", step, rank) if rank else seed_of(seed, "dropout", step)


def feed_of(pipe: Any, data: Prompts, encode: Encode, config: Run, device: torch.device, ranks: Ranks) -> Feed:
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


def claim(config: Run, ranks: Ranks) -> Path:
    """The run folder, with the resolved configuration in it; refused if it holds another run."""
    folder = Path(config.out)
    files.claim(
        folder / "run.json",
        to_json(config),
        holds="a run",
        settings=lambda text: flat(json.loads(to_json(from_json(text)))),
        free=FREE,
        write=ranks.first,
    )
    ranks.agree(lambda: None)
    return folder


def save_adapter(net: Any, folder: Path, config: Run, progress: Progress) -> None:
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
