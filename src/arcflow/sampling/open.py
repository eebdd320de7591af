"""How a command opens a model and finds an adapter."""

from collections.abc import Sequence
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

    dtype = dtype_of(device, dtype)
    chosen = config.Model(base=model, dtype=dtype, teacher_lora=lora)  # type: ignore[arg-type]
    return load_pipe(chosen).to(torch_device(device))


def dtype_of(device: str, dtype: str) -> str:
    """The precision that a command's --device and --dtype mean."""
    from arcflow.system.devices import torch_device

    if dtype != "auto":
        return dtype
    return "bfloat16" if torch_device(device).type == "cuda" else "float32"


def open_student(model: str, adapter: str, device: str, dtype: str) -> Any:
    """A pipeline on its device with a student on it: the base, the LoRA that was part of its teacher, the adapter."""
    from arcflow.sampling.attach import attach
    from arcflow.student.adapter import read_info

    lora = read_info(adapter).teacher_lora
    pipe = open_pipe(model, device, dtype, lora)
    return attach(pipe, adapter, fuse=not lora)


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


def check_size(pipe: Any, height: int, width: int) -> None:
    """Refuse a size that the pipeline's tokens do not fill: it would draw another one in silence.

    Raises:
        ValueError: a side is no multiple of a token's, 16 pixels for the large models.
    """
    token = 2 * pipe.vae_scale_factor
    for name, pixels in (("height", height), ("width", width)):
        fits = pixels >= token and pixels % token == 0
        config.check(fits, name, pixels, f"a multiple of {token} for this model", "take the nearest one")


def check_drawing(*, steps: int, batch: int, seeds: Sequence[int] = ()) -> None:
    """Refuse settings that no image can be drawn with, before anything is loaded.

    Raises:
        ValueError: fewer than one step or image at a time, or a seed that does not fit in 64 bits.
    """
    config.check(steps >= 1, "steps", steps, "1 or more", "2 is what most adapters are made for")
    config.check(batch >= 1, "batch", batch, "1 or more", "leave it out for 8")
    for seed in seeds:
        config.check(-(2**63) <= seed < 2**64, "seed", seed, "a whole number of at most 64 bits", "take a smaller one")
