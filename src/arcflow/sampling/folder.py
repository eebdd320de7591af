"""A folder of images that can be taken up again: recipes in the PNG files, a manifest, nothing drawn twice."""

import hashlib
import io
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from arcflow.sampling.generate import generate
from arcflow.system import files
from arcflow.system.text import Json


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides one image, besides the machine; it is written into the PNG."""

    prompt: str
    seed: int
    steps: int
    height: int
    width: int
    guidance: float | None
    model: str
    adapter: str
    version: str
    negative_prompt: str | None = None
    true_cfg: float | None = None
    """Scale of a second call; see `generate`."""
    teacher_lora: str | None = None
    dtype: str = ""
    quantize: str = "none"
    """How the base's weights are stored, where that is shorter."""
    fused: bool = False
    """Whether the adapter's LoRA is added into the weights, which rounds otherwise."""
    model_weights: str = ""
    """Digest of the model's files; these three tell weights apart that follow one another in one place. Empty in
    recipes of before, which nobody takes for one of today."""
    adapter_weights: str = ""
    lora_weights: str = ""
    frames: int = 1
    """Frames of a video, which is an animated PNG."""
    source: str = ""
    """Path of the image that was edited, where there was one."""
    source_digest: str = ""
    """Of what it held."""

    @property
    def file(self) -> str:
        """A readable name that differs whenever any part of the recipe does."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:60].rstrip("-")
        parts = asdict(self)
        if self.frames == 1:  # images have the names that they had before there were videos
            del parts["frames"]
        if not self.source:  # nor before images were edited
            del parts["source"], parts["source_digest"]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        return f"{words or 'image'}-{self.seed}-{digest}.png"


END = b"\0\0\0\0IEND\xaeB`\x82"
"""The last chunk of every PNG."""


def share_of_work() -> tuple[int, int]:
    """Number of this process and of all of them, as torchrun and its like set them; (0, 1) alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def sample_folder(
    pipe: DiffusionPipeline,
    recipes: Sequence[Recipe],
    folder: Path,
    *,
    batch_size: int = 8,
    share: tuple[int, int] = (0, 1),
) -> list[Path]:
    """Write every image that the folder's manifests do not list yet; the paths of the new ones.

    The recipes must agree in everything but prompt, seed and size. Several processes share the work, (rank, ranks)
    each: who draws what depends on the list alone, so they need not talk to one another, and each keeps a manifest of
    its own, which also says how many seconds an image took.
    """
    rank, ranks = share
    missing = to_draw(recipes, folder, share)
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / ("manifest.jsonl" if ranks == 1 else f"manifest-{rank}-of-{ranks}.jsonl")
    _trim(own)
    alone = True if len(missing) < 2 else None  # None: no bar where there is no terminal
    paths: list[Path] = []
    waiting: list[tuple[Recipe, float, Future[None]]] = []

    def list_saved() -> None:
        with own.open("a") as manifest:
            while waiting:
                recipe, seconds, saved = waiting.pop(0)
                saved.result()
                manifest.write(json.dumps({"file": recipe.file, **asdict(recipe), "seconds": seconds}) + "\n")
                paths.append(folder / recipe.file)

    with ThreadPoolExecutor(1) as saver:  # writes the last batch while the next one is drawn
        try:
            for batch in tqdm(batches(missing, batch_size), desc="sampling", unit="batch", disable=alone):
                images, seconds = drawn(pipe, batch)
                list_saved()
                for recipe, image in zip(batch, images, strict=True):
                    saved = saver.submit(save_png, image, recipe, folder / recipe.file)
                    waiting.append((recipe, seconds, saved))
        finally:
            list_saved()
    return paths


def drawn(
    pipe: DiffusionPipeline, batch: Sequence[Recipe]
) -> tuple[UInt8[np.ndarray, "images *frames height width 3"], float]:
    """The images of recipes of one size, from the pipeline as it is set up now, and seconds for each."""
    first = batch[0]
    began = time.perf_counter()
    samples = generate(
        pipe,
        [recipe.prompt for recipe in batch],
        [recipe.seed for recipe in batch],
        steps=first.steps,
        height=first.height,
        width=first.width,
        frames=first.frames,
        batch_size=len(batch),
        guidance=first.guidance,
        negative=first.negative_prompt,
        true_cfg=first.true_cfg,
        sources=[recipe.source for recipe in batch] if first.source else (),
    )
    return samples.images, round((time.perf_counter() - began) / len(batch), 6)


def to_draw(recipes: Sequence[Recipe], folder: Path, share: tuple[int, int] = (0, 1)) -> list[Recipe]:
    """Recipes of a process's share, each once, that the folder does not have yet."""
    finished = {record["file"] for record in read_manifest(folder) if is_whole(folder / record["file"])}
    return [recipe for recipe in list(dict.fromkeys(recipes))[share[0] :: share[1]] if recipe.file not in finished]


def is_whole(path: Path) -> bool:
    """Whether a PNG is there up to its end: what a copy or a disk has cut short is not."""
    try:
        with path.open("rb") as file:
            file.seek(-len(END), os.SEEK_END)
            return file.read() == END
    except OSError:  # it is not there, or shorter than that
        return False


def batches(recipes: Sequence[Recipe], most: int) -> list[list[Recipe]]:
    """Recipes of one size each, that many at most, in their order; what edits an image is drawn by itself."""

    def kind(recipe: Recipe) -> tuple[int, int, bool]:
        return recipe.height, recipe.width, bool(recipe.source)

    kinds = dict.fromkeys(map(kind, recipes))
    alike = {one: [recipe for recipe in recipes if kind(recipe) == one] for one in kinds}
    counts = {one: 1 if one[2] else most for one in kinds}
    return [some[i : i + counts[one]] for one, some in alike.items() for i in range(0, len(some), counts[one])]


def read_manifest(folder: Path) -> list[Json]:
    """One record for each image that a folder's manifests list. A last line cut short by a kill is left out, and so
    is a damaged one: its image is drawn again."""
    lines = [line for file in sorted(folder.glob("manifest*.jsonl")) for line in files.whole_lines(file)]
    records = [record for record in map(_listed, lines) if record]
    return list({record["file"]: record for record in records}.values())


def _listed(line: str) -> Json | None:
    """The record of an image; None if a line is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fits = isinstance(record, dict) and isinstance(record.get("file"), str)
    return record if fits and isinstance(record.get("seconds", 0.0), int | float) else None


def _trim(manifest: Path) -> None:
    """Drop a last line cut short by a kill."""
    text = manifest.read_text("utf-8", errors="replace") if manifest.exists() else ""
    if text and not text.endswith("\n"):
        files.write_text(manifest, text[: text.rfind("\n") + 1])


def save_png(image: UInt8[np.ndarray, "*frames height width 3"], recipe: Recipe, path: Path) -> None:
    """Write a PNG whose text chunks are the recipe, whole or not at all; of a video, an animated one."""
    files.write_bytes(path, png(image, recipe))


def png(image: UInt8[np.ndarray, "*frames height width 3"], recipe: Recipe | None = None) -> bytes:
    """A PNG whose text chunks are the recipe, if there is one; of a video, an animated one."""
    chunks = PngInfo()
    if recipe:
        chunks.add_text("parameters", parameters(recipe))  # as text that is international where it has to be
    for name, value in (asdict(recipe) if recipe else {}).items():
        chunks.add_itxt(name, str(value))
    file = io.BytesIO()
    first, *others = [Image.fromarray(frame) for frame in (image[None] if image.ndim == 3 else image)]
    moving: Json = {"save_all": True, "append_images": others, "duration": 40} if others else {}
    first.save(file, format="PNG", pnginfo=chunks, **moving)
    return file.getvalue()


def parameters(recipe: Recipe) -> str:
    """The recipe as viewers, Civitai and other user interfaces read it: the text that A1111 writes into its PNGs."""
    lines = [recipe.prompt]
    if recipe.negative_prompt is not None:
        lines.append(f"Negative prompt: {recipe.negative_prompt}")
    scale = recipe.guidance if recipe.true_cfg is None else recipe.true_cfg
    said = {
        "Steps": recipe.steps,
        "Sampler": "Euler" if recipe.adapter == "none" else "ArcFlow",
        "CFG scale": scale,
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model": _plain(recipe.model),
        "Model hash": recipe.model_weights[:10],
        "Adapter": "" if recipe.adapter == "none" else _plain(recipe.adapter),
        "Version": f"arcflow {recipe.version}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in said.items() if value not in (None, "")))
    return "\n".join(lines)


def _plain(value: str) -> str:
    """A value as that text has it: in quotes where it has what separates values."""
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value
