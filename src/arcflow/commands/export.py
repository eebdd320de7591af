"""`arcflow export`: an adapter that others can use."""

from dataclasses import dataclass
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
    layout: Literal["arcflow", "file", "published"] = "arcflow"
    """"arcflow" keeps all that sampling needs in a folder, "file" in one `adapter.safetensors`, "published" is what the
    authors' code reads (float16)."""
    model: str | None = None
    """The base, needed to change the layout: "world", a diffusers pipeline folder, or a Hub id."""
    results: Path | None = None
    """A results.json of `arcflow evaluate`, for the card."""
    push: str | None = None
    """Hub repository "owner/name" to put it in."""
    private: bool = False
    """Make that repository a private one."""

    def run(self) -> None:
        from arcflow.reports import model_card
        from arcflow.student.adapter import read_info

        if self.results and not self.results.is_file():
            raise ValueError(f"no file {self.results}: expected a results.json of `arcflow evaluate`; check --results")
        transformer = open_transformer(self.model, read_info(self.adapter).family) if self.model else None
        log = Path(self.adapter).parent / "log.jsonl"
        model_card.export(
            self.adapter,
            self.out,
            layout=self.layout,
            transformer=transformer,
            log=log if log.is_file() else None,
            results=self.results,
            name=self.push or "path/to/adapter",
        )
        print(f"adapter and card: {self.out}")
        if self.push:
            print(f"pushed: {model_card.push(self.out, self.push, private=self.private)}")
