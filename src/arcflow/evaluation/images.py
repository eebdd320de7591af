"""A suite from prompts to numbers, in a folder that a run may leave at any time and come back to.

    suite.json      what the images are of: another model, adapter or setting wants a folder of its own
    pictures/       <prompt>-<draw>.png and manifest.jsonl (`sample`): drawn once
    measured/       what this package computes of each image (`measure`): computed once
    scores/         what scorers in their own environments answered (`scorers`): asked once
    official/       the images as the benchmark's own scorer looks for them (`official`)
    clock/          seconds of each stage
    results.json    all of it, when nothing is missing

Several processes share the images, (rank, ranks) each, and do not talk; the last to finish writes the results.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from diffusers import DiffusionPipeline

from arcflow.evaluation.results import Seconds, Settings
from arcflow.evaluation.scorers import part_of
from arcflow.evaluation.suites.suite import Item, Suite
from arcflow.sampling.folder import Recipe, is_whole, read_manifest, sample_folder
from arcflow.system import files, records
from arcflow.system.owner import owned_share
from arcflow.system.text import shown


@dataclass(frozen=True, kw_only=True)
class Image(Recipe):
    """An image of a suite; its name says which."""

    id: str
    category: str
    number: int
    draw: int

    @property
    def file(self) -> str:
        return f"{self.number:05d}-{self.draw}.png"


def images_of(
    suite: Suite, items: Sequence[Item], draws: int, settings: Settings, version: str, fused: bool = False
) -> list[Image]:
    """All images of a suite, the draws of a prompt one after the other."""
    known = {one.name for one in fields(Recipe)}
    alike = {one.name: getattr(settings, one.name) for one in fields(settings) if one.name in known}
    return [
        Image(
            id=item.image(draw),
            category=item.category,
            number=item.number,
            draw=draw,
            seed=suite.seed(item, draw),
            version=version,
            fused=fused,
            model_weights=settings.base,
            adapter_weights=settings.weights,
            **{**alike, "prompt": item.prompt},
        )
        for item in items
        for draw in range(draws)
    ]


def claim_images(folder: Path, what: Settings) -> None:
    """Make a folder the home of these images. One of before, whose settings say nothing of the model's weights and
    dtype, is known again by what they say, and stays as it is.

    Raises:
        ValueError: it is that of others.
    """
    about = folder / "suite.json"
    if not about.exists() and (folder / "pictures").exists():
        raise ValueError(f"{folder} has images but no suite.json: expected a new folder or one of ours; change --out")
    there = records.plain(read_settings(folder)) if about.exists() else {}
    assert isinstance(there, dict)
    # Folders of before do not know these; what is drawn from now on is held against them.
    free = [name for name in ("weights", "dtype", "base") if not there.get(name)]
    free += ["teacher_lora", "lora_weights"] if "dtype" in free else []
    usual = {one.name: one.default for one in fields(what) if one.default is not MISSING}
    text = json.dumps(records.plain(what), indent=2) + "\n"
    files.claim(about, text, holds="images", settings=lambda text: {**usual, **json.loads(text)}, free=free)


def read_settings(folder: Path) -> Settings:
    """What the images of a folder are of. Raises ValueError if `suite.json` is damaged, with what to do."""
    try:
        return records.read(Settings, folder / "suite.json")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder / 'suite.json'} is damaged ({shown(error, 120)}): expected what the images beside it are of; "
            f"put it back, or choose another folder with --out"
        ) from error


@contextmanager
def alone(folder: Path, share: tuple[int, int]) -> Iterator[None]:
    """Keep a suite's folder to this process, or of several this one's part of it, and clear up after killed ones."""
    with owned_share(folder, share, "evaluates"):
        if share[1] == 1:
            for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
                files.sweep(place)
        yield


def items_digest(items: Sequence[Item]) -> str:
    """Tells lists of prompts apart."""
    return files.text_digest([[item.id, item.prompt] for item in items], 16)


def missing_images(folder: Path, images: Sequence[Image], share: tuple[int, int] = (0, 1)) -> list[Image]:
    """The images of this process's share that are not there yet."""
    there = {record["file"] for record in read_manifest(folder / "pictures")}
    mine = list(images)[share[0] :: share[1]]
    return [p for p in mine if p.file not in there or not is_whole(folder / "pictures" / p.file)]


def draw_missing(
    pipe: DiffusionPipeline, folder: Path, images: Sequence[Image], batch: int, share: tuple[int, int] = (0, 1)
) -> int:
    """Draw what is missing, from the pipeline as it is set up now; how many."""
    start = time.perf_counter()
    new = sample_folder(pipe, images, folder / "pictures", batch_size=batch, share=share)
    spent = time.perf_counter() - start
    names = {path.name for path in new}
    drawn = [record["seconds"] for record in read_manifest(folder / "pictures") if record["file"] in names]
    _add(folder, "saving", spent - sum(drawn), len(new), share)
    return len(new)


def timed(folder: Path, stage: str, do: Callable[[], int], share: tuple[int, int] = (0, 1)) -> int:
    """Do a stage, which says how many images it was about, and add its seconds to those of the folder."""
    start = time.perf_counter()
    images = do()
    if images:
        _add(folder, stage, time.perf_counter() - start, images, share)
    return images


def _add(folder: Path, stage: str, seconds: float, images: int, share: tuple[int, int]) -> None:
    file = folder / "clock" / f"clock{part_of(share)}.json"
    file.parent.mkdir(exist_ok=True)
    spent = _spent(file)
    before = spent.get(stage, [0.0, 0])
    spent[stage] = [before[0] + seconds, before[1] + images]
    files.write_text(file, json.dumps(spent))


def _spent(file: Path) -> dict[str, list[float]]:
    """Seconds and images by stage. What is damaged is left out: only clock times are lost."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    stages = found.items() if isinstance(found, dict) else ()
    return {stage: [float(one) for one in pair] for stage, pair in stages if _pair(pair)}


def _pair(value: object) -> bool:
    """Whether a value is a time and a number of images."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(type(one) in (int, float) and 0 <= one < 1e12 for one in value)


def times(folder: Path, commands: Sequence[str] = ()) -> Seconds:
    """Seconds an image: its generation, each stage of its evaluation, and their sum as a share of the generation;
    the scorers' own, `commands`, are named but no part of the share."""
    made = [record["seconds"] for record in read_manifest(folder / "pictures")]
    total: dict[str, list[float]] = {}
    for file in sorted((folder / "clock").glob("*.json")):
        for stage, (seconds, images) in _spent(file).items():
            before = total.get(stage, [0.0, 0])
            total[stage] = [before[0] + seconds, before[1] + images]
    each = {stage: seconds / images for stage, (seconds, images) in total.items() if images}
    generation = sum(made) / max(1, len(made))
    own = sum(seconds for stage, seconds in each.items() if stage not in commands)
    return Seconds(generation=generation, evaluation=each, share=own / generation if generation else 0.0)


def lay_out(folder: Path, suite: Suite, items: Sequence[Item], draws: int, model: str) -> None:
    """Show the images as the official scorer expects them, of those prompts whose images are all there."""
    if suite.layout is None:
        return
    for item in items:
        files = [folder / "pictures" / f"{item.number:05d}-{draw}.png" for draw in range(draws)]
        if all(file.exists() for file in files):
            suite.layout(item, files, folder / "official", model)
