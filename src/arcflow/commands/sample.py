"""`arcflow sample`: prompts to PNG files."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import UseAppendAction

from arcflow import __version__, config
from arcflow.sampling.open import SHIPPED, adapter_of, check_drawing, check_size, open_pipe, open_student, size_of


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
        check_drawing(steps=self.steps, batch=self.batch, seeds=self.seeds)
        height, width = size_of(self.model, self.height, self.width)
        texts = [*self.prompt]
        if self.prompts:
            from arcflow.data.prompts import read_prompts

            rows, message = read_prompts(self.prompts)
            texts += [row.text for row in rows]
            if message:
                print(message, file=sys.stderr)
        if not texts:
            raise ValueError("no prompt given; add --prompt TEXT (several times if you like) or --prompts FILE")
        from contextlib import nullcontext

        from arcflow.sampling import generate
        from arcflow.sampling.folder import Recipe, read_manifest, sample_folder, share_of_work

        adapter = adapter_of(self.model, self.adapter)
        guidance = self.guidance
        if adapter:
            from arcflow.student.adapter import read_info

            guidance = read_info(adapter).guidance if guidance is None else guidance
            pipe = open_student(self.model, adapter, self.device, self.dtype)
        else:
            pipe = open_pipe(self.model, self.device, self.dtype)
        check_size(pipe, height, width)
        recipes = [
            Recipe(
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
        with nullcontext() if adapter else generate.euler(pipe):
            new = sample_folder(pipe, recipes, self.out, batch_size=self.batch, share=share_of_work())
        for path in new:
            print(path)
        there = len(read_manifest(self.out))
        print(f"{len(new)} new pictures; {there} of {len(set(recipes))} are listed in {self.out}/manifest*.jsonl")
