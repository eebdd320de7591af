"""Which packages are here, at which version, and what a run was made with."""

import importlib
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch


def need(module: str, *, asked: str, install: str) -> ModuleType:
    """An optional module, imported.

    Raises:
        ValueError: it is not installed. The message says who asked for it and what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f'{asked} takes {module.partition(".")[0]}, which is not here ({error}): pip install "{install}"'
        ) from error


def version_of(package: str) -> str:
    """The version of an installed package; "unknown" if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True, kw_only=True)
class About:
    """What `about` says, as a record."""

    versions: dict[str, str]
    python: str
    device: str
    threads: int
    command: str


def about(**more: str | int) -> dict[str, Any]:
    """What the numbers were made with: versions, machine, and whatever the caller adds."""
    packages = ("arcflow", "torch", "diffusers", "transformers", "peft")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        **more,
    }
