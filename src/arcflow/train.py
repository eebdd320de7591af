"""The loop: prompts in, an adapter out.

One `for` over iterations: noise and conditioning of iteration n, one backward pass per segment and micro-batch, one
AdamW step, one step of the average. Everything random in iteration n derives from (seed, n), so a run that was killed
goes on from its last checkpoint to the same bits. Settings: arXiv 2602.09014.
"""

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from arcflow import adapter, backbone, hub, student
from arcflow.backbone import Cond
from arcflow.cache import Cache
from arcflow.config import Model, Run, from_json, to_json
from arcflow.data import Batch, PromptData, Prompts, Table, micro_batches, open_prompts, rows
from arcflow.gauge import Gauge
from arcflow.objective import Part, Walk, distill, rehearse, teacher_ratio
from arcflow.optim import accepted, adamw, diagnosis, rate, set_rate, step_directions
from arcflow.path import segments
from arcflow.replay import Replay
from arcflow.rollout import Student, Teacher, guided
from arcflow.state import Ema, Log, Progress, ema_beta, restore, save_checkpoint, seed_of, write_atomic

FREE = ("out", "device", "pictures", "eval_every", "save_every", "keep", "log_every", "stop_after")
"""Settings that may change when a run is taken up again."""


def train(config: Run, pipe: Any = None, log: Callable[[str], None] = tqdm.write) -> Path:
    """Distill, and return the run folder: `adapter/`, `log.jsonl`, `run.json`, `checkpoints/`.

    A run that is already in the folder is taken up where it stopped. `pipe` (by default loaded from
    `config.model.base`) is changed in place: at the end its transformer is the student with averaged weights. SIGINT
    and SIGTERM save, say how to go on, and exit.
    """
    started = time.monotonic()
    optim, device = config.optim, torch_device(config.device)
    data = open_prompts(config.data, seed=config.seed, batch=optim.batch)
    if data.message:
        log(data.message)
    folder = claim(config)
    pipe = (load_pipe(config.model, not config.data.embeddings) if pipe is None else pipe).to(device)
    encode, negative = encoder(pipe, config, data)
    parameters = build_student(pipe.transformer, config)
    walker, teacher = views(pipe.transformer, negative, config.distill.teacher_cfg)
    ema, optimizer = Ema(parameters), adamw(parameters, optim)
    turned = step_directions(parameters, config)
    replay = Replay(config.distill.replay_batches, segments(config.distill.steps, config.distill.final_step_scale))
    progress = restore(folder / "checkpoints", parameters, ema, optimizer, log, replay)
    if progress.data:
        data.load(progress.data)
    before = progress.seconds

    def tensors(batch: Batch) -> tuple[Tensor, Cond]:
        return backbone.noise(pipe, batch.seeds, *batch.size).to(device), encode(batch.prompts, batch.size)

    gauge = Gauge(config, teacher, *tensors(data.held_out), folder / "held_out.safetensors", log)
    journal = Log(folder, progress.step, log)
    if progress.step:
        log(f"resuming {folder} at iteration {progress.step} of {optim.iterations}")
    bar = tqdm(total=optim.iterations, initial=progress.step, desc="distill", unit="it", disable=None)

    def measure() -> None:
        pipe.transformer.eval()
        with ema.applied():
            progress.distance = gauge.distance(walker)
        if config.pictures:
            journal.picture(progress.step, gauge.pictures(pipe, config.pictures, data.held_out.size))
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
                assert isinstance(data, PromptData)  # `Run` has seen to it
                drawn = Generator().manual_seed(seed_of(config.seed, "replay", step))
                samples, kept = replay.draw(optim.batch, drawn, device)
                cond = encode([data.prompt(sample) for sample in samples], data.held_out.size)
                logs = rehearsal(walker, kept, cond, config=config)
            else:
                logs, fresh = accumulate(walker, teacher, *tensors(data.batch(walked)), config=config, step=step)
            limit = optim.clip if step >= optim.clip_from else math.inf
            norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), limit))
            if accepted(progress, norm, step, optim):
                set_rate(optimizer, rate(step, optim))
                with turned():
                    optimizer.step()
                ema.update(ema_beta(step, optim.ema_from, optim.ema_power))
                if fresh:
                    replay.keep(walked * optim.batch, fresh)
            elif progress.in_a_row >= optim.most_skipped:
                raise ValueError(diagnosis(progress, norm, logs, parameters))
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
                progress.data = data.state()
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


def load_pipe(model: Model, text: bool = True) -> Any:
    """The teacher's pipeline: the small one of the package, a folder, or one from the Hub; without `text` its text
    encoders stay where they are."""
    dtype = getattr(torch, model.dtype)
    if model.base == "world":
        from arcflow.world.teacher import load_teacher  # only this base needs it

        return load_teacher().to(dtype)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    with hub.explained(model.base):
        parts: Any = {} if text else DiffusionPipeline.load_config(model.base)
        unwanted: dict[str, Any] = {name: None for name in parts if name.startswith(("text_encoder", "tokenizer"))}
        return DiffusionPipeline.from_pretrained(model.base, dtype=dtype, **unwanted)


Encode = Callable[[list[str], tuple[int, int]], Cond]
"""(prompts, height and width of their pictures) -> conditioning."""


def encoder(pipe: Any, config: Run, data: Prompts) -> tuple[Encode, Cond | None]:
    """What gives the conditioning of prompts, and that of the empty prompt if the teacher is guided with it."""
    against = [""] if config.distill.teacher_cfg > 1 else []
    known = [row.text for row in data.train] + data.held_out.prompts + against
    text: Callable[[list[str]], Cond] = partial(
        backbone.encode_text, pipe, max_sequence_length=config.data.max_sequence_length
    )
    if config.data.embeddings:
        dtype = getattr(torch, config.model.dtype)
        text = Cache(Path(config.data.embeddings), embedded(config), pipe.device, dtype)
        text.need(known)
    elif config.data.cache:
        text = Table(text, known)

    def encode(prompts: list[str], size: tuple[int, int]) -> Cond:
        return backbone.place(pipe, text(prompts), height=size[0], width=size[1], guidance=config.distill.guidance)

    return encode, encode(against, data.held_out.size) if against else None


def embedded(config: Run) -> dict[str, Any]:
    """What embeddings depend on, beside the prompt."""
    return {"model": config.model.base, "max_sequence_length": config.data.max_sequence_length}


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
    record = {name: value for name, value in dataclasses.asdict(progress).items() if name != "data"}
    info = adapter.AdapterInfo(
        base=config.model.base,
        shift=config.distill.shift,
        steps=config.distill.steps,
        final_step_scale=config.distill.final_step_scale,
        guidance=config.distill.guidance if backbone.family_of(net).guidance else None,
        training={"settings": settings, "progress": record},
    )
    adapter.save_adapter(net, folder, info=info)
