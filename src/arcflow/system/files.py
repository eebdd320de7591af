"""Files that are whole or absent: written under a temporary name, synced and renamed. JSON, JSON lines, digests."""

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from arcflow.system.errors import on_full_disk
from arcflow.system.text import Json

DRAFT = re.compile(r"\.([0-9a-f]{8}|\d+)\.tmp$")
"""How names of temporary files end; those of before had the process number there."""


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then sync and rename it: after a crash it is old or new, never half."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    # A name of its own and no file before it: two containers share process numbers, and a link could lead elsewhere.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        mode = temporary.stat().st_mode  # what this user's umask gives; safetensors would leave it to the owner alone
        write(temporary)
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
    except Exception as error:
        if on_full_disk(error) and getattr(error, "filename", None) is None:  # which neither disk nor library says
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sweep(folder: Path) -> list[Path]:
    """Temporary files that killed processes have left in a folder, removed. Only its owner may ask for this
    (`system.owner`), for those of a living process look the same."""
    left = [path for path in folder.glob("*.tmp") if DRAFT.search(path.name) and path.is_file()]
    for path in left:
        path.unlink(missing_ok=True)
    return left


NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)
"""What disks answer that cannot sync a folder: CIFS, VirtualBox, some FUSE."""


def sync(path: Path) -> None:
    """What was written to a file or folder is on the disk. Folders are passed over where they cannot be synced."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (folder and error.errno in NO_SYNC):
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    write_atomic(path, lambda draft: draft.write_text(text, "utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes, whole or not at all."""
    write_atomic(path, lambda draft: draft.write_bytes(content))


def write_image(path: Path, image: Image.Image) -> None:
    """Write a PNG, whole or not at all."""
    write_atomic(path, lambda draft: image.save(draft, format="PNG"))


def write_json(path: Path, content: object) -> None:
    """Write JSON for people to read, whole or not at all; the folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    write_atomic(path, lambda draft: save_file(tensors, draft, metadata))


def whole_lines(path: Path) -> list[str]:
    """The lines of a file; a last one that is cut short is left out, and a file that is not there has none."""
    if not path.exists():
        return []
    *lines, _ = path.read_text("utf-8", errors="replace").split("\n")
    return lines


def read_lines(path: Path) -> list[Json]:
    """The records of a file of JSON lines; a last one that is cut short is left out."""
    return [json.loads(line) for line in whole_lines(path)]


def write_lines(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Write records as JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(content: object, digits: int = 64) -> str:
    """SHA-256 of what JSON makes of a value, in so many hex digits: it tells settings and lists apart."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:digits]


def differing(there: Mapping[str, object], wanted: Mapping[str, object], free: Collection[str] = ()) -> str:
    """The settings that are not the same in both, in words; empty if there are none. `free` ones may differ."""
    names = [name for name in wanted if name not in free and there.get(name) != wanted[name]]
    return "; ".join(f"{name}: {there.get(name)!r} there, {wanted[name]!r} now" for name in names)


def claim(
    path: Path,
    text: str,
    *,
    holds: str,
    settings: Callable[[str], Mapping[str, object]] = json.loads,
    free: Collection[str] = (),
    write: bool = True,
) -> None:
    """Make a folder the home of work with these settings, which are written into it as `text`.

    Args:
        path: the file of the folder that tells its settings.
        holds: what the folder holds, for the error: "a run", "embeddings".
        settings: makes settings of the text, the stored one and this one.
        free: names of settings that may change when the work is taken up again.
        write: whether this process writes; of several that share a folder one does.

    Raises:
        ValueError: it is the home of work with other settings.
    """
    if path.exists():
        if other := differing(settings(path.read_text("utf-8")), settings(text), free):
            raise ValueError(
                f"{path.parent} holds {holds} with other settings ({other}): expected the same ones to go on with it; "
                f"repeat them, or choose another folder with --out"
            )
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
