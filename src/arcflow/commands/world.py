"""The commands of `arcflow world`: render scenes, check images, train and score the small teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, subcommand

from arcflow import paper
from arcflow.config import Device
from arcflow.world.scene import FIRST_SEED, held_out


@dataclass(frozen=True, kw_only=True)
class Render:
    """Draw random scenes of the world with their captions: what the small teacher learns from."""

    count: int = 64
    """Number of images."""
    seed: int = 0
    """The same seed gives the same scenes."""
    split: Literal["train", "test"] = "train"
    """Which side of the train / held-out cut the captions are from."""
    out: Path = Path("out/world")
    """Folder for the PNG files and manifest.jsonl."""

    def run(self) -> None:
        import random

        from PIL import Image

        from arcflow.system import files
        from arcflow.system.owner import owned
        from arcflow.world.render import render
        from arcflow.world.scene import sample_prompts, sample_scene

        rng = random.Random(self.seed)
        lines = []
        with owned(self.out, "renders"):
            for i, prompt in enumerate(sample_prompts(self.count, self.seed, split=self.split)):
                file = f"{i:05d}.png"
                image = Image.fromarray(render(sample_scene(prompt, rng)))
                files.write_image(self.out / file, image)
                lines.append({"file": file, "prompt": prompt.text, "skill": prompt.skill})
            files.write_lines(self.out / "manifest.jsonl", lines)
        print(f"{self.count} images in {self.out}")


@dataclass(frozen=True, kw_only=True)
class Check:
    """Score images against their captions, per skill; without a folder, test the checker itself."""

    folder: Positional[Path | None] = None
    """Folder with manifest.jsonl, as `arcflow sample` and `arcflow world render` write it."""
    count: int = 10_000
    """Rendered images to test the checker on when no folder is given."""

    def run(self) -> None:
        from arcflow.world import check

        if self.folder is None:
            scores = check.self_test(self.count, seed=0)
        else:
            scores = check_folder(self.folder)
        print_scores(scores)


def print_scores(scores: dict[str, float]) -> None:
    """One share a line."""
    for name, share in scores.items():
        print(f"{name:<28}{share:.2%}")


def check_folder(folder: Path) -> dict[str, float]:
    """Accuracy of the images a manifest lists."""
    import numpy as np
    from PIL import Image

    from arcflow.sampling.folder import read_manifest
    from arcflow.world.check import accuracy

    records = read_manifest(folder)
    if not records:
        raise ValueError(
            f"no manifest*.jsonl in {folder}; expected a folder written by `arcflow sample` or `arcflow world render`"
        )
    images = [np.asarray(Image.open(folder / record["file"]).convert("RGB")) for record in records]
    return accuracy(images, [record["prompt"] for record in records])


@dataclass(frozen=True, kw_only=True)
class Score:
    """Checker accuracy of a small teacher, per skill, on held-out captions through the stock pipeline."""

    folder: Positional[Path | None] = None
    """A teacher's folder; by default the shipped one."""
    count: int = 1024
    """Held-out captions, the skills in turn."""
    steps: int = paper.TEACHER_STEPS
    """Network calls per image."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""

    def run(self) -> None:
        from arcflow.sampling import generate
        from arcflow.system.devices import torch_device
        from arcflow.world.check import accuracy
        from arcflow.world.scene import SIZE
        from arcflow.world.teacher import load_teacher

        prompts = held_out(self.count)
        pipe = load_teacher(self.folder).to(torch_device(self.device))
        seeds = list(range(FIRST_SEED, FIRST_SEED + self.count))
        with generate.stock_euler(pipe):
            drawn = generate.generate(pipe, prompts, seeds, steps=self.steps, height=SIZE, width=SIZE, progress=True)
        print_scores(accuracy(drawn.images, prompts))


@dataclass(frozen=True, kw_only=True)
class TrainWorld:
    """Train the small teacher from nothing: text encoders, autoencoder, transformer, guidance. Hours; resumable."""

    out: Path = Path("runs/teacher")
    """Folder for the stages; called again, it goes on where it stopped. The pipeline ends up in its `teacher`."""
    threads: int | None = None
    """CPU threads; by default all cores."""

    def run(self) -> None:
        from arcflow.system.owner import owned
        from arcflow.training.pretrain import Pretrain, train_teacher

        with owned(self.out, "trains"):
            folder = train_teacher(self.out, Pretrain(), threads=self.threads)
        Score(folder=folder, device="cpu").run()
        print(f"teacher: {folder}")


@dataclass(frozen=True, kw_only=True)
class World:
    """The built-in text-to-image world: render scenes, check images, train and score the small teacher."""

    action: (
        Annotated[Render, subcommand("render")]
        | Annotated[Check, subcommand("check")]
        | Annotated[TrainWorld, subcommand("train")]
        | Annotated[Score, subcommand("score")]
    )

    def run(self) -> None:
        self.action.run()
