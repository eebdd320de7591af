"""The loop: prompts in, an adapter out.

One `for` over iterations: noise and conditioning of iteration n, one backward pass per segment and micro-batch, one
AdamW step, one step of the average. Everything random in iteration n derives from (seed, n), so a run that was killed
goes on from its last checkpoint to the same bits. The distance shown is the mean squared difference between the final
latents of the averaged student and those of the teacher's many Euler steps from the same noise, on held-out prompts;
the teacher's ends are computed once and kept in the run folder. Settings: arXiv 2602.09014.
"""

import dataclasses
import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor
from tqdm import tqdm

from arcflow import adapter, backbone, basis, student
from arcflow.backbone import Cond
from arcflow.config import Model, Optim, Run, from_json, to_json
from arcflow.data import PromptData, Table, rows
from arcflow.objective import Part, Walk, distill, rehearse, teacher_ratio
from arcflow.path import segments, step_grid
from arcflow.replay import Replay
from arcflow.rollout import Student, Teacher, arcs, euler, guided
from arcflow.state import Ema, Log, Progress, ema_beta, restore, save_checkpoint, seed_of, write_atomic

EULER_STEPS = (2, 4, 8)
"""Plain Euler runs of the teacher that put the distance into proportion."""
FREE = ("out", "device", "eval_every", "save_every", "keep", "log_every", "stop_after")
"""Settings that may change when a run is taken up again."""


def train(config: Run, pipe: Any = None, log: Callable[[str], None] = tqdm.write) -> Path:
    """Distill, and return the run folder: `adapter/`, `log.jsonl`, `run.json`, `checkpoints/`.

    A run that is already in the folder is taken up where it stopped. `pipe` (by default loaded from
    `config.model.base`) is changed in place: at the end its transformer is the student with averaged weights. SIGINT
    and SIGTERM save, say how to go on, and exit.
    """
    started = time.monotonic()
    optim, device = config.optim, torch_device(config.device)
    data = PromptData(config.data, seed=config.seed, batch=optim.batch)
    folder = claim(config)
    pipe = (load_pipe(config.model) if pipe is None else pipe).to(device)
    encode, negative = encoder(pipe, config, data)
    parameters = build_student(pipe.transformer, config)
    walker, teacher = views(pipe.transformer, negative, config.distill.teacher_cfg)
    ema, optimizer = Ema(parameters), adamw(parameters, optim)
    turned = step_directions(parameters, config)
    replay = Replay(config.distill.replay_batches, segments(config.distill.steps, config.distill.final_step_scale))
    progress = restore(folder / "checkpoints", parameters, ema, optimizer, log, replay)
    before = progress.seconds

    def batch(prompts: list[str], seeds: list[int]) -> tuple[Tensor, Cond]:
        x = backbone.noise(pipe, seeds, config.data.height, config.data.width)
        return x.to(device), encode(prompts)

    gauge = Gauge(config, teacher, *batch(data.held_out, data.held_out_seeds), folder / "held_out.safetensors", log)
    journal = Log(folder, progress.step, log)
    if progress.step:
        log(f"resuming {folder} at iteration {progress.step} of {optim.iterations}")
    bar = tqdm(total=optim.iterations, initial=progress.step, desc="distill", unit="it", disable=None)

    def measure() -> None:
        pipe.transformer.eval()
        with ema.applied():
            progress.distance = gauge.distance(walker)
        pipe.transformer.train()
        journal.write(progress.step, distance=progress.distance, **(gauge.euler if progress.step == 0 else {}))

    pipe.transformer.train()
    with journal, bar, stop_signals() as caught:
        for step in range(progress.step, optim.iterations):
            if step == 0:
                measure()
            torch.manual_seed(seed_of(config.seed, "dropout", step))
            walked, fresh = walks_before(step, config), list[list[Walk]]()
            if walks_before(step + 1, config) == walked and replay.batches:
                drawn = Generator().manual_seed(seed_of(config.seed, "replay", step))
                samples, kept = replay.draw(optim.batch, drawn, device)
                cond = encode([data.prompt(sample) for sample in samples])
                logs = rehearsal(walker, kept, cond, config=config)
            else:
                logs, fresh = accumulate(walker, teacher, *batch(*data.batch(walked)), config=config, step=step)
            limit = optim.clip if step >= optim.clip_from else math.inf
            norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), limit))
            if math.isfinite(norm):
                set_rate(optimizer, rate(step, optim))
                with turned():
                    optimizer.step()
                ema.update(ema_beta(step, optim.ema_from, optim.ema_power))
                if fresh:
                    replay.keep(walked * optim.batch, fresh)
            else:
                progress.skipped += 1
            optimizer.zero_grad()

            progress.step, progress.samples = step + 1, progress.samples + optim.batch
            last = progress.step == optim.iterations
            if progress.step % config.log_every == 0:
                lr = optimizer.param_groups[0]["lr"]
                journal.write(progress.step, **logs, gradient_norm=norm, lr=lr, skipped=progress.skipped)
            if progress.step % config.eval_every == 0 or last:
                measure()
            bar.update()
            bar.set_postfix(loss=logs["loss"], distance=progress.distance, refresh=False)
            stop = bool(caught) or time.monotonic() - started > 60 * (config.stop_after or math.inf)
            if stop or last or progress.step % config.save_every == 0:
                progress.seconds = before + time.monotonic() - started
                journal.sync()
                save_checkpoint(folder / "checkpoints", progress, parameters, ema, optimizer, config.keep, replay)
            if stop:
                break
    if progress.step < optim.iterations:
        log(
            f"stopped at iteration {progress.step} of {optim.iterations}, saved in {folder}: "
            f"run the same command to go on"
        )
    if caught:
        raise SystemExit(128 + caught[0])
    ema.swap()
    save_adapter(pipe.transformer, folder / "adapter", config, progress)
    return folder


def claim(config: Run) -> Path:
    """The run folder, with the resolved configuration in it; refused if it holds another run."""
    folder, stored = Path(config.out), Path(config.out) / "run.json"
    if stored.exists():
        then, now = _flat(json.loads(to_json(from_json(stored.read_text("utf-8"))))), _flat(json.loads(to_json(config)))
        changed = [f"{k}: {then[k]!r} there, {now[k]!r} now" for k in now if k not in FREE and then[k] != now[k]]
        if changed:
            raise ValueError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}): expected the same ones "
                f"to go on with it; repeat them, or choose another folder with --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(stored, lambda temporary: temporary.write_text(to_json(config), "utf-8"))
    return folder


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def torch_device(name: str) -> torch.device:
    """The device of that name; "auto" is the best there is."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in here.items() if available)
    if not here[name]:
        found = ", ".join(kind for kind, available in here.items() if available)
        raise ValueError(f"device {name!r} is not here: expected one of {found}; take auto")
    several = name == "cuda" and "LOCAL_RANK" in os.environ  # each process takes the card of its number
    return torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if several else name)


def load_pipe(model: Model) -> Any:
    """The teacher's pipeline: the small one of the package, a folder, or one from the Hub."""
    dtype = getattr(torch, model.dtype)
    if model.base == "world":
        from arcflow.world.teacher import load_teacher  # only this base needs it

        return load_teacher().to(dtype)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(model.base, dtype=dtype)


def encoder(pipe: Any, config: Run, data: PromptData) -> tuple[Callable[[list[str]], Cond], Cond | None]:
    """What gives the conditioning of prompts, and that of the empty prompt if the teacher is guided with it."""

    def encode(prompts: list[str]) -> Cond:
        return backbone.encode_prompts(
            pipe,
            prompts,
            height=config.data.height,
            width=config.data.width,
            guidance=config.distill.guidance,
            max_sequence_length=config.data.max_sequence_length,
        )

    negative = encode([""]) if config.distill.teacher_cfg > 1 else None
    return (Table(encode, data.train + data.held_out) if config.data.cache else encode), negative


def build_student(net: Any, config: Run) -> dict[str, torch.nn.Parameter]:
    """Put head and LoRA on the transformer; the trainable parameters."""
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
    return student.trainable(net)


def views(net: Any, negative: Cond | None, scale: float) -> tuple[Student, Teacher]:
    """The network as the two callables that everything else sees."""

    def walker(x: Tensor, sigma: Tensor, cond: Cond) -> Any:
        return student.predict(net, x, sigma, cond)

    def teacher(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return student.teacher_velocity(net, x, sigma, cond)

    return walker, teacher if negative is None else guided(teacher, negative, scale)


def adamw(parameters: dict[str, torch.nn.Parameter], optim: Optim) -> torch.optim.AdamW:
    """AdamW with a rate of its own for the head's log-gamma part."""
    gammas = [p for name, p in parameters.items() if "_loggamma." in name]
    others = [p for name, p in parameters.items() if "_loggamma." not in name]
    groups = [{"params": others, "peak": optim.lr}, {"params": gammas, "peak": optim.lr_log_gamma}]
    fused = others[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, betas=optim.betas, weight_decay=optim.weight_decay, fused=fused)


def step_directions(
    parameters: dict[str, torch.nn.Parameter], config: Run
) -> Callable[[], AbstractContextManager[None]]:
    """What an optimizer step runs in, see `optim.directions`."""
    if config.optim.directions == "modes":
        return nullcontext
    grid = step_grid(config.distill.steps, config.distill.shift, config.distill.final_step_scale)
    means = [p for name, p in parameters.items() if "_means." in name]
    mix = basis.directions(config.model.modes, float((grid[:-1] - grid[1:]).max()))
    return lambda: basis.along(mix, means)


def rate(iteration: int, optim: Optim) -> float:
    """Fraction of the learning rate at an iteration counted from 0: warm-up, constant, cooldown if there is one."""
    if iteration < optim.warmup:
        return 1 - (1 - iteration / optim.warmup) * (1 - optim.warmup_start)
    left = (optim.iterations - iteration) / max(optim.cooldown_iterations, 1)
    if optim.cooldown == "none" or left >= 1:
        return 1.0
    return left if optim.cooldown == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def set_rate(optimizer: torch.optim.Optimizer, fraction: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * fraction


def walks_before(step: int, config: Run) -> int:
    """How many iterations before `step` ask the teacher: one in `replay` + 1 while the ratio is held, then all."""
    held = min(step, config.distill.hold)
    return math.ceil(held / (config.distill.replay + 1)) + step - held


def accumulate(
    walker: Student, teacher: Teacher, x: Tensor, cond: Cond, *, config: Run, step: int
) -> tuple[dict[str, float], list[list[Walk]]]:
    """Add a batch's gradient to the parameters, one backward pass per segment and micro-batch: the losses to log, and
    each segment's walks if they are to be kept."""
    draws = Generator().manual_seed(seed_of(config.seed, "draws", step))
    ratio = teacher_ratio(step, config.distill.decay, config.distill.hold)
    tally = Tally(config.distill.steps, x.device)
    walks: list[list[Walk]] = [[] for _ in range(config.distill.steps)] if config.distill.replay else []
    for part in micro_batches(len(x), config.optim):
        objective = distill(
            walker, teacher, x[part], rows(cond, part), config=config.distill, ratio=ratio, generator=draws
        )
        share = len(x[part]) / len(x)
        for i, segment in enumerate(objective):
            (share * segment.loss).backward()
            tally.add(i, segment, share)
            if walks:
                walks[i].append(segment.walk)
    return tally.logs(ratio), walks


def rehearsal(walker: Student, walks: list[Walk], cond: Cond, *, config: Run) -> dict[str, float]:
    """Add the gradient of kept walks to the parameters, one backward pass per micro-batch: the losses to log."""
    count = len(walks[0].x)
    tally = Tally(config.distill.steps, walks[0].x.device)
    for part in micro_batches(count, config.optim):
        parts = rehearse(walker, [walk[part] for walk in walks], rows(cond, part), config=config.distill)
        share = len(walks[0].x[part]) / count
        (share * torch.stack([segment.loss for segment in parts]).sum()).backward()
        for i, segment in enumerate(parts):
            tally.add(i, segment, share)
    return tally.logs(1.0)


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


def micro_batches(count: int, optim: Optim) -> Iterator[slice]:
    """A batch in pieces that fit in memory."""
    size = optim.micro_batch or optim.batch
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


class Gauge:
    """Distance to the teacher on held-out prompts: mean squared difference of final latents from the same noise."""

    def __init__(
        self, config: Run, teacher: Teacher, x: Tensor, cond: Cond, cache: Path, log: Callable[[str], None]
    ) -> None:
        self.x, self.cond, self.distill = x, cond, config.distill
        self.parts = list(micro_batches(len(x), config.optim))
        key = self._key(config)
        known = _cached(cache, key)
        if known is None:
            log(f"teacher: {len(x)} held-out images in {config.data.teacher_steps} steps (once)")
            known = self._teacher_end(teacher, config.data.teacher_steps)
            write_atomic(cache, lambda path: save_file({"x": known.cpu()}, path, {"key": key}))
        self.end = known.to(x.device)
        self.euler = {f"euler_{n}": self._error(self._teacher_end(teacher, n)) for n in EULER_STEPS}

    def distance(self, walker: Student) -> float:
        """Of the student at its own number of steps."""
        sigmas = step_grid(self.distill.steps, self.distill.shift, self.distill.final_step_scale)
        return self._error(torch.cat([arcs(walker, self.x[p], rows(self.cond, p), sigmas) for p in self.parts]))

    def _error(self, x: Tensor) -> float:
        return float((x - self.end).square().mean())

    def _teacher_end(self, teacher: Teacher, steps: int) -> Tensor:
        sigmas = step_grid(steps, self.distill.shift)
        return torch.cat([euler(teacher, self.x[p], rows(self.cond, p), sigmas) for p in self.parts])

    def _key(self, config: Run) -> str:
        """Everything the teacher's ends depend on, hashed."""
        settings = (config.model.base, config.model.dtype, config.data.teacher_steps)
        digest = hashlib.sha256(repr((settings, self.distill.shift, self.distill.teacher_cfg)).encode())
        for value in (self.x, *(self.cond[name] for name in sorted(self.cond))):
            digest.update(value.cpu().float().numpy().tobytes())
        return digest.hexdigest()


def _cached(path: Path, key: str) -> Tensor | None:
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return file.get_tensor("x") if file.metadata()["key"] == key else None


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one has its usual effect."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread can receive signals
        return

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, usual[signal.Signals(number)])

    usual = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def save_adapter(net: Any, folder: Path, config: Run, progress: Progress) -> None:
    """Write the adapter with everything needed to sample rightly, and the record of its training."""
    settings = json.loads(to_json(config))
    settings.pop("out")  # a folder of this machine
    info = adapter.AdapterInfo(
        base=config.model.base,
        shift=config.distill.shift,
        steps=config.distill.steps,
        final_step_scale=config.distill.final_step_scale,
        guidance=config.distill.guidance if backbone.family_of(net).guidance else None,
        training={"settings": settings, "progress": dataclasses.asdict(progress)},
    )
    adapter.save_adapter(net, folder, info=info)
