"""`arcflow world train`: the small teacher from nothing, stage by stage, on a CPU.

    text  ->  autoencoder  ->  latents  ->  decoder  ->  flow  ->  guidance  ->  teacher/

Each stage is one call of `minimize` and leaves its result in the output folder. A stage that is finished is not
repeated, one that was interrupted goes on from its last checkpoint: all randomness of a step is a function of stage and
step.
"""

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, T5EncoderModel

from arcflow import paper
from arcflow.distillation.policy import Teacher
from arcflow.distillation.walk import euler
from arcflow.families.conditioning import Cond, rows, shared
from arcflow.families.network import folded, unfolded
from arcflow.path import step_grid
from arcflow.runs.checkpoint import Checkpoints, Progress
from arcflow.runs.ema import Ema
from arcflow.system import files
from arcflow.system.seeds import seed_of
from arcflow.training import flow
from arcflow.world import autoencoder as ae
from arcflow.world import text
from arcflow.world.check import accuracy
from arcflow.world.render import render_all
from arcflow.world.scene import Scene, sample_prompts, sample_scene
from arcflow.world.teacher import GRID, assemble, build_transformer

PATCH = (2, 2)
"""Latent pixels of a token."""

SAVE_EVERY = 240.0
"""Seconds between two checkpoints."""
PROBED = 120
"""Held-out captions on which the transformer is watched; the autoencoder takes four times as many."""
SHARES = {
    "single_object": 0.05,
    "two_objects": 0.15,
    "counting": 0.15,
    "colors": 0.1,
    "position": 0.25,
    "color_attribution": 0.3,
}
"""How often the transformer sees each skill: what is harder to learn comes more often."""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """How long the small teacher trains. How the shipped one came about is told in docs/log.md."""

    text_steps: int = 1500
    """Steps of 128 captions for the text encoders."""
    autoencoder_steps: int = 2200
    """Steps of 16 images for encoder and decoder."""
    scenes: int = 131072
    """Images encoded once for the transformer to learn from."""
    decoder_steps: int = 1800
    """Steps of 16 images for the decoder alone."""
    flow_steps: int = 14000
    """Steps of flow matching."""
    guidance_steps: int = 1200
    """Steps of guidance distillation."""
    batch: int = 128
    """Images a step for the transformer."""


@dataclass(frozen=True)
class Stage:
    """One training: its learning rate rises over 3 %, holds, and falls linearly over the last `cooldown` share."""

    name: str
    steps: int
    rate: float
    cooldown: float = 0.3
    ema: float = 0.0
    """Share of the running mean kept in a step; 0 keeps the last weights."""

    def scale(self, step: int) -> float:
        warm = (step + 1) / max(1, 0.03 * self.steps)
        fall = (self.steps - step) / max(1, self.cooldown * self.steps)
        return max(0.02, min(1.0, warm, fall))


def minimize(
    stage: Stage,
    out: Path,
    modules: dict[str, nn.Module],
    loss: Callable[[int], Tensor],
    probe: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Minimize `loss(step)` over the trainable parameters of `modules`; resumes from `out/checkpoints`.

    The modules end with the running mean of their weights. With every checkpoint `probe()`, which sees that mean, adds
    a line to `out/<stage>.jsonl`.
    """
    parameters = {
        f"{name}.{key}": p
        for name, module in modules.items()
        for key, p in module.named_parameters()
        if p.requires_grad
    }
    optimizer = torch.optim.AdamW(parameters.values(), stage.rate, betas=(0.9, 0.99), weight_decay=0.0)
    ema = Ema(parameters)
    checkpoints = Checkpoints(out / "checkpoints" / stage.name, parameters, ema, optimizer, log=tqdm.write)
    progress = checkpoints.restore()
    bar = tqdm(range(progress.step, stage.steps), initial=progress.step, total=stage.steps, desc=stage.name)
    saved = time.monotonic()
    with closing(checkpoints):
        for step in bar:
            torch.manual_seed(seed_of(stage.name, step))
            value = loss(step)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * stage.scale(step)
            optimizer.step()
            ema.update(min(stage.ema, (step + 1) / (step + 10)))
            if step % 20 == 0:
                bar.set_postfix(loss=f"{value.item():.4f}")
            if time.monotonic() - saved > SAVE_EVERY or step == stage.steps - 1:
                checkpoints.save(Progress(step=step + 1))
                with ema.applied(), (out / f"{stage.name}.jsonl").open("a") as log:
                    log.write(json.dumps({"step": step + 1, "loss": value.item()} | (probe() if probe else {})) + "\n")
                saved = time.monotonic()
    ema.swap()


def train_teacher(out: Path, recipe: Pretrain, *, threads: int | None = None) -> Path:
    """Train every stage that is not finished; returns the folder of the pipeline, `out/teacher`."""
    out.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    t5, clip = train_text(out, recipe.text_steps, world_text)
    vae = train_autoencoder(out, recipe)
    latents, captions = encode_scenes(out, recipe, vae)
    vae = train_decoder(out, recipe, vae)
    batches = Batches(latents, captions, partial(flow.encode, t5, clip), recipe.batch)
    lessons = Lessons(batches, partial(held_out_accuracy, batches, vae), flow.world_weight)
    frozen = train_flow(out, recipe.flow_steps, lessons, build_transformer)
    net = train_guidance(out, recipe.guidance_steps, lessons, frozen)
    return finish(out / "teacher", lambda folder: assemble(net, vae, t5, clip).save_pretrained(folder))


def finish(folder: Path, save: Callable[[Path], object]) -> Path:
    """Save into a folder, whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


@dataclass(frozen=True)
class TextLesson:
    """Untrained text encoders, the probes that read them, and how well these do."""

    t5: T5EncoderModel
    clip: CLIPTextModel
    probes: nn.Module
    loss: Callable[[int], Tensor]
    """(step) -> what is minimized."""


def world_text() -> TextLesson:
    """The text encoders of the world, which learn what its captions say."""
    t5, clip, probes, tokenizer = text.build_t5(), text.build_clip(), text.Probes(), text.build_tokenizer()

    def loss(step: int) -> Tensor:
        prompts = text.captions(128, f"text-{step}")
        return text.text_loss(t5, clip, probes, prompts, text.tokenize(tokenizer, [p.text for p in prompts]))

    return TextLesson(t5, clip, probes, loss)


def train_text(out: Path, steps: int, build: Callable[[], TextLesson]) -> tuple[T5EncoderModel, CLIPTextModel]:
    """Text encoders that were trained with their probes, frozen."""
    if not (out / "clip").exists():
        torch.manual_seed(0)
        lesson = build()
        t5, clip = lesson.t5, lesson.clip
        minimize(Stage("text", steps, 2e-3), out, {"t5": t5, "clip": clip, "probes": lesson.probes}, lesson.loss)
        finish(out / "t5", t5.save_pretrained)
        finish(out / "clip", clip.save_pretrained)
    return (
        T5EncoderModel.from_pretrained(out / "t5").eval().requires_grad_(False),
        CLIPTextModel.from_pretrained(out / "clip").eval().requires_grad_(False),
    )


def _images(scenes: list[Scene]) -> Tensor:
    return ae.to_tensor(render_all(scenes)).contiguous(memory_format=torch.channels_last)


def _channels_last(vae: Any) -> AutoencoderKL:
    return vae.to(memory_format=torch.channels_last)


def _half() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def train_autoencoder(out: Path, recipe: Pretrain) -> AutoencoderKL:
    if not (out / "autoencoder").exists():
        torch.manual_seed(0)
        vae = _channels_last(ae.build_autoencoder())

        def loss(step: int) -> Tensor:
            scenes = ae.scenes(16, f"ae-{step}")
            with _half():
                return ae.autoencoder_loss(vae, _images(scenes), ae.plain_map(scenes))

        stage = Stage("autoencoder", recipe.autoencoder_steps, 2.5e-3, cooldown=0.9)
        minimize(stage, out, {"vae": vae}, loss, lambda: ae.reconstruction_accuracy(vae, 4 * PROBED))
        ae.standardize(vae)
        finish(out / "autoencoder", vae.save_pretrained)
    return _channels_last(AutoencoderKL.from_pretrained(out / "autoencoder")).eval()


def encode_scenes(out: Path, recipe: Pretrain, vae: AutoencoderKL) -> tuple[Tensor, list[str]]:
    """Standardized packed latents of training scenes, with their captions; kept in `out/scenes.safetensors`."""
    path, chunk = out / "scenes.safetensors", 256
    if not path.exists():
        parts, captions = [], []
        for start in tqdm(range(0, recipe.scenes, chunk), desc="scenes"):
            prompts, rng = text.captions(chunk, f"train-{start}", SHARES), random.Random(f"scenes-{start}")
            x = _images([sample_scene(prompt, rng) for prompt in prompts])
            with torch.no_grad(), _half():
                parts.append(unfolded(ae.vae_encode(vae, x), PATCH).half())
            captions += [prompt.text for prompt in prompts]
        metadata = {"captions": json.dumps(captions)}
        files.write_tensors(path, {"latents": torch.cat(parts)}, metadata)
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents"), json.loads(file.metadata()["captions"])


def train_decoder(out: Path, recipe: Pretrain, vae: AutoencoderKL) -> AutoencoderKL:
    if not (out / "vae").exists():
        vae.requires_grad_(False).decoder.requires_grad_(True)

        def loss(step: int) -> Tensor:
            with _half():
                return ae.decoder_loss(vae, _images(ae.scenes(16, f"decoder-{step}")))

        stage = Stage("decoder", recipe.decoder_steps, 1.5e-3, cooldown=0.9, ema=0.99)
        minimize(stage, out, {"vae": vae}, loss, lambda: ae.reconstruction_accuracy(vae, 4 * PROBED))
        finish(out / "vae", vae.save_pretrained)
    return AutoencoderKL.from_pretrained(out / "vae").eval()


class Batches:
    """Latents with their captions' embeddings, by step; all captions are embedded once."""

    def __init__(self, latents: Tensor, captions: list[str], encode: Callable[[list[str]], Cond], size: int) -> None:
        self.latents, self.captions, self.encode, self.size = latents, captions, encode, size

    @cached_property
    def embedded(self) -> Cond:
        """Conditioning of all captions; computed when a stage first trains on them."""
        chunks = tqdm(range(0, len(self.captions), 512), desc="captions")
        parts = [self.encode(self.captions[i : i + 512]) for i in chunks]
        return {
            name: value if shared(name) else torch.cat([part[name] for part in parts])
            for name, value in parts[0].items()
        }

    def empty(self) -> Cond:
        """Conditioning of the empty caption."""
        return self.encode([""])

    def at(self, step: int, stage: str) -> tuple[Tensor, Cond]:
        """Latents and conditioning of a step of a stage."""
        per_epoch = len(self.latents) // self.size
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng(seed_of(stage, -1 - epoch)).permutation(len(self.latents))
        mine = order[place * self.size : (place + 1) * self.size].tolist()
        return self.latents[mine].float(), rows(self.embedded, mine)


def _frozen(net: FluxTransformer2DModel) -> FluxTransformer2DModel:
    return net.eval().requires_grad_(False)


@dataclass(frozen=True)
class Lessons:
    """What a transformer learns from, and what it is watched by."""

    batches: Batches
    watch: Callable[[Teacher, float], dict[str, float]]
    """Numbers of a teacher that is asked with a guidance, for the log."""
    weight: Callable[[], Tensor | float] = lambda: 1.0
    """Of the channels of a token in the loss; told when a stage first needs it."""


def train_flow(
    out: Path, steps: int, lessons: Lessons, build: Callable[[], FluxTransformer2DModel]
) -> FluxTransformer2DModel:
    """Flow matching from nothing; the transformer's guidance input is 1."""
    if not (out / "flow").exists():
        torch.manual_seed(0)
        net, empty, weight = build(), lessons.batches.empty(), lessons.weight()
        minimize(
            Stage("flow", steps, 1.2e-3, cooldown=0.35, ema=0.999),
            out,
            {"transformer": net},
            lambda step: flow.flow_loss(net, *lessons.batches.at(step, "flow"), empty, weight),
            lambda: lessons.watch(flow.guided_by_captions(net, empty, paper.GUIDANCE), 1.0),
        )
        finish(out / "flow", net.save_pretrained)
    return _frozen(FluxTransformer2DModel.from_pretrained(out / "flow"))


def train_guidance(out: Path, steps: int, lessons: Lessons, frozen: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The same transformer with guidance distilled into it."""
    if not (out / "transformer").exists():
        net = FluxTransformer2DModel.from_pretrained(out / "flow")
        empty, weight = lessons.batches.empty(), lessons.weight()
        minimize(
            Stage("guidance", steps, 4e-4, cooldown=0.8, ema=0.995),
            out,
            {"transformer": net},
            lambda step: flow.guidance_loss(net, frozen, *lessons.batches.at(step, "guidance"), empty, weight),
            lambda: lessons.watch(flow.velocity_of(net), paper.GUIDANCE),
        )
        finish(out / "transformer", net.save_pretrained)
    return _frozen(FluxTransformer2DModel.from_pretrained(out / "transformer"))


@torch.no_grad()
def held_out_accuracy(batches: Batches, vae: AutoencoderKL, teacher: Teacher, guidance: float) -> dict[str, float]:
    """Checker accuracy on `PROBED` held-out captions, for watching a training."""
    prompts = sample_prompts(PROBED, seed=3, split="test")
    latents = draw(batches, teacher, [prompt.text for prompt in prompts], guidance)
    images = [ae.to_images(ae.vae_decode(vae, folded(x, [GRID, GRID], PATCH))) for x in latents]
    return accuracy(np.concatenate(images), prompts)


def draw(batches: Batches, teacher: Teacher, texts: list[str], guidance: float, steps: int = 25) -> Iterator[Tensor]:
    """Final latents of captions, 60 at a time."""
    for start in range(0, len(texts), 60):
        cond = batches.encode(texts[start : start + 60])
        shape = (len(cond["pooled_projections"]), *batches.latents.shape[1:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(start))
        yield euler(teacher, noise, flow.at_guidance(cond, guidance), step_grid(steps))
