"""Numbers for each image of a folder, computed once: scores and features, kept as they come.

`measure` calls a function on those images that have no numbers yet and writes each batch to a file of its own, so a
run that is killed loses one batch, and several processes share the work without talking. `table` puts the files
together. Images are known by a name, not by a place in a list: a list may grow.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arcflow.data.images import read_image
from arcflow.metrics import features
from arcflow.metrics import images as image_metrics
from arcflow.system import files
from arcflow.world.check import is_right

Call = Callable[[UInt8[np.ndarray, "n rows columns 3"], list[str]], Float[Tensor, "n width"]]
"""(images, their names) -> one row of numbers each."""

BATCH = 64
"""Images at a time; a run that is killed loses as many."""

KINDS = (".png", ".jpg", ".jpeg", ".webp")


def measure(
    store: Path,
    paths: Mapping[str, Path],
    load: Callable[[], Call],
    *,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Put numbers into a folder for those images of this process's share that have none; for how many.

    `paths` are files by name. Images of a batch have one size, so images of many sizes go in small batches. `load`
    makes the function that computes, and is called only if something is missing.
    """
    rank, ranks = share
    there = set(_shards(store, heal=True))
    missing = {name: paths[name] for name in list(paths)[rank::ranks] if name not in there}
    if not missing:
        return 0
    store.mkdir(parents=True, exist_ok=True)
    call = load()
    for names, images in _batches(missing, BATCH):
        values = call(images, names).float().cpu().contiguous()
        wrong = [name for name, row in zip(names, values, strict=True) if not row.isfinite().all()]
        if wrong:
            raise ValueError(
                f"{paths[wrong[0]]} gives a number that is not finite; look at the image, or take another network"
            )
        file = store / f"{hashlib.sha256(names[0].encode()).hexdigest()[:16]}.safetensors"
        about = {"names": json.dumps(names), "sum": _sum(names, values)}
        files.write_tensors(file, {"values": values}, about)
    return len(missing)


def table(store: Path, names: list[str]) -> Float[Tensor, "n width"] | None:
    """The numbers of the images of these names, a row for each; None while some have none yet."""
    found = _shards(store)
    if not names or any(name not in found for name in names):
        return None
    return torch.stack([found[name] for name in names])


def _shards(store: Path, *, heal: bool = False) -> dict[str, Tensor]:
    """The numbers of a folder by name of image. Damaged files are taken away with `heal`: it can be computed again.

    Raises:
        ValueError: a file is damaged.
    """
    found: dict[str, Tensor] = {}
    for file in sorted(store.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as shard:
                about = shard.metadata()
                values = shard.get_tensor("values")
            names = json.loads(about["names"])
            if about.get("sum", _sum(names, values)) != _sum(names, values) or not values.isfinite().all():
                raise ValueError("its numbers are not those that were written")
            found |= zip(names, values, strict=True)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if not heal:
                raise ValueError(
                    f"{file} is damaged ({error}): expected numbers of images; remove it, and the same command "
                    f"computes them again"
                ) from error
            print(f"{file} is damaged ({error}); its numbers are computed again", file=sys.stderr)
            file.unlink(missing_ok=True)
    return found


def _sum(names: list[str], values: Tensor) -> str:
    """A checksum of numbers and of whose they are."""
    return hashlib.sha256(json.dumps(names).encode() + values.numpy().tobytes()).hexdigest()


def _batches(paths: Mapping[str, Path], size: int) -> Iterator[tuple[list[str], np.ndarray]]:
    names: list[str] = []
    images: list[np.ndarray] = []
    for name, path in paths.items():
        image = read_image(path)
        if images and (len(images) == size or image.shape != images[0].shape):
            yield names, np.stack(images)
            names, images = [], []
        names.append(name)
        images.append(image)
    if images:
        yield names, np.stack(images)


def folder_images(folder: Path) -> dict[str, Path]:
    """All images in a folder, by names that change with the file."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS)
    if not files:
        raise ValueError(f"no image in {folder}: expected a folder of {', '.join(KINDS)} files; check --reference")
    return {f"{file.relative_to(folder)} {file.stat().st_size} {file.stat().st_mtime_ns}": file for file in files}


def parted(named: str) -> tuple[str, str]:
    """NAME or NAME=VALUE."""
    name, _, value = named.partition("=")
    return name, value


def named_by(kind: str, value: str) -> str:
    """A name under which numbers are kept: another file or network is another name."""
    return f"{kind}-{hashlib.sha256(value.encode()).hexdigest()[:8]}" if value else kind


@dataclass(frozen=True, kw_only=True)
class Material:
    """What there is beside an image to score it by."""

    suite: str
    prompts: Mapping[str, str]
    """What each image is of, by the image's name."""
    twins: Mapping[str, Path] | None
    """The same images by another model, by the same names; None without a reference of the same prompts."""
    device: str
    clip: str | None = None
    """The CLIP network that is asked for."""
    lpips: bool = False
    """Whether LPIPS is asked for."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A score of single images. `MEASURES` lists them; nothing else knows one by name."""

    name: str
    better: Literal["higher", "lower"]
    wanted: Callable[[Material], bool]
    """Whether it can be had and is asked for."""
    load: Callable[[Material], Call]
    """What computes it, one column wide; called only if an image has no score yet."""
    share: bool = False
    """Whether it says of each image only that it is right or wrong."""
    of: Callable[[Material], str] = lambda material: ""
    """The network or file that it depends on: scores of another one are kept under another name."""

    def stored(self, material: Material) -> str:
        """The name under which its scores are kept and told."""
        return named_by(self.name, self.of(material))


def measure_accuracy(prompts: Mapping[str, str], images: np.ndarray, names: list[str]) -> Tensor:
    """1 for an image of the built-in world that shows what its caption says."""
    return torch.tensor([[float(is_right(image, prompts[name]))] for image, name in zip(images, names, strict=True)])


def measure_squared_error(twins: Mapping[str, Path], images: np.ndarray, names: list[str]) -> Tensor:
    """Mean squared difference to another image, of channels from 0 to 1."""
    theirs = np.stack([read_image(twins[name]) for name in names])
    return image_metrics.squared_error(torch.from_numpy(images) / 255, torch.from_numpy(theirs) / 255)[:, None]


def measure_clip(model: str, device: str, prompts: Mapping[str, str]) -> Call:
    """Cosine of image and prompt, times 100."""
    network = features.clip(model, device=device)

    def call(images: np.ndarray, names: list[str]) -> Tensor:
        texts = network.texts([prompts[name] for name in names])
        return image_metrics.clip_score(network.images(images), texts)[:, None]

    return call


def measure_lpips(device: str, twins: Mapping[str, Path]) -> Call:
    """Perceptual distance to another image."""
    distance = features.lpips_distance(device=device)
    return lambda images, names: distance(images, np.stack([read_image(twins[name]) for name in names]))[:, None]


def twins_of(material: Material) -> Mapping[str, Path]:
    """The reference's images, which a paired measure has made sure of."""
    assert material.twins is not None
    return material.twins


MEASURES = (
    Measure(
        name="accuracy",
        better="higher",
        wanted=lambda material: material.suite == "world",
        load=lambda material: partial(measure_accuracy, material.prompts),
        share=True,
    ),
    Measure(
        name="clip",
        better="higher",
        wanted=lambda material: bool(material.clip),
        load=lambda material: measure_clip(material.clip or "", material.device, material.prompts),
        of=lambda material: material.clip or "",
    ),
    Measure(
        name="squared_error",
        better="lower",
        wanted=lambda material: material.twins is not None,
        load=lambda material: partial(measure_squared_error, twins_of(material)),
    ),
    Measure(
        name="lpips",
        better="lower",
        wanted=lambda material: material.lpips and material.twins is not None,
        load=lambda material: measure_lpips(material.device, twins_of(material)),
    ),
)
"""Every score of single images, in the order of the results."""


def check_network(named: str) -> None:
    """Raises a ValueError if there is no such network, or not its file."""
    kind, value = parted(named)
    wrong = kind not in NETWORKS or (kind == "world" and value)
    if wrong or (kind in ("inception", "patch") and not Path(value).is_file()):
        raise ValueError(
            f"no features {named!r}: expected world, dino, dino=MODEL, inception=FILE or patch=FILE, the file from "
            f"{features.INCEPTION_URL}; correct --features"
        )


NETWORKS = ("world", "dino", "inception", "patch")


def network(named: str, device: str) -> Call:
    """The features of that name."""
    kind, value = parted(named)
    if kind == "world":
        call = features.world_features()
    elif kind == "dino":
        call = features.dino_features(value or "facebook/dinov2-large", device=device)
    else:
        inception = features.inception_features(value, device=device)
        call = inception if kind == "inception" else lambda images: inception(features.patches(images))
    return lambda images, names: call(images)
