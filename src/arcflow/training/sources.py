"""Images to edit that no list has: the teacher draws them first, from words.

An editing model learns from images and instructions. Where there are no images (`data.sources` is "drawn"), each row
says what is to be seen on one; the teacher draws it from these words alone, in `data.teacher_steps` steps, and it is
kept in the run folder. A run that is taken up draws what is missing.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from arcflow.config import Run
from arcflow.data.batches import PromptData, Prompts, Size
from arcflow.data.embeddings import Encode
from arcflow.distillation.policy import Teacher
from arcflow.distillation.walk import euler
from arcflow.families import family_of, network
from arcflow.families.conditioning import Cond
from arcflow.path import step_grid
from arcflow.system.files import write_image
from arcflow.system.processes import Ranks
from arcflow.system.seeds import seed_of


def with_sources(
    pipe: DiffusionPipeline,
    teacher: Teacher,
    encode: Encode,
    config: Run,
    data: Prompts,
    ranks: Ranks,
    log: Callable[[str], None],
) -> Encode:
    """The same encoder, which takes words for an image to edit where the run has them drawn.

    Raises:
        ValueError: the model draws nothing from words alone.
    """
    if config.data.sources != "drawn" or not isinstance(data, PromptData):
        return encode
    family = family_of(pipe.transformer)
    if not network.editing(family).draws:
        raise ValueError(
            f"data.sources = 'drawn': {family.name} edits images and draws none from words alone; draw them with "
            f"`arcflow sample` by another model, and give their paths with --data.sources files"
        )
    folder = Path(config.out) / "sources"
    words = list(dict.fromkeys([row.source for row in data.train] + list(data.held_out.sources)))
    missing = ranks.agree(lambda: [text for text in words if not _place(folder, text).is_file()])
    if missing:
        log(f"teacher: {len(missing)} images to edit in {config.data.teacher_steps} steps (once)")
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
    size, sigmas = config.data.size, step_grid(config.data.teacher_steps, config.distill.shift)
    count = config.optim.micro_batch or config.optim.batch
    for start in range(0, len(missing), count):
        some = missing[start : start + count]
        cond = encode(some, size)
        seeds = [seed_of(config.seed, "source", _name(text)) for text in some]
        x = network.noise(pipe, seeds, *size, family=family).to(next(iter(cond.values())).device)
        with torch.no_grad():
            drawn = network.decode(pipe, euler(teacher, x, cond, sigmas), *size)
        for text, image in zip(some, drawn, strict=True):
            if ranks.first:
                write_image(_place(folder, text), Image.fromarray(image))
    ranks.any(False)  # all wait for the first, which writes

    def encoded(prompts: list[str], size: Size, sources: Sequence[str] = ()) -> Cond:
        return encode(prompts, size, [str(_place(folder, text)) for text in sources])

    return encoded


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _place(folder: Path, text: str) -> Path:
    """Where the image of these words is kept."""
    return folder / f"{_name(text)}.png"
