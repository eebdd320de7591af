"""What data and models are, whatever path they lie at: digests of their content.

Weights of many gigabytes are known by their names, shapes and a sample of their numbers, evenly spread: another
training or another precision changes nearly all of them. Prompts and small files are read whole.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from arcflow.data.prompts import Row
from arcflow.system import files
from arcflow.system.processes import whole

SAMPLE = 64
"""Numbers of each tensor, or pieces of each file, that are looked at."""

PIECE = 4096
"""Bytes in such a piece."""

DIGITS = 32
"""Of a digest that is written down."""


def rows_digest(rows: Sequence[Row]) -> str:
    """Tells lists of prompts apart, with sizes and pictures, in their order."""
    return files.text_digest([[row.text, row.size, row.image] for row in rows], DIGITS)


def weights_digest(network: nn.Module, *, lora: bool = False) -> str | None:
    """Tells networks apart by their weights; with `lora` by those of the LoRAs on them alone. None if it has none."""
    digest, found = hashlib.sha256(), False
    for name, parameter in sorted(network.named_parameters()):
        if (".lora_" in name) is not lora:
            continue
        found = True
        digest.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)}".encode())
        try:
            flat = whole(parameter.detach()).reshape(-1)
            places = torch.linspace(0, len(flat) - 1, min(len(flat), SAMPLE), dtype=torch.float64).long()
            digest.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
        except (NotImplementedError, RuntimeError, TypeError):  # quantized by a library whose tensors are not indexed
            continue
    return digest.hexdigest()[:DIGITS] if found else None


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
    folder = local_folder(base)
    stored = sorted(folder.glob("text_encoder*/*.safetensors")) if folder else []
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
