"""What models are, whatever path they lie at: digests of their weights' files.

There are two, because what they cost differs. Embeddings, streamed data and the folders of suites are held against one
at every start of a run: files of many gigabytes are known there by their sizes and by pieces of them, evenly spread,
for another training or another precision changes nearly all of their numbers. An image's recipe has the other: it is
to be right whatever was changed, so every byte counts, of a file from the Hub by the digest it is stored under.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from arcflow.system import files, hub

SAMPLE = 64
"""Pieces of each file that are looked at."""

PIECE = 4096
"""Bytes in such a piece."""

DIGITS = 32
"""Digits of a digest that is written down."""


def files_digest(paths: Iterable[Path]) -> str:
    """Tells large files apart by their sizes and by pieces of them, whatever they are called."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for place in range(SAMPLE):
                file.seek(max(0, size - PIECE) * place // (SAMPLE - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:DIGITS]


def encoder_digest(base: str) -> str | None:
    """Tells text encoders of pipelines apart, by their files; None if they are not on this machine."""
    return part_digest(base, "text_encoder*")


def part_digest(base: str, part: str) -> str | None:
    """Tells parts of pipelines apart, by their files; None if they are not on this machine."""
    folder = local_folder(base)
    stored = sorted(folder.glob(f"{part}/*.safetensors")) if folder else []
    plain = [path for path in stored if "." not in path.stem]  # not those of a variant, as model.fp16
    lacking = any(int(path.stem.rpartition("-of-")[2]) != _siblings(path) for path in plain if "-of-" in path.stem)
    return files_digest(plain) if plain and not lacking else None


def _siblings(path: Path) -> int:
    """How many parts of a file in several parts are there."""
    return len(list(path.parent.glob(f"*-of-{path.stem.rpartition('-of-')[2]}{path.suffix}")))


def local_folder(base: str) -> Path | None:
    """Where a pipeline lies on this machine; None if it does not. Nothing is fetched."""
    if base == "world":
        from arcflow.world.teacher import teacher_folder  # only this base needs it

        return teacher_folder()
    if Path(base).is_dir():
        return Path(base)
    try:
        return Path(snapshot_download(base, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError):
        return None


def pipeline_digest(folder: Path) -> str:
    """Tells pipelines apart, by every byte of their parts; the scheduler is ours."""
    parts = [part for part in folder.iterdir() if part.is_dir() and part.name != "scheduler"]
    kept = [file for part in parts for file in part.rglob("*") if file.is_file()]
    named = {file.relative_to(folder).as_posix(): file for file in kept}
    shown = sorted(name for name in named if not any(one.startswith(".") for one in Path(name).parts))
    with ThreadPoolExecutor(4) as readers:
        found = list(readers.map(lambda name: hub.content_of(named[name]), shown))
    return files.text_digest([shown, found], 16)


def lora_digest(lora: str | None) -> str:
    """Tells a teacher's LoRAs apart, where they are here: of one on the Hub, or none, this is empty."""
    path = Path(lora or "")
    if lora is None or not path.exists():
        return ""
    kept = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin"))
    return files.text_digest([hub.content_of(file) for file in kept], 16)
