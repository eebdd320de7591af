"""What models are, whatever path they lie at: digests of their weights' files.

Files of many gigabytes are known by their sizes and by pieces of them, evenly spread: another training or another
precision changes nearly all of their numbers.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

SAMPLE = 64
"""Pieces of each file that are looked at."""

PIECE = 4096
"""Bytes in such a piece."""

DIGITS = 32
"""Of a digest that is written down."""


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
