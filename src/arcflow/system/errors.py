"""What went wrong, in a sentence: what, where, and what to do.

Our own errors are ValueErrors and sentences already. What the system, the disk, the network, the device and the
libraries say becomes one here; what is left over is a mistake in this package, and keeps its traceback. Their errors
are known by the names of their classes, so that nothing is imported for this.
"""

import errno
import json

from arcflow.system.text import printable

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk answers that has no room left, or none for this user."""


def sentence(error: BaseException) -> str | None:
    """The sentence for the user; None for what no user can put right."""
    for of in (_disk_or_path, _device, _library, _network, _text):
        if said := of(error):
            return printable(said, keep="\n")
    return None


def on_full_disk(error: BaseException) -> bool:
    """Whether there was no room to write."""
    known = isinstance(error, OSError) and error.errno in FULL
    return known or "No space left on device" in str(error) or "os error 28" in str(error)


def first_line(error: BaseException) -> str:
    """The type of an error and the first line it says."""
    said = str(error).strip()
    return f"{type(error).__name__}: {said.splitlines()[0][:300]}" if said else type(error).__name__


def _disk_or_path(error: BaseException) -> str | None:
    if on_full_disk(error):
        where = getattr(error, "filename2", None) or getattr(error, "filename", None)  # of a copy, where it goes
        return (
            f"no space left on the disk{f' of {where}' if where else ''} ({first_line(error)}): nothing whole was "
            f"harmed. Free some space and run the same command again, or choose another folder with --out"
        )
    if not isinstance(error, OSError) or _named(error, "huggingface_hub") or _network(error):
        return None
    where = error.filename if error.filename is not None else "a file"
    reason = error.strerror or first_line(error)
    number = error.errno
    if isinstance(error, FileNotFoundError):
        return f"no file or folder {where}: check the path"
    if isinstance(error, PermissionError) or number == errno.EROFS:
        return f"{where} may not be read or written ({reason}): change its permissions, or choose another folder"
    if isinstance(error, (FileExistsError, NotADirectoryError, IsADirectoryError)):
        return f"{where} is in the way ({reason}): choose another path"
    if number in (errno.EMFILE, errno.ENFILE):
        return f"too many open files ({reason}): raise the limit, `ulimit -n 65536`"
    return f"{where} cannot be read or written ({reason}): check the disk, then run the same command again"


def _device(error: BaseException) -> str | None:
    said = str(error)
    if _named(error, "torch", "OutOfMemoryError"):
        return (
            f"out of memory on the device ({first_line(error)}): `arcflow doctor --model NAME` says what fits. "
            f"In a training: optim.micro_batch 1, model.gradient_checkpointing, model.quantize; else a smaller --batch"
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in said):
        return (
            f"out of memory on this machine ({first_line(error)}): close what else runs, or take less at once; "
            f"`arcflow doctor --model NAME` says what fits"
        )
    if isinstance(error, RuntimeError) and (
        _named(error, "torch", "AcceleratorError") or said.startswith(("CUDA error", "cuDNN error", "CUDA driver"))
    ):
        return (
            f"the device failed ({first_line(error)}): it may need a restart of the process or of the machine; run "
            f"the same command again"
        )
    if _named(error, "torch", "DistError") or (isinstance(error, RuntimeError) and "gloo" in said.lower()):
        return (
            f"another process of this run has ended or cannot be reached ({first_line(error)}): see what it said; "
            f"run the same command again"
        )
    return None


def _library(error: BaseException) -> str | None:
    if _named(error, "safetensors", "SafetensorError"):
        return f"a safetensors file is damaged or cannot be written ({first_line(error)}): copy, fetch or make it again"
    if isinstance(error, ImportError):
        return f"a package is missing or broken ({first_line(error)}): `arcflow doctor` says what is installed"
    return None


def _network(error: BaseException) -> str | None:
    if any(_named(error, package) for package in ("huggingface_hub", "httpx", "httpx2", "requests", "aiohttp")):
        return (
            f"the Hugging Face Hub or another server gave no answer that can be used ({first_line(error)}): check the "
            f"name, the connection and `hf auth login`, then run the same command again"
        )
    if isinstance(error, (ConnectionError, TimeoutError)):
        return f"a connection broke off ({first_line(error)}): check it, then run the same command again"
    return None


def _text(error: BaseException) -> str | None:
    if isinstance(error, json.JSONDecodeError):
        near = " ".join(error.doc[max(0, error.pos - 20) : error.pos + 20].split())
        return f"a JSON file is damaged ({error}, near {near!r}): make or fetch it again"
    if isinstance(error, UnicodeEncodeError):
        return (
            f"a name or text has characters that the system's encoding lacks ({first_line(error)}): set "
            f"PYTHONUTF8=1 or LC_ALL=C.UTF-8, or choose other names"
        )
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read: expected a few levels of JSON; make or fetch it again"
    return str(error) if isinstance(error, ValueError) else None


def _named(error: BaseException, package: str, name: str | None = None) -> bool:
    """Whether an error is of a class of this package, or made from one; classes are known by their names."""
    kinds = [kind for kind in type(error).__mro__ if kind.__module__.partition(".")[0] == package]
    return any(name in (None, kind.__name__) for kind in kinds)
