"""`arcflow export`: an adapter that others can use."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from arcflow import config
from arcflow.sampling.open import SHIPPED, adapter_of

if TYPE_CHECKING:
    from arcflow.student.formats import Found


@dataclass(frozen=True, kw_only=True)
class Export:
    """An adapter ready for others: in our layout or the authors', with a model card, and on the Hub if wanted."""

    adapter: str
    """Adapter folder or Hub "owner/name:subfolder"; "world" and "world-one" for the shipped ones."""
    out: Path = Path("out/export")
    """Folder to write: the adapter's files, README.md and the curves."""
    layout: Literal["arcflow", "file", "published", "lora", "merged"] = "arcflow"
    """"arcflow" keeps all that sampling needs in a folder, "file" in one `adapter.safetensors`, "published" is what the
    authors' code reads (float16). Two need no arcflow to be used: "lora" is the student at the least number of steps it
    was trained for, as a plain LoRA, "merged" the base's whole folder with the student in it: stock classes alone, but
    for a mixture, which brings its scheduler as a file (`trust_remote_code=True`)."""
    second: str | None = None
    """Adapter for the pipeline's other network, where it has two (Wan 2.2): "file" then holds both."""
    keys: Literal["diffusers", "comfyui", "kohya"] = "diffusers"
    """Names in a plain LoRA's file: "diffusers" is what diffusers reads; "comfyui" what ComfyUI reads for every family,
    and Forge and stable-diffusion.cpp for FLUX.1; "kohya" the other ones that ComfyUI and kin know for FLUX.1."""
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
        self._check_options()
        adapter = adapter_of(SHIPPED, self.adapter)
        if not adapter:
            raise ValueError("--adapter none has nothing to export: expected an adapter; give a folder or a Hub id")
        from arcflow.student.adapter import found_at

        found = found_at(adapter)
        self._check_against(found)
        from arcflow.reports import model_card
        from arcflow.sampling.open import folder_of, open_transformer
        from arcflow.sampling.plain import drawn_apart
        from arcflow.system.owner import owned

        base = self.model
        transformer = open_transformer(base, found.info.family) if base and self._takes_base(found) else None
        log = Path(adapter).parent / "log.jsonl"
        with owned(self.out, "exports"):
            model_card.export(
                adapter,
                self.out,
                layout=self.layout,
                keys=self.keys,
                transformer=transformer,
                base=folder_of(base) if base and self.layout == "merged" else None,
                bound=self.bound,
                measure=partial(drawn_apart, base, adapter) if base else None,
                log=log if log.is_file() else None,
                results=self.results,
                name=self.push or str(self.out),
            )
        if self.second:
            self._join(adapter_of(SHIPPED, self.second) or self.second)
        print(f"adapter and card: {self.out}")
        if self.push:
            print(f"pushed: {model_card.push(self.out, self.push, private=self.private)}")

    def _join(self, second: str) -> None:
        """Put the other network's adapter into the file that is there, without what is not published either."""
        from arcflow.reports import model_card
        from arcflow.student.adapter import join_adapters
        from arcflow.student.formats import FILES

        name = FILES["arcflow"][0]
        with TemporaryDirectory(dir=self.out) as draft:
            model_card.export(second, Path(draft), layout="file")
            join_adapters({"transformer": self.out / name, "transformer_2": Path(draft) / name}, self.out / name)

    def _check_options(self) -> None:
        """Refuse options that do not go together, before anything is read."""
        if self.second and self.layout != "file":
            raise ValueError(f"--second goes into one file with --adapter: expected --layout file, not {self.layout}")
        if self.results and not self.results.is_file():
            raise ValueError(f"no file {self.results}: expected a results.json of `arcflow evaluate`; check --results")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file: expected a folder, there already or not")
        config.check(
            math.isfinite(self.bound) and self.bound >= 0, "--bound", self.bound, "0 or more", "0.01 is one percent"
        )
        if self.keys != "diffusers" and self.layout != "lora":
            raise ValueError(f"--keys {self.keys} names the tensors of a plain LoRA: expected --layout lora with it")
        if self.layout == "merged" and not self.model:
            raise ValueError("--layout merged is a copy of the base's folder: expected that; give --model")
        if self.push and (self.push.count("/") != 1 or not all(self.push.split("/"))):
            raise ValueError(f"--push {self.push} is no repository: expected owner/name on the Hugging Face Hub")
        if self.private and not self.push:
            raise ValueError("--private is about a repository on the Hugging Face Hub: expected --push owner/name too")

    def _check_against(self, found: "Found") -> None:
        """Refuse what this adapter cannot be made into, before a base is loaded."""
        from arcflow.student.formats import check_published

        info = found.info
        if self.out.resolve() == found.weights.parent.resolve():
            raise ValueError(
                f"--out {self.out} is the adapter's own folder, whose record has what is not published (where its base "
                f"lies): expected another one; give --out"
            )
        if self.layout in ("lora", "merged") and info.targets == "full":
            raise ValueError(
                f"every weight of {self.adapter} is trained, which is no LoRA: expected --layout arcflow or file"
            )
        if self.layout == "published":
            check_published(info)
        if not self.model and self._takes_base(found):
            why = (
                "is a mixture, of which a LoRA is made and measured on its base"
                if self.layout == "lora"
                else "changes layout"
            )
            raise ValueError(f"{self.adapter} {why}: expected that base; give --model")

    def _takes_base(self, found: "Found") -> bool:
        """Whether the base's transformer has a part in it."""
        if self.layout == "merged":
            return False
        if self.layout == "lora":
            return found.info.form != "coefficients"
        return found.layout != ("published" if self.layout == "published" else "arcflow")
