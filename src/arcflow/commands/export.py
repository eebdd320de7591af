"""`arcflow export`: an adapter that others can use."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from arcflow.sampling.open import open_transformer


@dataclass(frozen=True, kw_only=True)
class Export:
    """An adapter ready for others: in our layout or the authors', with a model card, and on the Hub if wanted."""

    adapter: str
    """Adapter folder, or Hub "owner/name:subfolder"."""
    out: Path = Path("out/export")
    """Folder to write: the adapter's files, README.md and the curves."""
    layout: Literal["arcflow", "file", "published", "lora", "merged"] = "arcflow"
    """"arcflow" keeps all that sampling needs in a folder, "file" in one `adapter.safetensors`, "published" is what the
    authors' code reads (float16). Two need no arcflow to be used: "lora" is the student at its own number of steps as a
    plain LoRA, "merged" the base's whole folder with that in it."""
    keys: Literal["diffusers", "kohya"] = "diffusers"
    """Names in a plain LoRA's file: "diffusers" is what diffusers and ComfyUI read, "kohya" the other ones that ComfyUI
    and kin know for FLUX.1."""
    bound: float = 0.01
    """Loss of a plain LoRA at most, for a student that is a mixture: relative difference of the latents. One in
    coefficients (model.form) loses nothing."""
    model: str | None = None
    """The base, needed to change the layout, to merge, or to make a LoRA of a mixture: "world", a diffusers pipeline
    folder, or a Hub id."""
    results: Path | None = None
    """A results.json of `arcflow evaluate`, for the card."""
    push: str | None = None
    """Hub repository "owner/name" to put it in."""
    private: bool = False
    """Make that repository a private one."""

    def run(self) -> None:
        from arcflow.reports import model_card
        from arcflow.sampling.open import folder_of
        from arcflow.sampling.plain import drawn_apart
        from arcflow.student.adapter import read_info

        if self.results and not self.results.is_file():
            raise ValueError(f"no file {self.results}: expected a results.json of `arcflow evaluate`; check --results")
        info = read_info(self.adapter)
        plain = self.layout in ("lora", "merged")
        needed = self.model and not (plain and info.form == "coefficients")
        transformer = open_transformer(self.model, info.family) if self.model and needed else None
        log = Path(self.adapter).parent / "log.jsonl"
        model_card.export(
            self.adapter,
            self.out,
            layout=self.layout,
            keys=self.keys,
            transformer=transformer,
            base=folder_of(self.model) if self.model and self.layout == "merged" else None,
            bound=self.bound,
            measure=partial(drawn_apart, self.model, self.adapter) if self.model else None,
            log=log if log.is_file() else None,
            results=self.results,
            name=self.push or "path/to/adapter",
        )
        print(f"adapter and card: {self.out}")
        if self.push:
            print(f"pushed: {model_card.push(self.out, self.push, private=self.private)}")
