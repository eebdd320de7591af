"""How a command opens a model and finds an adapter."""

from pathlib import Path
from typing import Any

from arcflow import config

SHIPPED = "world"
"""Name of what comes with the package: the small teacher, and its adapter."""


def adapter_of(model: str, adapter: str) -> str:
    """Where the adapter is; "" when the teacher itself is wanted."""
    if adapter == "none":
        return ""
    if adapter != SHIPPED:
        return adapter
    if model != SHIPPED:
        raise ValueError(f"no adapter given for {model}; add --adapter FOLDER (or owner/name:subfolder, or none)")
    folder = Path(__file__).parents[1] / "assets" / "adapter"
    if not folder.is_dir():
        raise ValueError(f"no adapter in {folder}; make one with `arcflow train world` and give --adapter FOLDER")
    return str(folder)


def open_pipe(model: str, device: str, dtype: str, lora: str | None = None) -> Any:
    """The teacher's pipeline on its device; a LoRA may be part of it."""
    from arcflow.families.loading import load_pipe
    from arcflow.system.devices import torch_device

    where = torch_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if where.type == "cuda" else "float32"
    return load_pipe(config.Model(base=model, dtype=dtype, teacher_lora=lora)).to(where)  # type: ignore[arg-type]


def open_transformer(model: str, family: str) -> Any:
    """A base's transformer alone, on the CPU."""
    if model == SHIPPED:
        return open_pipe(model, "cpu", "float32").transformer
    import diffusers
    import torch

    from arcflow.families import FAMILIES
    from arcflow.system.hub import explained

    row = next(row for row in FAMILIES if row.name == family)
    with explained(model):
        return getattr(diffusers, row.transformer).from_pretrained(model, subfolder="transformer", dtype=torch.bfloat16)


def folder_of(model: str) -> Path:
    """The folder of a base's pipeline, fetched from the Hub if it is there, without what else lies beside it (the whole
    model in one file, often)."""
    from arcflow.system import hub
    from arcflow.world.teacher import teacher_folder

    if model == SHIPPED:
        return teacher_folder()
    return Path(model) if Path(model).is_dir() else hub.fetch(model, ["model_index.json", "*/*"])


def size_of(model: str, height: int | None, width: int | None) -> tuple[int, int]:
    """Image size in pixels, completed by the model's own."""
    side = height or width or (64 if model == SHIPPED else 1024)
    return height or side, width or side
