"""Cores, GPUs and memory: what is here, and how to use it well."""

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int | None:
    """Bytes of the machine's memory; None where nobody knows."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU since the process began, or of the whole process on a CPU; 0 where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def torch_device(name: str) -> torch.device:
    """The device of that name; "auto" is the best there is."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in here.items() if available)
    if not here[name]:
        found = ", ".join(kind for kind, available in here.items() if available)
        raise ValueError(f"device {name!r} is not here: expected one of {found}; take auto")
    several = name == "cuda" and "LOCAL_RANK" in os.environ  # each process takes the card of its number
    return torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if several else name)


def attention(device: torch.device) -> AbstractContextManager[object]:
    """Run the block without cuDNN's attention on a GPU: its backward pass fails on an H100 (FLUX, PyTorch 2.11)."""
    own = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(own) if device.type == "cuda" else nullcontext()


def keep_buffers() -> None:
    """Let glibc keep what is freed: else it hands every large buffer back and asks for it anew in each iteration, which
    is an eighth of an iteration on a CPU (docs/log.md)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no buffer of its own mapping
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
