"""A ComfyUI for tests: where it is, and what it takes to import it beside a PyTorch without CUDA.

`COMFYUI_PATH` names a folder of ComfyUI, of any version from 0.3.64 on; `get.py` makes one from packages. Packages that
ComfyUI needs and this environment lacks may lie in its subfolder `.packages`.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]

GGUF_NODES = "COMFYUI_GGUF_PATH"
"""Names a folder of the ComfyUI-GGUF nodes, if they are not among ComfyUI's custom nodes."""

MADE = ROOT / ".venv" / "comfyui"
"""Where `get.py` puts it, unless told otherwise."""


def folder() -> Path | None:
    """The ComfyUI to test with."""
    path = Path(os.environ.get("COMFYUI_PATH") or MADE)
    return path if (path / "comfy" / "samplers.py").is_file() else None


class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for torchaudio, which newer versions import for nodes that draw no pictures."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "torchaudio":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: type(name, (), {}) if not name.startswith("__") else _missing(name)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing stands in it."""


def _missing(name: str) -> None:
    raise AttributeError(name)


def prepare(path: Path) -> None:
    """Make `import comfy` work. Before anything that imports transformers."""
    import torch

    sys.path.append(str(path))
    if (path / ".packages").is_dir():
        sys.path.append(str(path / ".packages"))
    if not torch.cuda.is_available():
        # torchvision's wheels are built for CUDA, and name these operators on import
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    if importlib.util.find_spec("torchaudio") is None:
        sys.meta_path.append(_Empty())


def start(path: Path) -> None:
    """ComfyUI as a library, on the CPU."""
    prepare(path)
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management  # noqa: F401  # reads the options


def nodes(name: str = "arcflow_nodes") -> types.ModuleType:
    """This package as ComfyUI loads it: by its path."""
    return _package(Path(__file__).parents[1], name)


def _package(home: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, home / "__init__.py", submodule_search_locations=[str(home)])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def gguf_folder() -> Path | None:
    """The ComfyUI-GGUF nodes to test with."""
    base = folder()
    path = Path(os.environ.get(GGUF_NODES) or (base or ROOT) / "custom_nodes" / "ComfyUI-GGUF")
    return path if (path / "loader.py").is_file() and importlib.util.find_spec("gguf") is not None else None


def gguf_nodes() -> types.ModuleType:
    """The ComfyUI-GGUF nodes as ComfyUI loads them."""
    path = gguf_folder()
    if path is None:
        raise FileNotFoundError(f"no ComfyUI-GGUF: name its folder in {GGUF_NODES}, and install the package gguf")
    return sys.modules.get("gguf_nodes") or _package(path, "gguf_nodes")
