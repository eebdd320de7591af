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
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from arcflow import adapter, backbone, parallel, student
from arcflow.backbone import Cond
from arcflow.checkpoint import Checkpoints
from arcflow.config import Run, check, flat, from_json, to_json
from arcflow.data import Prompts, micro_batches, open_prompts, read_pictures, rows
from arcflow.feed import Feed, Sample
from arcflow.gauge import Gauge
from arcflow.loading import Encode, encoder, load_pipe, settle, torch_device
from arcflow.objective import Part, distill, teacher_ratio
from arcflow.optim import accepted, adamw, diagnosis, rate, set_rate, step_directions
from arcflow.parallel import Ranks
from arcflow.rollout import Student, Teacher, guided
from arcflow.signals import stop_signals
from arcflow.speed import Speed
from arcflow.state import Ema, Log, Progress, Tracker, ema_beta, seed_of, write_atomic

FREE = (
    *("out", "device", "pictures", "eval_every", "save_every", "keep", "milestones", "log_every", "stop_after"),
    *("shard", "tracker", "model.compile", "model.text_device"),
)
"""Settings that may change when a run is taken up again."""


def train(config: Run, pipe: Any = None, log: Callable[[str], None] = tqdm.write) -> Path:
    """Distill, and return the run folder: `adapter/`, `log.jsonl`, `run.json`, `checkpoints/`.

    A run that is already in the folder is taken up where it stopped, by as many processes as `torchrun` starts now.
    `pipe` (by default loaded from `config.model.base`) is changed in place: at the end its transformer is the student
    with averaged weights. SIGINT and SIGTERM save, say how to go on, and exit.
    """
    device = torch_device(config.device)
    if config.model.compile and device.type == "cpu":
        compiler = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")))
        check(compiler, "model.compile", True, "a C++ compiler on the path", "install g++ or clang++, or leave it out")
    with parallel.start(device, config.shard) as ranks, attention(device):
        return _train(config, pipe, device, ranks, log if ranks.first else _silent)


def attention(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU any but cuDNN's, which PyTorch may prefer: its backward pass fails on an H100 (FLUX, PyTorch 2.11)."""
    own = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(own) if device.type == "cuda" else nullcontext()


def _silent(message: str) -> None:
    pass


def _train(config: Run, pipe: Any, device: torch.device, ranks: Ranks, log: Callable[[str], None]) -> Path:
    started = time.monotonic()
    optim, mine, speed = config.optim, ranks.rows(config.optim.batch), Speed(device)
    data = open_prompts(config.data, seed=config.seed, batch=optim.batch)
    if data.message:
        log(data.message)
    folder, tracked = claim(config, ranks), ranks.first and config.tracker != "none"
    curves = Tracker(config.tracker, folder, json.loads(to_json(config))) if tracked else None
    pipe = load_pipe(config.model, not config.data.embeddings) if pipe is None else pipe
    encode, negative = encoder(settle(pipe, config.model, device, ranks), config, data, device)
    parameters = build_student(pipe.transformer, config, ranks)
    walker, teacher = views(pipe.transformer, negative, config.distill.teacher_cfg)
    ema, optimizer = Ema(parameters), adamw(parameters, optim)
    turned = step_directions(parameters, config)
    keep = {"keep": config.keep, "milestones": config.milestones}
    checkpoints = Checkpoints(folder / "checkpoints", parameters, ema, optimizer, ranks=ranks, log=log, **keep)
    progress = checkpoints.restore()
    if progress.data:
        data.load(progress.data)
    before = progress.seconds

    held_out = data.held_out
    gauge = Gauge(
        config,
        teacher,
        backbone.noise(pipe, held_out.seeds, *held_out.size).to(device),
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
        with ema.applied():
            measured = gauge.distance(walker)
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
            torch.manual_seed(seed_of(config.seed, "dropout", step, *([ranks.rank] if ranks.rank else [])))
            sample, first = fetch(step), step * optim.batch + mine.start
            progress.data = sample.position
            draws = [seed_of(config.seed, "draws", first + i) for i in range(len(sample.x))]
            logs = accumulate(walker, ask, sample, config=config, step=step, draws=draws)
            ranks.average(parameters.values())
            limit = optim.clip if step >= optim.clip_from else math.inf
            norm = float(parallel.whole(torch.nn.utils.clip_grad_norm_(parameters.values(), limit)))
            if accepted(progress, norm, step, optim):
                set_rate(optimizer, rate(step, optim))
                with turned():
                    optimizer.step()
                ema.update(ema_beta(step, optim.ema_from, optim.ema_power))
            elif progress.in_a_row >= optim.most_skipped:
                raise ValueError(diagnosis(progress, norm, logs, parameters))
            optimizer.zero_grad()

            progress.step, progress.samples = step + 1, progress.samples + optim.batch
            late = time.monotonic() - started > 60 * (config.stop_after or math.inf)
            logs = ranks.mean({**logs, "late": float(late), "signal": float(bool(caught))})  # all stop, or none
            late, told = logs.pop("late") > 0, logs.pop("signal") > 0
            last, stop = progress.step == optim.iterations, late or told
            if journal and progress.step % config.log_every == 0:
                lr = optimizer.param_groups[0]["lr"]
                journal.write(progress.step, **logs, gradient_norm=norm, lr=lr, skipped=progress.skipped)
                journal.speed(progress.step, **speed.line(config.log_every, config.log_every * optim.batch))
            if progress.step % config.eval_every == 0 or last:
                measure()
            bar.update()
            bar.set_postfix(loss=logs["loss"], distance=progress.distance, refresh=False)
            if stop or last or progress.step % config.save_every == 0:
                progress.seconds = before + time.monotonic() - started
                if journal:
                    journal.sync()
                checkpoints.save(progress)
            if stop:
                break
    if progress.step < optim.iterations:
        log(
            f"stopped at iteration {progress.step} of {optim.iterations}, saved in {folder}: "
            f"run the same command to go on"
        )
    if told:
        raise SystemExit(128 + next(iter(caught), signal.SIGTERM))
    ema.swap()
    if ranks.first or ranks.mesh:  # all give their part of a network that is shared out
        save_adapter(pipe.transformer, folder / "adapter", config, progress)
    return folder


def feed_of(pipe: Any, data: Prompts, encode: Encode, config: Run, device: torch.device, ranks: Ranks) -> Feed:
    """This process's part of every batch. One process reads the prompts, so that a streamed data set is read once."""
    mine = ranks.rows(config.optim.batch)

    def make(number: int) -> Sample:
        batch, position = ranks.agree(lambda: (data.batch(number), data.state()), ranks.side)
        x = backbone.noise(pipe, batch.seeds[mine], *batch.size).to(device)
        clean = None
        if config.data.images:
            clean = backbone.encode_pictures(pipe, read_pictures(batch.images[mine], batch.size)).to(device)
        return Sample(x, encode(batch.prompts[mine], batch.size), position, clean)

    in_memory = config.data.cache and not config.data.embeddings
    return Feed(make, device, ahead=not in_memory)


def claim(config: Run, ranks: Ranks) -> Path:
    """The run folder, with the resolved configuration in it; refused if it holds another run."""
    folder, stored = Path(config.out), Path(config.out) / "run.json"
    if stored.exists():
        then, now = flat(json.loads(to_json(from_json(stored.read_text("utf-8"))))), flat(json.loads(to_json(config)))
        changed = [f"{k}: {then[k]!r} there, {now[k]!r} now" for k in now if k not in FREE and then[k] != now[k]]
        if changed:
            raise ValueError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}): expected the same ones "
                f"to go on with it; repeat them, or choose another folder with --out"
            )
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(stored, lambda temporary: temporary.write_text(to_json(config), "utf-8"))
    ranks.agree(lambda: None)
    return folder


def build_student(net: Any, config: Run, ranks: Ranks) -> dict[str, torch.nn.Parameter]:
    """Put head and LoRA on the transformer and share it out; the trainable parameters."""
    model, start = config.model, Generator().manual_seed(seed_of(config.seed, "student"))
    student.build(
        net,
        modes=model.modes,
        rank=model.rank,
        dropout=model.dropout,
        lora=model.lora,
        targets=model.targets,
        generator=start,
    )
    if model.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    if model.compile:
        net.compile_repeated_blocks()
    return student.trainable(parallel.shard(net, ranks))


def views(net: Any, negative: Cond | None, scale: float) -> tuple[Student, Teacher]:
    """The network as the two callables that everything else sees."""

    def walker(x: Tensor, sigma: Tensor, cond: Cond) -> Any:
        return student.predict(net, x, sigma, cond)

    def teacher(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return student.teacher_velocity(net, x, sigma, cond)

    return walker, teacher if negative is None else guided(teacher, negative, scale)


def accumulate(
    walker: Student, teacher: Teacher, sample: Sample, *, config: Run, step: int, draws: list[int]
) -> dict[str, float]:
    """Add a batch's gradient to the parameters, one backward pass per segment and micro-batch: the losses to log.
    `draws` seeds the random numbers of each sample."""
    x, ratio = sample.x, teacher_ratio(step, config.distill.decay, config.distill.hold)
    steps = config.distill.all_steps[step % len(config.distill.all_steps)]
    settings = dataclasses.replace(config.distill, steps=steps, also_steps=())
    tally = Tally(steps, x.device)
    for part in micro_batches(len(x), config.optim):
        own = [Generator().manual_seed(seed) for seed in draws[part]]
        objective = distill(
            walker,
            teacher,
            x[part],
            rows(sample.cond, part),
            config=settings,
            ratio=ratio,
            generator=own,
            clean=None if sample.clean is None else sample.clean[part],
        )
        share = len(x[part]) / len(x)
        for i, segment in enumerate(objective):
            (share * segment.loss).backward()
            tally.add(i, segment, share)
    return tally.logs(ratio)


class Tally:
    """Losses of an iteration, by segment."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.losses, self.errors = [torch.zeros(steps, device=device) for _ in range(2)]

    def add(self, i: int, part: Part, share: float) -> None:
        self.losses[i] += share * part.logs["loss"]
        self.errors[i] += share * part.logs["distance"]

    def logs(self, ratio: float) -> dict[str, float]:
        by_segment = {f"loss_{i}": loss for i, loss in enumerate(self.losses.tolist(), 1)}
        total, error = float(self.losses.sum()), float(self.errors.mean())
        return {"loss": total, **by_segment, "velocity_error": error, "teacher_ratio": ratio}


def save_adapter(net: Any, folder: Path, config: Run, progress: Progress) -> None:
    """Write the adapter with everything needed to sample rightly, and the record of its training."""
    settings = json.loads(to_json(config))
    settings.pop("out")  # a folder of this machine
    record = {name: value for name, value in dataclasses.asdict(progress).items() if name != "data"}
    info = adapter.AdapterInfo(
        base=config.model.base,
        shift=config.distill.shift,
        steps=config.distill.steps,
        also_steps=config.distill.also_steps,
        final_step_scale=config.distill.final_step_scale,
        guidance=config.distill.guidance if backbone.family_of(net).guidance else None,
        teacher_lora=config.model.teacher_lora,
        training={"settings": settings, "progress": record},
    )
    adapter.save_adapter(net, folder, info=info)
