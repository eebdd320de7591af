"""Files that are whole or absent: written under a temporary name, synced and renamed. JSON, JSON lines, digests."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then sync and rename it: after a crash it is old or new, never half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what this user's umask gives; safetensors would leave it to the owner alone
        write(temporary)
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """What was written to a file or folder is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def whole_lines(path: Path) -> list[str]:
    *lines, _ = path.read_text("utf-8", errors="replace").split("\n")
    return lines


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; an unfinished last one is left out."""
    return [json.loads(line) for line in whole_lines(path)]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_results(results: dict[str, Any], path: Path) -> None:
    """Write the results as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda draft: draft.write_text(json.dumps(results, indent=2) + "\n"))
