"""`arcflow sample`: prompts to PNG files; and how a command opens a model and finds an adapter."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import UseAppendAction

from arcflow import __version__, config

SHIPPED = "world"
"""Name of what comes with the package: the small teacher, and its adapter."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Turn prompts into PNG files in a few steps. What the folder's manifest lists already is not drawn again."""

    prompt: UseAppendAction[tuple[str, ...]] = ()
    """A prompt; may be given several times."""
    prompts: Path | None = None
    """File of prompts: .txt, one a line, or .jsonl, .csv, .tsv or .parquet with a column "prompt"."""
    model: str = SHIPPED
    """Teacher: "world" for the shipped small one, a diffusers pipeline folder, or a Hub id."""
    adapter: str = SHIPPED
    """Adapter folder or Hub "owner/name:subfolder"; "world" for the one shipped for the shipped teacher, "none" to
    sample the teacher itself in plain Euler steps."""
    steps: int = 2
    """Network calls per image."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the noise; every prompt is drawn with each of them."""
    out: Path = Path("out/samples")
    """Folder for the pictures and manifest.jsonl."""
    height: int | None = None
    """Height in pixels; by default 64 for the shipped teacher, else 1024."""
    width: int | None = None
    """Width in pixels; by default the height."""
    guidance: float | None = None
    """Guidance; by default what the adapter was distilled with, or the model is meant for."""
    batch: int = 8
    """Images at a time."""
    device: config.Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    dtype: config.Dtype | Literal["auto"] = "auto"
    """Precision of the weights; auto takes bfloat16 on cuda, else float32."""

    def run(self) -> None:
        texts = [*self.prompt]
        if self.prompts:
            from arcflow.prompts import read_prompts

            rows, message = read_prompts(self.prompts)
            texts += [row.text for row in rows]
            if message:
                print(message, file=sys.stderr)
        if not texts:
            raise ValueError("no prompt given; add --prompt TEXT (several times if you like) or --prompts FILE")
        from contextlib import nullcontext

        from arcflow import sample

        adapter, guidance, lora = adapter_of(self.model, self.adapter), self.guidance, None
        if adapter:
            from arcflow.adapter import read_info

            info = read_info(adapter)
            guidance, lora = info.guidance if guidance is None else guidance, info.teacher_lora
        pipe = open_pipe(self.model, self.device, self.dtype, lora)
        height, width = size_of(self.model, self.height, self.width)
        recipes = [
            sample.Recipe(
                prompt=text,
                seed=seed,
                steps=self.steps,
                height=height,
                width=width,
                guidance=guidance,
                model=self.model,
                adapter=self.adapter,
                version=__version__,
            )
            for text in texts
            for seed in self.seeds
        ]
        if adapter:
            from arcflow.pipeline import attach

            attach(pipe, adapter, fuse=not lora)
        with nullcontext() if adapter else sample.euler(pipe):
            new = sample.sample_folder(pipe, recipes, self.out, batch_size=self.batch, share=sample.share_of_work())
        for path in new:
            print(path)
        there = len(sample.read_manifest(self.out))
        print(f"{len(new)} new pictures; {there} of {len(set(recipes))} are listed in {self.out}/manifest*.jsonl")


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
    from arcflow.loading import load_pipe, torch_device

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

    from arcflow.backbone import FAMILIES
    from arcflow.hub import explained

    row = next(row for row in FAMILIES if row.name == family)
    with explained(model):
        return getattr(diffusers, row.transformer).from_pretrained(model, subfolder="transformer", dtype=torch.bfloat16)


def size_of(model: str, height: int | None, width: int | None) -> tuple[int, int]:
    """Image size in pixels, completed by the model's own."""
    side = height or width or (64 if model == SHIPPED else 1024)
    return height or side, width or side
